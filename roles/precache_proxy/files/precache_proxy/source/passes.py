# SPDX-License-Identifier: GPL-3.0-or-later
"""One generation: what changed on all disks of a VM, slice by slice, until it is one instant; then sealed.

Each slice is a view of its own instant. What was sent in an earlier slice and changed since is sent again, so
once a slice comes to its end everything sent agrees with *that* slice's instant: the generation's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from precache_proxy.blocks.extents import Extents
from precache_proxy.channel.link import Link
from precache_proxy.channel.settings import TrafficClass
from precache_proxy.channel.stream import Stream
from precache_proxy.crash_points import crash_point
from precache_proxy.errors import Conflict, IntegrityError, LifeboatError, ProtocolError
from precache_proxy.source.compare import Comparison
from precache_proxy.source.feeder import Feeder, Pace
from precache_proxy.source.reader import most_ranges
from precache_proxy.source.tracker import checkpoint_name
from precache_proxy.source.views import View, ViewSource
from precache_proxy.store.records import Record, RecordType, attachment_records, json_record

logger = logging.getLogger(__name__)


@dataclass
class PassResult:
    """What a pass did. ``open_seconds``: a view was open; ``wire_bytes``: payload handed to the link."""

    generation: int
    data_bytes: int = 0
    zero_bytes: int = 0
    wire_bytes: int = 0
    open_seconds: float = 0.0
    total_seconds: float = 0.0
    slices: int = 0
    skipped: bool = False
    compared_bytes: int = 0
    different_bytes: int = 0
    digest: str = ""
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For the status."""
        return dict(vars(self))


@dataclass
class GenerationPlan:
    """What one generation is to hold.

    ``since``: per disk the checkpoint that changes are counted from; ``whole``: disks that go as a whole.
    ``send``: ranges that go whatever is counted. ``compare``: ranges whose blocks are compared with the
    sealed replica and sent where they differ.
    ``checkpoint``: what the header names; None makes one per slice.
    """

    vm_uuid: str
    vm_name: str
    epoch: int
    generation: int
    leads_from: int
    definition_xml: str
    disks: dict[str, int]
    since: dict[str, str]
    compare: dict[str, Extents] = field(default_factory=dict)
    send: dict[str, Extents] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()
    attachments: Mapping[str, bytes] = field(default_factory=dict)
    checkpoint: str | None = None
    residual: bool = False
    traffic_class: TrafficClass = TrafficClass.PRECACHE

    @property
    def makes_checkpoints(self) -> bool:
        """Whether every slice begins a checkpoint of its own."""
        return self.checkpoint is None


@dataclass
class _Progress:
    """Per disk what is still to be sent (``send``) or compared (``compare``) after the slices so far."""

    send: dict[str, Extents] = field(default_factory=dict)
    compare: dict[str, Extents] = field(default_factory=dict)


class Generation:
    """Sends one generation. ``made`` lists the checkpoints that it created, for who must take them back."""

    def __init__(self, link: Link, plan: GenerationPlan, pace: Pace | None = None) -> None:
        self.plan = plan
        self._pace = pace
        self.made: list[str] = []
        self.seal_sent = False
        self.result = PassResult(plan.generation)
        self._link = link
        self._stream: Stream | None = None
        self._urgent = False
        self._progress = _Progress(send={disk: extents.copy() for disk, extents in plan.send.items()})
        self._comparison = Comparison(link, plan.vm_uuid, plan.leads_from)

    def hasten(self) -> None:
        """An evacuation waits for this pass: it goes with the memory of VMs that leave, not behind it."""
        self._urgent = True
        if self._stream is not None and self._stream.traffic_class is TrafficClass.PRECACHE:
            self._stream.traffic_class = TrafficClass.MIGRATION

    async def run(self, source: ViewSource) -> dict[str, Any]:
        """Send and have it sealed; returns the peer's answer.

        Raises what opening a view raises, StreamReset and PeerUnreachable. When it fails after ``seal_sent``
        only the peer knows whether it holds the generation.
        """
        plan = self.plan
        began = time.monotonic()
        first = plan.checkpoint or checkpoint_name(plan.epoch, plan.generation)
        header = {
            "vm": plan.vm_uuid,
            "epoch": plan.epoch,
            "generation": plan.generation,
            "leads_from": plan.leads_from,
            "checkpoint": first,
            "disks": plan.disks,
            "definition": plan.definition_xml,
            "residual": plan.residual,
        }
        stream = await self._link.open_stream("generation", plan.traffic_class, header, label=plan.vm_uuid)
        self._stream = stream
        if self._urgent:
            self.hasten()
        feeder = Feeder(stream, list(plan.disks), pace=self._pace)
        try:
            refusal = asyncio.create_task(stream.receive())
            work = asyncio.create_task(self._feed(feeder, source))
            try:
                # a store that refuses says so at once: do not read on for nothing
                await asyncio.wait({refusal, work}, return_when=asyncio.FIRST_COMPLETED)
                if refusal.done() and not work.done():
                    refusal.result()
                    raise ProtocolError(
                        f"VM {plan.vm_name}: the peer answered generation {plan.generation} too early"
                    )
                await work
                answer = await self._seal(feeder, stream, refusal)
            finally:
                for task in (work, refusal):
                    task.cancel()
                await asyncio.gather(work, refusal, return_exceptions=True)
        except BaseException as error:
            stream.reset(error if isinstance(error, LifeboatError) else Conflict(f"pass ended: {error!r}"))
            raise
        finally:
            await feeder.close()
            counts = feeder.counts
            result = self.result
            result.data_bytes, result.zero_bytes = counts.data_bytes, counts.zero_bytes
            result.wire_bytes = counts.payload_bytes
            result.compared_bytes = self._comparison.compared_bytes
            result.different_bytes = self._comparison.different_bytes
            result.total_seconds = time.monotonic() - began
        return answer

    async def _feed(self, feeder: Feeder, source: ViewSource) -> None:
        await self._slices(feeder, source)
        for name, content in self.plan.attachments.items():
            for record in attachment_records(name, content):
                await feeder.record(record)
        await feeder.flush()

    async def _slices(self, feeder: Feeder, source: ViewSource) -> None:
        since: Mapping[str, str] = self.plan.since
        whole = self.plan.whole
        number = 0
        while True:
            number += 1
            checkpoint: str | None = None
            if self.plan.makes_checkpoints:
                checkpoint = checkpoint_name(self.plan.epoch, self.plan.generation, number)
                self.made.append(checkpoint)
            began = time.monotonic()
            try:
                async with source.open(since, checkpoint) as view:
                    finished = await self._slice(feeder, view, whole, first=number == 1)
            finally:
                self.result.open_seconds += time.monotonic() - began
            self.result.slices = number
            if finished:
                return
            await feeder.record(Record(RecordType.SLICE))
            logger.info(
                "VM %s: slice %d of generation %d ended (%s), %d bytes to go",
                self.plan.vm_name, number, self.plan.generation, view.reason(), self.remaining_bytes,
            )  # fmt: skip
            if checkpoint is None:
                raise Conflict(
                    f"VM {self.plan.vm_name}: its view ended before everything was read; run the pass again"
                )
            # from here on changes are counted since this slice's instant
            since = dict.fromkeys(view.readers, checkpoint)
            whole = frozenset()

    @property
    def remaining_bytes(self) -> int:
        """What was found and is not yet sent or compared."""
        progress = self._progress
        return sum(
            extents.total_bytes for part in (progress.send, progress.compare) for extents in part.values()
        )

    async def _slice(self, feeder: Feeder, view: View, whole: frozenset[str], *, first: bool) -> bool:
        """Send what the view allows. True: all that there was to send agrees with the view's instant."""
        progress = self._progress
        hot: dict[str, Extents] = {}
        for disk, reader in view.readers.items():
            if reader.size_bytes != self.plan.disks[disk]:
                raise Conflict(
                    f"VM {self.plan.vm_name} disk {disk}: its size changed from {self.plan.disks[disk]} to "
                    f"{reader.size_bytes} bytes during the pass; the next pass takes the new size"
                )
            everything = Extents([(0, reader.size_bytes)])
            changed = everything if disk in whole else (await reader.changed()).intersection(everything)
            compare = (
                self.plan.compare.get(disk, Extents()) if first else progress.compare.get(disk, Extents())
            )
            if first and disk in self.plan.compare and disk not in self.plan.since:
                # nothing is counted here: what changed is what differs
                changed = Extents()
            cold = progress.send.get(disk, Extents()).difference(changed)
            most = most_ranges(reader.size_bytes)
            progress.send[disk] = cold.union(changed).coarsened(most) if len(cold) else changed
            progress.compare[disk] = compare.intersection(everything).difference(progress.send[disk])
            hot[disk] = changed
        try:
            for disk in view.readers:
                await self._send_all(feeder, disk, view, progress.send[disk].difference(hot[disk]))
                await self._compare_all(feeder, disk, view)
            # what the guest writes again and again goes last, or it would be sent in every slice
            for disk in view.readers:
                await self._send_all(feeder, disk, view, hot[disk].intersection(progress.send[disk]))
        except LifeboatError:
            if not view.cut():
                raise
        return self.remaining_bytes == 0

    async def _send_all(self, feeder: Feeder, disk: str, view: View, extents: Extents) -> None:
        if view.over() or not len(extents):
            return
        done = 0
        try:
            async for piece in view.readers[disk].pieces(extents, view.over):
                await self._send(feeder, disk, piece.offset, piece.length, piece.data)
                done = piece.offset + piece.length
        finally:
            # once, not piece by piece: a fragmented set would be copied for every piece
            sent = extents.intersection(Extents([(0, done)]))
            self._progress.send[disk] = self._progress.send[disk].difference(sent)

    async def _compare_all(self, feeder: Feeder, disk: str, view: View) -> None:
        extents = self._progress.compare[disk]
        if view.over() or not len(extents):
            return
        done = 0
        try:
            async for piece, differs in self._comparison.pieces(disk, view.readers[disk], extents, view.over):
                if differs:
                    await self._send(feeder, disk, piece.offset, piece.length, piece.data)
                done = piece.offset + piece.length
        finally:
            self._progress.compare[disk] = extents.difference(Extents([(0, done)]))

    async def _send(
        self, feeder: Feeder, disk: str, offset: int, length: int, data: memoryview | None
    ) -> None:
        if data is None:
            await feeder.zero(disk, offset, length)
        else:
            await feeder.data(disk, offset, data)

    async def _seal(
        self, feeder: Feeder, stream: Stream, answered: asyncio.Task[bytes | None]
    ) -> dict[str, Any]:
        counts = feeder.counts
        content = {
            "digest": feeder.digest,
            "data_bytes": counts.data_bytes,
            "zero_bytes": counts.zero_bytes,
            "records": counts.records,
            "source_time": time.time(),
            "checkpoint": self.plan.checkpoint or self.made[-1],
        }
        self.result.digest = feeder.digest
        self.seal_sent = True
        await feeder.record(json_record(RecordType.SEAL, content))
        await feeder.flush()
        crash_point("pass-sent")
        message = await answered
        if message is None:
            raise ProtocolError(
                f"VM {self.plan.vm_name}: the peer ended generation {self.plan.generation} unsealed"
            )
        record = Record.unpack(message)
        if record.type != RecordType.SEALED:
            raise ProtocolError(
                f"VM {self.plan.vm_name}: record {record.type!r} instead of SEALED from the peer"
            )
        await stream.close()
        answer = record.json()
        if answer.get("digest") != feeder.digest:
            raise IntegrityError(
                f"VM {self.plan.vm_name}: the peer sealed generation {self.plan.generation} with another "
                "digest; it will be compared block by block"
            )
        return answer
