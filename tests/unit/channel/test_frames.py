# SPDX-License-Identifier: GPL-3.0-or-later
"""Frames byte by byte: what is packed comes out again however it is cut, and nonsense is refused early."""

from __future__ import annotations

import struct
import tracemalloc
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precache_proxy.channel.frames import (
    HEADER,
    MAX_HELLO_BYTES,
    MAX_JSON_BYTES,
    MAX_MESSAGE_BYTES,
    Frame,
    FrameParser,
    FrameType,
    pack,
    pack_acknowledge,
    pack_hello,
    unpack_hello_header,
    unpack_json,
    unpack_u64,
)
from precache_proxy.errors import ProtocolError

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
LENGTHS = {
    FrameType.OPEN: (2, 300),
    FrameType.DATA: (0, 70_000),
    FrameType.RESET: (2, 300),
    FrameType.GOODBYE: (2, 300),
    FrameType.ACKNOWLEDGE: (8, 8),
    FrameType.PING: (8, 8),
    FrameType.PONG: (8, 8),
}


@st.composite
def frames(draw: st.DrawFn) -> tuple[FrameType, int, int, int, int, bytes]:
    kind = draw(st.sampled_from(FrameType))
    length = draw(st.integers(*LENGTHS.get(kind, (0, 0))))
    payload = bytes([draw(st.integers(0, 255))]) * length
    return kind, draw(st.integers(0, 3)), draw(st.integers(0, 3)), draw(U32), draw(U64), payload


def feed(parser: FrameParser, data: bytes, sizes: list[int]) -> list[Frame]:
    """Give ``data`` to the parser in pieces of these sizes, again and again."""
    got: list[Frame] = []
    position = turn = 0
    while position < len(data):
        place = parser.buffer()
        count = min(sizes[turn % len(sizes)], len(place), len(data) - position)
        place[:count] = data[position : position + count]
        got.extend(parser.received(count))
        position, turn = position + count, turn + 1
    return got


@given(st.lists(frames(), max_size=8), st.lists(st.integers(1, 40_000), min_size=1, max_size=8))
def test_frames_come_out_as_they_were_packed(
    written: list[tuple[FrameType, int, int, int, int, bytes]], sizes: list[int]
) -> None:
    data = b"".join(
        pack(kind, payload, flags=flags, traffic_class=traffic_class, stream=stream, sequence=sequence)
        for kind, flags, traffic_class, stream, sequence, payload in written
    )
    got = feed(FrameParser(), data, sizes)
    assert [
        (frame.type, frame.flags, frame.traffic_class, frame.stream, frame.sequence, bytes(frame.payload))
        for frame in got
    ] == written


@given(st.binary(max_size=4000), st.lists(st.integers(1, 500), min_size=1, max_size=4))
def test_garbage_is_refused_or_waits_for_more(data: bytes, sizes: list[int]) -> None:
    with suppress(ProtocolError):
        for frame in feed(FrameParser(), data, sizes):
            assert len(frame.payload) <= MAX_MESSAGE_BYTES


@given(frames(), st.data())
def test_a_changed_header_never_breaks_the_parser(
    written: tuple[FrameType, int, int, int, int, bytes], data: st.DataObject
) -> None:
    kind, flags, traffic_class, stream, sequence, payload = written
    packed = bytearray(
        pack(kind, payload, flags=flags, traffic_class=traffic_class, stream=stream, sequence=sequence)
    )
    packed[data.draw(st.integers(0, HEADER.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with suppress(ProtocolError):
        feed(FrameParser(), bytes(packed), [len(packed)])


@pytest.mark.parametrize(
    ("kind", "length"),
    [
        (FrameType.DATA, MAX_MESSAGE_BYTES + 1),
        (FrameType.DATA, 2**32 - 1),
        (FrameType.OPEN, MAX_JSON_BYTES + 1),
        (FrameType.CLOSE, 1),
        (FrameType.ACKNOWLEDGE, 7),
        (FrameType.PING, 9),
        (FrameType.SYNC, 2**31),
    ],
)
def test_lengths_are_checked_before_memory_is_taken(kind: FrameType, length: int) -> None:
    parser = FrameParser()
    header = struct.pack(">BBBxIIQ", kind, 0, 0, length, 1, 0)
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match=f"{length} bytes"):
            feed(parser, header, [64])
        assert tracemalloc.get_traced_memory()[1] < 256 * 1024
    finally:
        tracemalloc.stop()


def test_unknown_type_names_it() -> None:
    with pytest.raises(ProtocolError, match="type 77"):
        feed(FrameParser(), struct.pack(">BBBxIIQ", 77, 0, 0, 0, 1, 0), [64])


@given(U32, U64, U64, st.booleans())
def test_acknowledgements_carry_sequence_and_limit(
    stream: int, sequence: int, limit: int, gone: bool
) -> None:
    (frame,) = feed(FrameParser(), pack_acknowledge(stream, sequence, limit, gone=gone), [5])
    assert (frame.stream, frame.sequence, unpack_u64(frame.payload), bool(frame.flags)) == (
        stream,
        sequence,
        limit,
        gone,
    )


def test_hello_header_refuses_other_protocols_and_lengths() -> None:
    hello = pack_hello({"name": "home"})
    assert unpack_hello_header(hello[:8]) == (1, len(hello) - 8)
    with pytest.raises(ProtocolError, match="something else"):
        unpack_hello_header(b"GET / HT")
    with pytest.raises(ProtocolError, match="hello of"):
        unpack_hello_header(struct.pack(">4sHH", b"LBCH", 1, MAX_HELLO_BYTES + 1))
    with pytest.raises(ProtocolError, match="shorten"):
        pack_hello({"name": "x" * MAX_HELLO_BYTES})


@given(st.binary(max_size=200))
def test_json_payloads_are_objects_or_refused(data: bytes) -> None:
    with suppress(ProtocolError):
        assert isinstance(unpack_json(data, "test"), dict)
