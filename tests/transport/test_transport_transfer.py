"""Sender and receiver of objects: windows, repeats, resuming, damage."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_sdk.errors import ContainerError, ProtocolError, StateError
from edge_sdk.protocol.frames import Chunk, decode_chunk
from edge_sdk.protocol.wire import Have, decode_as, encode
from edge_sdk.transport.objects import ObjectStore
from edge_sdk.transport.receiving import ObjectReceiver, sweep_partials
from edge_sdk.transport.sending import ObjectSender

CHUNK = 1024
TRANSFER = b"t" * 16


def make(folder: Path, size: int, seed: int = 0) -> tuple[Path, str]:
    data = Random(seed).randbytes(size)
    path = folder / f"object-{size}-{seed}"
    path.write_bytes(data)
    return path, hashlib.sha256(data).hexdigest()


def sender_of(path: Path) -> ObjectSender:
    return ObjectSender(TRANSFER, path, path.stat().st_size, CHUNK)


def frames(sender: ObjectSender, now: float) -> list[Chunk]:
    out = []
    while (frame := sender.next_frame(now)) is not None:
        out.append(decode_chunk(frame))
    return out


def test_nothing_goes_out_before_the_receiver_spoke(tmp_path: Path) -> None:
    path, _ = make(tmp_path, 5000)
    assert sender_of(path).next_frame(0.0) is None


def test_whole_object_in_windows_of_two(tmp_path: Path) -> None:
    path, digest = make(tmp_path, 10 * CHUNK + 17)
    store = ObjectStore(tmp_path / "store")
    sender = sender_of(path)
    receiver = ObjectReceiver.open(tmp_path / "parts", digest, path.stat().st_size, CHUNK)
    now = 0.0
    while not receiver.complete:
        sender.on_have(receiver.have("dev", 2), now)
        batch = frames(sender, now)
        assert 0 < len(batch) <= 2
        assert sender.in_flight <= 2
        now += 0.5
        assert all(receiver.accept(chunk) for chunk in batch)
    assert not sender.complete
    sender.on_have(receiver.have("dev", 2), now)
    assert sender.complete
    assert sender.due(now) is None
    assert (sender.bytes_sent, sender.chunks_sent) == (path.stat().st_size, 11)
    assert sender.rate_bps == pytest.approx(8 * path.stat().st_size / now)
    final = receiver.finish(store)
    assert final.read_bytes() == path.read_bytes()
    assert store.has(digest)
    assert list((tmp_path / "parts").iterdir()) == []
    assert receiver.duplicate_bytes == 0


def test_what_is_lost_goes_again_once_nothing_moved_and_later_each_time(tmp_path: Path) -> None:
    path, digest = make(tmp_path, 3 * CHUNK)
    sender = sender_of(path)
    receiver = ObjectReceiver.open(tmp_path, digest, 3 * CHUNK, CHUNK)
    sender.on_have(receiver.have("dev", 1), 0.0)
    receiver.accept(frames(sender, 0.0)[0])
    assert sender.due(0.0) == 60.0  # nothing tells yet how fast the link is
    sender.on_have(receiver.have("dev", 1), 0.5)
    assert [chunk.index for chunk in frames(sender, 0.5)] == [1]
    assert sender.due(0.5) == 4.5
    assert frames(sender, 4.4) == []
    assert [chunk.index for chunk in frames(sender, 4.5)] == [1]
    assert sender.due(4.5) == 12.5
    sender.still_leaving(10.0)
    assert sender.due(10.0) == 18.0
    receiver.accept(frames(sender, 18.0)[0])
    sender.on_have(receiver.have("dev", 1), 20.0)
    assert [chunk.index for chunk in frames(sender, 20.0)] == [2]
    # 19.5 s from one acknowledgement to the next: four times that before another repeat.
    assert sender.due(20.0) == 20.0 + 78.0
    receiver.close()


def carry(
    sender: ObjectSender, receiver: ObjectReceiver, window: int, bits_per_second: float, lost: set[int]
) -> list[int]:
    """The chunks that went out, in order, over a line that queues what it cannot carry at once.

    Of the sendings, those numbered in ``lost`` never arrive.
    """
    now, free = 0.0, 0.0
    line: list[tuple[float, Chunk | None]] = []
    sent: list[int] = []
    sender.on_have(receiver.have("dev", window), now)
    while not sender.complete:
        for chunk in frames(sender, now):
            free = max(now, free) + 8 * len(chunk.payload) / bits_per_second
            line.append((free, None if len(sent) in lost else chunk))
            sent.append(chunk.index)
        due = sender.due(now)
        assert due is not None and now < 3600
        now = min([due, *(at for at, _ in line[:1])])
        while line and line[0][0] <= now:
            arrived = line.pop(0)[1]
            if arrived is not None:
                receiver.accept(arrived)
                sender.on_have(receiver.have("dev", window), now)
    return sent


@pytest.mark.parametrize("kbps", [512, 256, 128, 64])
@pytest.mark.parametrize("known", [False, True])
def test_no_chunk_goes_twice_over_a_slow_line(tmp_path: Path, kbps: int, known: bool) -> None:
    size, chunk = 16 * 256 * 1024, 256 * 1024
    path, digest = make(tmp_path, size)
    rate = 1000.0 * kbps if known else None
    sender = ObjectSender(TRANSFER, path, size, chunk, rate_bps=rate)
    with ObjectReceiver.open(tmp_path, digest, size, chunk) as receiver:
        assert carry(sender, receiver, 4, 1000.0 * kbps, set()) == list(range(16))


@pytest.mark.parametrize("lost", [{0}, {5}, {4, 5, 6, 7}, {15}, {0, 1, 2, 3}])
def test_what_a_slow_line_loses_goes_again_and_nothing_else(tmp_path: Path, lost: set[int]) -> None:
    size, chunk = 16 * 64 * 1024, 64 * 1024
    path, digest = make(tmp_path, size)
    sender = ObjectSender(TRANSFER, path, size, chunk)
    with ObjectReceiver.open(tmp_path, digest, size, chunk) as receiver:
        sent = carry(sender, receiver, 4, 128_000.0, lost)
    assert sorted(sent) == sorted([*range(16), *lost])


def test_after_a_cut_only_what_is_missing_goes_and_at_most_a_window_again(tmp_path: Path) -> None:
    size, window = 20 * CHUNK, 3
    path, digest = make(tmp_path, size)
    sender = sender_of(path)
    receiver = ObjectReceiver.open(tmp_path / "parts", digest, size, CHUNK)
    for _ in range(3):
        sender.on_have(receiver.have("dev", window), 0.0)
        for chunk in frames(sender, 0.0):
            receiver.accept(chunk)
    sender.on_have(receiver.have("dev", window), 0.0)
    assert len(frames(sender, 0.0)) == window  # these are lost, and so is the receiver's process
    receiver.close()
    sender.mark_lost()
    assert sender.next_frame(100.0) is None
    receiver = ObjectReceiver.open(tmp_path / "parts", digest, size, CHUNK)
    assert receiver.ranges == ((0, 9),)
    assert receiver.received_bytes == 9 * CHUNK
    while not receiver.complete:
        sender.on_have(receiver.have("dev", window), 1.0)
        for chunk in frames(sender, 1.0):
            receiver.accept(chunk)
    assert sender.bytes_sent <= size + window * CHUNK
    receiver.finish(ObjectStore(tmp_path / "store"))


def test_a_receiver_that_lost_its_partial_file_gets_everything_again(tmp_path: Path) -> None:
    size = 6 * CHUNK
    path, digest = make(tmp_path, size)
    sender = sender_of(path)
    receiver = ObjectReceiver.open(tmp_path, digest, size, CHUNK)
    sender.on_have(receiver.have("dev", 4), 0.0)
    for chunk in frames(sender, 0.0):
        receiver.accept(chunk)
    sender.on_have(receiver.have("dev", 4), 0.0)
    frames(sender, 0.0)
    receiver.discard()
    receiver = ObjectReceiver.open(tmp_path, digest, size, CHUNK)
    now = 0.0
    for _ in range(20):
        sender.on_have(receiver.have("dev", 4), now)
        for chunk in frames(sender, now):
            receiver.accept(chunk)
        now += 5.0
    assert receiver.complete
    receiver.close()


def test_an_older_have_does_not_unsay_a_newer_one(tmp_path: Path) -> None:
    path, digest = make(tmp_path, 8 * CHUNK)
    sender = sender_of(path)
    receiver = ObjectReceiver.open(tmp_path, digest, 8 * CHUNK, CHUNK)
    first = receiver.have("dev", 2)
    sender.on_have(first, 0.0)
    for chunk in frames(sender, 0.0):
        receiver.accept(chunk)
    sender.on_have(receiver.have("dev", 2), 0.0)
    assert [chunk.index for chunk in frames(sender, 0.0)] == [2, 3]
    sender.on_have(first, 0.0)
    assert frames(sender, 0.0) == []
    receiver.close()


def test_duplicates_are_counted_and_the_count_survives(tmp_path: Path) -> None:
    path, digest = make(tmp_path, 2 * CHUNK)
    sender = sender_of(path)
    receiver = ObjectReceiver.open(tmp_path, digest, 2 * CHUNK, CHUNK)
    sender.on_have(receiver.have("dev", 2), 0.0)
    chunk = frames(sender, 0.0)[0]
    assert receiver.accept(chunk)
    assert not receiver.accept(chunk)
    receiver.close()
    with ObjectReceiver.open(tmp_path, digest, 2 * CHUNK, CHUNK) as again:
        assert again.duplicate_bytes == CHUNK
        assert again.received_bytes == CHUNK


def test_chunks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    _, digest = make(tmp_path, 2 * CHUNK + 1)
    with ObjectReceiver.open(tmp_path, digest, 2 * CHUNK + 1, CHUNK) as receiver:
        full = memoryview(bytes(CHUNK))
        for bad in (
            Chunk(TRANSFER, 3, 3 * CHUNK, full),
            Chunk(TRANSFER, 1, 0, full),
            Chunk(TRANSFER, 1, CHUNK, full[:-1]),
            Chunk(TRANSFER, 2, 2 * CHUNK, full),
        ):
            with pytest.raises(ProtocolError):
                receiver.accept(bad)
        assert receiver.ranges == ()


def test_altered_object_is_refused_and_its_partial_removed(tmp_path: Path) -> None:
    path, digest = make(tmp_path, 2 * CHUNK)
    other, _ = make(tmp_path, 2 * CHUNK, seed=1)
    store = ObjectStore(tmp_path / "store")
    receiver = ObjectReceiver.open(tmp_path / "parts", digest, 2 * CHUNK, CHUNK)
    for source, index in ((path, 0), (other, 1)):
        payload = source.read_bytes()[index * CHUNK : (index + 1) * CHUNK]
        receiver.accept(Chunk(TRANSFER, index, index * CHUNK, memoryview(payload)))
    with pytest.raises(ContainerError, match="altered"):
        receiver.finish(store)
    assert list(store.digests()) == []
    assert list((tmp_path / "parts").iterdir()) == []


def test_an_incomplete_object_does_not_finish(tmp_path: Path) -> None:
    _, digest = make(tmp_path, 2 * CHUNK)
    with ObjectReceiver.open(tmp_path, digest, 2 * CHUNK, CHUNK) as receiver, pytest.raises(StateError):
        receiver.finish(ObjectStore(tmp_path / "store"))


def test_another_chunk_size_starts_anew(tmp_path: Path) -> None:
    path, digest = make(tmp_path, 4 * CHUNK)
    with ObjectReceiver.open(tmp_path, digest, 4 * CHUNK, CHUNK) as receiver:
        receiver.accept(Chunk(TRANSFER, 0, 0, memoryview(path.read_bytes()[:CHUNK])))
    with ObjectReceiver.open(tmp_path, digest, 4 * CHUNK, 2 * CHUNK) as receiver:
        assert receiver.ranges == ()


@pytest.mark.parametrize("damage", [b"", b"HAV", b"\xff" * 30])
def test_a_damaged_have_file_starts_anew(tmp_path: Path, damage: bytes) -> None:
    path, digest = make(tmp_path, 2 * CHUNK)
    with ObjectReceiver.open(tmp_path, digest, 2 * CHUNK, CHUNK) as receiver:
        receiver.accept(Chunk(TRANSFER, 0, 0, memoryview(path.read_bytes()[:CHUNK])))
    (tmp_path / f"{digest}.have").write_bytes(damage)
    with ObjectReceiver.open(tmp_path, digest, 2 * CHUNK, CHUNK) as receiver:
        assert receiver.ranges == ()


def test_a_full_disk_is_told_before_the_first_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StateError, match="No space left"):
        ObjectReceiver.open(tmp_path / "parts", "a" * 64, 4096, CHUNK)
    assert list((tmp_path / "parts").iterdir()) == []


def test_the_sender_says_when_its_object_is_gone_or_short(tmp_path: Path) -> None:
    path, digest = make(tmp_path, 3 * CHUNK)
    sender = sender_of(path)
    with ObjectReceiver.open(tmp_path, digest, 3 * CHUNK, CHUNK) as receiver:
        sender.on_have(receiver.have("dev", 4), 0.0)
    path.write_bytes(b"short")
    with pytest.raises(StateError, match="shorter"):
        sender.next_frame(0.0)
    path.unlink()
    with pytest.raises(StateError, match="cannot be read"):
        sender.next_frame(0.0)


def test_sweeping_partials_keeps_those_named(tmp_path: Path) -> None:
    for digest in ("a" * 64, "b" * 64):
        ObjectReceiver.open(tmp_path, digest, 4096, CHUNK).close()
    assert sweep_partials(tmp_path, {"a" * 64}) == ["b" * 64]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a" * 64 + ".have", "a" * 64 + ".part"]


@pytest.mark.parametrize(("size", "chunk"), [(0, CHUNK), (1 << 31, CHUNK), (10, 0), (10, 1 << 20)])
def test_sizes_outside_the_contract_are_refused(tmp_path: Path, size: int, chunk: int) -> None:
    with pytest.raises(ProtocolError):
        ObjectReceiver.open(tmp_path, "a" * 64, size, chunk)
    with pytest.raises(ProtocolError):
        ObjectSender(TRANSFER, tmp_path / "x", size, chunk)


def have_of(ranges: tuple[tuple[int, int], ...], chunks: int) -> Have:
    return Have(device="dev", object="a" * 64, bytes=chunks * CHUNK, chunk_bytes=CHUNK, ranges=ranges)


@given(
    chunks=st.integers(1, 40),
    ranges=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=6).map(tuple),
)
@settings(max_examples=80, deadline=None)
def test_ranges_are_believed_or_refused_never_worse(
    tmp_path_factory: pytest.TempPathFactory, chunks: int, ranges: tuple[tuple[int, int], ...]
) -> None:
    sender = ObjectSender(TRANSFER, Path("nowhere"), chunks * CHUNK, CHUNK)
    try:
        sender.on_have(have_of(ranges, chunks), 0.0)
    except ProtocolError:
        return
    held = {index for first, after in ranges for index in range(first, after)}
    assert held <= set(range(chunks))
    assert sender.complete == (len(held) == chunks)


@given(held=st.sets(st.integers(0, 29)))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ranges_name_exactly_what_is_held(tmp_path: Path, held: set[int]) -> None:
    payload = memoryview(bytes(CHUNK))
    receiver = ObjectReceiver.open(tmp_path, "a" * 64, 30 * CHUNK, CHUNK)
    for index in held:
        receiver.accept(Chunk(TRANSFER, index, index * CHUNK, payload))
    told = decode_as(encode(receiver.have("dev", 2)), Have)
    assert {index for first, after in told.ranges for index in range(first, after)} == held
    assert all(a[1] < b[0] for a, b in zip(told.ranges, told.ranges[1:], strict=False))
    receiver.discard()


@given(seed=st.integers(0, 2**32), window=st.integers(1, 6), chunks=st.integers(1, 25))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_loss_doubling_and_reordering_ends_with_the_same_bytes(
    tmp_path: Path, seed: int, window: int, chunks: int
) -> None:
    random = Random(seed)
    size = chunks * CHUNK - random.randrange(CHUNK)
    path, digest = make(tmp_path, size, seed)
    store = ObjectStore(tmp_path / "store")
    sender = sender_of(path)
    receiver = ObjectReceiver.open(tmp_path / "parts", digest, size, CHUNK)
    up: list[bytes] = []
    down: list[bytes] = [encode(receiver.have("dev", window))]
    now, unacknowledged_most = 0.0, 0
    for _ in range(20_000):
        if receiver.complete:
            break
        now += random.random()
        while (frame := sender.next_frame(now)) is not None:
            up += [frame] * random.choice((0, 1, 1, 1, 2))
            unacknowledged_most = max(unacknowledged_most, sender.in_flight)
        random.shuffle(up)
        if up and random.random() < 0.8:
            data = bytearray(up.pop())
            if random.random() < 0.1:
                data[random.randrange(len(data))] ^= 1 + random.randrange(255)
            try:
                chunk = decode_chunk(data)
                # The rest of the header is the caller's to check against the topic and the transfer.
                if chunk.transfer == TRANSFER:
                    receiver.accept(chunk)
            except ProtocolError:
                pass
            if random.random() < 0.7:
                down.append(encode(receiver.have("dev", window)))
        if random.random() < 0.02:
            receiver.close()
            receiver = ObjectReceiver.open(tmp_path / "parts", digest, size, CHUNK)
        if random.random() < 0.02:
            sender.mark_lost()
        if random.random() < 0.1:  # asked again where it stands
            down.append(encode(receiver.have("dev", window)))
        random.shuffle(down)
        if down and random.random() < 0.8:
            sender.on_have(decode_as(down.pop(), Have), now)
    assert receiver.complete
    assert unacknowledged_most <= window
    assert receiver.finish(store).read_bytes() == path.read_bytes()
