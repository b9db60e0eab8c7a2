# SPDX-License-Identifier: GPL-3.0-or-later
"""A disk image served over NBD on a UNIX socket by a stock ``qemu-nbd`` process of our own.

The listening socket is ours and is passed as systemd would pass it (LISTEN_FDS): a client may
connect before ``qemu-nbd`` is up, and its death is seen as a closed connection; so nothing polls.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket as sockets
import stat
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from precache_proxy.blocks.launch import Admit, open_gate, start_server
from precache_proxy.errors import Conflict, HypervisorError, InvalidInput, LifeboatError, NoSpace, NotFound
from precache_proxy.units import MIB

READY_SECONDS = 30.0
CLOSE_SECONDS = 300.0
_STDERR_TAIL_BYTES = 8192
# A fresh mapping for every request's buffer costs more page faults than the copying costs time.
_ENVIRONMENT = {
    "LC_ALL": "C.UTF-8",
    "MALLOC_MMAP_THRESHOLD_": str(64 * MIB),
    "MALLOC_TRIM_THRESHOLD_": str(64 * MIB),
}
_numbers = count(1)


def image_options(
    image: Path,
    format: str,  # noqa: A002 - QEMU's and libvirt's word
    backing: Sequence[tuple[Path, str]] | None = None,
) -> dict[str, Any]:
    """QEMU's block options for an image file or device: no character of a name has a meaning there.

    ``backing`` None leaves the backing chain that the image names; a sequence of (path, format), topmost
    first, is used in its place, and an empty one opens the image alone.
    """
    name = os.fspath(image.absolute())
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"{os.fsencode(image)!r}: the name is not UTF-8, as QEMU's options must be; rename the file"
        ) from error
    try:
        driver = "host_device" if stat.S_ISBLK(image.stat().st_mode) else "file"
    except OSError as error:
        raise NotFound(f"{image}: cannot be opened ({error.strerror}); see whether it was moved") from error
    options: dict[str, Any] = {"driver": format, "file": {"driver": driver, "filename": name}}
    if backing is not None and format != "raw":
        options["backing"] = image_options(*backing[0], backing[1:]) if backing else None
    return options


def failure(subject: str, text: str) -> LifeboatError:
    """What a QEMU tool said on stderr, as the error class that a caller can act upon."""
    lines = [line for line in text.splitlines() if line.strip()]
    said = "; ".join(line.strip() for line in lines[-3:]) or "it ended without a word"
    if "lock" in said and "Is another process using" in text:
        return Conflict(f"{subject}: in use by another process ({said}); end that process or wait for it")
    if "No space left" in text:
        return NoSpace(f"{subject}: no space left ({said}); free space on that file system")
    if "No such file" in text:
        return NotFound(f"{subject}: no such file ({said})")
    return HypervisorError(f"{subject}: {said}")


class Export:
    """A running ``qemu-nbd``: connect to ``socket``, then ``close`` (clean) or ``kill`` it."""

    def __init__(
        self, image: Path, socket: Path, process: asyncio.subprocess.Process, *, writable: bool
    ) -> None:
        self.image = image
        self.socket = socket
        self.writable = writable
        self.pid = process.pid
        self._process = process
        self._stderr = bytearray()
        self._collector = asyncio.create_task(self._collect())
        self._closed = False

    async def _collect(self) -> None:
        assert self._process.stderr is not None
        while chunk := await self._process.stderr.read(4096):
            self._stderr += chunk
            del self._stderr[:-_STDERR_TAIL_BYTES]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self.close()
        else:
            await self.kill()

    async def _ready(self) -> None:
        """Wait for the server's greeting. Raises what qemu-nbd said when it ended instead."""
        greeting = b""
        try:
            async with asyncio.timeout(READY_SECONDS):
                reader, writer = await asyncio.open_unix_connection(str(self.socket))
                try:
                    greeting = await reader.read(8)
                finally:
                    writer.close()
        except TimeoutError:
            raise HypervisorError(
                f"{self.image}: qemu-nbd not ready within {READY_SECONDS:.0f} s; does the storage answer?"
            ) from None
        except OSError:
            pass  # a refused or reset connection: qemu-nbd has ended, and its own words say why
        if greeting != b"NBDMAGIC":
            await self._process.wait()
            await self._collector
            raise failure(str(self.image), self.stderr)

    @property
    def stderr(self) -> str:
        """The last words of qemu-nbd."""
        return self._stderr.decode(errors="replace")

    async def close(self) -> None:
        """End qemu-nbd so that the image is closed in order. Raises HypervisorError when it did not end well.

        Errors of the closing itself do not reach the exit code: who wrote must flush, and see to it, before.
        """
        if self._closed:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                code = await self._process.wait()
        except BaseException:
            await self.kill()
            raise
        await self._gone()
        if code != 0:
            said = failure(str(self.image), self.stderr)
            raise HypervisorError(f"{self.image}: qemu-nbd ended with exit code {code}: {said.message}")

    async def kill(self) -> None:
        """End qemu-nbd at once: for images that will be thrown away, or were only read."""
        if self._closed:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await asyncio.shield(self._process.wait())
        await self._gone()

    async def _gone(self) -> None:
        self._closed = True
        await self._collector
        self.socket.unlink(missing_ok=True)


def _listen(directory: Path, name: str) -> tuple[sockets.socket, Path]:
    directory.mkdir(mode=0o711, parents=True, exist_ok=True)
    path = directory / f"{name or 'export'}-{os.getpid()}-{next(_numbers)}.sock"
    path.unlink(missing_ok=True)  # only a former process with our number can have left it
    listener = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise InvalidInput(
            f"{path}: cannot listen there ({error}); a socket's path has at most 107 bytes"
        ) from error
    return listener, path


async def open_export(
    image: Path,
    *,
    format: str,  # noqa: A002
    socket_directory: Path,
    writable: bool = False,
    bitmap: str | None = None,
    allocation_depth: bool = False,
    backing: Sequence[tuple[Path, str]] | None = None,
    flush_to_disk: bool = True,
    connections: int = 1,
    name: str = "",
    admit: Admit | None = None,
) -> Export:
    """Serve ``image`` until the export is closed; the default export name is the empty one.

    ``bitmap`` exposes a persistent bitmap as ``qemu:dirty-bitmap:NAME``, ``allocation_depth`` the context
    of that name. ``flush_to_disk`` False has NBD flushes stop at the page cache: for a file that is
    worthless until its writer has synced it as a whole. ``name`` begins the socket's file name.
    ``admit`` is asked before qemu-nbd opens anything.
    Raises what ``admit`` raises, or with qemu-nbd's words Conflict (in use), NoSpace, NotFound, InvalidInput,
    HypervisorError.
    """
    options = image_options(image, format, backing)
    command = ["qemu-nbd", "--persistent", f"--shared={connections}", "--aio=threads"]
    if writable:
        # Zeroes are told to us as such: looking for more in every block would only cost time.
        command += [
            f"--cache={'writeback' if flush_to_disk else 'unsafe'}",
            "--discard=unmap",
            "--detect-zeroes=off",
        ]
    else:
        command.append("--read-only")
    if bitmap is not None:
        command.append(f"--bitmap={bitmap}")
    if allocation_depth:
        command.append("--allocation-depth")
    command.append("json:" + json.dumps(options, ensure_ascii=False))
    listener, path = _listen(socket_directory, name)
    try:
        process = await start_server(
            *command,
            listener=listener.fileno(),
            environment=_ENVIRONMENT | {"PATH": os.environ.get("PATH", os.defpath)},
        )
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        listener.close()  # our copy would keep clients waiting for a qemu-nbd that has ended
    export = Export(image, path, process, writable=writable)
    try:
        await open_gate(process, admit)
        await export._ready()
    except BaseException:
        await export.kill()
        raise
    return export
