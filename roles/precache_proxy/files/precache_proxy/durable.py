# SPDX-License-Identifier: GPL-3.0-or-later
"""Files that must be whole after a power cut: written beside, synced, renamed, directory synced."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from precache_proxy.errors import IntegrityError


def sync_directory(directory: Path) -> None:
    """Make entries created, renamed or removed in ``directory`` durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_parents(paths: Iterable[str | Path]) -> None:
    """Make the names of files that some other process made durable."""
    for directory in {Path(path).parent for path in paths}:
        sync_directory(directory)


def make_directory(directory: Path, mode: int) -> None:
    """Have a directory whose own name is durable, or a power cut takes it with all that was synced in it."""
    made: list[Path] = []
    for path in [directory, *directory.parents]:
        if path.is_dir():
            break
        made.append(path)
    for path in reversed(made):
        path.mkdir(mode=mode, exist_ok=True)
        sync_directory(path.parent)


def sync_file(path: Path) -> None:
    """Make the content of a file that some other process wrote durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes, *, mode: int = 0o640) -> None:
    """Replace ``path`` as a whole: a reader, or a power cut, sees the old content or the new one.

    Of two writers at once, threads or processes, each writes a whole content, and the later one's stays. A
    kill between any two lines leaves at most ``.NAME.new`` beside it, which the next write replaces.
    """
    beside = path.with_name(f".{path.name}.new")
    descriptor = _open_alone(beside, mode)
    try:
        os.truncate(descriptor, 0)
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fchmod(descriptor, mode)
        os.fsync(descriptor)
        os.rename(beside, path)
        sync_directory(path.parent)
    finally:
        os.close(descriptor)


def _open_alone(path: Path, mode: int) -> int:
    """A descriptor of ``path`` that nobody else writes to until it is closed."""
    while True:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, mode)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Who had the lock before us has renamed the file away: then the name is free, or another file's.
        try:
            mine = os.path.samestat(os.fstat(descriptor), os.stat(path))
        except FileNotFoundError:
            mine = False
        if mine:
            return descriptor
        os.close(descriptor)


def write_json(path: Path, value: Any, *, mode: int = 0o640) -> None:
    """:func:`write_bytes` for a JSON value."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
    write_bytes(path, text.encode() + b"\n", mode=mode)


def read_json(path: Path) -> Any:
    """The value in ``path``, or None where there is no such file. Raises IntegrityError on a broken one."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        value = json.loads(content)
    except ValueError as error:
        raise IntegrityError(
            f"{path}: not a whole record ({error}); this program did not write it: move it away and look"
        ) from error
    if value is None:
        raise IntegrityError(f"{path}: holds nothing; this program did not write it: move it away and look")
    return value


def remove(path: Path) -> None:
    """Remove a file for good; one that is not there is no error."""
    path.unlink(missing_ok=True)
    if path.parent.is_dir():
        sync_directory(path.parent)


async def to_its_end(write: Callable[[], None]) -> None:
    """Run a blocking write in a thread. A cancellation is raised when it has ended, for nothing may be
    written behind what is done then; an error of the write goes before it."""
    writing = asyncio.ensure_future(asyncio.to_thread(write))
    cancelled: asyncio.CancelledError | None = None
    while not writing.done():
        try:
            await asyncio.shield(asyncio.wait([writing]))
        except asyncio.CancelledError as error:
            cancelled = error
    writing.result()
    if cancelled is not None:
        raise cancelled
