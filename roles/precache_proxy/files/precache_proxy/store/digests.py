# SPDX-License-Identifier: GPL-3.0-or-later
"""Digests of a sealed generation's blocks, for resync, scrub and verify. Holes cost no reading."""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

from precache_proxy.blocks.export import open_export
from precache_proxy.blocks.extents import Extents
from precache_proxy.blocks.nbd import ALLOCATION, NbdClient, reads_zero
from precache_proxy.channel import Stream
from precache_proxy.errors import InvalidInput, NotFound
from precache_proxy.store.record import SealedGeneration
from precache_proxy.store.replica import Replica
from precache_proxy.units import KIB, MIB

DIGEST_BYTES = 32
ZERO_DIGEST = bytes(DIGEST_BYTES)
_MESSAGE_DIGESTS = 1024
_ZEROES = bytes(MIB)
# Hashing leaves the interpreter's lock: two threads are two cores, whatever the number of streams.
_workers = ThreadPoolExecutor(2, thread_name_prefix="digests")


def hash_blocks(data: memoryview, block_bytes: int) -> bytes:
    """The digests of consecutive blocks, joined; the last block may be short (blocking)."""
    digests = []
    for at in range(0, len(data), block_bytes):
        block = data[at : at + block_bytes]
        # bytes compare at memory speed and stop at the first difference, memoryviews do neither
        empty = block[:64] == _ZEROES[: len(block[:64])] and bytes(block) == _ZEROES[: len(block)]
        digests.append(ZERO_DIGEST if empty else hashlib.sha256(block).digest())
    return b"".join(digests)


async def generation_digests(
    replica: Replica, disk: str, at: SealedGeneration, *, block_bytes: int, offset: int, length: int
) -> AsyncGenerator[bytes, None]:
    """Runs of digests of the blocks in ``[offset, offset + length)``, in order. Holds the chain open."""
    chain = replica.record.chain(disk, at)
    top = chain[-1]
    end = min(offset + length, at.disks[disk])
    export = await open_export(
        replica.path(top.file), format=top.format, backing=replica.backing_chain(chain[:-1]),
        socket_directory=replica.socket_directory, name="digests",
    )  # fmt: skip
    client: NbdClient | None = None
    try:
        client = await NbdClient.connect(
            export.socket, contexts=[ALLOCATION], subject=replica.disk_subject(disk)
        )
        end = min(end, client.size_bytes)
        # In windows: what is known about a disk is bounded, however large and fragmented it is.
        for start in range(offset, end, 1024 * MIB):
            window_end = min(end, start + 1024 * MIB)
            async with aclosing(_window(client, start, window_end, block_bytes)) as runs:
                async for run in runs:
                    yield run
    finally:
        if client is not None:
            await client.close()
        await export.kill()


async def _window(client: NbdClient, start: int, end: int, block_bytes: int) -> AsyncGenerator[bytes, None]:
    loop = asyncio.get_running_loop()
    zero = await client.extents(ALLOCATION, reads_zero, start, end - start)
    data = Extents()
    for first, last in Extents([(start, end)]).difference(zero):
        down = first - (first - start) % block_bytes
        data.add(down, min(end, last + (start - last) % block_bytes))
    hashing: deque[asyncio.Future[bytes]] = deque()
    at = start
    async for offset, length, content in client.read_extents(data, request_bytes=MIB):
        if offset > at:
            while hashing:
                yield await hashing.popleft()
            for run in _zeroes(offset - at, block_bytes):
                yield run
        hashing.append(loop.run_in_executor(_workers, hash_blocks, content, block_bytes))
        at = offset + length
        while len(hashing) > 4:
            yield await hashing.popleft()
    while hashing:
        yield await hashing.popleft()
    for run in _zeroes(end - at, block_bytes):
        yield run


def _zeroes(length: int, block_bytes: int) -> Iterator[bytes]:
    count = -(-length // block_bytes)
    while count > 0:
        part = min(count, _MESSAGE_DIGESTS)
        yield ZERO_DIGEST * part
        count -= part


async def serve_digests(replica: Replica, stream: Stream) -> None:
    """Serve a stream ``digests``. Raises InvalidInput, NotFound, Conflict."""
    header = stream.header
    replica.check_writable()
    try:
        disk, number = str(header["disk"]), int(header["generation"])
        block_bytes, offset, length = (
            int(header.get("block_bytes", 64 * KIB)), int(header["offset"]), int(header["length"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"{replica.subject}: digests were asked for without {error}") from error
    if block_bytes & (block_bytes - 1) or not 4 * KIB <= block_bytes <= MIB:
        raise InvalidInput(
            f"{replica.subject}: blocks of {block_bytes} bytes; give a power of 2, 4 KiB to 1 MiB"
        )
    if offset < 0 or length < 0 or offset % block_bytes:
        raise InvalidInput(f"{replica.subject}: digests from offset {offset} do not begin with a block")
    async with replica.chain_lock.reading():
        at = replica.sealed_generation(number)
        if disk not in at.disks:
            raise NotFound(f"{replica.disk_subject(disk)}: generation {number} has no such disk")
        held = bytearray()
        wanted = generation_digests(replica, disk, at, block_bytes=block_bytes, offset=offset, length=length)
        async with aclosing(wanted) as runs:
            async for run in runs:
                held += run
                while len(held) >= _MESSAGE_DIGESTS * DIGEST_BYTES:
                    await stream.send(bytes(held[: _MESSAGE_DIGESTS * DIGEST_BYTES]))
                    del held[: _MESSAGE_DIGESTS * DIGEST_BYTES]
        if held:
            await stream.send(bytes(held))
