# SPDX-License-Identifier: GPL-3.0-or-later
"""An NBD client for asyncio: libnbd's state machine driven by its descriptor, many requests in flight."""

from __future__ import annotations

import asyncio
import errno
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import nbd

from precache_proxy.blocks.buffers import BufferPool
from precache_proxy.blocks.extents import Extents
from precache_proxy.errors import HypervisorError, InvalidInput, LifeboatError, NoSpace
from precache_proxy.units import GIB, MIB

Buffer = bytes | bytearray | memoryview
ALLOCATION = "base:allocation"
ALLOCATION_DEPTH = "qemu:allocation-depth"
STATE_HOLE = 1
STATE_ZERO = 2
# What QEMU takes in one request; a server that names a smaller limit is obeyed.
_LARGEST_REQUEST_BYTES = 32 * MIB
_LARGEST_ZERO_BYTES = GIB
_LARGEST_STATUS_BYTES = GIB


def dirty_bitmap(name: str) -> str:
    """The meta context of a dirty bitmap."""
    return f"qemu:dirty-bitmap:{name}"


def is_dirty(flags: int) -> bool:
    """Whether flags of a dirty bitmap's context say that a range changed."""
    return bool(flags & 1)


def reads_zero(flags: int) -> bool:
    """Whether flags of the allocation context say that a range reads as zeroes."""
    return bool(flags & STATE_ZERO)


class NbdClient:
    """One connection; any number of requests at once. They raise NoSpace, HypervisorError or InvalidInput."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.size_bytes = 0
        self.read_only = True
        self.contexts: tuple[str, ...] = ()
        self.minimum_block_bytes = 1
        self.largest_request_bytes = _LARGEST_REQUEST_BYTES
        self._handle: Any = nbd.NBD()
        self._loop = asyncio.get_running_loop()
        self._descriptor = -1
        self._writer_watched = False
        self._ready: asyncio.Future[None] | None = None
        self._waiting: dict[int, tuple[asyncio.Future[None], str]] = {}
        self._failure: LifeboatError | None = None
        self._pool = BufferPool()

    @classmethod
    async def connect(
        cls, socket: Path, export_name: str = "", contexts: Sequence[str] = (), *, subject: str = ""
    ) -> Self:
        """Connect and negotiate. A context that the server does not offer raises HypervisorError.

        ``subject`` is what errors call the thing that is read or written (default: the socket).
        """
        client = cls(subject or str(socket))
        handle = client._handle
        handle.set_export_name(export_name)
        handle.set_pread_initialize(False)
        # The end of an image may be no multiple of the block size: that is for the server to judge.
        handle.set_strict_mode(handle.get_strict_mode() & ~nbd.STRICT_ALIGN)
        for context in contexts:
            handle.add_meta_context(context)
        client._ready = client._loop.create_future()
        try:
            handle.aio_connect_unix(str(socket))
            client._watch()
            client._advance()
            await client._ready
            client.size_bytes = handle.get_size()
            client.read_only = handle.is_read_only()
            client.minimum_block_bytes = handle.get_block_size(nbd.SIZE_MINIMUM) or 1
            client.largest_request_bytes = min(
                handle.get_block_size(nbd.SIZE_MAXIMUM) or _LARGEST_REQUEST_BYTES, _LARGEST_REQUEST_BYTES
            )
            missing = [context for context in contexts if not handle.can_meta_context(context)]
        except nbd.Error as error:
            client._shut()
            raise client._translate(error, "connecting") from error
        except BaseException:
            client._shut()
            raise
        client.contexts = tuple(contexts)
        if missing:
            client._shut()
            raise HypervisorError(
                f"{client.subject}: the NBD server does not offer {', '.join(missing)};"
                " a bitmap of that name is not there or is inconsistent"
            )
        return client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -- requests ----------------------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> memoryview:
        """``length`` bytes at ``offset``, whatever the server's block size and limits are."""
        self._check(offset, length)
        block = self.minimum_block_bytes
        start = offset - offset % block
        end = min(-(-(offset + length) // block) * block, self.size_bytes)
        view = self._pool.take(end - start)
        # Plain buffers, not nbd.Buffer: libnbd 1.14 never frees what an nbd.Buffer holds.
        limit = self.largest_request_bytes - self.largest_request_bytes % block
        requests = [
            self._submit(
                "aio_pread", view[at - start : min(end, at + limit) - start], at,
                what=f"reading {min(end - at, limit)} bytes at offset {at}",
            )
            for at in range(start, end, limit)
        ]  # fmt: skip
        await self._all(requests)
        return view[offset - start : offset - start + length]

    async def read_extents(
        self, extents: Extents | Iterable[tuple[int, int]], *, request_bytes: int = MIB, in_flight: int = 16
    ) -> AsyncIterator[tuple[int, int, memoryview]]:
        """``(offset, length, data)`` in ascending order, ``in_flight`` requests ahead of the consumer."""
        ranges = extents if isinstance(extents, Extents) else Extents(extents)
        pieces = ranges.pieces(request_bytes)
        ahead: deque[tuple[int, int, asyncio.Task[memoryview]]] = deque()
        try:
            while True:
                while len(ahead) < in_flight and (piece := next(pieces, None)) is not None:
                    ahead.append((*piece, asyncio.ensure_future(self.read(*piece))))
                if not ahead:
                    return
                offset, length, task = ahead[0]
                data = await task
                ahead.popleft()
                yield offset, length, data
        finally:
            for _unused, _unused, task in ahead:
                task.cancel()
            await asyncio.gather(*(task for _unused, _unused, task in ahead), return_exceptions=True)

    async def write(self, offset: int, data: Buffer) -> None:
        """Write ``data``, which may not change until this returns; not ordered against other requests."""
        view = memoryview(data)
        self._check(offset, len(view))
        limit = self.largest_request_bytes
        await self._all([
            self._submit(
                "aio_pwrite", view[at : at + limit], offset + at,
                what=f"writing {min(len(view) - at, limit)} bytes at offset {offset + at}",
            )
            for at in range(0, len(view), limit)
        ])  # fmt: skip

    async def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes; the server may punch a hole."""
        self._check(offset, length)
        for at in range(offset, offset + length, _LARGEST_ZERO_BYTES):
            part = min(_LARGEST_ZERO_BYTES, offset + length - at)
            await self._submit("aio_zero", part, at, what=f"zeroing {part} bytes at offset {at}")

    async def flush(self) -> None:
        """Have all that was written before on stable storage, or as far as the export was told to go."""
        await self._submit("aio_flush", what="flushing")

    async def block_statuses(self, offset: int, length: int) -> dict[str, list[tuple[int, int, int]]]:
        """Per negotiated context: ``(offset, length, flags)`` over the range, equal neighbours merged."""
        self._check(offset, length)
        found: dict[str, list[tuple[int, int, int]]] = {context: [] for context in self.contexts}
        end = offset + length
        while offset < end:
            part = min(end - offset, _LARGEST_STATUS_BYTES)
            reply: dict[str, list[int]] = {}
            await self._submit(
                "aio_block_status", part, offset, _keep(reply),
                what=f"asking for the status of {part} bytes at offset {offset}",
            )  # fmt: skip
            # Each context may answer for less than was asked; go on from the shortest answer.
            reached = min((sum(reply.get(context, [])[::2]) for context in self.contexts), default=part)
            if reached == 0:
                raise HypervisorError(f"{self.subject}: the NBD server told no status at offset {offset}")
            reached = min(reached, part)
            for context in self.contexts:
                _extend(found[context], offset, offset + reached, reply[context])
            offset += reached
        return found

    async def block_status(
        self, context: str, offset: int = 0, length: int | None = None
    ) -> list[tuple[int, int, int]]:
        """``(offset, length, flags)`` of one context over a range (default: the whole image)."""
        if context not in self.contexts:
            raise InvalidInput(f"{self.subject}: {context} was not asked for when connecting")
        if length is None:
            length = self.size_bytes - offset
        return (await self.block_statuses(offset, length))[context]

    async def extents(
        self,
        context: str,
        wanted: Callable[[int], bool],
        offset: int = 0,
        length: int | None = None,
        *,
        limit: int | None = None,
    ) -> Extents:
        """The ranges whose flags in ``context`` are ``wanted``.

        With ``limit`` at most so many ranges: where there are more, what lies in narrow gaps comes along.
        """
        end = self.size_bytes if length is None else offset + length
        found = Extents()
        # Asked for in parts: what the server tells takes ten times the memory of what is kept of it.
        for at in range(offset, end, _LARGEST_STATUS_BYTES):
            for start, size, flags in await self.block_status(
                context, at, min(_LARGEST_STATUS_BYTES, end - at)
            ):
                if wanted(flags):
                    found.add(start, start + size)
            if limit is not None and len(found) > 2 * limit:
                found = found.coarsened(limit)
        return found if limit is None else found.coarsened(limit)

    async def close(self) -> None:
        """End the connection; requests still in flight fail. Does not flush."""
        if self._descriptor >= 0 and self._failure is None and not self._waiting:
            try:
                self._handle.aio_disconnect()
                self._handle.aio_notify_write()
            except nbd.Error:
                pass  # the server went first
        self._shut()

    # -- libnbd's state machine --------------------------------------------------------------------

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise InvalidInput(
                f"{self.subject}: {length} bytes at {offset} are not inside its {self.size_bytes} bytes"
            )

    def _submit(self, command: str, *arguments: Any, what: str) -> asyncio.Future[None]:
        if self._failure is not None:
            raise self._failure
        try:
            cookie = getattr(self._handle, command)(*arguments)
        except nbd.Error as error:
            failure = self._translate(error, what)
            if self._handle.aio_is_dead() or self._handle.aio_is_closed():
                self._broken(error)
            raise failure from error
        future: asyncio.Future[None] = self._loop.create_future()
        self._waiting[cookie] = (future, what)
        self._advance()
        return future

    @staticmethod
    async def _all(requests: list[asyncio.Future[None]]) -> None:
        # Buffers are libnbd's until their request is answered: wait for all, then tell the first error.
        if len(requests) == 1:
            await requests[0]
        elif requests:
            await asyncio.wait(requests)
            for request in requests:
                request.result()

    def _watch(self) -> None:
        # One of our own: libnbd closes its descriptor as soon as the server is gone, and by the time at which
        # we stop watching it the number may be somebody else's.
        self._descriptor = os.dup(self._handle.aio_get_fd())
        self._loop.add_reader(self._descriptor, self._on_event, nbd.AIO_DIRECTION_READ)

    def _on_event(self, direction: int) -> None:
        handle = self._handle
        try:
            # Another event of the same round may have changed what libnbd waits for.
            if handle.aio_get_direction() & direction:
                if direction == nbd.AIO_DIRECTION_READ:
                    handle.aio_notify_read()
                else:
                    handle.aio_notify_write()
        except nbd.Error as error:
            self._broken(error)
            return
        self._advance()

    def _advance(self) -> None:
        """Settle what is complete and watch for what libnbd wants next."""
        handle = self._handle
        try:
            if self._ready is not None and not self._ready.done():
                if handle.aio_is_ready():
                    self._ready.set_result(None)
            while self._waiting and (cookie := handle.aio_peek_command_completed()) > 0:
                self._settle(cookie)
            if handle.aio_is_dead() or handle.aio_is_closed():
                self._broken(None)  # with nobody waiting, too: it would wake us for ever
                return
            wants_to_write = bool(handle.aio_get_direction() & nbd.AIO_DIRECTION_WRITE)
        except nbd.Error as error:
            self._broken(error)
            return
        if wants_to_write != self._writer_watched:
            self._writer_watched = wants_to_write
            if wants_to_write:
                self._loop.add_writer(self._descriptor, self._on_event, nbd.AIO_DIRECTION_WRITE)
            else:
                self._loop.remove_writer(self._descriptor)

    def _settle(self, cookie: int) -> None:
        future, what = self._waiting.pop(cookie)
        try:
            self._handle.aio_command_completed(cookie)
        except nbd.Error as error:
            if not future.done():
                future.set_exception(self._translate(error, what))
                future.exception()  # a reader that went away need not be told
        else:
            if not future.done():
                future.set_result(None)

    def _broken(self, error: nbd.Error | None) -> None:
        self._failure = (
            HypervisorError(f"{self.subject}: the NBD server closed the connection")
            if error is None
            else self._translate(error, "the NBD connection")
        )
        self._shut()

    def _shut(self) -> None:
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            self._loop.remove_writer(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
        if self._failure is None:
            self._failure = HypervisorError(f"{self.subject}: the NBD connection was closed")
        waiting = [future for future, _unused in self._waiting.values()]
        self._waiting.clear()
        if self._ready is not None:
            waiting.append(self._ready)
        for future in waiting:
            if not future.done():
                future.set_exception(self._failure)
                future.exception()
        self._handle = None  # its last reference: libnbd 1.14 closes a handle no other way

    def _translate(self, error: nbd.Error, what: str) -> LifeboatError:
        number = error.errnum or 0
        words = os.strerror(number) if number else str(error.string)
        message = f"{self.subject}: {what} failed: {words}"
        if number in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            return NoSpace(f"{message}; free space on that file system")
        return HypervisorError(message)


def _keep(reply: dict[str, list[int]]) -> Any:
    def on_extents(context: str, _offset: int, entries: list[int], _error: Any) -> int:
        reply.setdefault(context, []).extend(entries)
        return 0

    return on_extents


def _extend(found: list[tuple[int, int, int]], offset: int, end: int, entries: list[int]) -> None:
    for length, flags in zip(entries[::2], entries[1::2], strict=True):
        part = min(length, end - offset)
        if part <= 0:
            return
        if found and found[-1][2] == flags and found[-1][0] + found[-1][1] == offset:
            found[-1] = (found[-1][0], found[-1][1] + part, flags)
        else:
            found.append((offset, part, flags))
        offset += part
