# SPDX-License-Identifier: GPL-3.0-or-later
"""A flush that is answered here has nothing to flush there, whatever is under way and however it is cut."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precache_proxy.evacuation import nbd_frames
from precache_proxy.evacuation.nbd_flushes import Flushes, MirrorFlushes

REQUEST = struct.Struct(">IHHQQQ")
READ, WRITE, DISCONNECT, FLUSH, TRIM, ZEROES, BLOCK_STATUS = 0, 1, 2, 3, 4, 6, 7
OWN = 1 << 63
CHANGES = {WRITE, TRIM, ZEROES}
PAYLOAD = 1 << 5


def request(kind: int, cookie: int, payload: bytes = b"") -> bytes:
    flags = PAYLOAD if kind == WRITE else 0
    return REQUEST.pack(0x21E41C71, flags, kind, cookie, 0, len(payload)) + payload


def reply(cookie: int, *, error: bool = False, content: bytes = b"", done: bool = True) -> bytes:
    kind = (1 << 15 | 1) if error else (1 if content else 0)
    return REQUEST.pack(0x6E8A278C, int(done), kind, cookie, 0, len(content)) + content


def cookies(data: bytes) -> list[int]:
    """Of replies without content."""
    return [REQUEST.unpack_from(data, at)[3] for at in range(0, len(data), REQUEST.size)]


class Side:
    """A client and a server that keep account; what one says reaches the other when the test says so."""

    def __init__(self) -> None:
        self.flushes = Flushes()
        self.kinds: dict[int, int] = {}
        self.answered: set[int] = set()
        self.to_server = b""
        # at the server: requests that were not answered, and changes that are on disk
        self.waiting: list[int] = []
        self.on_disk: set[int] = set()
        self.promised: dict[int, set[int]] = {}

    def ask(self, kind: int, cookie: int, payload: bytes, cuts: random.Random) -> None:
        self.kinds[cookie] = kind
        if kind == FLUSH:
            self.promised[cookie] = {done for done in self.answered if self.kinds[done] in CHANGES}
        for piece in cut(request(kind, cookie, payload if kind == WRITE else b""), cuts):
            onward, told = self.flushes.outward(piece)
            self.to_server += onward
            self.hear(cookies(told))
        self.serve()

    def serve(self) -> None:
        while len(self.to_server) >= REQUEST.size:
            _, flags, kind, cookie, _, length = REQUEST.unpack_from(self.to_server)
            end = REQUEST.size + (length if flags & PAYLOAD else 0)
            assert len(self.to_server) >= end, "whole packets reach the server"
            if cookie == OWN:
                self.kinds[OWN] = kind
                self.promised[OWN] = {done for done in self.answered if self.kinds[done] in CHANGES}
            assert kind == self.kinds[cookie]
            self.to_server = self.to_server[end:]
            self.waiting.append(cookie)

    def flush_ahead(self) -> None:
        self.to_server += self.flushes.flush()
        self.serve()

    def answer(self, which: int, cuts: random.Random, *, error: bool) -> None:
        if not self.waiting:
            return
        cookie = self.waiting.pop(which % len(self.waiting))
        kind = self.kinds[cookie]
        if kind == FLUSH and not error:
            # only what was answered before the flush came is sure to be on disk
            self.on_disk |= self.promised[cookie]
        said = b""
        if kind == READ:
            said = reply(cookie, content=b"data" * 20, done=False)
        said += reply(cookie, error=error)
        heard = b"".join(self.flushes.inward(piece) for piece in cut(said, cuts))
        assert heard == (b"" if cookie == OWN else said), "the client hears what it has asked, and only that"
        if cookie == OWN:
            return
        if not error:
            self.hear([cookie])
        else:
            self.answered.discard(cookie)

    def hear(self, answered: list[int]) -> None:
        for cookie in answered:
            self.answered.add(cookie)
            if self.kinds[cookie] == FLUSH:
                assert self.promised[cookie] <= self.on_disk, "a flush was answered that was none"


def cut(data: bytes, cuts: random.Random) -> list[bytes]:
    pieces = []
    while data:
        length = cuts.choice([1, 7, 31, 32, 33, 200])
        pieces.append(data[:length])
        data = data[length:]
    return pieces


STEP = st.one_of(
    st.tuples(
        st.just("ask"), st.sampled_from([READ, WRITE, WRITE, FLUSH, FLUSH, FLUSH, TRIM, ZEROES, BLOCK_STATUS])
    ),
    st.tuples(st.just("answer"), st.integers(0, 5)),
    st.tuples(st.just("answer"), st.integers(0, 5)),
    st.tuples(st.just("refuse"), st.integers(0, 5)),
    st.tuples(st.just("flush ahead"), st.just(0)),
)


@given(st.lists(STEP, max_size=60), st.integers(0, 2**32))
def test_every_flush_that_is_answered_keeps_what_it_promises(steps: list[tuple[str, int]], seed: int) -> None:
    side, cuts = Side(), random.Random(seed)
    for cookie, (what, which) in enumerate(steps):
        if what == "ask":
            side.ask(which, cookie, bytes(which * 40), cuts)
        elif what == "flush ahead":
            side.flush_ahead()
        else:
            side.answer(which, cuts, error=what == "refuse")


def test_a_mirrors_end_costs_one_round_trip_instead_of_three() -> None:
    """The requests that QEMU 10.0 was seen to send, and a write before them."""
    flushes = Flushes()
    first = bytes.fromhex("21e41c7100000003000000000000000100000000000000000000000000000000")
    answer = bytes.fromhex("6e8a278c00010000000000000000000100000000000000000000000000000000")
    assert flushes.outward(first) == (b"", answer), "nothing was written by this client"
    write = request(WRITE, 2, bytes(512))
    assert flushes.outward(write) == (write, b"")
    flushes.inward(reply(2))
    assert flushes.outward(first) == (first, b"")
    flushes.inward(answer)
    assert [flushes.outward(first) for _ in range(2)] == [(b"", answer)] * 2
    disconnect = request(DISCONNECT, 3)
    assert flushes.outward(disconnect) == (disconnect, b"")
    assert flushes.answered == 3


def test_what_was_flushed_ahead_costs_the_mirrors_end_no_round_trip() -> None:
    flushes = Flushes()
    assert flushes.flush() == b"", "nothing was written"
    flushes.outward(request(WRITE, 1, bytes(64)))
    assert flushes.flush() == b"", "what is under way cannot be flushed"
    flushes.inward(reply(1))
    assert flushes.flush() == REQUEST.pack(0x21E41C71, 0, FLUSH, OWN, 0, 0)
    assert flushes.flush() == b"", "one at a time"
    assert flushes.inward(reply(OWN)) == b"", "the client has not asked"
    for cookie in (2, 3, 4):
        assert flushes.outward(request(FLUSH, cookie)) == (b"", reply(cookie))


@pytest.mark.parametrize("trouble", ["refused", "written since", "on its way", "second connection"])
def test_a_flush_ahead_that_promises_nothing_spares_none(trouble: str) -> None:
    flushes = Flushes()
    flushes.outward(request(WRITE, 1, bytes(64)))
    flushes.inward(reply(1))
    assert flushes.flush()
    if trouble == "written since":
        flushes.outward(request(WRITE, 2, bytes(64)))
        flushes.inward(reply(2))
    if trouble == "second connection":
        flushes.answer_none()
    if trouble != "on its way":
        refused = trouble == "refused"
        answer = reply(OWN, error=refused, content=b"why it was" if refused else b"")
        assert flushes.inward(answer + reply(9)) == reply(9), "an explanation is not for the client either"
    assert flushes.outward(request(FLUSH, 3)) == (request(FLUSH, 3), b"")
    if trouble == "refused":
        flushes.inward(reply(3))
        flushes.outward(request(WRITE, 4, bytes(64)))
        flushes.inward(reply(4))
        assert flushes.flush() == b"", "one that refuses is not asked again"


def test_no_flush_goes_into_the_middle_of_what_is_said() -> None:
    flushes = Flushes()
    flushes.outward(request(WRITE, 1, bytes(64)))
    flushes.inward(reply(1))
    begun = request(READ, 2)[:9]
    flushes.outward(begun)
    assert flushes.flush() == b"", "within a header"
    flushes.outward(request(READ, 2)[9:])
    flushes.inward(reply(2, content=b"data")[:-2])
    assert flushes.flush() == b""
    flushes.inward(reply(2, content=b"data")[-2:])
    assert flushes.flush()


def test_what_a_server_left_in_the_middle_of_a_reply_is_not_kept() -> None:
    flushes = Flushes()
    assert flushes.inward(reply(1)[:9]) == b""
    assert flushes.inward(b"") == reply(1)[:9]


@pytest.mark.parametrize("trouble", ["refused", "write under way", "write after", "reply cut", "answer owed"])
def test_any_doubt_lets_a_flush_pass(trouble: str) -> None:
    flushes = Flushes()
    flushes.outward(request(WRITE, 1, bytes(64)))
    if trouble != "write under way":
        flushes.inward(reply(1))
    flushes.outward(request(FLUSH, 2))
    flushes.inward(reply(2, error=trouble == "refused"))
    if trouble == "write under way":
        flushes.inward(reply(1))
    if trouble == "write after":
        flushes.outward(request(TRIM, 3))
        flushes.inward(reply(3))
    if trouble in {"reply cut", "answer owed"}:
        flushes.outward(request(READ, 4))
    if trouble == "reply cut":
        flushes.inward(reply(4, content=b"content")[:-3])
    assert flushes.outward(request(FLUSH, 5)) == (request(FLUSH, 5), b"")


@pytest.mark.parametrize("by_server", [True, False])
def test_what_is_not_understood_passes_and_all_after_it(*, by_server: bool) -> None:
    flushes = Flushes()
    strange = b"something else entirely, and long enough"
    begun = request(FLUSH, 1)[:3]
    assert flushes.outward(begun) == (b"", b"")
    if by_server:
        flushes.inward(strange)
        assert flushes.outward(strange) == (begun + strange, b"")
    else:
        assert flushes.outward(strange) == (begun + strange, b"")
    assert flushes.outward(request(FLUSH, 2)) == (request(FLUSH, 2), b"")
    flushes.inward(strange)


def test_what_a_client_left_in_the_middle_of_a_request_is_not_kept() -> None:
    flushes = Flushes()
    assert flushes.outward(request(WRITE, 1)[:9]) == (b"", b"")
    assert flushes.outward(b"") == (request(WRITE, 1)[:9], b"")


FLUSH_FIRST = request(FLUSH, 1)


def answers_flushes(flushes: Flushes | None) -> bool:
    return flushes is not None and flushes.outward(FLUSH_FIRST)[0] == b""


@given(
    st.lists(st.tuples(st.sampled_from([None, "drive-a", "drive-b", "drive-c"]), st.booleans()), max_size=8)
)
def test_of_an_export_with_two_connections_none_is_answered_here(
    connections: list[tuple[str | None, bool]],
) -> None:
    """Also where the first has ended: what it wrote may not be on disk. ``None``: who knows which export."""
    mirrors = MirrorFlushes()
    followed = [
        (export, understood, mirrors.connected(export, understood=understood))
        for export, understood in connections
    ]
    exports = [export for export, _understood in connections]
    for export, understood, flushes in followed:
        alone = None not in exports and exports.count(export) == 1
        assert answers_flushes(flushes) == (understood and alone)


def test_what_is_under_way_passes_whole_when_a_second_connection_comes() -> None:
    mirrors = MirrorFlushes()
    first = mirrors.connected("drive-a", understood=True)
    assert first is not None
    data = request(WRITE, 7, b"x" * 100) + request(FLUSH, 8)
    onward, told = first.outward(data[:40])
    assert mirrors.connected("drive-a", understood=True) is None
    for piece in (data[40:150], data[150:], FLUSH_FIRST, b""):
        more, answered = first.outward(piece)
        onward, told = onward + more, told + answered
    assert (onward, told) == (data + FLUSH_FIRST, b"")


@pytest.mark.parametrize("version", [7_002_000, 10_000_000])
def test_the_export_is_known_once_it_was_named(version: int) -> None:
    requests = nbd_frames.opening("drive-virtio-disk0", version)
    assert [nbd_frames.export_of(requests[:step]) for step in range(6)] == [
        None, None, None, None, "drive-virtio-disk0", "drive-virtio-disk0",
    ]  # fmt: skip
    assert nbd_frames.export_of([nbd_frames.option(nbd_frames.GO)]) is None
