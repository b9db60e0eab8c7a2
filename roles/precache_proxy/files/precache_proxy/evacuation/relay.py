# SPDX-License-Identifier: GPL-3.0-or-later
"""The job's UNIX sockets, carried over the channel: libvirt's RPC, the RAM stream and the disk stream.

The source listens, the destination connects; libvirt and QEMU on both sides see local sockets at the same
path.
What the source's QEMU sends is compressed on the way (zstd, flushed with every piece, so nothing is held
back).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from precache_proxy.crash_points import drops
from precache_proxy.errors import LifeboatError, ProtocolError, Stalled
from precache_proxy.evacuation.finish_call import FinishCall
from precache_proxy.evacuation.flush_ahead import FlushAhead
from precache_proxy.evacuation.libvirt_frames import DOMAIN_MIGRATE_FINISH3_PARAMS
from precache_proxy.evacuation.libvirt_replies import Replies
from precache_proxy.evacuation.nbd_flushes import Flushes
from precache_proxy.evacuation.pace import Pace
from precache_proxy.evacuation.packing import PIECE_BYTES, Packer, Unpacker, WindowBudget

logger = logging.getLogger(__name__)

LIBVIRT: Final = "libvirt"
RAM: Final = "ram"
DISK: Final = "disk"
SOCKETS: Final = (LIBVIRT, RAM, DISK)
STREAM_KIND: Final = "relay"
LIBVIRT_SOCKET: Final = Path("/run/libvirt/libvirt-sock")
# One for the process, as the memory that it divides.
_windows = WindowBudget()


class RelayStream(Protocol):
    """What a relay needs of a stream of the channel."""

    @property
    def idle_seconds(self) -> float: ...
    async def send(self, *parts: bytes | bytearray | memoryview) -> None: ...
    async def receive(self) -> bytes | None: ...
    async def close(self) -> None: ...
    async def drained(self) -> None: ...
    def reset(self, error: LifeboatError) -> None: ...


@dataclass(slots=True)
class RelayCounters:
    """Bytes of one job by socket: as QEMU sees them (raw) and as sent to the peer (packed)."""

    raw_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SOCKETS, 0))
    packed_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SOCKETS, 0))
    received_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SOCKETS, 0))


@dataclass(slots=True)
class Begun:
    """What of a connection has passed before its relay takes over: a piece that was read here and not sent,
    a message that was received and not unpacked, and the unpacker of those before it. ``flushes`` where it is
    a mirror's that is followed from its first request; ``on_piece`` hears what the local side says."""

    unpacker: Unpacker = field(default_factory=Unpacker)
    piece: bytes = b""
    message: bytes | None = None
    flushes: Flushes | None = None
    on_piece: Callable[[bytes], None] | None = None


class Meet(Protocol):
    """Who may answer a connection before its stream is needed (opening_ahead.py)."""

    async def meet(
        self,
        socket: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        open_plain: Callable[[str], Awaitable[RelayStream]],
        /,
    ) -> tuple[RelayStream, Begun]:
        """The stream that carries it, and what has passed already."""


def takes_all(socket: str, error: LifeboatError) -> bool:
    """Whether a connection that ends by this error ends those of the other sockets."""
    return socket != LIBVIRT or isinstance(error, Stalled)


class RelayedConnection:
    """One connection of libvirt or QEMU, and the stream that carries it."""

    def __init__(
        self,
        socket: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        stream: RelayStream,
        counters: RelayCounters,
        *,
        stall_seconds: float,
        link_up: Callable[[], bool],
        level: int = 1,
        pace: Pace | None = None,
        begun: Begun | None = None,
        on_piece: Callable[[bytes], None] | None = None,
        before_end: Callable[[LifeboatError], Awaitable[None]] | None = None,
        finish: FinishCall | None = None,
    ) -> None:
        self.socket = socket
        self._before_end = before_end
        self._finish = finish
        self._begun = begun or Begun()
        self._on_piece = on_piece or self._begun.on_piece
        self._level = level
        self._pace = pace
        self._reader = reader
        self._writer = writer
        self._stream = stream
        self._counters = counters
        self._stall_seconds = stall_seconds
        self._link_up = link_up
        self._writing_since: float | None = None
        # The local side was told that the other one has ended.
        self._told_end = False
        self._flush_ahead = FlushAhead(self._begun.flushes) if self._begun.flushes is not None else None

    async def run(self) -> None:
        """Carry both directions until both have ended. Raises Stalled, or the stream's reset."""
        tasks = [
            asyncio.create_task(self._outward()),
            asyncio.create_task(self._inward()),
        ]
        watch = asyncio.create_task(self._watch())
        try:
            pending: set[asyncio.Task[None]] = {*tasks, watch}
            while not all(task.done() for task in tasks):
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        except asyncio.CancelledError:
            # Without this the other side would hold its end open, and libvirt's is root there.
            self._stream.reset(
                LifeboatError(f"relay of the {self.socket} socket: its job does not need it any more")
            )
            raise
        except (OSError, LifeboatError) as error:
            reason = error if isinstance(error, LifeboatError) else self._broken(error)
            try:
                # Not where the local side has gone: nobody waits there any more.
                if self._before_end is not None and reason is error and takes_all(self.socket, reason):
                    await self._before_end(reason)
            finally:
                self._stream.reset(reason)
            raise reason from error
        finally:
            for task in (*tasks, watch):
                task.cancel()
            await asyncio.gather(*tasks, watch, return_exceptions=True)
            if self._flush_ahead is not None:
                self._flush_ahead.close()
            self.abort()

    def abort(self) -> None:
        """Close the local socket now, whatever is queued."""
        with contextlib.suppress(RuntimeError):
            self._writer.transport.abort()

    def _broken(self, error: OSError) -> LifeboatError:
        return ProtocolError(f"relay of the {self.socket} socket: the local side broke off ({error})")

    async def _outward(self) -> None:
        # Only memory is worth a window of its own size.
        window_log = _windows.take() if self.socket == RAM else None
        try:
            await self._send(Packer(level=self._level, window_log=window_log) if window_log else Packer())
        finally:
            if window_log:
                _windows.give_back(window_log)

    async def _send(self, packer: Packer) -> None:
        lost = Replies(DOMAIN_MIGRATE_FINISH3_PARAMS) if drops("relay-finish-reply") else None
        clock = asyncio.get_running_loop().time
        waited = False
        async for piece in self._pieces():
            if self._on_piece is not None:
                self._on_piece(piece)
            if self._finish is not None:
                self._finish.outward(piece)
            if lost is not None and self.socket == LIBVIRT and lost.contain(piece):
                raise ProtocolError("relay of the libvirt socket: lost its last reply, as the test asked")
            began = clock()
            parts = packer.pack(piece, waited=waited)
            self._counters.raw_bytes[self.socket] += len(piece)
            self._counters.packed_bytes[self.socket] += len(parts[1]) + 1
            packed = clock()
            if self._pace is not None and self.socket == RAM:
                await self._pace.wait(len(parts[1]) + 1)
            await self._stream.send(*parts)
            waited = clock() - packed > packed - began
        await self._stream.close()

    async def _pieces(self) -> AsyncIterator[bytes]:
        piece, ended, flushes = self._begun.piece, False, self._begun.flushes
        while not ended:
            if not piece and self._flush_ahead is not None:
                reading = asyncio.create_task(self._reader.read(PIECE_BYTES))
                try:
                    while ours := await self._flush_ahead.before(reading):
                        yield ours
                    piece = reading.result()
                finally:
                    reading.cancel()
            elif not piece:
                piece = await self._reader.read(PIECE_BYTES)
            ended = not piece
            if flushes is not None:
                piece, told = flushes.outward(piece)
                # Who has heard the server's end has nothing to be told any more.
                if told and not self._told_end:
                    self._writer.write(told)
            for at in range(0, len(piece), PIECE_BYTES):
                yield piece[at : at + PIECE_BYTES]
            piece = b""

    async def _inward(self) -> None:
        unpacker, message = self._begun.unpacker, self._begun.message
        loop = asyncio.get_running_loop()
        while message is not None or (message := await self._stream.receive()) is not None:
            piece = unpacker.unpack(message)
            message = None
            self._counters.received_bytes[self.socket] += len(piece)
            if self._finish is not None:
                await self._finish.inward(piece)
            self._writing_since = loop.time()
            if self._begun.flushes is not None:
                piece = self._begun.flushes.inward(piece)
            if self._flush_ahead is not None:
                self._flush_ahead.heard()
            self._writer.write(piece)
            await self._writer.drain()
            self._writing_since = None
        if self._begun.flushes is not None:
            self._writer.write(self._begun.flushes.inward(b""))
        self._told_end = True
        if self._writer.can_write_eof():
            self._writer.write_eof()

    async def _watch(self) -> None:
        """Raise Stalled when something is owed and nothing has moved for too long. An idle stream is no
        stall."""
        loop = asyncio.get_running_loop()
        drained: asyncio.Task[None] | None = None
        asked_at = 0.0
        down_since: float | None = None
        try:
            while True:
                await asyncio.sleep(min(1.0, self._stall_seconds / 4))
                now = loop.time()
                if drained is None or drained.done():
                    drained, asked_at = asyncio.create_task(self._stream.drained()), now
                    await asyncio.sleep(0)
                down_since = None if self._link_up() else (down_since or now)
                # What is sent after a long idle time is owed from then on, not for as long as it was idle.
                quiet_seconds = min(self._stream.idle_seconds, now - asked_at)
                owed = not drained.done() and quiet_seconds > self._stall_seconds
                down = down_since is not None and now - down_since > self._stall_seconds
                stuck = self._writing_since is not None and now - self._writing_since > self._stall_seconds
                if owed or down or stuck:
                    where = "the local side takes nothing" if stuck else "the peer acknowledges nothing"
                    raise Stalled(
                        f"relay of the {self.socket} socket: no progress for {self._stall_seconds:.0f} s, "
                        f"{where}; "
                        "it was closed so that the guest does not hang: see the link and try again"
                    )
        finally:
            if drained is not None:
                drained.cancel()
                await asyncio.gather(drained, return_exceptions=True)


class JobSockets:
    """The source's side: listens on the job's sockets and carries each connection to the peer.

    ``before_end`` is awaited before a connection is closed whose peer has failed and that takes the others
    along; ``on_failure`` is called after that.
    """

    def __init__(
        self,
        directory: Path,
        owner: tuple[int, int],
        open_stream: Callable[[str], Awaitable[RelayStream]],
        *,
        stall_seconds: float,
        link_up: Callable[[], bool],
        on_failure: Callable[[LifeboatError], None],
        level: int = 1,
        pace: Pace | None = None,
        ahead: Meet | None = None,
        before_end: Callable[[LifeboatError], Awaitable[None]] | None = None,
        finish: FinishCall | None = None,
    ) -> None:
        self.directory = directory
        self._before_end = before_end
        self._finish = finish
        self._ahead = ahead
        self._level = level
        self._pace = pace
        self.counters = RelayCounters()
        self._owner = owner
        self._open_stream = open_stream
        self._stall_seconds = stall_seconds
        self._link_up = link_up
        self._on_failure = on_failure
        self._servers: list[asyncio.Server] = []
        self._connections: dict[asyncio.Task[None], str] = {}

    def path(self, socket: str) -> Path:
        """Where a socket of the job is, here and at the destination."""
        return self.directory / f"{socket}.sock"

    async def listen(self) -> None:
        """Open the three sockets: libvirt's for root only, the others for QEMU's user as well."""
        await asyncio.to_thread(make_job_directory, self.directory, self._owner)
        for socket in SOCKETS:
            path = self.path(socket)
            path.unlink(missing_ok=True)

            async def accept(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter, socket: str = socket
            ) -> None:
                task = asyncio.current_task()
                assert task is not None
                self._connections[task] = socket
                try:
                    await self._carry(socket, reader, writer)
                finally:
                    self._connections.pop(task, None)

            server = await asyncio.start_unix_server(accept, path, limit=PIECE_BYTES)
            self._servers.append(server)
            path.chmod(0o600)
            if socket != LIBVIRT:
                os.chown(path, *self._owner)

    async def _carry(self, socket: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        finish = self._finish if socket == LIBVIRT else None
        if finish is not None:
            finish.carried_by(writer.get_extra_info("socket"))
        try:
            if self._ahead is None:
                stream, begun = await self._open_stream(socket), Begun()
            else:
                stream, begun = await self._ahead.meet(socket, reader, writer, self._open_stream)
            connection = RelayedConnection(
                socket,
                reader,
                writer,
                stream,
                self.counters,
                stall_seconds=self._stall_seconds,
                link_up=self._link_up,
                level=self._level,
                pace=self._pace,
                begun=begun,
                before_end=self._before_end,
                finish=finish,
            )
            await connection.run()
        except (OSError, LifeboatError) as local_or_ours:
            error = (
                local_or_ours
                if isinstance(local_or_ours, LifeboatError)
                else ProtocolError(
                    f"relay of the {socket} socket: the local side broke off ({local_or_ours})"
                )
            )
            logger.warning("relay of the %s socket ended: %s", socket, error)
            writer.transport.abort()
            if takes_all(socket, error):
                # One dead stream leaves QEMU waiting in the other: all go.
                self._on_failure(error)
        except asyncio.CancelledError:
            writer.transport.abort()
        except Exception as error:
            # An error of ours must not leave libvirt or QEMU waiting, and the guest's writes with them.
            logger.exception("relay of the %s socket ended", socket)
            writer.transport.abort()
            self._on_failure(ProtocolError(f"relay of the {socket} socket: it failed here ({error!r})"))

    def close_connections(self, *sockets: str) -> None:
        """Cut what is open (of these sockets; of all), so that neither libvirt nor QEMU waits for what will
        not come."""
        for task, socket in list(self._connections.items()):
            if not sockets or socket in sockets:
                task.cancel()

    async def close(self) -> None:
        """Close and remove the sockets."""
        for server in self._servers:
            server.close()
        self.close_connections()
        tasks = list(self._connections)
        if tasks:
            await asyncio.wait(tasks, timeout=5)
        self._servers.clear()
        await asyncio.to_thread(remove_job_directory, self.directory)


def make_job_directory(directory: Path, owner: tuple[int, int]) -> None:
    """The job's directory, writable for QEMU's user only (blocking): QEMU at the destination binds there."""
    for parent in (directory.parent.parent, directory.parent):
        parent.mkdir(parents=True, exist_ok=True)
        parent.chmod(0o711)
    directory.mkdir(exist_ok=True, mode=0o700)
    directory.chmod(0o700)
    os.chown(directory, *owner)


def remove_job_directory(directory: Path) -> None:
    """Remove the job's sockets and directory (blocking)."""
    with contextlib.suppress(FileNotFoundError):
        for path in directory.iterdir():
            path.unlink(missing_ok=True)
        directory.rmdir()


async def connect_locally(
    socket: str, path: Path, libvirt_socket: Path = LIBVIRT_SOCKET
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The destination's side of a socket: libvirt's own, or the one that QEMU has opened for this job."""
    target = libvirt_socket if socket == LIBVIRT else path
    try:
        return await asyncio.open_unix_connection(target, limit=PIECE_BYTES)
    except OSError as error:
        raise ProtocolError(
            f"relay of the {socket} socket: {target} does not accept ({error}); see libvirt's log at the "
            f"destination"
        ) from error


def header(job_id: str, socket: str) -> dict[str, Any]:
    """The header of a relay's stream."""
    return {"job": job_id, "socket": socket}
