# SPDX-License-Identifier: GPL-3.0-or-later
"""A store with a fixed story, as a process that a test may kill: crash_child.py DIRECTORY [remove]."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from precache_proxy.store.service import Store
from precache_proxy.store.settings import StoreSettings
from precache_proxy.units import KIB, MIB
from unit.store.store_driver import VM, Change, Handlers, Source, merged

SIZES = {"vda": 2 * MIB + 512, "vdb": 512 * KIB}
GENERATIONS = 6
SETTINGS = StoreSettings(keep_generations=1, minimum_free_bytes=0)


def changes(generation: int) -> list[Change]:
    """What generation ``generation`` writes; 0 is the first copy."""
    noise = random.Random(generation)
    if generation == 0:
        return [
            Change("vda", 0, noise.randbytes(MIB)), Change("vda", MIB, noise.randbytes(MIB)),
            Change("vdb", 0, noise.randbytes(512 * KIB)),
        ]  # fmt: skip
    return [
        Change("vda", generation * 100000, noise.randbytes(150000)),
        Change("vda", generation * 100000 + 50000, None, 70000),
        Change("vdb", generation * 4096, noise.randbytes(8192)),
    ]


def contents() -> list[dict[str, bytes]]:
    """What the disks hold after each generation."""
    source = Source.__new__(Source)
    source.content = {disk: bytearray(size) for disk, size in SIZES.items()}
    found = []
    for generation in range(GENERATIONS + 1):
        source.apply(changes(generation))
        found.append({disk: bytes(content) for disk, content in source.content.items()})
    return found


def tell(**event: object) -> None:
    os.write(1, json.dumps(event).encode() + b"\n")


async def story(directory: Path, *, remove: bool) -> None:
    store = Store(directory / "store", directory / "run", SETTINGS)
    await store.start()
    source = Source(Handlers(store))
    source.resize(**SIZES)
    status = await source.prepare()
    if remove:
        await store.remove(VM)
        return
    sealed = status["sealed"]
    if sealed is None:
        await source.seed(changes(0)[:1], {"vda": MIB})
        tell(marked=MIB)
        await source.seed(changes(0)[1:], {"vda": 2 * MIB, "vdb": 512 * KIB})
        tell(marked=2 * MIB)
    source.generation = sealed["generation"] if sealed else 0
    while source.generation < GENERATIONS:
        attachments = {"nvram": b"n%d" % (source.generation + 1)}
        answer = await source.send(changes(source.generation + 1), attachments)
        tell(sealed=answer["generation"])
        await merged(store)
    await store.stop()
    tell(done=True)


if __name__ == "__main__":
    asyncio.run(story(Path(sys.argv[1]), remove="remove" in sys.argv))
