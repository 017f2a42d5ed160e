"""The base model as files on this disk: where it lies, and what it is. No torch, no download."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from edge_sdk.data.digest_cache import DigestCache
from edge_sdk.data.tensor_files import TensorFile, read_header
from edge_sdk.errors import BaseModelError
from edge_sdk.protocol.base import Digest
from edge_sdk.protocol.model import Fingerprint, LoraShape

__all__ = [
    "base_digest",
    "chat_template",
    "check_whole",
    "find_base",
    "fingerprint_of",
    "tokenizer_digest",
    "weight_files",
]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_BLOCK = 1 << 20
_MAX_JSON_BYTES = 64 << 20
_VOCABULARY_FILES = (
    "vocab.txt", "vocab.json", "merges.txt", "bpe.codes", "spiece.model", "sentencepiece.bpe.model",
    "tokenizer.model", "spm.model", "added_tokens.json", "special_tokens_map.json",
)  # fmt: skip
_TOKENIZER_SETTINGS = (
    "do_lower_case", "strip_accents", "tokenize_chinese_chars", "add_prefix_space", "do_basic_tokenize",
    "never_split", "legacy", "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
    "mask_token",
)  # fmt: skip


def find_base(path_or_hub_id: str) -> Path:
    """The local folder of a base model: the folder itself, or a hub id's snapshot in the local cache.

    The cache is the one that Hugging Face's libraries fill, found by the environment variables that they
    read: HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME. Of several snapshots the one that ``main`` refers to counts.

    Raises:
        BaseModelError: there is no such folder, it holds no model or may not be looked into, or the hub id
            is not in the cache.
    """
    try:
        return _find(path_or_hub_id)
    except OSError as error:
        raise BaseModelError(
            f'base model "{path_or_hub_id[:200]}" cannot be looked into: {error.strerror}',
            "let the user that runs this read the folder and what lies in it",
        ) from None


def _find(path_or_hub_id: str) -> Path:
    try:
        path = Path(path_or_hub_id).expanduser()
    except RuntimeError as error:
        raise BaseModelError(f'base model "{path_or_hub_id}": {error}') from None
    if path_or_hub_id and path.exists():
        if not (path / "config.json").is_file():
            what = "holds no config.json" if path.is_dir() else "is a file"
            raise BaseModelError(
                f"base model {path}: {what}",
                "base.path names a folder with config.json, model.safetensors and the tokenizer's files",
            )
        return path.resolve()
    if not _HUB_ID.fullmatch(path_or_hub_id):
        raise BaseModelError(
            f"base model {path}: there is no such folder", "set base.path, or copy the model there"
        )
    cache = _hub_cache()
    local = "set base.path to a folder that holds it, as seen from the config file"
    repository = cache / ("models--" + path_or_hub_id.replace("/", "--"))
    try:
        commit = (repository / "refs" / "main").read_text().strip()
        snapshots = [repository / "snapshots" / commit]
    except OSError:
        snapshots = sorted((repository / "snapshots").glob("*"))
    found = [snapshot for snapshot in snapshots if (snapshot / "config.json").is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise BaseModelError(
            f'base model "{path_or_hub_id}": {repository} holds {len(found)} snapshots, none marked as main',
            "set base.path to one of their folders",
        )
    raise BaseModelError(
        f'base model "{path_or_hub_id}" is neither a folder nor in the cache ({cache})',
        f"fetch it once with `hf download {path_or_hub_id}` (comes with the extra 'train'), or {local}"
        if "/" in path_or_hub_id
        else f"{local}; a hub id to fetch is org/name",
    )


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a base: ``model.safetensors``, or the shards that its index names.

    Raises BaseModelError where there are none; ``.bin`` weights are pickles and are never opened.
    """
    single = folder / "model.safetensors"
    if single.is_file():
        return (single,)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weights = _json(index).get("weight_map")
        if not isinstance(weights, dict) or not weights:
            raise BaseModelError(f"base model {index}: has no weight_map", "fetch the model again")
        names = sorted(set(map(str, weights.values())))
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise BaseModelError(
                    f"base model {index}: names {name!r}, which is not there", "fetch the model again"
                )
        return tuple(folder / name for name in names)
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if pickles:
        raise BaseModelError(
            f"base model {folder}: has its weights as {pickles[0].name} only, which may run code when opened",
            "where you trust it, convert it once with transformers: from_pretrained(folder), then "
            "save_pretrained(new_folder); or take the model's safetensors revision",
        )
    raise BaseModelError(
        f"base model {folder}: has no model.safetensors", "fetch or copy the weights as well"
    )


def check_whole(folder: Path) -> None:
    """Raises BaseModelError where weights or tokenizer are missing, as while a base is being fetched."""
    weight_files(folder)
    _tokenizer_files(folder)


def base_digest(folder: Path, cache: Path | None = None) -> Digest:
    """sha256 of the unquantized base, the same for one file or many shards.

    Over every tensor in the order of its name (by code points): a JSON line ``[name, dtype, [shape]]``, a
    line feed, then its bytes as they lie in the file. Names are unique over all shards.

    Args:
        cache: folder of the cache file; digests are kept there by path, size and mtime of all weight
            files. None: none is used.

    Raises:
        BaseModelError: no safetensors weights, a damaged file, or one that changed while it was read.
    """
    files = weight_files(folder)
    try:
        kept = DigestCache(cache)
        key = _stamps(files)
        digest = kept.get(key)
        if digest is None:
            digest = _digest(files)
            if _stamps(files) != key:
                raise BaseModelError(
                    f"base model {folder}: its weights changed while they were read", "try again"
                )
            kept.put(key, digest)
        return digest
    except OSError as error:
        raise BaseModelError(
            f"base model {error.filename or folder}: cannot be read: {error.strerror}"
        ) from None


def tokenizer_digest(folder: Path) -> Digest:
    """sha256 of all that turns text into token ids.

    Over ``tokenizer.json`` where there is one, else over the vocabulary, merges and SentencePiece files
    that there are, each as name, line feed, length, line feed, bytes; then over those keys of
    ``tokenizer_config.json`` that change tokens (case, accents, prefix space, special tokens). Lengths of
    padding and truncation are left out: the run sets them.

    Raises BaseModelError where there is no tokenizer.
    """
    files = _tokenizer_files(folder)
    settings = folder / "tokenizer_config.json"
    config = _json(settings) if settings.is_file() else {}
    hasher = hashlib.sha256()
    try:
        for file in files:
            with file.open("rb") as stream:
                hasher.update(f"{file.name}\n{os.fstat(stream.fileno()).st_size}\n".encode())
                while block := stream.read(_BLOCK):
                    hasher.update(block)
    except OSError as error:
        raise BaseModelError(f"base model {folder}: its tokenizer cannot be read: {error.strerror}") from None
    chosen = {name: _token(config[name]) for name in _TOKENIZER_SETTINGS if config.get(name) is not None}
    hasher.update(json.dumps(chosen, sort_keys=True).encode())
    return hasher.hexdigest()


def chat_template(folder: Path) -> str | None:
    """The template that turns chats into text; None: the base has none.

    Of several in one list, the one that is called ``default``. Raises BaseModelError for unreadable files.
    """
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        try:
            return alone.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BaseModelError(f"base model {alone}: cannot be read: {error}") from None
    for name in ("chat_template.json", "tokenizer_config.json"):
        file = folder / name
        found = _json(file).get("chat_template") if file.is_file() else None
        if isinstance(found, list):
            named = {str(one.get("name")): one.get("template") for one in found if isinstance(one, dict)}
            found = named.get("default")
        if isinstance(found, str):
            return found
    return None


def fingerprint_of(
    folder: Path,
    *,
    labels: Sequence[str],
    task: str,
    max_length: int,
    template: str,
    lora: LoraShape,
    cache: Path | None = None,
) -> Fingerprint:
    """What all parties of a run must agree on, of the base in ``folder``. Raises BaseModelError.

    The order of the labels counts (it is the order of the head's rows), that of LoRA's targets does not.
    The chat template is part of a causal LM's tokenizer, and of no classifier's.
    """
    tokenizer = tokenizer_digest(folder)
    if task == "causal-lm":
        tokenizer = hashlib.sha256(f"{tokenizer}\n{chat_template(folder) or ''}".encode()).hexdigest()
    return Fingerprint(
        base=base_digest(folder, cache),
        tokenizer=tokenizer,
        labels=hashlib.sha256(msgspec.json.encode(list(labels))).hexdigest(),
        head=f"{task}:{len(labels)}",
        max_length=max_length,
        template=hashlib.sha256(template.encode()).hexdigest(),
        targets=tuple(sorted(set(lora.targets))),
        rank=lora.rank,
        alpha=float(lora.alpha),
    )


def _digest(files: Sequence[Path]) -> Digest:
    tensors: dict[str, tuple[TensorFile, int]] = {}
    headers = [read_header(file) for file in files]
    for header in headers:
        for position, tensor in enumerate(header.tensors):
            if tensor.name in tensors:
                raise BaseModelError(
                    f"base model {header.path}: repeats the tensor {tensor.name!r} of another shard"
                )
            tensors[tensor.name] = (header, position)
    hasher = hashlib.sha256()
    buffer = memoryview(bytearray(_BLOCK))
    streams = {header.path: header.path.open("rb", buffering=0) for header in headers}
    try:
        for name in sorted(tensors):
            header, position = tensors[name]
            tensor = header.tensors[position]
            hasher.update(json.dumps([name, tensor.dtype, list(tensor.shape)]).encode() + b"\n")
            stream = streams[header.path]
            stream.seek(tensor.begin)
            left = tensor.size
            while left:
                count = stream.readinto(buffer[: min(left, _BLOCK)])
                if not count:
                    raise BaseModelError(
                        f"base model {header.path}: ends early, in tensor {name!r}", "fetch it again"
                    )
                hasher.update(buffer[:count])
                left -= count
    finally:
        for stream in streams.values():
            stream.close()
    return hasher.hexdigest()


def _tokenizer_files(folder: Path) -> list[Path]:
    whole = folder / "tokenizer.json"
    files = (
        [whole]
        if whole.is_file()
        else [folder / name for name in _VOCABULARY_FILES if (folder / name).is_file()]
    )
    if not any(file.name not in ("added_tokens.json", "special_tokens_map.json") for file in files):
        raise BaseModelError(
            f"base model {folder}: has no tokenizer (tokenizer.json, vocab.txt, spiece.model, ...)",
            "copy the tokenizer's files next to config.json",
        )
    return files


def _stamps(files: Sequence[Path]) -> str:
    stamps = [
        (str(file.resolve()), stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]
    ]
    return json.dumps(stamps)


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise BaseModelError(f"base model {path}: is above {_MAX_JSON_BYTES >> 20} MiB")
        value = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise BaseModelError(f"base model {path}: cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BaseModelError(f"base model {path}: is not JSON: {error}", "fetch the model again") from None
    if not isinstance(value, dict):
        raise BaseModelError(f"base model {path}: is not a JSON object", "fetch the model again")
    return value


def _token(value: Any) -> Any:
    """A special token is written as text, or as an object with its text in ``content``."""
    return value.get("content") if isinstance(value, dict) else value


def _hub_cache() -> Path:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HOME") or default).expanduser() / "hub"
