# SPDX-License-Identifier: GPL-3.0-or-later
"""The relays: lossless in both directions, compressed where it pays, and closed when nothing moves."""

from __future__ import annotations

import asyncio
import os
import random
import struct
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from precache_proxy.errors import LifeboatError, ProtocolError, Stalled
from precache_proxy.evacuation.nbd_flushes import Flushes
from precache_proxy.evacuation.packing import PIECE_BYTES, Packer, Unpacker, WindowBudget, level_for
from precache_proxy.evacuation.relay import (
    DISK,
    LIBVIRT,
    RAM,
    Begun,
    JobSockets,
    RelayCounters,
    RelayedConnection,
)


class Pipe:
    """One end of a stream in memory; ``stuck`` acknowledges nothing."""

    def __init__(self) -> None:
        self.inbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.other: Pipe | None = None
        self.stuck = False
        self.reset_by: LifeboatError | None = None
        self.moved_at = asyncio.get_event_loop().time()
        self.unacknowledged = 0

    @property
    def idle_seconds(self) -> float:
        return asyncio.get_running_loop().time() - self.moved_at

    async def send(self, *parts: bytes | bytearray | memoryview) -> None:
        assert self.other is not None
        if self.stuck:
            self.unacknowledged += 1
            return
        self.moved_at = asyncio.get_running_loop().time()
        await self.other.inbox.put(b"".join(bytes(part) for part in parts))

    async def receive(self) -> bytes | None:
        message = await self.inbox.get()
        self.moved_at = asyncio.get_running_loop().time()
        return message

    async def close(self) -> None:
        assert self.other is not None
        if not self.stuck:
            await self.other.inbox.put(None)

    async def drained(self) -> None:
        while self.unacknowledged:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    def reset(self, error: LifeboatError) -> None:
        self.reset_by = error


def pair() -> tuple[Pipe, Pipe]:
    here, there = Pipe(), Pipe()
    here.other, there.other = there, here
    return here, there


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=300),
            st.integers(0, 2**32).map(lambda seed: random.Random(seed).randbytes(70_000)),
            st.integers(1, PIECE_BYTES).map(lambda size: b"page" * (size // 4)),
        ),
        max_size=30,
    )
)
def test_what_is_packed_comes_out_piece_for_piece(pieces: list[bytes]) -> None:
    packer, unpacker = Packer(), Unpacker()
    for piece in pieces:
        assert unpacker.unpack(b"".join(packer.pack(piece))) == piece


def test_random_data_is_soon_no_longer_tried() -> None:
    packer = Packer()
    content = random.Random(1)
    markers = [packer.pack(content.randbytes(128 * 1024))[0] for _ in range(40)]
    assert markers[0] == b"\x01"
    assert markers.count(b"\x00") > 20
    sizes = [len(packer.pack(bytes(128 * 1024))[1]) for _ in range(100)]
    assert min(sizes) < 1000, "and tried again later"


def test_while_the_channel_is_slow_nothing_is_given_up() -> None:
    packer = Packer()
    content = random.Random(1)
    for _ in range(40):
        assert packer.pack(content.randbytes(128 * 1024), waited=True)[0] == b"\x01"


def test_memory_that_repeats_itself_far_away_goes_once() -> None:
    seed = random.Random(2)
    memory = [seed.randbytes(PIECE_BYTES) for _ in range(160)]
    near, far = Packer(), Packer(window_log=26)
    sizes = {
        packer: sum(len(packer.pack(piece, waited=True)[1]) for piece in memory * 2) for packer in (near, far)
    }
    once = len(memory) * PIECE_BYTES
    assert sizes[near] > 1.9 * once
    assert sizes[far] < 1.1 * once


@given(st.lists(st.booleans(), max_size=60))
def test_windows_together_stay_within_their_budget(steps: list[bool]) -> None:
    budget, taken = WindowBudget(1 << 29), list[int]()
    for take in steps:
        if take:
            taken.append(budget.take())
        elif taken:
            budget.give_back(taken.pop())
        large = [log for log in taken if log > 20]
        assert sum(1 << log for log in large) <= 1 << 29
        assert all(20 <= log <= 27 for log in taken)


def test_slow_channels_get_the_strongest_compression() -> None:
    assert level_for(6.25e6) > level_for(50e6) > level_for(1e9)
    assert level_for(None) == level_for(50e6)


def test_where_processors_are_short_a_channel_that_seems_slow_is_not_packed_for() -> None:
    """Four guests of eight were packed at three times the processor's time for a line of 50 MB/s."""
    assert level_for(6.25e6, 0.5) == level_for(6.25e6)
    assert level_for(6.25e6, 0.7) == level_for(50e6)
    for rate in (None, 50e6, 1e9):
        assert level_for(rate, 1.0) == level_for(rate)


@pytest.mark.parametrize("message", [b"\x07abc", b"\x01no zstd frame"])
def test_a_message_that_makes_no_sense_is_refused(message: bytes) -> None:
    with pytest.raises(ProtocolError):
        Unpacker().unpack(message)


@pytest.mark.parametrize(
    "message",
    [
        b"\x01" + zstandard.ZstdCompressor().compress(bytes(64 << 20)),
        b"\x01" + zstandard.ZstdCompressor().compress(bytes(PIECE_BYTES + 1)),
        b"\x00" + bytes(PIECE_BYTES + 4096),
    ],
)
def test_a_few_bytes_that_stand_for_gigabytes_are_refused_and_not_kept(message: bytes) -> None:
    unpacker = Unpacker()
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="a piece has 131072 at most"):
            unpacker.unpack(message)
        assert tracemalloc.get_traced_memory()[1] < 8 * PIECE_BYTES
    finally:
        tracemalloc.stop()


def test_a_window_beyond_ours_takes_no_memory() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28)
    packed = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    message = packed.compress(bytes(1000)) + packed.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    with pytest.raises(ProtocolError, match="does not decompress"):
        Unpacker().unpack(b"\x01" + message)


async def serve(
    tmp_path: Path, stream: Pipe, *, stall_seconds: float = 10.0, link_up: bool = True
) -> tuple[JobSockets, list[LifeboatError]]:
    failures: list[LifeboatError] = []

    async def open_stream(_socket: str) -> Pipe:
        return stream

    sockets = JobSockets(
        tmp_path / "run" / "jobs" / "j1",
        (os.getuid(), os.getgid()),
        open_stream,
        stall_seconds=stall_seconds,
        link_up=lambda: link_up,
        on_failure=failures.append,
    )
    await sockets.listen()
    return sockets, failures


async def test_both_directions_reach_the_other_end_whole(tmp_path: Path) -> None:
    here, there = pair()
    sockets, failures = await serve(tmp_path, here)
    content = os.urandom(100_000) + bytes(3_000_000)
    echo_path = tmp_path / "qemu.sock"

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read(-1))[::-1])
        writer.write_eof()

    server = await asyncio.start_unix_server(echo, echo_path)
    far_reader, far_writer = await asyncio.open_unix_connection(echo_path)
    far = asyncio.create_task(
        RelayedConnection(
            RAM, far_reader, far_writer, there, RelayCounters(), stall_seconds=10, link_up=lambda: True
        ).run()
    )
    reader, writer = await asyncio.open_unix_connection(sockets.path(RAM))
    writer.write(content)
    writer.write_eof()
    assert await reader.read(-1) == content[::-1]
    await far
    assert sockets.counters.raw_bytes[RAM] == len(content)
    assert sockets.counters.packed_bytes[RAM] < 200_000
    assert failures == []
    writer.close()
    server.close()
    await sockets.close()
    assert not sockets.directory.exists()


async def test_a_mirror_that_flushes_after_its_servers_end_ends_in_peace(tmp_path: Path) -> None:
    """QEMU at the destination lets go of the export; the source's says its last words a moment later."""
    here, there = pair()
    path = tmp_path / "disk.sock"
    runs: list[asyncio.Task[None]] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        begun = Begun(flushes=Flushes())
        connection = RelayedConnection(
            DISK, reader, writer, here, RelayCounters(), stall_seconds=10, link_up=lambda: True, begun=begun
        )
        runs.append(asyncio.create_task(connection.run()))

    server = await asyncio.start_unix_server(accept, path)
    reader, writer = await asyncio.open_unix_connection(path)
    flush, disconnect = (struct.pack(">IHHQQQ", 0x21E41C71, 0, kind, 7, 0, 0) for kind in (3, 2))
    writer.write(flush)
    assert struct.unpack(">IHHQQQ", await reader.readexactly(32))[3] == 7, "it has nothing to flush"
    await there.close()
    assert await reader.read() == b""
    writer.write(flush)
    await asyncio.sleep(0.05)
    writer.write(disconnect)
    writer.write_eof()
    await asyncio.wait_for(runs[0], 5)
    assert here.reset_by is None
    assert [await there.inbox.get(), await there.inbox.get()][-1] is None
    writer.close()
    server.close()


async def test_a_job_that_is_over_leaves_no_connection_open_on_either_side(tmp_path: Path) -> None:
    here, _ = pair()
    sockets, _ = await serve(tmp_path, here)
    reader, writer = await asyncio.open_unix_connection(sockets.path(LIBVIRT))
    writer.write(b"hello")
    await asyncio.sleep(0.05)
    await sockets.close()
    assert await asyncio.wait_for(reader.read(), 5) == b""
    assert here.reset_by is not None, "libvirt's socket at the peer is root there"


async def test_only_root_reaches_the_libvirt_socket(tmp_path: Path) -> None:
    sockets, _ = await serve(tmp_path, pair()[0])
    assert sockets.path(LIBVIRT).stat().st_mode & 0o777 == 0o600
    assert sockets.directory.stat().st_mode & 0o777 == 0o700
    await sockets.close()


async def test_an_idle_connection_is_no_stall(tmp_path: Path) -> None:
    here, _ = pair()
    sockets, failures = await serve(tmp_path, here, stall_seconds=0.3)
    reader, writer = await asyncio.open_unix_connection(sockets.path(DISK))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 1.2)
    assert failures == []
    writer.close()
    await sockets.close()


async def test_a_write_after_a_long_idle_time_has_its_own_time_to_be_acknowledged(tmp_path: Path) -> None:
    """Found on the lab: over 180 ms a guest's first write after 10 s was a stall as soon as it was sent."""
    here, _ = pair()
    sockets, failures = await serve(tmp_path, here, stall_seconds=0.6)
    reader, writer = await asyncio.open_unix_connection(sockets.path(DISK))
    await asyncio.sleep(0.9)
    here.stuck = True
    writer.write(b"a write of the guest")
    await asyncio.sleep(0.35)
    here.stuck, here.unacknowledged = False, 0
    here.moved_at = asyncio.get_running_loop().time()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 0.3)
    assert failures == []
    writer.close()
    await sockets.close()


async def test_no_acknowledgement_closes_the_socket_and_says_why(tmp_path: Path) -> None:
    here, _ = pair()
    here.stuck = True
    sockets, failures = await serve(tmp_path, here, stall_seconds=0.3)
    reader, writer = await asyncio.open_unix_connection(sockets.path(DISK))
    writer.write(b"a write of the guest")
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await asyncio.wait_for(reader.readexactly(1), 5)
    assert isinstance(failures[0], Stalled)
    assert isinstance(here.reset_by, Stalled)
    await sockets.close()


async def test_a_link_that_stays_down_closes_even_an_idle_connection(tmp_path: Path) -> None:
    sockets, failures = await serve(tmp_path, pair()[0], stall_seconds=0.3, link_up=False)
    reader, _ = await asyncio.open_unix_connection(sockets.path(RAM))
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await asyncio.wait_for(reader.readexactly(1), 5)
    assert isinstance(failures[0], Stalled)
    await sockets.close()
