"""The base model as files: found, and told apart from any other."""

import hashlib
import json
import struct
from pathlib import Path

import msgspec
import pytest

from edge_sdk.data import base_files
from edge_sdk.data.base_files import (
    base_digest,
    chat_template,
    find_base,
    fingerprint_of,
    tokenizer_digest,
)
from edge_sdk.errors import BaseModelError
from edge_sdk.protocol.model import LoraShape

TENSORS = {
    "b.weight": ("F32", [2, 3], bytes(range(24))),
    "a": ("BF16", [4], b"12345678"),
    "n": ("I64", [], b"ABCDEFGH"),
}


def container(tensors, metadata=None, pad=0):
    header, at = ({"__metadata__": metadata} if metadata else {}), 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode() + b" " * pad
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"model": 1}')
    (folder / "model.safetensors").write_bytes(container(TENSORS))
    return folder


def shard(folder, *groups):
    (folder / "model.safetensors").unlink()
    index = {}
    for number, names in enumerate(groups):
        (folder / f"part-{number}.safetensors").write_bytes(
            container({name: TENSORS[name] for name in names})
        )
        index |= dict.fromkeys(names, f"part-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_the_digest_is_as_documented(base):
    hasher = hashlib.sha256()
    for name in sorted(TENSORS):
        dtype, shape, data = TENSORS[name]
        hasher.update(json.dumps([name, dtype, shape]).encode() + b"\n" + data)
    assert base_digest(base) == hasher.hexdigest()


def test_layout_metadata_and_shards_do_not_count(base):
    expected = base_digest(base)
    turned = dict(reversed(TENSORS.items()))
    (base / "model.safetensors").write_bytes(container(turned, {"format": "pt"}, pad=7))
    assert base_digest(base) == expected
    shard(base, ["n", "b.weight"], ["a"])
    assert base_digest(base) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"a": ("BF16", [4], b"12345679")},
        {"a": ("F16", [4], b"12345678")},
        {"a": ("BF16", [2, 2], b"12345678")},
        {"c": ("U8", [1], b"x")},
    ],
)
def test_values_types_shapes_and_names_count(base, change):
    before = base_digest(base)
    (base / "model.safetensors").write_bytes(container(TENSORS | change))
    assert base_digest(base) != before


def test_tensors_larger_than_a_block(base, monkeypatch):
    expected = base_digest(base)
    monkeypatch.setattr(base_files, "_BLOCK", 5)
    assert base_digest(base) == expected


def test_the_digest_is_cached_by_path_size_and_mtime(base, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    digest = base_digest(base, cache)
    monkeypatch.setattr(base_files, "_digest", lambda files: pytest.fail("read again"))
    assert base_digest(base, cache) == digest
    monkeypatch.undo()
    (base / "model.safetensors").write_bytes(container(TENSORS | {"c": ("U8", [1], b"x")}))
    assert base_digest(base, cache) != digest
    (cache / "base-digests.json").write_text("{damaged")
    assert base_digest(base, cache) != digest
    assert [file.name for file in cache.iterdir()] == ["base-digests.json"]
    (tmp_path / "file").touch()
    base_digest(base, tmp_path / "file")  # cannot be written: only told in the log


def test_a_file_that_changes_while_it_is_read(base, monkeypatch):
    real = base_files._digest

    def digest(files):
        files[0].write_bytes(container(TENSORS | {"c": ("U8", [1], b"x")}))
        return real(files)

    monkeypatch.setattr(base_files, "_digest", digest)
    with pytest.raises(BaseModelError, match="changed while"):
        base_digest(base)


def refused(folder):
    with pytest.raises(BaseModelError) as caught:
        base_digest(folder)
    return str(caught.value)


WHOLE = container(TENSORS)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"1234567", WHOLE[:20], WHOLE[:-1], WHOLE + b"x",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 3) + b"{]}",
        struct.pack("<Q", 2) + b"\xff\xff",
        container({"a": ("F32", [3], b"12345678")}),
        container({"a": ("F33", [2], b"12345678")}),
        container({"a": ("F32", [-2, -1], b"12345678")}),
        container({"a": ("F32", [1 << 40, 1 << 40], b"12345678")}),
        WHOLE.replace(b'"data_offsets": [0, 24]', b'"data_offsets": [4, 24]'),
        WHOLE.replace(b'"data_offsets": [24, 32]', b'"data_offsets": [16, 24]'),
    ],
)  # fmt: skip
def test_damaged_weights(base, data):
    (base / "model.safetensors").write_bytes(data)
    assert "model.safetensors: " in refused(base)


def test_weights_that_are_not_there(base):
    (base / "model.safetensors").unlink()
    assert "has no model.safetensors" in refused(base)
    (base / "pytorch_model.bin").write_bytes(b"never opened")
    assert "save_pretrained" in refused(base)


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": "missing.safetensors"}}', "names 'missing.safetensors', which is not there"),
        ('{"weight_map": {"a": "../base/part-0.safetensors"}}', "which is not there"),
    ],
)
def test_damaged_indexes(base, index, told):
    shard(base, ["a"])
    (base / "model.safetensors.index.json").write_text(index)
    assert told in refused(base)


def test_a_tensor_in_two_shards(base):
    shard(base, ["a"], ["n"])
    (base / "part-1.safetensors").write_bytes(container({"a": TENSORS["a"], "n": TENSORS["n"]}))
    assert "repeats the tensor 'a'" in refused(base)


def test_what_counts_of_a_tokenizer(base):
    first = tokenizer_digest(base)
    (base / "tokenizer_config.json").write_text('{"model_max_length": 9, "padding_side": "left"}')
    (base / "vocab.txt").write_text("ignored beside tokenizer.json")
    assert tokenizer_digest(base) == first
    (base / "tokenizer_config.json").write_text('{"unk_token": "[UNK]"}')
    second = tokenizer_digest(base)
    (base / "tokenizer_config.json").write_text('{"unk_token": {"content": "[UNK]", "lstrip": false}}')
    assert first != tokenizer_digest(base) == second
    (base / "tokenizer.json").unlink()
    (base / "tokenizer_config.json").unlink()
    third = tokenizer_digest(base)
    (base / "vocab.txt").write_text("other")
    assert third != tokenizer_digest(base)
    (base / "vocab.txt").unlink()
    (base / "special_tokens_map.json").write_text("{}")
    with pytest.raises(BaseModelError, match="has no tokenizer"):
        tokenizer_digest(base)


def test_a_fingerprint_names_what_differs(base):
    def of(**changed):
        settings = {"labels": ("a", "b"), "max_length": 32, "template": "{text}", "lora": LoraShape()}
        return fingerprint_of(base, task="classification", **(settings | changed))

    first = of()
    assert first.head == "classification:2"
    assert first == of(lora=LoraShape(targets=("all-linear", "all-linear")))
    assert msgspec.json.decode(msgspec.json.encode(first), type=type(first)).digest == first.digest
    assert first.differing(of(labels=("b", "a"))) == ("labels",)
    assert first.differing(of(template="x {text}", max_length=33)) == ("max_length", "template")
    (base / "tokenizer.json").write_text("{}")
    assert first.differing(of()) == ("tokenizer",)


def test_a_chat_template_is_part_of_a_causal_lm(base):
    def of(task):
        return fingerprint_of(
            base, labels=(), task=task, max_length=32, template="{prompt}\n{response}", lora=LoraShape()
        )

    labelled, first = of("classification"), of("causal-lm")
    assert first.head == "causal-lm:0" and labelled.differing(first) == ("tokenizer", "head")
    assert first.labels == hashlib.sha256(b"[]").hexdigest()

    def put(found):
        (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": found}))

    digests = [first.digest]
    for found, template in (
        ("{{ a }}", "{{ a }}"),
        ([{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "tools", "template": "t"}], None),
    ):
        put(found)
        assert chat_template(base) == template
        digests.append(of("causal-lm").digest)
    assert digests[3] == digests[0] and len(set(digests)) == 3
    (base / "chat_template.json").write_text('{"chat_template": "j"}')
    assert chat_template(base) == "j"
    (base / "chat_template.jinja").write_text("{{ own }}")
    assert chat_template(base) == "{{ own }}" and first.differing(of("causal-lm")) == ("tokenizer",)
    assert of("classification") == labelled


@pytest.fixture
def cache(tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hf" / "hub"


def snapshot(cache, commit):
    folder = cache / "models--org--name" / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_local_folder(base, cache):
    assert find_base(str(base)) == base
    assert find_base("base") == base


def test_a_hub_id_in_the_cache(cache, monkeypatch, tmp_path):
    first = snapshot(cache, "111")
    assert find_base("org/name") == first
    second = snapshot(cache, "222")
    with pytest.raises(BaseModelError, match="2 snapshots, none marked as main"):
        find_base("org/name")
    (cache / "models--org--name" / "refs").mkdir()
    (cache / "models--org--name" / "refs" / "main").write_text("222")
    assert find_base("org/name") == second
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "other"))
    with pytest.raises(BaseModelError) as caught:
        find_base("org/name")
    assert str(tmp_path / "other") in str(caught.value)
    assert "hf download org/name" in str(caught.value)


def test_a_name_that_is_hardly_a_hub_id_is_not_to_be_fetched(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a trainer's folder, say, which is no place to look in
    with pytest.raises(BaseModelError) as caught:
        find_base("bse")
    assert "hf download" not in caught.value.hint and "from the config file" in caught.value.hint
    assert f"{tmp_path}/bse" not in caught.value.message


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "~/none/there", "~no-such-user/x", "../x", "a/b/c", "org/..", ""]
)
def test_bases_that_are_nowhere(cache, name):
    with pytest.raises(BaseModelError):
        find_base(name)


def test_folders_that_hold_no_model(cache, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BaseModelError, match=r"holds no config\.json"):
        find_base("empty")
    Path("file").touch()
    with pytest.raises(BaseModelError, match="is a file"):
        find_base("file")


def test_a_folder_that_may_not_be_looked_into(tmp_path, monkeypatch):
    def refused(_self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.raises(BaseModelError, match="cannot be looked into: Permission denied"):
        find_base(str(tmp_path))
