# SPDX-License-Identifier: GPL-3.0-or-later
"""Sees to it that the media in a VM's drives are at its peer: beside the passes, which do not wait for it."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from precache_proxy.blocks.extents import Extents
from precache_proxy.blocks.images import ImageReference, stamp
from precache_proxy.channel.settings import TrafficClass
from precache_proxy.errors import Conflict, LifeboatError, ProtocolError
from precache_proxy.hypervisor.domain_xml import Disk
from precache_proxy.source.environment import Environment
from precache_proxy.source.feeder import Feeder
from precache_proxy.source.record import ProtectionRecord
from precache_proxy.source.tracker import VmReference
from precache_proxy.source.views import ClosedImages
from precache_proxy.store.media import STREAM_KIND, Medium
from precache_proxy.store.records import Record, RecordType, json_record
from precache_proxy.units import format_bytes

logger = logging.getLogger(__name__)

RETRY_SECONDS = 30.0
THERE, SENDING, WAITING = "there", "sending", "waiting"


def carried(static: Mapping[str, Disk]) -> dict[str, Disk]:
    """The media that can be carried: files that the guest cannot write to. A host's own drive is none."""
    return {
        target: disk
        for target, disk in static.items()
        if disk.image.kind == "file" and disk.path and (disk.readonly or disk.device == "cdrom")
    }


class MediaCourier:
    """The media of one VM."""

    def __init__(self, environment: Environment, record: ProtectionRecord) -> None:
        self._environment = environment
        self._record = record
        self._told: dict[str, dict[str, Any]] = {}
        # what the peer was told of last: drive -> path and stamp
        self._declared: dict[str, tuple[str, str]] | None = None
        self._task: asyncio.Task[None] | None = None
        self._retry_at = 0.0

    def status(self) -> dict[str, dict[str, Any]]:
        """Drive -> path, state (there, sending, waiting) and a sentence."""
        return {target: dict(told) for target, told in self._told.items()}

    def look(self, static: Mapping[str, Disk]) -> None:
        """Begin to work when the drives hold something else than what the peer knows."""
        media = carried(static)
        wanted = {target: (disk.path, stamp(disk.path)) for target, disk in media.items()}
        if self._task is not None and not self._task.done():
            return
        if wanted == self._declared or (self._declared is None and not wanted and not self._told):
            return
        if time.monotonic() < self._retry_at:
            return
        self._task = asyncio.create_task(self._work(media, wanted), name=f"media-{self._record.name}")

    def ask_again(self) -> None:
        """The peer may have lost what it had: declare at the next look."""
        self._declared, self._retry_at = None, 0.0

    async def stop(self) -> None:
        """End what is under way; the peer keeps what it has got so far."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def forget(self) -> None:
        """Tell the peer that the VM has no media any more: it keeps them for nobody. Raises LifeboatError."""
        await self.stop()
        if self._told:
            await self._declare({})

    # -- the work ----------------------------------------------------------------------------------

    def _tell(self, target: str, disk: Disk, state: str, sentence: str) -> None:
        self._told[target] = {"path": disk.path, "state": state, "sentence": sentence}

    async def _work(self, media: Mapping[str, Disk], wanted: dict[str, tuple[str, str]]) -> None:
        self._told = {}
        for target, disk in media.items():
            self._tell(target, disk, WAITING, "it is looked at")
        try:
            async with self._environment.media.turn(self._record.priority):
                known = {target: await self._medium(target, disk) for target, disk in media.items()}
                missing = await self._declare(known)
                for target, medium in known.items():
                    if medium.digest in missing:
                        size = format_bytes(medium.size_bytes)
                        self._tell(target, media[target], SENDING, f"{size} are on their way")
                        await self._send(target, media[target], medium)
                        missing.discard(medium.digest)
                    self._tell(target, media[target], THERE, f"it is at {self._record.peer}")
        except (LifeboatError, OSError) as error:
            self._retry_at = time.monotonic() + RETRY_SECONDS
            logger.warning("VM %s: its media: %s; tried again", self._record.name, error)
            for target, told in self._told.items():
                if told["state"] != THERE:
                    self._tell(target, media[target], WAITING, str(error))
        else:
            self._declared = wanted

    async def _declare(self, media: Mapping[str, Medium]) -> set[str]:
        record = self._record
        parameters = {
            "vm": record.uuid,
            "epoch": record.epoch,
            "media": {target: asdict(medium) for target, medium in media.items()},
        }
        # The peer may digest a file of its own before it answers.
        answer = await self._environment.link(record.peer).call(
            "media.declare", parameters, timeout_seconds=600
        )
        return {str(digest) for digest in answer["missing"]}

    def _image(self, target: str, disk: Disk) -> ClosedImages:
        # Our reader lets others read, and nobody writes: a start of the VM need not end it.
        reference = ImageReference(Path(disk.path), disk.format, 0)
        vm = VmReference(self._record.uuid, self._record.name)
        return ClosedImages(vm, {target: reference}, socket_directory=self._environment.run_directory / "nbd")

    async def _medium(self, target: str, disk: Disk) -> Medium:
        """What is in a drive, read once for each content. Raises Conflict where it changes meanwhile."""
        index = self._environment.media_index
        known = await asyncio.to_thread(index.medium, disk.path)
        if known is not None:
            return known
        before = stamp(disk.path)
        digest, size_bytes = hashlib.sha256(), 0
        async with self._image(target, disk).open({}, None) as view:
            reader = view.readers[target]
            size_bytes = reader.size_bytes
            async for piece in reader.pieces(Extents([(0, size_bytes)])):
                content = bytes(piece.length) if piece.data is None else piece.data
                await asyncio.to_thread(digest.update, content)
        if not before or stamp(disk.path) != before:
            raise Conflict(f"disk {target}: {disk.path} was changed while it was read; it is read again")
        medium = Medium(digest.hexdigest(), size_bytes, disk.path, plain=disk.format == "raw")
        await asyncio.to_thread(index.remember, disk.path, medium, before)
        return medium

    async def _send(self, target: str, disk: Disk, medium: Medium) -> None:
        record = self._record
        header = {"vm": record.uuid, "digest": medium.digest, "size_bytes": medium.size_bytes}
        link = self._environment.link(record.peer)
        stream = await link.open_stream(STREAM_KIND, TrafficClass.PRECACHE, header, label=record.uuid)
        feeder = Feeder(stream, [target], digest=False)
        try:
            offset = int(_told(await stream.receive(), RecordType.MARKED)["offset"])
            if offset < medium.size_bytes:
                await self._feed(feeder, target, disk, offset)
                await feeder.record(json_record(RecordType.SEAL, {"digest": medium.digest}))
                await feeder.flush()
            _told(await stream.receive(), RecordType.SEALED)
            await stream.close()
        except BaseException as error:
            failure = error if isinstance(error, LifeboatError) else Conflict(f"medium ended: {error!r}")
            stream.reset(failure)
            raise
        finally:
            await feeder.close()
        logger.info(
            "VM %s: medium %s (%s) is at %s", record.name, disk.path, format_bytes(medium.size_bytes),
            record.peer,
        )  # fmt: skip

    async def _feed(self, feeder: Feeder, target: str, disk: Disk, offset: int) -> None:
        async with self._image(target, disk).open({}, None) as view:
            reader = view.readers[target]
            async for piece in reader.pieces(Extents([(offset, reader.size_bytes)])):
                if piece.data is None:
                    await feeder.zero(target, piece.offset, piece.length)
                else:
                    await feeder.data(target, piece.offset, piece.data)


def _told(message: bytes | None, kind: RecordType) -> dict[str, Any]:
    """The JSON of an answer of this kind. Raises ProtocolError."""
    if message is None:
        raise ProtocolError(f"medium: the peer ended the stream without {kind.name}")
    record = Record.unpack(message)
    if record.type is not kind:
        raise ProtocolError(f"medium: record {record.type.name} instead of {kind.name} from the peer")
    return record.json()
