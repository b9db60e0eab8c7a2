# SPDX-License-Identifier: GPL-3.0-or-later
"""Image files through ``qemu-img``: describe, create, commit, rebase, resize, bitmaps; owners, locks."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from precache_proxy.blocks.export import failure, image_options
from precache_proxy.blocks.launch import Admit, open_gate, start_tool
from precache_proxy.errors import InvalidInput

SECTOR_BYTES = 512


@dataclass(frozen=True, slots=True)
class ImageReference:
    """An image file or block device as QEMU opens it: ``format`` is ``qcow2`` or ``raw``."""

    path: Path
    format: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ImageDescription:
    """What ``qemu-img info`` says of one image of a chain."""

    path: Path
    format: str
    size_bytes: int
    allocated_bytes: int
    backing: str | None
    backing_format: str | None
    bitmaps: tuple[str, ...]
    inconsistent_bitmaps: tuple[str, ...]


def stamp(path: str | Path) -> str:
    """Changes whenever an image was written or exchanged; "" where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return f"{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


async def qemu_img(
    subject: Path | str,
    *arguments: str | Path,
    tolerated_codes: Sequence[int] = (0,),
    admit: Admit | None = None,
) -> str:
    """Run ``qemu-img`` and return its output; ``admit`` is asked before it opens anything.

    Raises what ``admit`` raises, and what :func:`failure` makes of its words.
    """
    command = ["qemu-img", *(os.fspath(argument) for argument in arguments)]
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}
    if admit is None:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env=environment, process_group=0,
        )  # fmt: skip
    else:
        process = await start_tool(*command, environment=environment)
    try:
        if admit is not None:
            await open_gate(process, admit)
        output, errors = await process.communicate()
    except BaseException:
        if process.returncode is None:
            process.kill()
            await asyncio.shield(process.wait())
        raise
    if process.returncode not in tolerated_codes:
        text = errors.decode(errors="replace")
        raise failure(f"{subject}: qemu-img {arguments[0]}", text)
    return output.decode(errors="replace")


def _name(image: Path, format: str) -> str:  # noqa: A002
    return "json:" + json.dumps(image_options(image, format), ensure_ascii=False)


def _plain(image: Path) -> str:
    # Where qemu-img takes no json: name: in an absolute path a colon has no meaning of its own.
    return os.fspath(image.absolute())


async def info(image: Path, format: str | None = None, *, in_use: bool = False) -> list[ImageDescription]:  # noqa: A002
    """The image and its backing chain, topmost first. ``in_use`` reads what another process may be writing.

    Without ``format`` QEMU guesses it, which for a raw disk whose guest wrote a header is a trap: ask with a
    format wherever one is known.
    """
    arguments: list[str] = ["--output=json", "--backing-chain", *(["-U"] if in_use else [])]
    arguments += [_name(image, format)] if format else [_plain(image)]
    # QEMU prints a json: name back for images that were opened by one: only the top is ours to know.
    found = json.loads(await qemu_img(image, "info", *arguments))
    return [_description(entry, image if number == 0 else None) for number, entry in enumerate(found)]


def _description(entry: dict[str, Any], path: Path | None) -> ImageDescription:
    specific = entry.get("format-specific", {}).get("data", {})
    bitmaps = specific.get("bitmaps", []) if isinstance(specific, dict) else []
    return ImageDescription(
        path=path or Path(entry["filename"]),
        format=entry["format"],
        size_bytes=int(entry["virtual-size"]),
        allocated_bytes=int(entry.get("actual-size", 0)),
        backing=entry.get("full-backing-filename") or entry.get("backing-filename"),
        backing_format=entry.get("backing-filename-format"),
        bitmaps=tuple(bitmap["name"] for bitmap in bitmaps),
        inconsistent_bitmaps=tuple(bitmap["name"] for bitmap in bitmaps if "in-use" in bitmap["flags"]),
    )


def rounded_size(size_bytes: int) -> int:
    """QEMU's disks are whole sectors of 512 bytes: the size that an image for this many bytes has."""
    return -(-size_bytes // SECTOR_BYTES) * SECTOR_BYTES


async def create(
    image: Path, size_bytes: int, *, backing: str | None = None, backing_format: str = "qcow2"
) -> None:
    """Create a qcow2 image, which must not be there. ``backing`` is stored as given, unopened; a relative
    one means the image's directory."""
    if image.exists():
        raise InvalidInput(f"{image}: is there already; it is not overwritten")
    command = ["create", "-q", "-f", "qcow2"]
    if backing is not None:
        command += ["-u", "-b", backing, "-F", backing_format]
    await qemu_img(image, *command, _plain(image), str(rounded_size(size_bytes)))
    image.chmod(0o640)  # qemu-img leaves a disk readable to everybody on the host


async def rebase(overlay: Path, backing: str, backing_format: str) -> None:
    """Have ``overlay`` name another backing file of the same content; nothing is copied or compared."""
    target = ("-b", backing, "-F", backing_format)
    await qemu_img(overlay, "rebase", "-q", "-u", "-f", "qcow2", *target, _plain(overlay))


async def check(image: Path) -> dict[str, Any]:
    """``qemu-img check`` of a qcow2 image: its report. Raises HypervisorError when the image is corrupt."""
    # Exit code 3 means leaked clusters only: harmless, and said in the report.
    arguments = ("check", "--output=json", "-f", "qcow2", _plain(image))
    return dict(json.loads(await qemu_img(image, *arguments, tolerated_codes=(0, 3))))


async def resize(image: Path, format: str, size_bytes: int) -> None:  # noqa: A002
    """Grow an image to ``size_bytes`` (whole sectors). Shrinking is refused by qemu-img."""
    await qemu_img(image, "resize", "-q", "-f", format, _plain(image), str(rounded_size(size_bytes)))


async def add_bitmap(
    image: Path, name: str, granularity_bytes: int = 65536, *, admit: Admit | None = None
) -> None:
    """Add an enabled, empty persistent bitmap to a qcow2 image that nobody has open."""
    change = ("--add", "-g", str(granularity_bytes), "-f", "qcow2", _plain(image), name)
    await qemu_img(image, "bitmap", *change, admit=admit)


async def remove_bitmap(image: Path, name: str, *, admit: Admit | None = None) -> None:
    """Remove a persistent bitmap, also an inconsistent one, from a qcow2 image that nobody has open."""
    await qemu_img(image, "bitmap", "--remove", "-f", "qcow2", _plain(image), name, admit=admit)


def locked(path: Path) -> bool:
    """Whether a QEMU process, in any namespace, has the image open: it holds a lock as long as it does."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # struct flock: short type, short whence, off_t start, off_t length (0: to the end), pid_t
        probe = struct.pack("@hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, probe)
        return bool(struct.unpack("@hhqqi4x", answer)[0] != fcntl.F_UNLCK)
    finally:
        os.close(descriptor)


def open_elsewhere(paths: Sequence[Path]) -> set[Path]:
    """Those of ``paths`` that some process has open, as far as /proc and QEMU's locks show."""
    wanted: dict[tuple[int, int], Path] = {}
    held: set[Path] = set()
    for path in paths:
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        wanted[status.st_dev, status.st_ino] = path
        if locked(path):
            held.add(path)
    for process in Path("/proc").iterdir() if wanted else ():
        if not process.name.isdigit():
            continue
        try:
            for descriptor in os.scandir(process / "fd"):
                try:
                    status = descriptor.stat()
                except OSError:
                    continue  # closed meanwhile
                found = wanted.get((status.st_dev, status.st_ino))
                if found is not None:
                    held.add(found)
        except OSError:
            continue  # ended meanwhile
    return held
