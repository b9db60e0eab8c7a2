# SPDX-License-Identifier: GPL-3.0-or-later
"""One image being written: a qemu-nbd, its client, and many requests in flight that keep their meaning."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, Self

from precache_proxy.blocks.export import Export, open_export
from precache_proxy.blocks.nbd import Buffer, NbdClient
from precache_proxy.units import MIB

IN_FLIGHT = 16
# Written back as we go, or sealing a large generation would end in one long fsync.
_WRITE_BACK_BYTES = 128 * MIB


class ImageWriter:
    """Writes land in the order in which they were asked for where they overlap. End by finish or abort."""

    def __init__(self, path: Path, subject: str, export: Export, client: NbdClient) -> None:
        self.path = path
        self.subject = subject
        self._export = export
        self._client = client
        self._flying: dict[asyncio.Task[None], tuple[int, int]] = {}
        self._failure: BaseException | None = None
        # Held from before the first write: an error of writing back is told to descriptors open at that time.
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._unsynced_bytes = 0
        self._write_back: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        path: Path,
        *,
        format: str,  # noqa: A002
        subject: str,
        socket_directory: Path,
        flush_to_disk: bool,
        backing: Sequence[tuple[Path, str]] | None = None,
    ) -> Self:
        """Serve the image and connect to it. Raises what :func:`open_export` and the client raise."""
        export = await open_export(
            path, format=format, writable=True, backing=backing, flush_to_disk=flush_to_disk,
            socket_directory=socket_directory, name="store",
        )  # fmt: skip
        try:
            return cls(path, subject, export, await NbdClient.connect(export.socket, subject=subject))
        except BaseException:
            await export.kill()
            raise

    @property
    def size_bytes(self) -> int:
        """Size of the disk."""
        return self._client.size_bytes

    async def write(self, offset: int, data: Buffer) -> None:
        """Start writing; waits for room only. ``data`` may not change until :meth:`settled`."""
        await self._launch(offset, offset + len(data), self._client.write(offset, data))
        self._unsynced_bytes += len(data)
        if self._unsynced_bytes >= _WRITE_BACK_BYTES:
            self.write_back()

    async def zero(self, offset: int, length: int) -> None:
        """Start making a range zero, as a hole where the format has holes."""
        await self._launch(offset, offset + length, self._client.zero(offset, length))

    async def _launch(self, start: int, end: int, request: Coroutine[Any, Any, None]) -> None:
        try:
            while True:
                self._raise_failure()
                # NBD orders nothing: a block sent in two slices must not end with the older content.
                blocking = [task for task, (s, e) in self._flying.items() if s < end and start < e]
                if not blocking and len(self._flying) < IN_FLIGHT:
                    break
                await asyncio.wait(blocking or self._flying, return_when=asyncio.FIRST_COMPLETED)
        except BaseException:
            request.close()
            raise
        task = asyncio.ensure_future(request)
        self._flying[task] = (start, end)
        task.add_done_callback(self._landed)

    def _landed(self, task: asyncio.Task[None]) -> None:
        self._flying.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None and self._failure is None:
            self._failure = error

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def write_back(self) -> None:
        """Begin to bring to the disk what is in the page cache, without waiting for it."""
        if self._write_back is None or self._write_back.done():
            self._unsynced_bytes = 0
            self._write_back = asyncio.create_task(asyncio.to_thread(os.fdatasync, self._descriptor))
            self._write_back.add_done_callback(self._written_back)

    def _written_back(self, task: asyncio.Task[None]) -> None:
        # The kernel tells an error of writing back once: what this call learns the seal must know.
        if not task.cancelled() and (error := task.exception()) is not None and self._failure is None:
            self._failure = error

    async def settled(self) -> None:
        """Wait until every request so far is answered. Raises the first failure."""
        while self._flying:
            await asyncio.wait(self._flying)
        self._raise_failure()

    async def flush(self) -> None:
        """:meth:`settled`, then flush as far as the export flushes."""
        await self.settled()
        await self.flush_answered()

    async def flush_answered(self) -> None:
        """Flush what was answered before the call; what is written meanwhile does not wait for it."""
        await self._client.flush()

    async def finish(self) -> None:
        """Flush and close the image in order; it is not yet synced. Raises when anything of it failed."""
        try:
            await self.flush()
            await self._client.close()
            await self._export.close()
        except BaseException:
            await self.abort()
            raise

    async def sync(self) -> None:
        """Fsync the image's file, after :meth:`finish`. Raises OSError when any write-back of it failed."""
        if self._write_back is not None:
            await asyncio.wait([self._write_back])
        self._raise_failure()
        await asyncio.to_thread(os.fsync, self._descriptor)
        self.release()

    async def abort(self) -> None:
        """End at once, whatever is in flight; the image is worthless, or was flushed before."""
        for task in list(self._flying):
            task.cancel()
        await asyncio.gather(*self._flying, return_exceptions=True)
        await self._client.close()
        await self._export.kill()
        if self._write_back is not None:
            await asyncio.wait([self._write_back])
        self.release()

    def release(self) -> None:
        """Give the descriptor back."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
