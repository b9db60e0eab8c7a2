# SPDX-License-Identifier: GPL-3.0-or-later
"""Superseded generations are merged into the base, in the background, in steps that give way to passes.

At every line a cut leaves the chain's content as it was: until the record says otherwise the overlay still
masks what is written below it, and merging it once more writes the same.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from precache_proxy import durable
from precache_proxy.blocks import images
from precache_proxy.blocks.export import open_export
from precache_proxy.blocks.extents import Extents
from precache_proxy.blocks.nbd import ALLOCATION, ALLOCATION_DEPTH, STATE_ZERO, NbdClient
from precache_proxy.crash_points import crash_point
from precache_proxy.store.record import Layer
from precache_proxy.store.replica import Replica
from precache_proxy.store.writer import ImageWriter
from precache_proxy.units import MIB

logger = logging.getLogger(__name__)

_STEP_BYTES = 64 * MIB


@dataclass(slots=True)
class Merge:
    """One disk's merge under way: ``layers`` above the base, lowest first, and how far it came."""

    disk: str
    base: Layer
    layers: tuple[Layer, ...]
    offset: int = 0

    @property
    def size_bytes(self) -> int:
        """Of the disk after the merge."""
        return self.layers[-1].size_bytes


def due(replica: Replica) -> Merge | None:
    """The next merge that the kept generations allow, None where there is none."""
    record, keep = replica.record, replica.settings.keep_generations
    if record.detached or record.removing or record.frozen_epoch is not None or not record.generations:
        return None
    oldest_kept = record.generations[-keep:][0]
    for disk, chain in record.layers.items():
        if disk in record.seeding or not chain or (chain[0].foreign and not record.commit_allowed):
            continue
        superseded = tuple(layer for layer in chain[1:] if layer.order < oldest_kept.order)
        if superseded:
            return Merge(disk, chain[0], superseded)
    return None


async def trim(replica: Replica) -> None:
    """Forget generations that are no longer kept, and disks that no kept generation has."""
    async with replica.changing:
        record, keep = replica.record, replica.settings.keep_generations
        if record.detached or record.removing or record.frozen_epoch is not None:
            return
        generations = record.generations[-keep:]
        wanted = {disk for entry in generations for disk in entry.disks} | set(record.seeding)
        for disk in [disk for disk in record.layers if disk not in wanted]:
            record = record.without_disk(disk)
        record = replace(record, generations=generations)
        if record != replica.record:
            await replica.save(record)
        await replica.empty_garbage()


async def step(replica: Replica, merge: Merge) -> bool:
    """Go on with a merge until it is done (True), or until a pass wants the chain (False)."""
    async with replica.chain_lock.writing():
        replica.check_writable()
        chain = replica.record.layers.get(merge.disk, ())
        if chain[: 1 + len(merge.layers)] != (merge.base, *merge.layers):
            return True  # the chain is another one now: what is due is judged anew
        async with AsyncExitStack() as stack:
            if not await _copy(replica, merge, stack):
                return False
        crash_point("store-committed")
        await _shorten(replica, merge)
    return True


async def _copy(replica: Replica, merge: Merge, stack: AsyncExitStack) -> bool:
    base_path, subject = replica.path(merge.base.file), replica.disk_subject(merge.disk)
    if merge.base.size_bytes < merge.size_bytes:
        # A base that is larger than the overlay above it still reads the same through that overlay.
        actual = (await images.info(base_path, merge.base.format))[0].size_bytes
        if actual < merge.size_bytes:
            await images.resize(base_path, merge.base.format, merge.size_bytes)
    top = merge.layers[-1]
    # Without the base below: what reads as allocated is exactly what the superseded layers hold.
    export = await open_export(
        replica.path(top.file), format=top.format, backing=replica.backing_chain(merge.layers[:-1]),
        allocation_depth=True, socket_directory=replica.socket_directory, name="merge",
    )  # fmt: skip
    stack.push_async_callback(export.kill)
    reader = await NbdClient.connect(export.socket, contexts=[ALLOCATION, ALLOCATION_DEPTH], subject=subject)
    stack.push_async_callback(reader.close)
    writer = await ImageWriter.open(
        base_path, format=merge.base.format, subject=subject, flush_to_disk=True,
        socket_directory=replica.socket_directory,
    )  # fmt: skip
    stack.push_async_callback(writer.abort)
    while merge.offset < reader.size_bytes:
        if replica.chain_lock.wanted:
            await writer.flush()
            return False
        length = min(_STEP_BYTES, reader.size_bytes - merge.offset)
        statuses = await reader.block_statuses(merge.offset, length)
        zero = [entry for entry in statuses[ALLOCATION] if entry[2] & STATE_ZERO]
        await _copy_range(reader, writer, statuses[ALLOCATION_DEPTH], zero)
        merge.offset += length
        crash_point("store-committing")
    await writer.finish()
    await writer.sync()
    return True


async def _copy_range(
    reader: NbdClient,
    writer: ImageWriter,
    depths: Sequence[tuple[int, int, int]],
    zero: Sequence[tuple[int, int, int]],
) -> None:
    held = Extents((start, start + length) for start, length, depth in depths if depth > 0)
    zeroes = held.intersection(Extents((start, start + length) for start, length, _unused in zero))
    for start, end in zeroes:
        await writer.zero(start, end - start)
    async for offset, _unused, data in reader.read_extents(held.difference(zeroes), in_flight=8):
        await writer.write(offset, data)
    await writer.settled()


async def _shorten(replica: Replica, merge: Merge) -> None:
    """The base is durable: have the layer above name it, then the record, then delete what is superseded."""
    async with replica.changing:
        record = replica.record
        chain = record.layers[merge.disk]
        above = chain[1 + len(merge.layers) :]
        base = replace(
            merge.base, size_bytes=merge.size_bytes,
            epoch=merge.layers[-1].epoch, generation=merge.layers[-1].generation,
        )  # fmt: skip
        if above:
            path = replica.path(above[0].file)
            relative = os.path.relpath(replica.path(base.file), path.parent)
            await images.rebase(path, base.file if base.foreign else relative, base.format)
            await asyncio.to_thread(durable.sync_file, path)
        crash_point("store-rebased")
        files = tuple(layer.file for layer in merge.layers)
        layers = {**record.layers, merge.disk: (base, *above)}
        await replica.save(replace(record, layers=layers, garbage=(*record.garbage, *files)))
        crash_point("store-commit-recorded")
        await replica.empty_garbage()
