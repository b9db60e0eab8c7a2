# SPDX-License-Identifier: GPL-3.0-or-later
"""Connections that are broken by themselves: how that is found out, and what becomes of what they carried."""

from __future__ import annotations

import asyncio
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from precache_proxy.channel import Stream, TrafficClass
from precache_proxy.channel.frames import Frame, FrameParser, FrameType
from precache_proxy.channel.liveness import SILENT_SECONDS, Liveness, SilenceWatch
from precache_proxy.channel.session import Session

from .conftest import PairFactory, WiredFactory, until
from .test_streams import carries, echo

SECOND = 1_000_000_000


class Pings:
    """Two connections that are pinged once a second, and looked at four times as often."""

    def __init__(self) -> None:
        self.slots = {0: Liveness(), 1: Liveness()}
        self.watch = SilenceWatch(0.0)
        self.now = 0.0

    def run(self, seconds: float, *answering: int) -> list[bool]:
        """Which were silent meanwhile."""
        ends, silent = self.now + seconds, [False, False]
        while self.now < ends:
            if self.now % 1 == 0:
                for slot, liveness in self.slots.items():
                    liveness.pinged(self.asked)
                    if slot in answering:
                        assert liveness.answered(self.asked)
            self.look(silent)
            self.now += 0.25
        return silent

    @property
    def asked(self) -> int:
        """The newest ping."""
        return int(self.now) * SECOND

    def look(self, silent: list[bool]) -> None:
        """Once."""
        self.watch.look(self.now, self.slots)
        for slot, liveness in self.slots.items():
            silent[slot] |= liveness.silent


def test_one_that_answers_no_more_is_silent_and_one_that_answers_again_is_not() -> None:
    pings = Pings()
    assert pings.run(20, 0, 1) == [False, False]
    assert pings.run(SILENT_SECONDS + 2, 0) == [False, True]
    assert pings.run(20, 0) == [False, True], "until it answers"
    assert pings.run(1, 0, 1) == [False, False]
    assert pings.run(20, 0, 1) == [False, False]


def test_who_answers_late_is_not_silent() -> None:
    pings = Pings()
    for second in range(30):
        assert pings.run(1, 0) == [False, False]
        if second >= 2:
            assert pings.slots[1].answered((second - 2) * SECOND)


def test_nobody_is_silent_where_all_are() -> None:
    assert Pings().run(60) == [False, False]


def test_a_stall_of_our_own_is_nobodys_silence() -> None:
    """What came meanwhile is read at once from one connection, and behind a copy's data from the other."""
    pings = Pings()
    pings.run(5, 0, 1)
    pings.run(1)
    asked = pings.asked - SECOND
    pings.now += 30
    assert pings.slots[0].answered(asked)
    assert pings.run(2, 0) == [False, False]
    assert pings.slots[1].answered(pings.asked - SECOND)
    assert pings.run(10, 0, 1) == [False, False]


def test_a_stall_between_two_looks_counts_as_little_as_one_of_them() -> None:
    pings = Pings()
    pings.run(5, 0, 1)
    assert pings.run(2, 0) == [False, False]
    pings.now += 30
    silent = [False, False]
    pings.look(silent)
    assert silent == [False, False]
    assert pings.run(SILENT_SECONDS, 0) == [False, True]


def test_a_stall_of_the_peer_is_nobodys_silence() -> None:
    pings = Pings()
    pings.run(5, 0, 1)
    pings.run(30)
    assert pings.slots[0].answered(pings.asked - SECOND), "all of one connection at once"
    assert pings.run(1, 0) == [False, False]
    assert pings.slots[1].answered(pings.asked - SECOND)
    assert pings.run(10, 0, 1) == [False, False]


def test_an_answer_to_a_ping_that_was_never_sent_proves_nothing() -> None:
    liveness = Liveness()
    liveness.told(5, [b"a"])
    liveness.pinged(7)
    assert not liveness.answered(2**64 - 1)
    assert not liveness.answered(6)
    assert liveness.take_unproved() == [b"a"]


def test_what_was_told_before_a_ping_has_come_with_its_answer() -> None:
    liveness = Liveness()
    liveness.told(5, [b"a", b"b"])
    liveness.pinged(7)
    liveness.told(8, [b"c"])
    assert liveness.answered(7)
    assert liveness.take_unproved() == [b"c"]
    assert liveness.take_unproved() == []


async def test_a_loop_that_stood_still_takes_no_connection_for_silent(pair: PairFactory) -> None:
    home, backup = await pair(connections=4)
    backup.handle_stream("echo", echo)
    link = home.links["backup"]
    session = link._session
    await until(lambda: carries(session) == 4)
    stream = await link.open_stream("echo", TrafficClass.PRECACHE, {})
    await until(lambda: all(each.liveness.answered_ns for each in session.connections.values()))
    # Of one the answer waits in its socket meanwhile, of the others nothing does.
    session._ping(session.connections[0])
    session.connections[0].pump()
    time.sleep(SILENT_SECONDS + 2)  # noqa: ASYNC251 this is what is tested
    found: set[int] = set()
    for _ in range(20):
        found |= {slot for slot, each in session.connections.items() if each.liveness.silent}
        await asyncio.sleep(0.05)
    assert found == set()
    await stream.send(b"x")
    assert await stream.receive() == b"x"
    assert link.counters()["resent_wire_bytes"] == 0


async def fall_silent(session: Session, slot: int) -> None:
    """A ping of this connection stays unanswered, for so long as it takes; until its next one is answered."""
    others = [each for each in session.connections.values() if each.slot != slot]
    await until(lambda: all(each.liveness.answered_ns for each in others))
    session.connections[slot].liveness._unanswered.appendleft(1)
    now = time.monotonic()
    for look in range(int(SILENT_SECONDS * 2) + 2):
        session._find_silent(now + look / 2)
    session._silence = SilenceWatch(now)
    assert session.connections[slot].liveness.silent


def next_frames(session: Session, slot: int) -> list[Frame]:
    """What the session would send next on a connection."""
    chunk = session.next_chunk(session.connections[slot]) or b""
    parser = FrameParser()
    parser.buffer()[: len(chunk)] = chunk
    return list(parser.received(len(chunk)))


async def test_a_connection_that_is_silent_by_itself_gets_no_calls(pair: PairFactory) -> None:
    home, _backup = await pair(connections=4)
    session = home.links["backup"]._session
    await until(lambda: carries(session) == 4)
    first, second = session.connections[0], session.connections[1]
    assert session._connection_for_calls() is first
    await fall_silent(session, 0)
    assert session._connection_for_calls() is second, "although it hears of the peer"
    await until(lambda: not first.liveness.silent)
    assert session._connection_for_calls() is first, "it answers again"


async def test_where_few_connections_answer_data_goes_on_them_and_none_is_for_calls_only(
    pair: PairFactory,
) -> None:
    home, backup = await pair(connections=2)
    backup.handle_stream("echo", echo)
    link = home.links["backup"]
    session = link._session
    await until(lambda: carries(session) == 2)
    assert session._connection_for_calls() is None, "two were asked for: both carry data"
    stream = await link.open_stream("echo", TrafficClass.PRECACHE, {})
    await stream.drained()
    await fall_silent(session, 1)
    # Queued, and no turn of the loop in between: nothing goes before it is asked for here.
    sent = asyncio.ensure_future(stream.send(b"x"))
    session._pumping = True
    await asyncio.sleep(0)
    assert next_frames(session, 1) == []
    assert [frame.type for frame in next_frames(session, 0)] == [FrameType.DATA]
    await sent


async def test_what_has_arrived_is_told_again_on_one_that_answers(pair: PairFactory) -> None:
    """An acknowledgement is told once: in a socket whose direction is lost it would stop the other side."""
    home, backup = await pair(connections=4)
    backup.handle_stream("echo", echo)
    stream = await home.links["backup"].open_stream("echo", TrafficClass.PRECACHE, {})
    await stream.send(b"x")
    await stream.receive()
    accepted = backup.links["home"]._accepted
    assert accepted is not None
    await until(lambda: carries(accepted) == 4)
    await asyncio.sleep(0.1)
    # Pings of the peer come on it still, later than anything on the others.
    accepted.connections[0].received_at += 5
    await fall_silent(accepted, 0)
    assert next_frames(accepted, 0) == []
    [told] = next_frames(accepted, 1)
    assert (told.type, told.stream) == (FrameType.ACKNOWLEDGE, stream.identifier)
    accepted._find_silent(time.monotonic())
    assert next_frames(accepted, 1) == [], "once"
    assert accepted._likeliest_first()[-1] is accepted.connections[0]


async def test_one_direction_of_a_connection_that_is_lost_stops_a_copy_for_no_longer_than_pings_take(
    wired: WiredFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pings, one a second, stay unanswered; that nothing comes at all would be seen after 30 s."""
    monkeypatch.setattr("precache_proxy.channel.liveness.SILENT_SECONDS", 1.0)
    home, backup, cable = await wired(connections=4, dead_peer_seconds=30.0)

    async def take(stream: Stream) -> None:
        while await stream.receive() is not None:
            pass

    backup.handle_stream("take", take)
    link = home.links["backup"]
    link.set_rate(4_000_000)
    await until(lambda: carries(link._session) == 4)
    stream = await link.open_stream("take", TrafficClass.PRECACHE, {})
    running = [True]

    async def push() -> None:
        while running[0]:
            await stream.send(bytes(100_000))

    pusher = asyncio.create_task(push())
    await until(lambda: link.counters()["acknowledged_raw_bytes"] > 1_000_000)
    cable.lose_answers(link._session.connections[0]._tls.getsockname()[1])
    clock = asyncio.get_running_loop().time
    seen, changed_at, longest, ends_at = 0, clock(), 0.0, clock() + 8
    while clock() < ends_at:
        acknowledged = int(link.counters()["acknowledged_raw_bytes"])
        if acknowledged != seen:
            longest = max(longest, clock() - changed_at)
            seen, changed_at = acknowledged, clock()
        await asyncio.sleep(0.02)
    longest = max(longest, clock() - changed_at)
    accepted = backup.links["home"]._accepted
    assert accepted is not None
    assert [accepted.connections[slot].liveness.silent for slot in range(4)] == [True, False, False, False]
    assert longest < 5
    running[0] = False
    await pusher


async def test_what_a_silent_connection_was_given_goes_again_before_it_is_closed(wired: WiredFactory) -> None:
    """The way to the peer is lost for all that carry data; their end would be seen after 30 s."""
    home, backup, cable = await wired(connections=4, dead_peer_seconds=30.0)
    got: list[int] = []

    async def take(stream: Stream) -> None:
        while (message := await stream.receive()) is not None:
            got.append(struct.unpack_from(">Q", message)[0])

    backup.handle_stream("take", take)
    link = home.links["backup"]
    link.set_rate(4_000_000)
    await until(lambda: carries(link._session) == 4)
    stream = await link.open_stream("take", TrafficClass.PRECACHE, {})

    async def push() -> None:
        for number in range(300):
            await stream.send(struct.pack(">Q", number), bytes(50_000))
        await stream.close()

    pusher = asyncio.create_task(push())
    await until(lambda: len(got) > 20)
    lost = {slot: link._session.connections[slot] for slot in (1, 2, 3)}
    for each in lost.values():
        cable.lose_questions(each._tls.getsockname()[1])
    await until(lambda: len(got) == 300, 25)
    assert got == list(range(300))
    assert lost.items() <= link._session.connections.items(), "nothing had to wait for their end"
    assert link.counters()["resent_wire_bytes"] > 0
    await pusher
    await stream.drained()


async def test_the_last_acknowledgement_of_a_stream_is_told_again_where_it_was_lost(
    wired: WiredFactory,
) -> None:
    home, backup, cable = await wired(connections=2, dead_peer_seconds=30.0)
    half_closed = asyncio.Event()

    async def take(stream: Stream) -> None:
        await stream.close()
        await stream.drained()
        half_closed.set()
        while await stream.receive() is not None:
            pass

    backup.handle_stream("take", take)
    link = home.links["backup"]
    session, accepted = link._session, backup.links["home"]._accepted
    assert accepted is not None
    await until(lambda: carries(session) == carries(accepted) == 2)
    stream = await link.open_stream("take", TrafficClass.PRECACHE, {})
    await asyncio.wait_for(half_closed.wait(), 10)
    # One connection carries what is sent; the other one the last word, alone, and it is lost there.
    lossy = accepted.connections[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accepted, "_likeliest_first", lambda: [lossy])
        patch.setattr(accepted._dues, "acknowledge", lambda _stream, *, soon: None)
        patch.setattr(session, "_likeliest_first", lambda: [session.connections[0]])
        cable.lose_answers(session.connections[1]._tls.getsockname()[1])
        await stream.send(b"x")
        await stream.close()
        await until(lambda: not accepted.streams)
        await asyncio.sleep(0.2)
    assert stream.identifier in session.streams, "it waits"
    await asyncio.wait_for(stream.drained(), 20)
    assert accepted.connections[1] is lossy, "nothing had to wait for its end"
    await until(lambda: not session.streams)


CHILD = Path(__file__).with_name("one_way_child.py")


@pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "nft", "ip"))),
    reason="needs root, unshare, ip and nft",
)
@pytest.mark.parametrize("lost", ["to-peer", "from-peer"])
def test_packets_that_are_lost_in_one_direction_cost_nothing_but_time(lost: str, tmp_path: Path) -> None:
    """In a network namespace of its own, with the kernel's TCP."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    words = ["unshare", "--net", sys.executable, str(CHILD), lost, str(tmp_path / "pki")]
    done = subprocess.run(words, check=False, capture_output=True, text=True, env=environment, timeout=90)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["whole", "before-their-end", "and-healed"]
