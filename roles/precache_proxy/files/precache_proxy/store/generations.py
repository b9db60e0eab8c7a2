# SPDX-License-Identifier: GPL-3.0-or-later
"""Taking one generation: overlays on the chain, all of it or nothing, sealed before it is acknowledged."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

from precache_proxy import durable
from precache_proxy.blocks import images
from precache_proxy.channel import Stream
from precache_proxy.crash_points import crash_point
from precache_proxy.errors import (
    Conflict,
    HypervisorError,
    InvalidInput,
    LifeboatError,
    NoSpace,
    ProtocolError,
)
from precache_proxy.store.record import Layer, ReplicaRecord, SealedGeneration, check_disks
from precache_proxy.store.records import (
    AttachmentCollector,
    GenerationDigest,
    Record,
    RecordType,
    json_record,
)
from precache_proxy.store.replica import Replica, generation_file
from precache_proxy.store.writer import ImageWriter
from precache_proxy.units import MIB

logger = logging.getLogger(__name__)

_AHEAD = 8
_SPACE_CHECK_BYTES = 32 * MIB


@dataclass(frozen=True, slots=True)
class GenerationHeader:
    """A generation stream's header, checked."""

    epoch: int
    generation: int
    leads_from: int
    checkpoint: str
    disks: dict[str, int]
    definition: str
    residual: bool

    @classmethod
    def parse(cls, header: dict[str, Any]) -> GenerationHeader:
        """Raises InvalidInput."""
        try:
            parsed = cls(
                epoch=int(header["epoch"]),
                generation=int(header["generation"]),
                leads_from=int(header["leads_from"]),
                checkpoint=str(header["checkpoint"]),
                disks=check_disks(header["disks"]),
                definition=str(header["definition"]),
                residual=bool(header.get("residual", False)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"generation: its header lacks or mistakes {error}") from error
        if parsed.generation < 1 or parsed.leads_from < 0:
            raise InvalidInput(f"generation {parsed.generation} from {parsed.leads_from}: numbers begin at 1")
        return parsed


class Decoder:
    """Messages to records in a thread of its own: decompressed and digested in the order of the stream."""

    def __init__(self, stream: Stream, digest: GenerationDigest | None) -> None:
        self._stream = stream
        self._digest = digest
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="decoder")
        self._queue: asyncio.Queue[asyncio.Future[Record] | None] = asyncio.Queue(_AHEAD)
        self._receiver = asyncio.create_task(self._receive_all())

    def _decode(self, message: bytes) -> Record:
        record = Record.unpack(message)
        if self._digest is not None:
            self._digest.update(record)
        return record

    async def _receive_all(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while (message := await self._stream.receive()) is not None:
                await self._queue.put(loop.run_in_executor(self._worker, self._decode, message))
        finally:
            await self._queue.put(None)

    async def next(self) -> Record | None:
        """The next record; None at the stream's end. Raises StreamReset, ProtocolError."""
        pending = await self._queue.get()
        if pending is None:
            await self._receiver
            return None
        return await pending

    async def close(self) -> None:
        """End the thread; what was received but not taken is dropped."""
        self._receiver.cancel()
        while not self._queue.empty():
            if (pending := self._queue.get_nowait()) is not None:
                pending.cancel()
        await asyncio.gather(self._receiver, return_exceptions=True)
        self._worker.shutdown(wait=False, cancel_futures=True)


def translate(subject: str, error: OSError) -> LifeboatError:
    """An operating system's error about our own files, for people."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return NoSpace(f"{subject}: no space left ({error}); free space there")
    return HypervisorError(f"{subject}: {error}; look into the host's storage")


class OpenGeneration:
    """The overlays of one generation that is coming in. Ends by :meth:`seal` or :meth:`discard`."""

    def __init__(self, replica: Replica, header: GenerationHeader) -> None:
        self.replica = replica
        self.header = header
        self.subject = f"{replica.subject}: generation {header.generation}"
        self.data_bytes = 0
        self.zero_bytes = 0
        self.records = 0
        self._unchecked_bytes = 0
        self._layers: dict[str, Layer] = {}
        self._writers: dict[str, ImageWriter] = {}

    def _below(self, disk: str) -> tuple[Layer, ...]:
        """The chain that this generation's overlay stands on; none for a disk that is new."""
        record = self.replica.record
        known = record.sealed is not None and disk in record.sealed.disks
        return record.layers.get(disk, ()) if known or disk in record.seeding else ()

    async def begin(self) -> None:
        """Refuse what cannot be; create overlays that must be there even if nothing is written to them."""
        record, header = self.replica.record, self.header
        for disk, size in header.disks.items():
            below = self._below(disk)
            held = below[-1].size_bytes if below else 0
            if images.rounded_size(size) < held:
                raise Conflict(
                    f"{self.replica.disk_subject(disk)}: the disk shrank from {held} to {size} bytes, which a"
                    " replica cannot follow; take the disk out of the protection and protect it again"
                )
            if images.rounded_size(size) > held:
                await self._create(disk)
        stale = [disk for disk in header.disks if disk in record.layers and not self._below(disk)]
        if stale:
            logger.info("%s: %s came back as new disks", self.subject, ", ".join(stale))
        crash_point("store-generation-open")

    async def _create(self, disk: str) -> Layer:
        header = self.header
        file = generation_file(disk, header.epoch, header.generation)
        path = self.replica.path(file)
        # A file of that name is a half generation that recovery found open: it was not sealed.
        if await asyncio.to_thread(images.open_elsewhere, [path]):
            raise Conflict(f"{path}: an unsealed generation that something has open; end that process")
        path.parent.mkdir(mode=0o711, exist_ok=True)
        path.unlink(missing_ok=True)
        size = images.rounded_size(header.disks[disk])
        layer = self._layers[disk] = Layer(file, "qcow2", header.epoch, header.generation, size)
        below = self._below(disk)
        if below:
            # Neighbours by name only, so that a store can be moved; what was adopted by its whole path.
            under = below[-1]
            name = (
                under.file if under.foreign else os.path.relpath(self.replica.path(under.file), path.parent)
            )
            await images.create(path, size, backing=name, backing_format=under.format)
        else:
            await images.create(path, size)
        return layer

    async def _writer(self, disk: str) -> ImageWriter:
        writer = self._writers.get(disk)
        if writer is None:
            layer = self._layers.get(disk) or await self._create(disk)
            writer = self._writers[disk] = await ImageWriter.open(
                self.replica.path(layer.file), format="qcow2", subject=self.replica.disk_subject(disk),
                socket_directory=self.replica.socket_directory,
                # Worthless until all of it is synced at the seal: no flush is needed before.
                flush_to_disk=False,
                backing=self.replica.backing_chain(self._below(disk)),
            )  # fmt: skip
        return writer

    async def write(self, disk: str, record: Record) -> None:
        """Take a DATA or ZERO record. Raises NoSpace before the file system is full."""
        writer = await self._writer(disk)
        if record.offset + record.length > writer.size_bytes:
            raise ProtocolError(
                f"{self.subject}: {record.length} bytes at offset {record.offset} are not inside {disk}"
                f" ({writer.size_bytes} bytes)"
            )
        self.records += 1
        if record.type is RecordType.ZERO:
            self.zero_bytes += record.length
            await writer.zero(record.offset, record.length)
            return
        self.data_bytes += record.length
        self._unchecked_bytes += record.length
        if self._unchecked_bytes >= _SPACE_CHECK_BYTES:
            self._unchecked_bytes = 0
            self.replica.check_space()
        await writer.write(record.offset, record.payload)

    def slice_ended(self) -> None:
        """A good moment to bring to the disk what has come so far."""
        for writer in self._writers.values():
            writer.write_back()

    async def discard(self) -> None:
        """Throw everything away: nothing of it was ever valid."""
        await asyncio.gather(*(writer.abort() for writer in self._writers.values()), return_exceptions=True)
        for layer in self._layers.values():
            self.replica.path(layer.file).unlink(missing_ok=True)

    async def seal(self, digest: str, checkpoint: str, attachments: dict[str, bytes]) -> SealedGeneration:
        """Make the generation durable, in this order: images closed, images synced, directories, record."""
        replica, header = self.replica, self.header
        try:
            await asyncio.gather(*(writer.finish() for writer in self._writers.values()))
            crash_point("store-flushed")
            await asyncio.gather(*(writer.sync() for writer in self._writers.values()))
            await self._sync_the_rest()
        except OSError as error:
            raise translate(self.subject, error) from error
        async with replica.changing:
            definition = await replica.keep_blob(header.definition.encode())
            former = replica.record.sealed
            kept = dict(former.attachments) if former else {}
            for name, content in attachments.items():
                kept[name] = await replica.keep_blob(content)
            sealed = SealedGeneration(
                epoch=header.epoch, generation=header.generation, leads_from=header.leads_from,
                checkpoint=checkpoint, digest=digest, sealed_at=time.time(), disks=header.disks,
                definition=definition, attachments=kept, residual=header.residual,
                data_bytes=self.data_bytes, zero_bytes=self.zero_bytes, records=self.records,
            )  # fmt: skip
            crash_point("store-synced")
            await replica.save(self._sealed_record(replica.record, sealed))
        crash_point("store-sealed")
        return sealed

    async def _sync_the_rest(self) -> None:
        replica = self.replica
        opened = {writer.path for writer in self._writers.values()}
        created = [replica.path(layer.file) for layer in self._layers.values()]
        paths = [path for path in created if path not in opened]
        # A base that was seeded becomes part of what is promised by the first seal that stands on it.
        for disk in self.header.disks:
            if disk in replica.record.seeding:
                paths += [replica.path(layer.file) for layer in replica.record.layers.get(disk, ())]
        for path in paths:
            await asyncio.to_thread(durable.sync_file, path)
        for directory in {path.parent for path in (*created, *paths)} | (
            {replica.directory} if created else set()
        ):
            await asyncio.to_thread(durable.sync_directory, directory)

    def _sealed_record(self, record: ReplicaRecord, sealed: SealedGeneration) -> ReplicaRecord:
        for disk in self.header.disks:
            if disk in record.layers and not self._below(disk):
                record = record.without_disk(disk)  # the disk left and came back: its old chain is history
        layers = dict(record.layers)
        for disk, layer in self._layers.items():
            layers[disk] = (*layers.get(disk, ()), layer)
        return replace(
            record,
            disks=self.header.disks,
            layers=layers,
            generations=(*record.generations, sealed),
            seeding={disk: offset for disk, offset in record.seeding.items() if disk not in sealed.disks},
            definition=sealed.definition,
        )


async def receive_generation(replica: Replica, stream: Stream) -> SealedGeneration | None:
    """Serve a stream ``generation``: returns what was sealed, or None where it had been sealed before."""
    header = GenerationHeader.parse(stream.header)
    replica.check_writable()
    replica.check_epoch(header.epoch, f"generation {header.generation}")
    replica.check_peer(stream.peer)
    sealed = replica.record.sealed
    if sealed is not None and (header.epoch, header.generation) == sealed.order:
        await _repeat(replica, stream, header, sealed)
        return None
    expected = sealed.generation if sealed else 0
    if header.leads_from != expected or header.generation <= expected:
        raise Conflict(
            f"{replica.subject}: generation {header.generation} leads from {header.leads_from}, the last"
            f" sealed one is {expected}; the source has to go on from there"
        )
    replica.check_space()
    digest = GenerationDigest()
    attachments = AttachmentCollector()
    generation = OpenGeneration(replica, header)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(replica.chain_lock.reading())
        decoder = Decoder(stream, digest)
        stack.push_async_callback(decoder.close)
        replica.receiving = True
        try:
            await generation.begin()
            seal = await _take_all(generation, decoder, attachments)
            digest.compare(seal.get("digest"), generation.subject)
            crash_point("store-before-seal")
            checkpoint = str(seal.get("checkpoint") or header.checkpoint)
            done = await generation.seal(digest.hexdigest(), checkpoint, attachments.finished())
        except BaseException as error:
            if replica.record.sealed is sealed:  # a record that was replaced has made it valid after all
                await asyncio.shield(generation.discard())
            told = translate(generation.subject, error) if isinstance(error, OSError) else error
            if isinstance(told, NoSpace):
                told = replica.full(told)
                logger.warning("%s: discarded: %s", generation.subject, told.message)
            if told is not error:
                raise told from error
            raise
        finally:
            replica.receiving = False
    await _answer(stream, done)
    return done


async def _take_all(
    generation: OpenGeneration, decoder: Decoder, attachments: AttachmentCollector
) -> dict[str, Any]:
    disks = list(generation.header.disks)
    while (record := await decoder.next()) is not None:
        match record.type:
            case RecordType.DATA | RecordType.ZERO:
                if record.disk >= len(disks):
                    raise ProtocolError(f"{generation.subject}: disk number {record.disk} of {len(disks)}")
                await generation.write(disks[record.disk], record)
            case RecordType.ATTACHMENT:
                generation.records += 1
                attachments.add(record)
            case RecordType.SLICE:
                generation.slice_ended()
            case RecordType.SEAL:
                return record.json()
            case _:
                raise ProtocolError(
                    f"{generation.subject}: a {record.type.name} record does not belong there"
                )
    raise ProtocolError(f"{generation.subject}: the stream ended before its seal; nothing of it was kept")


async def _repeat(
    replica: Replica, stream: Stream, header: GenerationHeader, sealed: SealedGeneration
) -> None:
    """The source did not hear that this generation was sealed: it is, if it is the same one."""
    digest = GenerationDigest()
    decoder = Decoder(stream, digest)
    try:
        while (record := await decoder.next()) is not None:
            if record.type is RecordType.SEAL:
                break
    finally:
        await decoder.close()
    if record is None:
        raise ProtocolError(f"{replica.subject}: generation {header.generation} ended before its seal")
    if digest.hexdigest() != sealed.digest:
        raise Conflict(
            f"{replica.subject}: generation {header.generation} is sealed already with other content;"
            f" the source has to go on from checkpoint {sealed.checkpoint}"
        )
    await _answer(stream, sealed)


async def _answer(stream: Stream, sealed: SealedGeneration) -> None:
    value = {"generation": sealed.generation, "sealed_at": sealed.sealed_at, "digest": sealed.digest}
    await stream.send(*json_record(RecordType.SEALED, value).pack())
