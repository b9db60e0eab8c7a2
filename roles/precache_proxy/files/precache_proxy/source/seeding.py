# SPDX-License-Identifier: GPL-3.0-or-later
"""The first copy: fuzzy, slice by slice, resumable at marks that the peer has made durable.

A checkpoint stands before the first block is read; whatever the guest changes during the copy is counted from
there and goes over as generation 1. So slices need not agree with each other, and no backup job is open for
longer than a slice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from precache_proxy.blocks.extents import Extents
from precache_proxy.channel.link import Link
from precache_proxy.channel.settings import TrafficClass
from precache_proxy.channel.stream import Stream
from precache_proxy.errors import LifeboatError, ProtocolError
from precache_proxy.source.feeder import Feeder
from precache_proxy.source.views import View, ViewSource
from precache_proxy.store.records import Record, RecordType, json_record

logger = logging.getLogger(__name__)


class Seeding:
    """One VM's first copy. ``offsets``: per disk up to where the peer holds everything, for sure."""

    def __init__(
        self,
        link: Link,
        *,
        vm_uuid: str,
        vm_name: str,
        epoch: int,
        disks: dict[str, int],
        offsets: dict[str, int],
        mark_bytes: int,
        on_mark: Callable[[dict[str, int]], None] = lambda _offsets: None,
    ) -> None:
        self.offsets = {disk: offsets.get(disk, 0) for disk in disks}
        self.allocated_bytes: dict[str, int] = {}
        self.held_bytes: dict[str, int] = {}
        self.sent_bytes = 0
        self._sent_offsets = dict(self.offsets)
        self._link = link
        self._vm_uuid = vm_uuid
        self._vm_name = vm_name
        self._epoch = epoch
        self._disks = disks
        self._mark_bytes = mark_bytes
        self._on_mark = on_mark
        self._unmarked_bytes = 0
        self._marks_due = 0

    @property
    def coverage(self) -> float:
        """Share of the allocated bytes that the peer holds."""
        allocated = sum(self.allocated_bytes.values())
        if not allocated:
            total = sum(self._disks.values())
            return sum(self.offsets.values()) / total if total else 1.0
        return min(1.0, sum(self.held_bytes.values()) / allocated)

    @property
    def finished(self) -> bool:
        """Whether the peer holds everything up to the end of every disk."""
        return all(self.offsets[disk] >= size for disk, size in self._disks.items())

    async def begin_anew(self, *, has_marks: bool = True) -> None:
        """Have the peer forget its marks: they belong to a checkpoint that is gone.

        Must be done *before* the new checkpoint is made: marks of an older copy beside a newer checkpoint
        would leave out what changed in between. ``has_marks`` False: the peer made its replica just now, on
        our word, and no stream can have marked anything in it.
        """
        self.offsets = dict.fromkeys(self._disks, 0)
        self._sent_offsets = dict(self.offsets)
        if not has_marks:
            return
        header = {"vm": self._vm_uuid, "epoch": self._epoch, "disks": self._disks}
        stream = await self._link.open_stream("seed", TrafficClass.PRECACHE, header, label=self._vm_uuid)
        try:
            self._marks_due = 1
            await stream.send(*json_record(RecordType.MARK, self.offsets).pack())
            await stream.close()
            await self._take_answers(stream)
            if self._marks_due:
                raise ProtocolError(
                    f"VM {self._vm_name}: the peer did not acknowledge that the copy begins anew"
                )
        except BaseException as error:
            stream.reset(error if isinstance(error, LifeboatError) else ProtocolError(f"ended: {error!r}"))
            raise

    async def run(self, source: ViewSource) -> None:
        """Copy until the end. Raises what views and streams raise; ``offsets`` say where to go on."""
        if self.finished:
            return
        header = {"vm": self._vm_uuid, "epoch": self._epoch, "disks": self._disks}
        stream = await self._link.open_stream("seed", TrafficClass.PRECACHE, header, label=self._vm_uuid)
        feeder = Feeder(stream, list(self._disks), digest=False)
        answers = asyncio.create_task(self._take_answers(stream))
        copy = asyncio.create_task(self._copy(feeder, source))
        try:
            await asyncio.wait({answers, copy}, return_when=asyncio.FIRST_COMPLETED)
            if answers.done():
                answers.result()
                raise ProtocolError(f"VM {self._vm_name}: the peer ended the first copy before it was over")
            await copy
            # With the last mark, not after its answer, which would be a round trip more.
            await stream.close()
            await answers
            if self._marks_due:
                raise ProtocolError(
                    f"VM {self._vm_name}: the peer ended the first copy without its last mark"
                )
        except BaseException as error:
            reason = (
                error if isinstance(error, LifeboatError) else ProtocolError(f"first copy ended: {error!r}")
            )
            stream.reset(reason)
            raise
        finally:
            for task in (copy, answers):
                task.cancel()
            await asyncio.gather(copy, answers, return_exceptions=True)
            await feeder.close()
            self.sent_bytes += feeder.counts.payload_bytes

    async def _copy(self, feeder: Feeder, source: ViewSource) -> None:
        while any(self._sent_offsets[disk] < size for disk, size in self._disks.items()):
            began = time.monotonic()
            async with source.open({}, None) as view:
                if not self.allocated_bytes:
                    await self._measure(view)
                await self._slice(feeder, view)
            logger.info(
                "VM %s: a slice of the first copy ended after %.1f s (%s)",
                self._vm_name, time.monotonic() - began, view.reason() or "done",
            )  # fmt: skip
        await self._mark(feeder)
        await feeder.flush()

    async def _measure(self, view: View) -> None:
        for disk, reader in view.readers.items():
            held_end = min(self._sent_offsets[disk], reader.size_bytes)
            self.held_bytes[disk] = await reader.allocated_bytes(0, held_end)
            rest = await reader.allocated_bytes(held_end, reader.size_bytes)
            self.allocated_bytes[disk] = self.held_bytes[disk] + rest

    async def _slice(self, feeder: Feeder, view: View) -> None:
        try:
            for disk, reader in view.readers.items():
                if view.over():
                    return
                # a disk that grew meanwhile: its new part is counted as changed or goes with a later pass
                rest = Extents([(self._sent_offsets[disk], min(reader.size_bytes, self._disks[disk]))])
                async for piece in reader.pieces(rest, view.over):
                    if piece.data is None:
                        # told, not skipped: the replica may hold something there from an earlier copy
                        await feeder.zero(disk, piece.offset, piece.length)
                    else:
                        await feeder.data(disk, piece.offset, piece.data)
                        self.held_bytes[disk] += piece.length
                        self._unmarked_bytes += piece.length
                    self._sent_offsets[disk] = piece.offset + piece.length
                    if self._unmarked_bytes >= self._mark_bytes:
                        await self._mark(feeder)
                if not view.over():
                    self._sent_offsets[disk] = self._disks[disk]
        except LifeboatError:
            if not view.cut():
                raise

    async def _mark(self, feeder: Feeder) -> None:
        self._unmarked_bytes = 0
        self._marks_due += 1
        await feeder.record(json_record(RecordType.MARK, self._sent_offsets))
        await feeder.flush_queue()

    async def _take_answers(self, stream: Stream) -> None:
        while (message := await stream.receive()) is not None:
            record = Record.unpack(message)
            if record.type != RecordType.MARKED:
                raise ProtocolError(
                    f"VM {self._vm_name}: record {record.type!r} instead of MARKED from the peer"
                )
            offsets = record.json()
            for disk in self.offsets:
                self.offsets[disk] = int(offsets.get(disk, self.offsets[disk]))
            self._marks_due -= 1
            self._on_mark(dict(self.offsets))
