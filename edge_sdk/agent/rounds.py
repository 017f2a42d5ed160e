"""The round axis: from an offer to an update in the outbox.

Nothing here waits. ``advance`` does the next step when its conditions hold, and is called after every event,
so that a restarted agent goes on by the same path as one that never stopped.
"""

from __future__ import annotations

import shutil
from math import isfinite
from typing import Any

from msgspec.structs import replace

from edge_sdk.agent.choosing import decline_of, first_choice, smaller_choice, training_setup
from edge_sdk.agent.context import Context
from edge_sdk.agent.downloads import Downloads
from edge_sdk.agent.joining import Joining
from edge_sdk.agent.packing import adopt_update, lies_whole, sweep_objects
from edge_sdk.agent.record import Packed, RoundRow
from edge_sdk.agent.states import ROUND, Occasion, RoundState
from edge_sdk.agent.uploads import Uploads
from edge_sdk.faults import reached
from edge_sdk.protocol.trainer import Died, Failed, Progress, Train, Trained, TrainerReply
from edge_sdk.protocol.wire import Choice, Decline, DeclineReason, Offer, RoundPosition

__all__ = ["Rounds"]

_ATTEMPTS = 3
"""How often one choice is trained when memory is not the cause."""
_SIGKILL = -9
_KILLS = 2
"""Unexplained SIGKILLs in one round after which memory is taken for the cause."""
_STORAGE_S = 30.0


class Rounds:
    """At most one round at a time. ``row`` is what the record holds of it."""

    def __init__(self, context: Context, joining: Joining, downloads: Downloads, uploads: Uploads) -> None:
        self._context = context
        self._joining = joining
        self._downloads = downloads
        self._uploads = uploads
        self._training = False
        self._tainted = False
        self._retry_at = 0.0
        self._staging = context.folder / "staging"
        self.row: RoundRow | None = None
        self.load()

    # -- what is so -----------------------------------------------------------------------------------

    @property
    def state(self) -> RoundState:
        return "idle" if self.row is None or self.row.state is None else self.row.state

    @property
    def deadline(self) -> float | None:
        """On this boot's monotonic clock."""
        return None if self.row is None else self.row.received + self.row.offer.deadline_s

    def position(self) -> RoundPosition | None:
        """Where this device stands, for its status, be it in a round that is over: its update may be late.

        Who says None, or an earlier round, is offered again what it may have missed.
        """
        if self.row is not None and self.state != "idle":
            return RoundPosition(round=self.row.round, state=self.state)
        items = self._uploads.items
        return RoundPosition(round=items[-1].announce.round, state=items[-1].state) if items else None

    def load(self) -> None:
        """Takes up the round that the record says is not done.

        Monotonic times of another boot mean nothing: its deadline is counted anew. The aggregator judges
        lateness by its own clock anyhow.
        """
        context = self._context
        open_rows = [
            row for row in context.record.rounds() if row.state is not None and row.run == context.nonce
        ]
        self.row = open_rows[-1] if open_rows else None
        if self.row is not None and self.row.boot != context.boot:
            self._save(received=context.clock.monotonic(), boot=context.boot)

    def clear(self) -> None:
        """Another run began: the record holds no round any more."""
        self._stop_training()
        self.row = None
        shutil.rmtree(self._staging, ignore_errors=True)

    # -- what happens ---------------------------------------------------------------------------------

    def on_offer(self, offer: Offer) -> Occasion | None:
        """Which occasion an offer is; None: one for a round that is over, to be ignored."""
        context = self._context
        known = context.record.round(context.nonce, offer.round)
        if known is not None and known.offer.nonce == offer.nonce:
            if self.row is not None and known.round == self.row.round:
                # What is left of the round is counted from now.
                again = replace(self.row.offer, deadline_s=offer.deadline_s)
                self._save(offer=again, received=context.clock.monotonic(), boot=context.boot)
            return "offer-again"
        newest = max((row.round for row in context.record.rounds()), default=0)
        if offer.round < newest or self._uploads.find(offer.run, offer.round) is not None:
            context.emit("offer.ignored", round=offer.round, newest=newest)
            return None
        return "offer"

    def react(
        self, occasion: Occasion, offer: Offer | None = None, reply: Failed | Died | None = None
    ) -> None:
        """Does what the table says for this occasion in the present state."""
        match ROUND[self.state].on[occasion].action:
            case "take" if offer is not None:
                self._take(offer)
            case "replace" if offer is not None:
                self._end("replaced")
                self._take(offer)
            case "repeat":
                self._repeat(offer)
            case "interrupt" if self._training:
                self._context.desk.interrupt()
            case "judge" if reply is not None:
                self._judge(reply)
            case "give-up":
                self.decline(*self._overdue())

    def _overdue(self) -> tuple[DeclineReason, str]:
        """What held the round up until its deadline."""
        if self._context.permission == "gated":
            return "gate", f"closed gates until the round's deadline: {self._context.gate}"
        if self._context.permission == "paused":
            return "paused", "the device was paused until the round's deadline"
        return "deadline", "the round's deadline passed on this device"

    def refuse(self, offer: Offer, reason: DeclineReason, message: str) -> None:
        """Declines an offer without having taken it, for good."""
        self._end("replaced")
        self._take(offer)
        self.decline(reason, message)

    def decline(self, reason: DeclineReason, message: str) -> None:
        """Answers the present round with a decline and ends it."""
        assert self.row is not None  # noqa: S101 - for the type checker: every caller has a round
        answer = decline_of(self._context, self.row, reason, message)
        row = self.row
        self._end("declined", answer=answer)
        self._context.emit("round.decline", round=row.round, reason=reason, message=message)
        self._context.say(answer)

    def end_run(self) -> None:
        """The run is finished: no round of it counts any more."""
        self._end("unfinished")

    def retrain(self) -> None:
        """The residual that the present training started from was cleared: what it makes would be wrong."""
        if self._training:
            self._tainted = True
            self._context.desk.interrupt()
        elif self.row is not None and self.row.state == "packing":
            self._save(state="training", packed=None)

    # -- the next step --------------------------------------------------------------------------------

    def advance(self, now: float) -> float | None:
        """Does what can be done now. Returns when to look again."""
        deadline = self.deadline
        if deadline is not None and self.state != "idle" and now >= deadline:
            self.react("deadline")
        if self._context.permission == "running" and self._joining.ready:
            if self.state == "choosing":
                self._choose(now)
            if self.state == "fetching":
                self._fetch()
            if self.state == "training" and not self._training and not self._context.desk.busy:
                self._train()
            if self.state == "packing" and now >= self._retry_at:
                self._pack(now)
        if self.state == "idle":
            return None
        times = [time for time in (self.deadline, self._retry_at) if time is not None and time > now]
        return min(times, default=None)

    def _take(self, offer: Offer) -> None:
        context = self._context
        self.row = RoundRow(
            run=context.nonce, round=offer.round, state="choosing", offer=offer,
            received=context.clock.monotonic(), boot=context.boot,
        )  # fmt: skip
        self._save()
        reached("offer.kept")
        self._retry_at = 0.0
        context.emit(
            "round.offer", round=offer.round, candidates=len(offer.candidates), deadline_s=offer.deadline_s
        )

    def _choose(self, now: float) -> None:
        if self.row is not None:
            self._give(first_choice(self._context, self._joining, self.row, now))

    def _give(self, answer: Choice | Decline) -> None:
        if isinstance(answer, Choice):
            self._answer(answer)
        else:
            self.decline(answer.reason, answer.message)

    def _answer(self, choice: Choice) -> None:
        """On disk first, then said."""
        self._save(state="fetching", answer=choice, failures=0, packed=None)
        reached("choice.kept")
        one = choice.candidate
        self._context.emit(
            "round.choice", round=choice.round, attempt=choice.attempt, candidate=one.id, depth=one.depth,
            quantized_layers=one.quantized_layers, binding=choice.binding, peak_mb=one.peak_mb,
            seconds=one.seconds, bytes_up=one.bytes_up, reason=choice.reason,
        )  # fmt: skip
        self._context.say(choice)
        reached("choice.said")

    def _fetch(self) -> None:
        row = self.row
        if row is None:
            return
        self._downloads.keep_only(row.offer.versions)
        if self._downloads.want(row.offer.versions, row.offer.chunk_bytes, row.offer.window):
            self._save(state="training")
            reached("round.fetched")

    def _train(self) -> None:
        context, row, joining = self._context, self.row, self._joining
        run, fingerprint = joining.run, joining.fingerprint
        if row is None or run is None or fingerprint is None or not isinstance(row.answer, Choice):
            return
        if not all(context.store.has(ref.object) for ref in row.offer.versions):
            self._save(state="fetching")
            return
        choice, spec = row.answer, row.offer.spec
        shutil.rmtree(self._staging, ignore_errors=True)
        folder = self._staging / f"round-{row.round}"
        folder.mkdir(parents=True)
        residual = context.record.residual if spec.error_feedback else None
        owed = tuple(one.object for one in context.record.owed()) if spec.error_feedback else ()

        def build(id: int) -> Train:
            return Train(
                id=id, setup=training_setup(context, joining, run, spec, choice), run=run.run,
                round=row.round, device=context.device, fingerprint=fingerprint.digest,
                candidate=choice.candidate, spec=spec,
                versions=tuple(str(context.store.path(ref.object)) for ref in row.offer.versions),
                residual=None if residual is None else str(context.store.path(residual)),
                owed=tuple(str(context.store.path(digest)) for digest in owed),
                folder=str(folder),
            )  # fmt: skip

        self._training, self._tainted = True, False
        context.emit("training.start", round=row.round, attempt=choice.attempt)
        context.desk.ask("train", build, lambda reply: self._on_reply(reply, owed))
        reached("training.asked")

    def _on_reply(self, reply: TrainerReply, owed: tuple[str, ...]) -> None:
        row = self.row
        if isinstance(reply, Progress):
            self._context.emit(
                "training.progress", round=0 if row is None else row.round, stage=reply.stage,
                done=reply.done, total=reply.total, loss=reply.loss,
                tokens_per_s=reply.tokens_per_s, left_s=reply.left_s,
            )  # fmt: skip
            return
        self._training = False
        if row is None or row.state != "training" or self._tainted:
            return
        if isinstance(reply, Trained):
            reached("training.done")
            measured = reply.measured
            if not all(isfinite(getattr(measured, name)) for name in measured.__struct_fields__):
                # JSON has no such numbers, and no aggregator would take the update.
                self.decline("trainer", "the training diverged: a measured figure is not finite")
                return
            self._context.emit(
                "training.done", round=row.round, samples=reply.samples, peak_mb=measured.peak_mb,
                rest_mb=measured.rest_mb, train_s=measured.train_s, loss_last=measured.loss_last,
            )  # fmt: skip
            if isinstance(row.answer, Choice):
                self._joining.trained(row.answer.candidate, row.offer.spec, measured)
            described = self._joining.described
            # Rows that came since it was told count from the next time that they are told.
            samples = reply.samples if described is None else min(reply.samples, described.samples)
            packed = Packed(
                update=reply.update, residual=reply.residual, samples=samples, measured=measured,
                owed=owed, boot=self._context.boot,
            )  # fmt: skip
            self._save(state="packing", packed=packed)
            reached("update.packed")
        elif isinstance(reply, Failed | Died) and not (
            isinstance(reply, Failed) and reply.cause == "interrupted"
        ):
            self.react("trainer-death", reply=reply)

    def _judge(self, reply: Failed | Died) -> None:
        """The trainer failed or died: memory, a lasting fault, or worth another try."""
        row = self.row
        if row is None:
            return
        kills = row.kills + (isinstance(reply, Died) and not reply.memory and reply.exit == _SIGKILL)
        memory = reply.cause == "memory" if isinstance(reply, Failed) else reply.memory or kills >= _KILLS
        self._context.emit(
            "training.failed", round=row.round, memory=memory, message=reply.message,
            exit=reply.exit if isinstance(reply, Died) else None,
        )  # fmt: skip
        if memory:
            self._save(kills=0)
            if isinstance(row.answer, Choice):
                self._joining.fell_short(row.answer.candidate, row.offer.spec)
            self._step_down(reply.message)
            return
        self._save(kills=kills, failures=row.failures + 1)
        match reply:
            case Failed(cause="data"):
                self.decline("data", reply.message)
            case Failed(cause="mechanism"):
                self.decline("mechanism", reply.message)
            case Failed(cause="container"):
                self._drop_versions(row)
                self.decline("version", reply.message)
            case Failed(cause="base" | "extra"):
                self.decline("trainer", reply.message)
            case _ if row.failures + 1 >= _ATTEMPTS:
                self.decline("trainer", f"the trainer failed {_ATTEMPTS} times: {reply.message}")

    def _step_down(self, message: str) -> None:
        row = self.row
        if row is not None and isinstance(row.answer, Choice):
            now = self._context.clock.monotonic()
            self._give(smaller_choice(self._context, self._joining, row, row.answer, now, message))

    def _drop_versions(self, row: RoundRow) -> None:
        """A version that cannot be read is fetched again at the next offer."""
        with self._context.record.transaction():
            for ref in row.offer.versions:
                self._context.record.remove_version(ref.number)
        for ref in row.offer.versions:
            self._context.store.remove(ref.object)

    def _pack(self, now: float) -> None:
        context, row, fingerprint = self._context, self.row, self._joining.fingerprint
        if row is None or row.packed is None or fingerprint is None or not isinstance(row.answer, Choice):
            return
        if not lies_whole(context, row.packed):
            self._save(state="training", packed=None)
            return
        try:
            announce = adopt_update(context, row, row.packed, row.answer, fingerprint)
        except OSError as error:
            context.emit(
                "problem", message=f"the update cannot be kept: {error.strerror}", hint="free disk space"
            )
            self._retry_at = now + _STORAGE_S
            return
        self.row = None
        shutil.rmtree(self._staging, ignore_errors=True)
        context.emit("update.queued", round=row.round, bytes=announce.bytes, object=announce.object)
        sweep_objects(context)
        self._uploads.added(announce.run, announce.round, now)

    # -- ends -----------------------------------------------------------------------------------------

    def _repeat(self, offer: Offer | None) -> None:
        """Says again what was said: for the offered round, or for the present one."""
        context = self._context
        row = self.row if offer is None else context.record.round(context.nonce, offer.round)
        if row is None:
            return
        if row.answer is not None:
            context.say(row.answer)
        item = self._uploads.find(row.offer.run, row.round)
        if item is not None:
            self._uploads.announce(item, context.clock.monotonic())

    def _end(self, outcome: str, answer: Decline | None = None) -> None:
        if self.row is None:
            return
        self._save(state=None, outcome=outcome, packed=None, answer=answer or self.row.answer)
        self._context.record.forget_old_rounds()
        self._stop_training()
        self._downloads.keep_only(())
        self.row = None

    def _stop_training(self) -> None:
        if self._training:
            self._training = False
            self._context.desk.abandon()

    def _save(self, **changes: Any) -> None:
        if self.row is not None:
            self.row = replace(self.row, **changes)
            self._context.record.save_round(self.row)
