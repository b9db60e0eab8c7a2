# SPDX-License-Identifier: GPL-3.0-or-later
"""Both sides of a job whose connections are opened ahead, a libvirtd, and the channel between in memory."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from precache_proxy.errors import Conflict, LifeboatError, NotFound
from precache_proxy.evacuation import held_opening, libvirt_frames
from precache_proxy.evacuation.arrival import Arrival
from precache_proxy.evacuation.arrival_relays import ArrivalRelays
from precache_proxy.evacuation.opening_ahead import KnownOpenings, OpeningsAhead
from precache_proxy.evacuation.relay import LIBVIRT, JobSockets, header

JOB = "j1"
OPENING = libvirt_frames.OPENING
PREPARE = libvirt_frames.DOMAIN_MIGRATE_PREPARE3_PARAMS
# It comes in when the opening is over, and never again: what a real Prepare carries is long.
REST = libvirt_frames.packet(libvirt_frames.REMOTE_PROGRAM, PREPARE, 0, bytes(9000), serial=77)
PING = libvirt_frames.packet(libvirt_frames.KEEPALIVE_PROGRAM, 1, libvirt_frames.MESSAGE)
EVENT = libvirt_frames.packet(libvirt_frames.REMOTE_PROGRAM, 107, libvirt_frames.MESSAGE, bytes(8))


class Pipe:
    """One end of a stream: what one resets ends the other."""

    peer = "home1"
    idle_seconds = 0.0
    # How long the word of an end is on its way to the source.
    late_seconds = 0.0
    header: dict[str, Any]

    def __init__(self) -> None:
        self.inbox: asyncio.Queue[bytes | LifeboatError | None] = asyncio.Queue()
        self.other: Pipe | None = None
        self.over: LifeboatError | None = None

    async def send(self, *parts: bytes | bytearray | memoryview) -> None:
        assert self.other is not None
        if self.over:
            raise self.over
        self.other.inbox.put_nowait(b"".join(bytes(part) for part in parts))

    async def receive(self) -> bytes | None:
        if self.over:
            raise self.over
        message = await self.inbox.get()
        if isinstance(message, LifeboatError):
            raise message
        return message

    async def close(self) -> None:
        assert self.other is not None
        self.other.inbox.put_nowait(None)

    async def drained(self) -> None: ...

    def reset(self, error: LifeboatError) -> None:
        assert self.other is not None
        other = self.other

        def arrives() -> None:
            other.over = error
            other.inbox.put_nowait(error)

        if self.over is None:
            self.over = error
            self.inbox.put_nowait(error)
            if self.late_seconds:
                asyncio.get_running_loop().call_later(self.late_seconds, arrives)
            else:
                arrives()


def answer_to(raw: bytes) -> bytes:
    """What a libvirtd says to a call of an opening, and to anything else."""
    _, program, _, procedure, _, serial, _ = libvirt_frames.HEADER.unpack_from(raw)
    content = {
        libvirt_frames.AUTH_LIST: bytes.fromhex("0000000100000000"),
        libvirt_frames.CONNECT_SUPPORTS_FEATURE: bytes.fromhex("00000001"),
        PREPARE: bytes(900),
    }.get(procedure, b"")
    return libvirt_frames.packet(program, procedure, libvirt_frames.REPLY, content, serial=serial)


class Libvirtd:
    """Answers packet by packet. ``procedures``: what it was called for, by connection."""

    def __init__(self) -> None:
        self.procedures: list[list[int]] = []
        self.pongs = 0
        self.writers: list[asyncio.StreamWriter] = []
        self.answer: Callable[[bytes], bytes] = answer_to
        self.open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        calls: list[int] = []
        self.procedures.append(calls)
        self.writers.append(writer)
        self.open += 1
        try:
            while True:
                start = await reader.readexactly(28)
                raw = start + await reader.readexactly((libvirt_frames.length_of(start) or 28) - 28)
                program, _, procedure = libvirt_frames.HEADER.unpack_from(raw)[1:4]
                if program == libvirt_frames.KEEPALIVE_PROGRAM:
                    self.pongs += procedure == libvirt_frames.KEEPALIVE_PONG
                    continue
                calls.append(procedure)
                writer.write(self.answer(raw))
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self.open -= 1
            writer.close()


class Ground:
    """Both sides of one job, and the channel between them in memory."""

    def __init__(self, directory: Path) -> None:
        self.libvirtd = Libvirtd()
        self.known = KnownOpenings()
        self.is_admitted = True
        self.knows_ahead = True
        self.ends_are_late_seconds = 0.0
        self.plain: list[str] = []
        self.failures: list[LifeboatError] = []
        self.served: set[asyncio.Task[None]] = set()
        self.far_directory = directory / "far"
        (self.far_directory / JOB).mkdir(parents=True)
        links = {"home1": SimpleNamespace(state="up")}
        self.links = links
        self.relays = ArrivalRelays(self.admitted, self.far_directory, links, 2.0)
        self.ahead = OpeningsAhead(
            "backup1", self.known, self.open_ahead, stall_seconds=5.0, ready_seconds=0.5
        )
        self.sockets = JobSockets(
            directory / "run" / "jobs" / JOB,
            (0, 0),
            self.open_plain,
            stall_seconds=10.0,
            link_up=lambda: True,
            on_failure=self.failures.append,
            ahead=self.ahead,
        )

    def admitted(self, job_id: str, peer: str) -> Arrival:
        if not self.is_admitted or (job_id, peer) != (JOB, "home1"):
            raise Conflict(f"job {job_id}: not admitted here for {peer}; nothing is relayed")
        return Arrival(JOB, "vm", "web1", peer, 1, 7)

    def _open(self, told: dict[str, Any], handler: Callable[[Any], Awaitable[None]]) -> Pipe:
        here, there = Pipe(), Pipe()
        here.other, there.other, there.header = there, here, told
        there.late_seconds = self.ends_are_late_seconds

        async def serve() -> None:
            try:
                await handler(there)
                await there.close()
            except LifeboatError as error:
                there.reset(error)

        task = asyncio.create_task(serve())
        self.served.add(task)
        return here

    async def open_ahead(self, socket: str, requests: Sequence[bytes]) -> Pipe:
        async def unknown(_stream: Any) -> None:
            raise NotFound("stream 'relay-ahead': not known to this proxy")

        handler = self.relays.carry_ahead if self.knows_ahead else unknown
        return self._open(held_opening.header(JOB, socket, requests), handler)

    async def open_plain(self, socket: str) -> Pipe:
        self.plain.append(socket)
        return self._open(header(JOB, socket), self.relays.carry)

    async def close(self) -> None:
        await self.sockets.close()
        await self.ahead.close()
        await self.relays.stop()
        for task in self.served:
            task.cancel()
        await asyncio.gather(*self.served, return_exceptions=True)


@asynccontextmanager
async def ground() -> AsyncIterator[Ground]:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        made = Ground(Path(name))
        patch.setattr(
            "precache_proxy.evacuation.relay.make_job_directory",
            lambda path, _owner: path.mkdir(parents=True),
        )
        patch.setattr("os.chown", lambda *_unused: None)
        libvirt_socket = Path(name) / "libvirt-sock"
        patch.setattr("precache_proxy.evacuation.relay.connect_locally.__defaults__", (libvirt_socket,))
        server = await asyncio.start_unix_server(made.libvirtd.serve, libvirt_socket)
        await made.sockets.listen()
        try:
            yield made
        finally:
            await made.close()
            server.close()


async def soon(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def with_serials(packets: Sequence[bytes]) -> list[bytes]:
    """As a libvirtd numbers them."""
    return [libvirt_frames.with_serial(raw, number) for number, raw in enumerate(packets)]


async def converse(made: Ground, packets: Sequence[bytes]) -> list[bytes]:
    """Be the libvirtd at the source: call after call, each when the one before was answered."""
    reader, writer = await asyncio.open_unix_connection(made.sockets.path(LIBVIRT))
    replies = []
    async with asyncio.timeout(5):
        for raw in packets:
            writer.write(raw)
            start = await reader.readexactly(28)
            replies.append(start + await reader.readexactly((libvirt_frames.length_of(start) or 28) - 28))
    writer.close()
    return replies


def procedures(packets: Sequence[bytes]) -> list[int]:
    return [libvirt_frames.HEADER.unpack_from(raw)[3] for raw in packets]
