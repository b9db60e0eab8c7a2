# SPDX-License-Identifier: GPL-3.0-or-later
"""Media: images that VMs only read (CD-ROMs), named by content, carried once, shared by all who have them.

A host knows where content lies in two ways: on its shelf (files that came over the channel, ``<digest>.img``)
and by its index (files of the host's own that were digested, so that what comes home finds its old place).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from precache_proxy import durable
from precache_proxy.blocks import images
from precache_proxy.channel import Channel, Stream
from precache_proxy.errors import IntegrityError, InvalidInput, ProtocolError, StaleEpoch
from precache_proxy.store.generations import translate
from precache_proxy.store.record import check_vm
from precache_proxy.store.records import Record, RecordType, json_record
from precache_proxy.store.settings import require_space
from precache_proxy.units import MIB

logger = logging.getLogger(__name__)

STREAM_KIND = "medium"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PIECE_BYTES = 4 * MIB
SECTOR_BYTES = 512


@dataclass(frozen=True, slots=True)
class Medium:
    """``digest``: SHA-256 of what the guest reads; ``path``: where the VM's present home has it.

    ``plain``: the file at ``path`` is that content itself, not an image format around it.
    """

    digest: str
    size_bytes: int
    path: str
    plain: bool = True

    @classmethod
    def parse(cls, value: Any) -> Medium:
        """From JSON. Raises InvalidInput."""
        try:
            medium = cls(
                str(value["digest"]), int(value["size_bytes"]), str(value["path"]), bool(value["plain"])
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"medium: its description lacks or mistakes {error}") from error
        if not _DIGEST.fullmatch(medium.digest) or not 0 < medium.size_bytes < 2**63:
            raise InvalidInput(f"medium {medium.path}: {medium.size_bytes} bytes, digest {medium.digest!r}")
        return medium


def file_digest(path: Path) -> str:
    """SHA-256 of a plain image as a guest reads it: in whole sectors (blocking)."""
    digest = hashlib.sha256()
    size_bytes = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
            size_bytes += len(piece)
    digest.update(bytes(-size_bytes % SECTOR_BYTES))
    return digest.hexdigest()


class MediaIndex:
    """Files of this host whose content is known, by digest. Methods block: the entries are small files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def remember(self, path: str, medium: Medium, stamp_then: str) -> None:
        """Note durably what a file holds; what was known of that file before is forgotten."""
        durable.make_directory(self._directory, 0o750)
        for entry in self._directory.glob("*.json"):
            if (told := durable.read_json(entry)) and told["path"] == path and entry.stem != medium.digest:
                durable.remove(entry)
        content = {"path": path, "stamp": stamp_then, "size_bytes": medium.size_bytes, "plain": medium.plain}
        durable.write_json(self._directory / f"{medium.digest}.json", content)

    def medium(self, path: str) -> Medium | None:
        """What a file holds, None where that is not known or was changed since."""
        now = images.stamp(path)
        for entry in self._directory.glob("*.json"):
            told = durable.read_json(entry)
            if told and told["path"] == path and told["stamp"] == now:
                return Medium(entry.stem, int(told["size_bytes"]), path, bool(told["plain"]))
        return None

    def plain_file(self, digest: str) -> Path | None:
        """An unchanged file of that content, which a VM can be given as it is."""
        told = durable.read_json(self._directory / f"{digest}.json")
        if told and told["plain"] and told["stamp"] == images.stamp(told["path"]):
            return Path(told["path"])
        return None


class MediaShelf:
    """Media kept on this host for VMs of other hosts, and which VM has which in what drive."""

    def __init__(self, directory: Path, index: MediaIndex, *, minimum_free_bytes: int) -> None:
        self.directory = directory
        self._index = index
        self._minimum_free_bytes = minimum_free_bytes
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def register(self, channel: Channel) -> None:
        """Answer peers on ``channel``."""
        channel.handle_call("media.declare", self._declare)
        channel.handle_stream(STREAM_KIND, self._receive)

    async def start(self) -> None:
        """Drop halves that nobody waits for any more."""

        def work() -> None:
            used = self._used()
            for part in self.directory.glob(".*.part"):
                if part.name[1:-5] not in used:
                    durable.remove(part)

        await asyncio.to_thread(work)

    # -- what is where -----------------------------------------------------------------------------

    def _record_path(self, vm: str) -> Path:
        return self.directory / "vms" / f"{vm}.json"

    def _file(self, digest: str) -> Path:
        return self.directory / f"{digest}.img"

    def _used(self) -> set[str]:
        told = [durable.read_json(path) for path in (self.directory / "vms").glob("*.json")]
        return {medium["digest"] for record in told if record for medium in record["media"].values()}

    def declared(self, vm: str) -> dict[str, Medium]:
        """Drive -> medium, as the VM's home told last (blocking)."""
        told = durable.read_json(self._record_path(check_vm(vm)))
        return {target: Medium.parse(medium) for target, medium in (told or {"media": {}})["media"].items()}

    def locate(self, digest: str) -> Path | None:
        """A file on this host with that content; one that was here before goes first (blocking)."""
        own = self._index.plain_file(digest)
        if own is not None:
            return own
        return self._file(digest) if self._file(digest).exists() else None

    def claim(self, vm: str, epoch: int) -> None:
        """The VM is about to live here with that epoch: nobody older has a say over its media (blocking)."""
        told = durable.read_json(self._record_path(check_vm(vm)))
        if told is not None and int(told["epoch"]) < epoch:
            durable.write_json(self._record_path(vm), {**told, "epoch": epoch})

    # -- asked by peers ----------------------------------------------------------------------------

    async def _declare(self, peer: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """Take over what media a VM has; answers the digests that have to be sent."""
        vm = check_vm(parameters.get("vm"))
        try:
            epoch = int(parameters["epoch"])
            media = {str(key): Medium.parse(value) for key, value in dict(parameters["media"]).items()}
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"VM {vm}: media.declare lacks or mistakes {error}") from error
        async with self._locks[vm]:
            return {"missing": await asyncio.to_thread(self._take_over, peer, vm, epoch, media)}

    def _take_over(self, peer: str, vm: str, epoch: int, media: Mapping[str, Medium]) -> list[str]:
        path = self._record_path(vm)
        before = durable.read_json(path)
        if before is not None and int(before["epoch"]) > epoch:
            raise StaleEpoch(
                f"VM {vm}: {peer} declares media with epoch {epoch}, here it is at epoch {before['epoch']}: "
                "its home has moved; unprotect it there"
            )
        record = {"peer": peer, "epoch": epoch, "media": {key: asdict(one) for key, one in media.items()}}
        if media and before != record:
            durable.make_directory(path.parent, 0o711)
            durable.write_json(path, record)
        elif not media:
            durable.remove(path)
        dropped = {one["digest"] for one in (before or {"media": {}})["media"].values()} - self._used()
        for digest in dropped:
            if not images.open_elsewhere([self._file(digest)]):
                durable.remove(self._file(digest))
                durable.remove(self._part(digest))
        return [one.digest for one in media.values() if not self._is_here(one)]

    def _is_here(self, medium: Medium) -> bool:
        if self.locate(medium.digest) is not None:
            return True
        # Images that sites keep in step by themselves, at the same place: then nothing has to be carried.
        same = Path(medium.path)
        with contextlib.suppress(OSError):
            before = images.stamp(same)
            if (
                medium.plain
                and same.is_file()
                and -(-same.stat().st_size // SECTOR_BYTES) * SECTOR_BYTES == medium.size_bytes
                and file_digest(same) == medium.digest
                and images.stamp(same) == before
            ):
                self._index.remember(str(same), medium, before)
                return True
        return False

    def _part(self, digest: str) -> Path:
        return self.directory / f".{digest}.part"

    async def _receive(self, stream: Stream) -> None:
        """One medium: from where an earlier attempt ended, checked as a whole, durable before it is told."""
        medium = Medium.parse({"path": "", "plain": True, **stream.header})
        subject = f"medium {medium.digest[:12]}"
        part = self._part(medium.digest)
        async with self._locks[medium.digest]:
            if await asyncio.to_thread(self.locate, medium.digest) is not None:
                await _answer(stream, RecordType.MARKED, {"offset": medium.size_bytes})
                await _answer(stream, RecordType.SEALED, {"digest": medium.digest})
                return
            try:
                await self._receive_into(stream, medium, part, subject)
                await asyncio.to_thread(self._seal, medium, part, subject)
            except OSError as error:
                raise translate(subject, error) from error
            logger.info("%s of %s: %d bytes are here", subject, stream.peer, medium.size_bytes)
        await _answer(stream, RecordType.SEALED, {"digest": medium.digest})

    async def _receive_into(self, stream: Stream, medium: Medium, part: Path, subject: str) -> None:
        held = part.stat().st_size if part.exists() else 0
        position = min(held, medium.size_bytes) // MIB * MIB
        needed_bytes = medium.size_bytes - position
        require_space(subject, self.directory, needed_bytes, self._minimum_free_bytes)
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            os.ftruncate(descriptor, position)
            await _answer(stream, RecordType.MARKED, {"offset": position})
            while True:
                message = await stream.receive()
                if message is None:
                    raise ProtocolError(f"{subject}: it ended after {position} of {medium.size_bytes} bytes")
                record = Record.unpack(message)
                if record.type is RecordType.SEAL:
                    break
                if record.type not in {RecordType.DATA, RecordType.ZERO} or record.offset != position:
                    raise ProtocolError(
                        f"{subject}: record {record.type.name} at {record.offset}, not at {position}"
                    )
                if position + record.length > medium.size_bytes:
                    raise ProtocolError(f"{subject}: more than its {medium.size_bytes} bytes")
                if record.type is RecordType.DATA:
                    await asyncio.to_thread(os.pwrite, descriptor, record.payload, position)
                position += record.length
                # Holes stay holes; the length says how far it is.
                os.ftruncate(descriptor, position)
            if position != medium.size_bytes:
                raise ProtocolError(f"{subject}: {position} of {medium.size_bytes} bytes came")
        finally:
            os.close(descriptor)

    def _seal(self, medium: Medium, part: Path, subject: str) -> None:
        """Digest what is on the disk, not what came: only then it bears its name (blocking)."""
        durable.sync_file(part)
        found = file_digest(part)
        if found != medium.digest:
            durable.remove(part)
            raise IntegrityError(f"{subject}: what came has the digest {found}; it is sent anew")
        os.rename(part, self._file(medium.digest))
        durable.sync_directory(self.directory)


async def _answer(stream: Stream, kind: RecordType, value: dict[str, Any]) -> None:
    await stream.send(*json_record(kind, value).pack())
