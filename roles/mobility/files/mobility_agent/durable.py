# SPDX-License-Identifier: GPL-3.0-or-later
"""What must be known again after a power cut: a journal of keyed records, and a counter.

The journal is a text file, one line per change: a checksum, a key, the record as JSON or ``null`` for "gone".
Changes are appended and synced in groups, so that thousands of bindings cost a few syncs and not thousands.
A last line that a power cut left half written is dropped: nobody was told yet that it was kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import threading
import zlib
from pathlib import Path
from typing import Any

from mobility_agent.errors import ConfigurationError

logger = logging.getLogger(__name__)

Record = dict[str, Any]

# Rewritten when this many lines say nothing that is still true.
_SPARE_LINES = 4096


def sync_directory(directory: Path) -> None:
    """Make entries created, renamed or removed in ``directory`` durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes) -> None:
    """Replace ``path`` so that after a power cut it holds either the old or the new content."""
    beside = path.with_name(path.name + ".new")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o640)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    beside.replace(path)
    sync_directory(path.parent)


def raise_counter(path: Path) -> int:
    """The number after the one in ``path`` (1 the first time), durable before it is returned."""
    before = 0
    with contextlib.suppress(FileNotFoundError, ValueError):
        before = int(path.read_text())
    after = before % 0xFFFFFFFF + 1
    write_whole(path, f"{after}\n".encode())
    return after


def _line(key: str, record: Record | None) -> bytes:
    text = json.dumps([key, record], separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> tuple[str, Record | None] | None:
    sum_text, _unused, text = line.partition(b" ")
    try:
        if int(sum_text, 16) != zlib.crc32(text.rstrip(b"\n")):
            return None
        key, record = json.loads(text)
    except ValueError:
        return None
    return str(key), record


class _Written(asyncio.Event):
    """Set when a group of changes is durable, or could not be made so."""

    def __init__(self) -> None:
        super().__init__()
        self.failure: OSError | None = None

    def end(self, failure: OSError | None) -> None:
        """Tell who waits."""
        self.failure = failure
        self.set()


class Journal:
    """Keyed records that survive. One process at a time; all calls from one event loop.

    The disk is written to by a thread, one write at a time: heartbeats go on while it works.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = -1
        self._live: dict[str, bytes] = {}
        self._lines = 0
        # Of the file: the thread that writes, and the loop's where it opens and closes.
        self._lock = threading.Lock()
        # A write has begun, or failed: what the end of the file holds is not known, and what was to be in it
        # is in ``_live`` alone.
        self._torn = False
        self._waiting: list[bytes] = []
        self._task: asyncio.Task[None] | None = None
        self._next, self._writing = _Written(), _Written()
        self._writing.set()

    def open(self) -> dict[str, Record]:
        """Read what is there and get ready to append. Raises ConfigurationError when it cannot be read."""
        records: dict[str, Record] = {}
        content = b""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ConfigurationError(f"{self._path}: cannot be read ({error}); run as root") from error
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            parsed = _parse(line) if line.endswith(b"\n") else None
            if parsed is None:
                where = "the last line" if number == len(lines) else f"line {number}"
                logger.warning("%s: %s is damaged and was left out", self._path, where)
                continue
            key, record = parsed
            if record is None:
                records.pop(key, None)
            else:
                records[key] = record
        self._live = {key: _line(key, record) for key, record in records.items()}
        self._lines = len(self._live)
        self._replace(b"".join(self._live.values()))
        return records

    def _replace(self, content: bytes) -> None:
        write_whole(self._path, content)
        before, self._file = self._file, os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        if before >= 0:
            os.close(before)

    def put(self, key: str, record: Record) -> None:
        """Remember ``record``; durable once :meth:`commit` returns."""
        line = _line(key, record)
        self._live[key] = line
        self._waiting.append(line)

    def remove(self, key: str) -> None:
        """Forget ``key``; durable once :meth:`commit` returns."""
        if self._live.pop(key, None) is not None:
            self._waiting.append(_line(key, None))

    async def commit(self) -> None:
        """Return when everything put and removed so far is durable. Callers share one sync.

        Raises OSError when the disk does not take it.
        """
        if self._waiting:
            written = self._next
            if self._task is None:
                self._task = asyncio.create_task(self._write())
        else:
            written = self._writing
        await written.wait()
        if written.failure is not None:
            raise written.failure

    async def _write(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = b"".join(self._waiting), []
                group = self._begin_group()
                # A thread that never began (the executor is going, the task is cancelled) has kept nothing.
                failure: OSError | None = self._unwritten()
                try:
                    await asyncio.to_thread(self._store, batch, self._whole_if_due(batch))
                    failure = None
                except OSError as error:
                    logger.error("%s: not written: %s", self._path, error)
                    failure = error
                finally:
                    group.end(failure)
        finally:
            self._task = None
            if self._waiting:
                # Nobody else would tell those who wait for the group that has not begun. Its lines stay, for
                # the next commit.
                self._begin_group().end(self._unwritten())

    def _unwritten(self) -> OSError:
        return OSError(errno.ECANCELED, f"{self._path}: ended before it was written")

    def _begin_group(self) -> _Written:
        """What was put so far is one group, and what is put from now on belongs to the next."""
        self._writing, self._next = self._next, _Written()
        return self._writing

    def _whole_if_due(self, batch: bytes) -> bytes | None:
        """What the file shall hold in all, where ``batch`` is not to be appended to what it holds.

        Taken here in the loop, at one instant: what is put while it is being written waits for its turn, and
        is appended to the new file.
        """
        self._lines += batch.count(b"\n")
        whole = None
        if self._torn or self._lines > 2 * len(self._live) + _SPARE_LINES:
            whole = b"".join(self._live.values())
            self._lines = len(self._live)
        # Until it is there, closing would have to write all of it.
        self._torn = True
        return whole

    def _store(self, batch: bytes, whole: bytes | None) -> None:
        with self._lock:
            if self._file < 0:
                # Closed since it was asked for; closing wrote everything, if it could.
                if self._torn:
                    raise OSError(errno.EIO, "closed before it was written")
                return
            if whole is None:
                self._append(batch)
            else:
                self._replace(whole)
            self._torn = False

    def _append(self, batch: bytes) -> None:
        written = os.write(self._file, batch)
        if written < len(batch):
            # On a disk that is nearly full the kernel takes what fits.
            raise OSError(errno.ENOSPC, f"only {written} of {len(batch)} octets fitted")
        os.fdatasync(self._file)

    def close(self) -> None:
        """Write what is left and let go of the file; waits for a write that is under way."""
        with self._lock:
            if self._file < 0:
                return
            failure: OSError | None = None
            try:
                if self._torn:
                    self._replace(b"".join(self._live.values()))
                    self._torn = False
                elif self._waiting:
                    self._append(b"".join(self._waiting))
            except OSError as error:
                logger.error("%s: not written: %s", self._path, error)
                failure = error
            # Their turn will not come any more: who waits hears of it here.
            self._waiting = []
            self._begin_group().end(failure)
            os.close(self._file)
            self._file = -1
