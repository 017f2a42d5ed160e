"""A whole base held in fewer bits: loaded, measured, planned, trained on."""

from __future__ import annotations

import pydoc
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

torch = pytest.importorskip("torch")

from edge_sdk.data.base_files import base_digest  # noqa: E402
from edge_sdk.errors import MechanismError  # noqa: E402
from edge_sdk.protocol.base_plan import BasePlan  # noqa: E402
from edge_sdk.protocol.model import LoraShape  # noqa: E402
from edge_sdk.protocol.spec import Candidate, TrainSpec  # noqa: E402
from edge_sdk.protocol.trainer import (  # noqa: E402
    BasePlanned,
    DataSource,
    Describe,
    Described,
    Failed,
    PlanBase,
    Progress,
    Setup,
    Train,
    Trained,
)
from edge_sdk.training.inline import InlineTrainer  # noqa: E402
from edge_sdk.training.model import load_model  # noqa: E402
from edge_sdk.training.precision import planning  # noqa: E402
from edge_sdk.training.precision.holding import base_precision  # noqa: E402
from edge_sdk.training.precision.salience import block_figures, frozen_of, loss_rises  # noqa: E402
from edge_sdk.training.resident import resident_key  # noqa: E402
from edge_sdk.training.tasks.tokens import load_tokenizer  # noqa: E402
from edge_sdk.training.words import MECHANISMS, mechanisms_of, refuse_missing  # noqa: E402
from edge_sdk.updates.initial import initial_adapter  # noqa: E402
from edge_sdk.updates.versions import write_version  # noqa: E402

pytestmark = pytest.mark.train
torch.set_num_threads(1)
LABELS = ("colour", "number", "animal", "plant")


def load(folder: Path, word: str, plan: BasePlan | None = None, task: str = "classification") -> Any:
    precision = base_precision(word, "cpu", plan)
    return load_model(folder, LABELS if task == "classification" else (), LoraShape(rank=4), "cpu",
                      task=task, precision=precision)  # fmt: skip


def tokens(folder: Path, count: int = 16) -> Any:
    texts = [line for line in pydoc.__doc__.splitlines() if len(line) > 40][:count]
    coded = load_tokenizer(folder)(texts, padding=True, return_tensors="pt")
    return coded["input_ids"], coded["attention_mask"]


def batch_of(vocabulary: int, seed: int = 0) -> Any:
    ids = torch.randint(vocabulary, (4, 10), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return ids, mask


def test_minilm_drifts_by_little_and_by_more_at_fewer_bits(minilm: Path) -> None:
    ids, mask = tokens(minilm)
    drifts, sizes, losses = {}, {}, {}
    for word in ("fp32", "int8", "nf4", "int2"):
        model = load(minilm, word)
        sizes[word] = model.shape.base_bytes
        with torch.inference_mode():
            hidden = model.hidden(ids, mask)
        wide = mask.unsqueeze(-1)
        sentence = torch.nn.functional.normalize((hidden * wide).sum(1) / wide.sum(1), dim=-1)
        if word == "fp32":
            whole, full = hidden, sentence
        apart = 1 - torch.cosine_similarity(hidden[mask.bool()], whole[mask.bool()], dim=-1)
        drifts[word] = float(apart.mean())
        # a task of its own: which of all sentences is meant by this one, at temperature 0.05
        losses[word] = float(
            torch.nn.functional.cross_entropy(sentence @ full.t() / 0.05, torch.arange(len(ids)))
        )
    assert drifts["int8"] < 1e-3 < drifts["nf4"] < 0.06 < drifts["int2"] < 0.6
    assert abs(losses["int8"] - losses["fp32"]) < 0.01
    assert abs(losses["nf4"] - losses["fp32"]) < 0.1
    assert losses["int2"] > losses["nf4"]
    assert 3.5 < sizes["fp32"] / sizes["int8"] < 4
    # of MiniLM the embeddings are half, which stay in 8 bits
    assert sizes["fp32"] / sizes["nf4"] > 4.7 and sizes["fp32"] / sizes["int2"] > 5.4


@pytest.mark.parametrize("word", ["bf16", "fp16", "int8", "nf4", "int2"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_language_model_trains_beside_every_base(
    bases: dict[tuple[str, str], Path], family: str, word: str
) -> None:
    model = load(bases[family, "causal-lm"], word, task="causal-lm")
    ids, mask = batch_of(model.shape.vocabulary)
    before = {name: weight.dense().clone() for name, weight in frozen_of(model.layers[2]).items()}
    with torch.no_grad():
        for key, part in model.parts.items():
            part.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(len(key)))
    model.tune(2)
    hidden = model.hidden(ids, mask)
    assert hidden.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}.get(word, torch.float32)
    logits = model.output_weight(hidden.float() if word in ("bf16", "fp16") else hidden, model.output_bias)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    trained = model.trained()
    assert trained and all(torch.isfinite(part.grad).all() for part in trained.values())
    assert any(part.grad.abs().max() > 0 for part in trained.values())
    for name, weight in frozen_of(model.layers[2]).items():
        assert torch.equal(weight.dense(), before[name])


@pytest.mark.parametrize("word", ["int8", "int2"])
def test_tied_words_and_output_layer_are_one_table(bases: dict[tuple[str, str], Path], word: str) -> None:
    model = load(bases["gpt2", "causal-lm"], word, task="causal-lm")
    words = model.net.get_input_embeddings()
    assert words.frozen is model.output_weight and model.output_weight.word == "int8"
    ids = torch.tensor([[3, 1, 3]])
    assert torch.equal(words(ids)[0], model.output_weight.dense()[ids[0]])


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_measuring_changes_nothing_of_the_model(bases: dict[tuple[str, str], Path], family: str) -> None:
    task = "causal-lm" if family == "llama" else "classification"
    model = load(bases[family, task], "fp32", task=task)
    batch = batch_of(model.shape.vocabulary)
    held = [dict(frozen_of(layer)) for layer in model.layers]
    with torch.no_grad():
        before = model.hidden(*batch)
    told: list[int] = []
    rises = loss_rises(model, [batch], told.append)
    figures = block_figures(model, batch, ("int8", "nf4", "int2"), told.append)
    assert len(rises) == len(figures) == 3 and told == [0, 1, 2, 0, 1, 2]
    for layer, own in zip(model.layers, held, strict=True):
        now = frozen_of(layer)
        assert now.keys() == own.keys() and all(now[name] is own[name] for name in own)
    with torch.no_grad():
        assert torch.equal(model.hidden(*batch), before)
    for figure in figures:
        assert 0 < figure.errors["int8"] < figure.errors["nf4"] < figure.errors["int2"]
        assert figure.influence > 0 and figure.added > 0


def test_an_error_within_a_lowered_block_leaves_the_model_whole(bases: dict[tuple[str, str], Path]) -> None:
    model = load(bases["bert", "classification"], "fp32")
    own = [dict(frozen_of(layer)) for layer in model.layers]

    def stop(number: int) -> None:
        raise KeyboardInterrupt

    for measure in (
        lambda: loss_rises(model, [batch_of(64)], stop),
        lambda: block_figures(model, batch_of(64), ("int2",), stop),
    ):
        with pytest.raises(KeyboardInterrupt):
            measure()
        assert [dict(frozen_of(layer)) for layer in model.layers] == own
        assert not any(layer._forward_hooks for layer in model.layers)


def test_a_block_that_does_nothing_has_no_salience(bases: dict[tuple[str, str], Path]) -> None:
    model = load(bases["llama", "causal-lm"], "fp32", task="causal-lm")
    with torch.no_grad():
        for name, weight in frozen_of(model.layers[1]).items():
            if name.endswith(("o_proj", "down_proj")):  # all that reaches the residual stream
                weight.weight.zero_()
    batch = batch_of(model.shape.vocabulary)
    rises = loss_rises(model, [batch], lambda _: None)
    figures = block_figures(model, batch, ("int2",), lambda _: None)
    assert rises[1] == pytest.approx(0.0, abs=1e-6) and abs(rises[0]) > 1e-3 and abs(rises[2]) > 1e-3
    assert figures[1].influence == pytest.approx(0.0, abs=1e-6) and figures[1].added == 0.0
    assert figures[0].influence > 1e-3 < figures[2].influence


class Bench:
    def __init__(self, base: Path, rows: Path) -> None:
        self.base = base
        self.setup = Setup(
            base=str(base), labels=LABELS, max_length=12, micro_batch=4, lora=LoraShape(rank=4),
            spec=TrainSpec(), threads=1, data=DataSource(path=str(rows)),
        )  # fmt: skip
        self.replies: list[Any] = []
        self.trainer = InlineTrainer(threaded=False)
        self.trainer.start(self.replies.append)

    def plan(self, **options: Any) -> Any:
        self.replies.clear()
        self.trainer.request(PlanBase(id=1, setup=self.setup, **options))
        return self.replies[-1]

    def describe(self, **changes: Any) -> Any:
        self.replies.clear()
        self.trainer.request(Describe(id=2, setup=replace(self.setup, **changes)))
        return self.replies[-1]


@pytest.fixture
def bench(tiny: dict[str, Path], rows_file: Path) -> Any:
    made = Bench(tiny["bert"], rows_file)
    yield made
    made.trainer.close()


@pytest.mark.parametrize("method", ["loss", "influence"])
def test_a_plan_says_what_the_loaded_base_will_take(bench: Bench, method: str) -> None:
    most = bench.plan(bits=16, method=method).plan
    least = bench.plan(bits=2, method=method).plan
    assert bench.replies[0].stage == "loading"
    assert isinstance(bench.replies[-2], Progress) and bench.replies[-2].stage == "planning"
    budget = (most.bytes + least.bytes) // 2
    reply = bench.plan(budget_bytes=budget, method=method)
    assert isinstance(reply, BasePlanned)
    plan = reply.plan
    assert least.bytes <= plan.bytes <= budget and len(set(plan.bits)) > 1
    assert most.objective < plan.objective < least.objective
    assert plan.base == base_digest(bench.base) and plan.method == method
    assert plan.calibration == "32 rows of rows.jsonl"
    assert plan.saved_bytes == plan.bytes_before - plan.bytes
    for made in (plan, most, least):
        model = load(bench.base, "plan", made)
        assert model.shape.base_bytes == made.bytes
        held = [sum(w.nbytes for w in frozen_of(layer).values()) for layer in model.layers]
        assert held == [block.bytes for block in made.blocks]


def test_planning_twice_gives_the_same_and_random_tokens_do_without_a_file(bench: Bench) -> None:
    assert bench.plan(budget_bytes=50_000).plan == bench.plan(budget_bytes=50_000).plan
    bench.setup = replace(bench.setup, data=None)
    assert bench.plan(budget_bytes=50_000).plan.calibration == "32 rows of random tokens"


def test_calibration_rows_without_a_token_are_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_tokens(texts: list[str], **_: Any) -> dict[str, Any]:
        return {name: torch.empty(len(texts), 0) for name in ("input_ids", "attention_mask")}

    monkeypatch.setattr(planning, "load_tokenizer", lambda _: no_tokens)
    reply = bench.plan(bits=4)
    assert isinstance(reply, Failed) and reply.cause == "data" and "makes no token" in reply.message


def test_a_budget_that_nothing_fits_names_the_least(bench: Bench) -> None:
    reply = bench.plan(budget_bytes=1000)
    assert isinstance(reply, Failed) and reply.cause == "mechanism"
    assert "below the 0.0 MB that the base takes with every block at 2 bits" in reply.message
    assert "give at least 0.1 MB" in reply.hint


def test_a_device_states_what_it_holds_and_by_whom(bench: Bench) -> None:
    plain = bench.describe()
    assert plain.mechanisms == MECHANISMS and plain.base_held == "fp32"
    nf4 = bench.describe(base_precision="nf4")
    assert isinstance(nf4, Described) and nf4.shape.base_bytes < plain.shape.base_bytes
    assert "base:nf4" in nf4.mechanisms and "base:fp32" not in nf4.mechanisms
    assert nf4.base_held.startswith(("nf4 by bitsandbytes ", "nf4 by torch"))
    plan = bench.plan(budget_bytes=50_000).plan
    assert "base:plan" in bench.describe(base_precision="plan", base_plan=plan).mechanisms


def test_another_precision_is_another_resident(bench: Bench) -> None:
    plan = bench.plan(budget_bytes=50_000).plan
    setups = [
        bench.setup,
        replace(bench.setup, base_precision="nf4"),
        replace(bench.setup, base_precision="plan", base_plan=plan),
        replace(bench.setup, base_precision="plan", base_plan=bench.plan(bits=2).plan),
    ]
    assert len({resident_key(setup, Path(setup.base)) for setup in setups}) == 4


def test_a_plan_of_another_base_or_without_its_word_is_refused(bench: Bench) -> None:
    plan = bench.plan(bits=4).plan
    longer = replace(plan, blocks=(*plan.blocks, replace(plan.blocks[0], block=3)))
    shorter = replace(plan, blocks=plan.blocks[:2])
    for wrong in (longer, shorter):
        reply = bench.describe(base_precision="plan", base_plan=wrong)
        assert (
            isinstance(reply, Failed) and reply.cause == "mechanism" and "made for another base" in reply.hint
        )
    for changes in ({"base_precision": "plan"}, {"base_plan": plan}, {"base_precision": "int3"}):
        assert bench.describe(**changes).cause == "mechanism"


@pytest.mark.parametrize("word", ["int8", "plan"])
def test_a_round_is_trained_beside_a_packed_base(bench: Bench, tmp_path: Path, word: str) -> None:
    plan = bench.plan(budget_bytes=50_000).plan if word == "plan" else None
    setup = replace(bench.setup, base_precision=word, base_plan=plan)
    shape = bench.describe(base_precision=word, base_plan=plan).shape
    write_version(
        tmp_path / "v0", run="r", round=0, number=0, fingerprint="0" * 64,
        adapter=initial_adapter(shape, setup.lora, seed=2), codec="fp32",
    )  # fmt: skip
    for held, kind in ((word, Trained), ("fp32", Failed)):
        candidate = Candidate(
            id="c", depth=2, quantized_layers=1, micro_batch=4, max_length=12, steps=8, base_precision=held
        )
        request = Train(
            id=3, setup=setup, run="r", round=1, device="d", fingerprint="0" * 64, candidate=candidate,
            spec=replace(setup.spec, learning_rate=5e-3, head_learning_rate=2e-2),
            versions=(str(tmp_path / "v0"),), folder=str(tmp_path / held),
        )  # fmt: skip
        bench.trainer.request(request)
        assert isinstance(bench.replies[-1], kind), bench.replies[-1]
    assert "base:fp32" in bench.replies[-1].message


def test_a_candidate_of_another_precision_is_refused() -> None:
    candidate = Candidate(id="c", depth=1, base_precision="nf4")
    refuse_missing(TrainSpec(), candidate, "nf4")
    with pytest.raises(MechanismError, match="base:nf4"):
        refuse_missing(TrainSpec(), candidate, "fp32")
    assert candidate.needs() <= set(mechanisms_of("nf4")) and mechanisms_of("fp32") == MECHANISMS
