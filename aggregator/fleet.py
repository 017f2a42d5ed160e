"""Who is there, and what each device last said of itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from aggregator.planner.lessons import Lessons
from aggregator.state.base import DeviceRow, ParticipationRow, Store
from edge_sdk.protocol.base import PROTOCOL
from edge_sdk.protocol.wire import Presence, Refusal, Run, Status

__all__ = ["Fleet", "Member"]

LINK_MEMORY = 0.8
"""Weight of the past in the moving average of a link's rate."""


@dataclass(frozen=True)
class Member:
    """A device as the server sees it now."""

    device: str
    session: int = 0
    online: bool = False
    status: Status | None = None
    """None: nothing reported since this server started."""
    refusal: Refusal | None = None
    """Why it may not take part; None: it may."""
    up_bps: float | None = None
    down_bps: float | None = None
    lessons: Lessons = field(default_factory=Lessons)
    """What its reports and its rounds taught."""

    @property
    def ready(self) -> bool:
        """Whether it can be offered work: there, admitted, measured, and allowed to work by its owner."""
        return (
            self.online
            and self.refusal is None
            and self.status is not None
            and self.status.session == self.session
            and self.status.fit is not None
            and self.status.permission == "running"
        )

    def planned(self) -> Status | None:
        """The last status, with the smoothed link in place of the last reported one. ``lessons`` are put to
        it by the plan, which needs both."""
        if self.status is None:
            return None
        link = self.status.link
        if link.source == "measured":
            link = msgspec.structs.replace(link, up_bps=self.up_bps, down_bps=self.down_bps)
        return msgspec.structs.replace(self.status, link=link)


class Fleet:
    """All devices of a run. What they said before a restart counts only for show: they report again.

    Args:
        store: every change is written through to it.
        run: the run that devices join; its fingerprint decides who may.
        max_samples: a device that tells of more may not.
    """

    def __init__(self, store: Store, run: Run, max_samples: int) -> None:
        self._store = store
        self._run = run
        self._max_samples = max_samples
        self._members: dict[str, Member] = {}
        self._rows: dict[str, DeviceRow] = {}
        with store.transaction():
            for row in store.devices(run.run):
                self._members[row.device] = Member(
                    row.device, row.session, up_bps=row.up_bps, down_bps=row.down_bps,
                    lessons=_lessons(row.learned),
                )  # fmt: skip
                self._rows[row.device] = replace(row, online=False)
                store.put_device(self._rows[row.device])

    def __getitem__(self, device: str) -> Member:
        """A device that was never seen is a member that is not there."""
        return self._members.get(device) or Member(device)

    def __contains__(self, device: str) -> bool:
        return device in self._members

    def __iter__(self) -> Iterator[Member]:
        """In the order of their ids."""
        return iter(sorted(self._members.values(), key=lambda member: member.device))

    def ready(self) -> list[Member]:
        return [member for member in self if member.ready]

    def reported(self, device: str) -> Status | None:
        """The last status, also of before a restart: what the device is, if not how it is now."""
        row = self._rows.get(device)
        return None if row is None or row.status is None else msgspec.json.decode(row.status, type=Status)

    def on_presence(self, presence: Presence, wall: float) -> Member | None:
        """The device as it is now; None for a late will of an older session: nothing changed.

        Who is online says the truth about its session, also a lower one: its state folder may be new.
        """
        before = self[presence.device]
        if presence.session < before.session and not presence.online:
            return None
        member = replace(before, session=presence.session, online=presence.online)
        if presence.online and presence.protocol != PROTOCOL:
            member = replace(member, refusal=self._other_protocol(presence))
        elif before.refusal is not None and before.refusal.reason == "protocol":
            member = replace(member, refusal=None)
        return self._set(member, wall)

    def heard(self, device: str, wall: float) -> bool:
        """A message of the device came: it is there. Whether that is news."""
        member = self[device]
        if member.online or device not in self:
            return False
        self._set(replace(member, online=True), wall)
        return True

    def lose_all(self) -> None:
        """The server's own link is gone, and wills with it: who is there says so again."""
        with self._store.transaction():
            for member in self:
                if member.online:
                    self._set(replace(member, online=False), self._rows[member.device].seen_at)

    def on_status(self, status: Status, wall: float) -> Member | None:
        """The device as it is now, refused or not; None where the status is of an older session."""
        before = self[status.device]
        if status.session < before.session:
            return None
        refusal = before.refusal if before.refusal and before.refusal.reason == "protocol" else None
        refusal = refusal or self._judge(status)
        member = replace(before, session=status.session, online=True, status=status, refusal=refusal)
        link, measured = status.link, status.link.source == "measured"
        member = replace(
            member,
            up_bps=_smooth(member.up_bps, link.up_bps, measured),
            down_bps=_smooth(member.down_bps, link.down_bps, measured),
            lessons=member.lessons.after_status(status),
        )
        return self._set(member, wall)

    def offered(self, device: str) -> None:
        """The device is offered what its last status allows: a failure is judged by that."""
        member = self[device]
        if member.status is not None:
            lessons = member.lessons.after_offer(member.status)
            self._set(replace(member, lessons=lessons), self._rows[device].seen_at)

    def learn(self, rows: Sequence[ParticipationRow], open_s: float) -> None:
        """What a round taught that closed after ``open_s``. In the transaction that closes it, so that every
        round teaches once."""
        for row in rows:
            member, status = self[row.device], self.reported(row.device)
            if status is None or status.fit is None:
                continue
            lessons = member.lessons.after_round(row, self._run, status, open_s, online=member.online)
            if lessons != member.lessons:
                self._set(replace(member, lessons=lessons), self._rows[row.device].seen_at)

    def _judge(self, status: Status) -> Refusal | None:
        if status.run != self._run.run:
            return Refusal(
                device=status.device,
                run=self._run.run,
                reason="run",
                message=f"the status is of run {status.run!r}; this is run {self._run.run!r}",
                hint="the device reads the present run from its topic and reports again",
            )
        parts = self._run.fingerprint.differing(status.fingerprint)
        if parts:
            return Refusal(
                device=status.device,
                run=self._run.run,
                reason="fingerprint",
                message=f"this device differs from the run in: {', '.join(parts)}",
                hint="all parties need the same base model, tokenizer, labels, template and LoRA shape",
                parts=parts,
            )
        if status.samples > self._max_samples:
            return Refusal(
                device=status.device,
                run=self._run.run,
                reason="samples",
                message=f"this device tells of {status.samples} samples; "
                f"{self._max_samples} at most may count for one",
                hint="give it fewer rows, or raise rounds.max_samples in run.toml if they are true",
            )
        return None

    def _other_protocol(self, presence: Presence) -> Refusal:
        return Refusal(
            device=presence.device,
            run=self._run.run,
            reason="protocol",
            message=f"the device speaks protocol {presence.protocol}, the aggregator {PROTOCOL}",
            hint="install versions of edge-sdk that speak the same protocol on both",
        )

    def _set(self, member: Member, wall: float) -> Member:
        known = self._rows.get(member.device)
        status = known.status if known else None
        row = DeviceRow(
            run=self._run.run,
            device=member.device,
            session=member.session,
            online=member.online,
            status=status if member.status is None else msgspec.json.encode(member.status).decode(),
            refusal=None if member.refusal is None else msgspec.json.encode(member.refusal).decode(),
            up_bps=member.up_bps,
            down_bps=member.down_bps,
            seen_at=wall,
            learned=msgspec.json.encode(member.lessons).decode(),
        )
        self._store.put_device(row)
        self._rows[member.device], self._members[member.device] = row, member
        return member


def _lessons(text: str | None) -> Lessons:
    return Lessons() if text is None else msgspec.json.decode(text, type=Lessons)


def _smooth(before: float | None, now: float | None, measured: bool) -> float | None:
    """Moving average of measurements; a limit that was set is exact at once."""
    if now is None:
        return before
    return LINK_MEMORY * before + (1 - LINK_MEMORY) * now if measured and before is not None else now
