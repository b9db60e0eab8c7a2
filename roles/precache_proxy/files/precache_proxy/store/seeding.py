# SPDX-License-Identifier: GPL-3.0-or-later
"""The first copy: blocks written into the base, fuzzy until generation 1, with marks to resume from."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace

from precache_proxy import durable
from precache_proxy.blocks import images
from precache_proxy.channel import Stream
from precache_proxy.crash_points import crash_point
from precache_proxy.errors import Conflict, InvalidInput, NoSpace, ProtocolError
from precache_proxy.store.generations import Decoder, translate
from precache_proxy.store.record import Layer, check_disks
from precache_proxy.store.records import Record, RecordType, json_record
from precache_proxy.store.replica import Replica
from precache_proxy.store.writer import ImageWriter
from precache_proxy.units import MIB

logger = logging.getLogger(__name__)

_SPACE_CHECK_BYTES = 32 * MIB


class Seeding:
    """The bases of some disks, open for writing. ``told`` lets the source know of a mark that is durable."""

    def __init__(
        self, replica: Replica, disks: dict[str, int], told: Callable[[dict[str, int]], Awaitable[None]]
    ) -> None:
        self.replica = replica
        self.disks = disks
        self._writers: dict[str, ImageWriter] = {}
        self._told = told
        self._unchecked_bytes = 0
        self._marking: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Create or grow the bases and record them before anything is written. Raises Conflict."""
        record = self.replica.record
        for disk, size in self.disks.items():
            if record.sealed is not None and disk in record.sealed.disks:
                raise Conflict(
                    f"{self.replica.disk_subject(disk)}: generation {record.sealed.generation} is sealed;"
                    " what differs has to come as a generation"
                )
            if disk in record.layers and disk not in record.seeding:
                record = record.without_disk(disk)  # it left the VM once and comes back as another disk
            if disk in record.layers:
                await self._grow(disk, size)
                base = replace(record.layers[disk][0], size_bytes=images.rounded_size(size))
                record = replace(record, layers={**record.layers, disk: (base,)})
            else:
                base = await self._create(disk, size, {*record.garbage})
                record = replace(
                    record,
                    layers={**record.layers, disk: (base,)},
                    seeding={**record.seeding, disk: 0},
                )
            record = replace(record, disks={**record.disks, disk: size})
        if record != self.replica.record:
            async with self.replica.changing:
                await self.replica.save(record)

    async def _create(self, disk: str, size_bytes: int, avoided: set[str]) -> Layer:
        replica = self.replica
        file = f"{disk}/base.qcow2"
        number = 1
        while file in avoided:
            number += 1
            file = f"{disk}/base-{number}.qcow2"
        path = replica.path(file)
        if await asyncio.to_thread(images.open_elsewhere, [path]):
            raise Conflict(
                f"{path}: not of this replica's record, and something has it open; end that process"
            )
        path.parent.mkdir(mode=0o711, exist_ok=True)
        # No record knows it: it was created just before a crash, and nothing was written to it.
        path.unlink(missing_ok=True)
        await images.create(path, size_bytes)
        await asyncio.to_thread(durable.sync_file, path)
        for directory in (path.parent, replica.directory):
            await asyncio.to_thread(durable.sync_directory, directory)
        return Layer(file, "qcow2", replica.record.epoch, 0, images.rounded_size(size_bytes))

    async def _grow(self, disk: str, size_bytes: int) -> None:
        base = self.replica.record.layers[disk][0]
        if images.rounded_size(size_bytes) < base.size_bytes:
            raise Conflict(
                f"{self.replica.disk_subject(disk)}: shrank from {base.size_bytes} to {size_bytes} bytes"
                " during the first copy; unprotect the VM and protect it again"
            )
        if images.rounded_size(size_bytes) > base.size_bytes:
            await images.resize(self.replica.path(base.file), base.format, size_bytes)

    async def next(self, decoder: Decoder) -> Record | None:
        """What comes next, None: nothing.

        Raises what a mark under way fails with, at once: the next record may be long in coming.
        """
        if self._marking is None:
            return await decoder.next()
        coming = asyncio.ensure_future(decoder.next())
        try:
            await asyncio.wait({coming, self._marking}, return_when=asyncio.FIRST_COMPLETED)
            if self._marking.done():
                await self._marked()
            return await coming
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)

    async def write(self, disk: str, record: Record) -> None:
        """Take a DATA or ZERO record."""
        writer = self._writers.get(disk)
        if writer is None:
            base = self.replica.record.layers[disk][0]
            writer = self._writers[disk] = await ImageWriter.open(
                self.replica.path(base.file), format=base.format, flush_to_disk=True,
                subject=self.replica.disk_subject(disk), socket_directory=self.replica.socket_directory,
            )  # fmt: skip
        if record.offset + record.length > writer.size_bytes:
            raise ProtocolError(
                f"{self.replica.disk_subject(disk)}: {record.length} bytes at offset {record.offset} are not"
                f" inside its {writer.size_bytes} bytes"
            )
        if record.type is RecordType.ZERO:
            await writer.zero(record.offset, record.length)
            return
        self._unchecked_bytes += record.length
        if self._unchecked_bytes >= _SPACE_CHECK_BYTES:
            self._unchecked_bytes = 0
            self.replica.check_space()
        await writer.write(record.offset, record.payload)

    async def mark(self, offsets: dict[str, int]) -> None:
        """Begin to make all that came so far durable, to record up to where a resumed copy may skip, and to
        tell that.

        What comes next is written meanwhile, or a disk that takes its time would stop the link. Waits for the
        mark before this one.
        """
        for disk, offset in offsets.items():
            if disk not in self.disks or not isinstance(offset, int) or not 0 <= offset <= self.disks[disk]:
                raise InvalidInput(
                    f"{self.replica.subject}: mark {offset!r} of disk {disk!r} is not inside it"
                )
        await self._marked()
        # A flush is about requests that were answered before it was asked for.
        for writer in self._writers.values():
            await writer.settled()
        self._marking = asyncio.create_task(self._make_durable(offsets))

    async def _make_durable(self, offsets: dict[str, int]) -> None:
        await asyncio.gather(*(writer.flush_answered() for writer in self._writers.values()))
        crash_point("store-mark")
        async with self.replica.changing:
            record = self.replica.record
            await self.replica.save(replace(record, seeding={**record.seeding, **offsets}))
        crash_point("store-marked")
        await self._told(offsets)

    async def _marked(self) -> None:
        """The mark under way is durable and told. Raises what it has failed with."""
        if self._marking is not None:
            await self._marking
            self._marking = None

    async def finish(self) -> None:
        """Close the bases in order, the last mark told."""
        await self._marked()
        for writer in self._writers.values():
            await writer.finish()
            writer.release()

    async def abort(self) -> None:
        """Close at once: what was marked is durable, what came after will come again."""
        if self._marking is not None:
            self._marking.cancel()
            await asyncio.gather(self._marking, return_exceptions=True)
        await asyncio.gather(*(writer.abort() for writer in self._writers.values()), return_exceptions=True)


async def receive_seed(replica: Replica, stream: Stream) -> None:
    """Serve a stream ``seed`` until the source ends it."""
    disks = check_disks(stream.header.get("disks"))
    replica.check_writable()
    replica.check_epoch(int(stream.header.get("epoch", -1)), "a first copy")
    replica.check_peer(stream.peer)
    replica.check_space()
    names = list(disks)

    async def tell_mark(offsets: dict[str, int]) -> None:
        await stream.send(*json_record(RecordType.MARKED, offsets).pack())

    seeding = Seeding(replica, disks, tell_mark)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(replica.chain_lock.writing())
        decoder = Decoder(stream, None)
        stack.push_async_callback(decoder.close)
        try:
            await seeding.begin()
            while (record := await seeding.next(decoder)) is not None:
                match record.type:
                    case RecordType.DATA | RecordType.ZERO if record.disk < len(names):
                        await seeding.write(names[record.disk], record)
                    case RecordType.MARK:
                        await seeding.mark(record.json())
                    case RecordType.SLICE:
                        pass
                    case _:
                        raise ProtocolError(
                            f"{replica.subject}: a {record.type.name} record, disk number {record.disk},"
                            f" does not belong into a first copy of {len(names)} disks"
                        )
            await seeding.finish()
        except BaseException as error:
            await asyncio.shield(seeding.abort())
            told = translate(replica.subject, error) if isinstance(error, OSError) else error
            if isinstance(told, NoSpace):
                told = replica.full(told)
            if told is not error:
                raise told from error
            raise
