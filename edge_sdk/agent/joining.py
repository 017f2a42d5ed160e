"""Joining a run: the base's fingerprint, what the trainer finds, the probe. Then the agent may report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import msgspec
from msgspec.structs import replace

from edge_sdk.agent.budgets import allowed_memory, memory_now
from edge_sdk.agent.context import Context
from edge_sdk.agent.learning import Experience
from edge_sdk.device.allocators import find_allocator
from edge_sdk.errors import (
    BaseModelError,
    ContainerError,
    DataError,
    EdgeError,
    FingerprintError,
    MechanismError,
    MissingExtraError,
    ProtocolError,
    TrainerError,
)
from edge_sdk.faults import reached
from edge_sdk.protocol.base import PROTOCOL
from edge_sdk.protocol.measure import Fit, Measured, Memory
from edge_sdk.protocol.model import TASKS, Fingerprint
from edge_sdk.protocol.spec import Candidate, TrainSpec
from edge_sdk.protocol.trainer import (
    Describe,
    Described,
    Died,
    Failed,
    Probe,
    Probed,
    Progress,
    Setup,
    TrainerReply,
)
from edge_sdk.protocol.wire import Run

__all__ = ["Joining", "error_of", "setup_for"]

_ATTEMPTS = 3
_SIGKILL = -9
_KILLS = 2
"""Unexplained SIGKILLs of one request after which memory is taken for the cause, as in a round."""
_WAIT_S = 60.0
_MOST_WAIT_S = 3600.0
"""Where memory is too little to join with, it is tried again after so long, doubled up to this."""
_PROBE_SHARES = (1.0, 0.25, 0.06, 0.015)
"""Of the memory that seems free, what a probe may use: less each time that it was killed for its memory."""
_ERRORS: dict[str, type[EdgeError]] = {
    "data": DataError,
    "base": BaseModelError,
    "mechanism": MechanismError,
    "extra": MissingExtraError,
    "container": ContainerError,
}


class Joining:
    """Brings a run from its record to ``ready``, one step at a time; what was found once stays known.

    Raises from ``advance`` and from the trainer's replies: the error is one of this machine's, and trying
    again cannot help. Too little memory is no such error: ``trouble`` tells it, and it is tried again.

    Args:
        patient: try again where memory is too little; otherwise that is an error, too.
    """

    def __init__(self, context: Context, fail: Callable[[EdgeError], None], *, patient: bool = True) -> None:
        self._context = context
        self._fail = fail
        self._patient = patient
        self._found: Path | None = None
        self._begin()
        self.run: Run | None = context.record.run
        self._stored = True
        self.fingerprint: Fingerprint | None = None
        self.described: Described | None = None
        self._experience = Experience(context)
        self._key = ""

    def _begin(self) -> None:
        """Nothing has failed yet."""
        self._attempts = self._kills = self._share = 0
        self._retry_at, self._wait_s = 0.0, _WAIT_S
        self.trouble = ""
        """Why this device cannot join for now; empty: nothing is known against it."""

    @property
    def fit(self) -> Fit | None:
        """As probed, corrected by what rounds taught."""
        return self._experience.fit

    @property
    def tells(self) -> bool:
        """Whether there is something to report: all, or that memory is too little."""
        known = self.fingerprint is not None and self.described is not None
        return self.ready or (known and bool(self.trouble))

    @property
    def ready(self) -> bool:
        return self.run is not None and self.fit is not None

    def on_run(self, run: Run) -> None:
        """The retained run record arrived, perhaps again, perhaps another one."""
        if run == self.run:
            return
        if run.protocol != PROTOCOL:
            raise ProtocolError(
                f"the aggregator speaks protocol {run.protocol}, this agent {PROTOCOL}",
                "install the version of edge-sdk that the aggregator runs",
            )
        if run.task not in TASKS:
            raise MechanismError(
                f"the task of run {run.run!r} is {run.task!r}; this agent knows {', '.join(TASKS)}",
                "install the version of edge-sdk that the aggregator runs",
            )
        if self._context.desk.task in ("describe", "probe"):
            self._context.desk.abandon()
        self._stored = False
        self.run, self.fingerprint, self.described = run, None, None
        self._experience.begin(None)
        self._begin()

    def advance(self, may_start: bool) -> float | None:
        """Does the next step. Returns when to look again. ``may_start``: the trainer may be given work."""
        run, desk = self.run, self._context.desk
        if run is None or self.ready:
            return None
        may_start = may_start and self._context.clock.monotonic() >= self._retry_at
        if self.fingerprint is None:
            base = self._find_base()
            if base is None:
                # A hub id that is not whole on this disk: the trainer fetches it.
                if may_start and not desk.busy:
                    self._ask_describe(run)
                return self._due
            if not self._check(run, base):
                return None
            self._remember(run)
        if self.fit is None and may_start and not desk.busy:
            if self.described is None:
                self._ask_describe(run)
            else:
                setup = replace(self._setup(run), memory_mb=self._probe_mb(self.described))
                desk.ask("probe", lambda id: Probe(id=id, setup=setup, levers=run.levers), self._on_reply)
        return self._due

    @property
    def _due(self) -> float | None:
        return self._retry_at if self._retry_at > self._context.clock.monotonic() else None

    def _probe_mb(self, described: Described) -> float | None:
        """What the trainer may hold while it probes: a limit where the owner set none, too."""
        try:
            free = memory_now(self._context, described, described.device, described.gpu).budget_mb
        except MissingExtraError:  # a GPU whose free memory nobody tells: its driver refuses what is too much
            return self._context.config.limits.memory_mb
        return described.rest_mb + _PROBE_SHARES[self._share] * free

    def memory(self) -> Memory:
        """What training may use now, and no more than what was found not to be there."""
        run, described, fit = self.run, self.described, self.fit
        if run is None or described is None:
            raise RuntimeError("memory was asked for before the trainer told what it holds")
        if fit is None:
            return memory_now(self._context, described, described.device, described.gpu)
        return allowed_memory(self._context, fit, described, run, self._experience.shortfalls)

    def fell_short(self, candidate: Candidate, spec: TrainSpec) -> None:
        """Keeps that a candidate ran out of memory, before another one is chosen."""
        if self.run is not None and self.described is not None:
            self._experience.fell_short(self.run, self.described, candidate, spec)
            self._learn()

    def trained(self, candidate: Candidate, spec: TrainSpec, measured: Measured) -> None:
        """Compares a round with what was predicted of it, and predicts better from then on."""
        if self.run is not None and self.described is not None:
            self._experience.trained(self.run, self.described, candidate, spec, measured)
            self._learn()

    def _find_base(self) -> Path | None:
        """None: a hub id of which files are missing, or may be: the trainer is at it."""
        if self._found is not None:
            return self._found
        path, files = self._context.config.base.path, self._context.base_files
        if Path(path).is_absolute():
            return files.find_base(path)
        if self._context.desk.busy:
            return None
        try:
            base = files.find_base(path)
            files.check_whole(base)
        except BaseModelError:
            return None
        return base

    def _check(self, run: Run, base: Path) -> bool:
        """Compares fingerprints, and only then makes this run the one that the record is about.

        False: the record's own run, from before a restart, is of another base; the broker will tell which
        run there is now.
        """
        context = self._context
        mine = context.base_files.fingerprint_of(
            base,
            labels=run.labels,
            task=run.task,
            max_length=run.max_length,
            template=run.template,
            lora=run.lora,
            cache=context.folder,
        )
        differing = run.fingerprint.differing(mine)
        if differing and self._stored:
            self.run = None
            return False
        if differing:
            raise FingerprintError(
                f"this device differs from run {run.run!r} in: {', '.join(differing)}",
                f"the run was made with base {run.base!r}; here base.path is {str(base)!r}",
            )
        plan = context.config.trainer.base_held()[1]
        if plan is not None and plan.base != mine.base:
            raise BaseModelError(
                f"the plan {context.config.trainer.base_plan} was made for another base than {base}",
                "make one for this base with edge-agent quantize-base",
            )
        self.fingerprint = mine
        known = context.record.run
        if known is None or known.nonce != run.nonce:
            dropped = context.record.begin_run(run)
            reached("run.joined")
            context.emit("run.joined", run=run.run, nonce=run.nonce, dropped_updates=dropped)
        return True

    def _remember(self, run: Run) -> None:
        self._key = _knowledge_key(self._context, run, self.fingerprint)
        known = self._context.record.knowledge(self._key)
        if known is not None:
            self.described = known.described
            self._experience.begin(known.fit, known.shortfalls, known.lessons)

    def _ask_describe(self, run: Run) -> None:
        self._context.desk.ask("describe", lambda id: Describe(id=id, setup=self._setup(run)), self._on_reply)

    def _setup(self, run: Run) -> Setup:
        return setup_for(self._context, run, run.spec)

    def _on_reply(self, reply: TrainerReply) -> None:
        context = self._context
        match reply:
            case Progress():
                context.emit(
                    "trainer.progress", task="join", stage=reply.stage, done=reply.done, total=reply.total
                )
            case Described():
                self.described = reply
                self._found = Path(reply.base)
                context.emit(
                    "trainer.described", samples=reply.samples, dropped=reply.dropped,
                    rest_mb=reply.rest_mb, device=reply.device, allocator=reply.allocator,
                    base_held=reply.base_held,
                )  # fmt: skip
                self._learn()
            case Probed():
                self._experience.begin(reply.fit)
                self._begin()
                context.emit("trainer.probed", rest_mb=reply.fit.rest_mb, layer_mb=reply.fit.layer_mb,
                             saved_mb=reply.fit.saved_mb, probes=len(reply.fit.probes))  # fmt: skip
                self._learn()
            case Failed(cause="interrupted"):
                pass
            case Failed(cause="memory"):
                self._run_out(error_of(reply))
            case Failed():
                self._fail(error_of(reply))
            case Died():
                self._attempts += 1
                self._kills += not reply.memory and reply.exit == _SIGKILL
                memory = reply.memory or self._kills >= _KILLS
                context.emit("trainer.died", memory=memory, exit=reply.exit, message=reply.message)
                if memory and self.described is not None and self._share + 1 < len(_PROBE_SHARES):
                    self._attempts, self._kills, self._share = 0, 0, self._share + 1
                elif memory:
                    self._run_out(error_of(replace(reply, memory=True)))
                elif self._attempts >= _ATTEMPTS:
                    self._fail(error_of(reply))

    def _run_out(self, error: EdgeError) -> None:
        """Too little memory to join with. Other programs end: it is tried again, ever more seldom."""
        if not self._patient:
            self._fail(error)
            return
        self._attempts = self._kills = self._share = 0
        self.trouble = error.message
        self._retry_at = self._context.clock.monotonic() + self._wait_s
        self._context.emit("join.postponed", message=error.message, hint=error.hint, again_s=self._wait_s)
        self._wait_s = min(_MOST_WAIT_S, 2 * self._wait_s)

    def _learn(self) -> None:
        """Keeps what the trainer found, once it is known what it is true of."""
        if self.fingerprint is not None and self.described is not None:
            with self._context.record.transaction():
                self._context.record.save_knowledge(self._key, self._experience.knowledge(self.described))
            reached("trainer.known")


def setup_for(context: Context, run: Run, spec: TrainSpec) -> Setup:
    """What the trainer holds for a run on this device."""
    config = context.config
    base_precision, base_plan = config.trainer.base_held()
    return Setup(
        base=config.base.path,
        task=run.task,
        labels=run.labels,
        template=run.template,
        max_length=run.max_length,
        micro_batch=run.micro_batch,
        lora=run.lora,
        layers=run.layers,
        spec=spec,
        device=config.trainer.device,
        threads=config.trainer.threads,
        memory_mb=config.limits.memory_mb,
        data=config.data.source(),
        base_precision=base_precision,
        base_plan=base_plan,
        prefix_mb=config.limits.prefix_cache_mb,
        prefix_place=config.limits.prefix_cache,
    )


def error_of(reply: Failed | Died) -> EdgeError:
    """The error to show for a failed request."""
    if isinstance(reply, Failed) and reply.cause != "memory":
        return _ERRORS.get(reply.cause, TrainerError)(reply.message, reply.hint)
    if isinstance(reply, Failed) or reply.memory:
        return TrainerError(
            f"this device's memory is too little to train with: {reply.message}",
            "raise limits.memory_mb, close other programs, or take a smaller base",
        )
    return TrainerError(
        f"the trainer ended {_ATTEMPTS} times: {reply.message}", "see trainer.log in the state folder"
    )


def _knowledge_key(context: Context, run: Run, fingerprint: Fingerprint | None) -> str:
    """Digest of all that the trainer's findings depend on; another value makes them void."""
    config, profile = context.config, context.machine.read_profile(disk=context.folder)
    data = Path(config.data.path)
    try:
        stat = data.stat()
    except OSError as error:
        raise DataError(
            f"the data file {data} cannot be read: {error.strerror}", "check data.path"
        ) from error
    facts = [
        fingerprint, run.spec, run.levers, run.micro_batch, run.labels, run.template,
        config.data, config.trainer, config.trainer.base_held(), config.limits.memory_mb,
        str(find_allocator(config.allocator()).library),
        profile.machine, profile.processor, profile.cores, profile.accelerators,
        stat.st_size, stat.st_mtime_ns, _version("edge-sdk"), _version("torch"), _version("bitsandbytes"),
    ]  # fmt: skip
    return hashlib.sha256(msgspec.json.encode(facts, order="deterministic")).hexdigest()


def _version(distribution: str) -> str:
    """Version of an installed package, without importing it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
