# SPDX-License-Identifier: GPL-3.0-or-later
"""How few bytes a guest's memory could be: each distinct non-zero page once, compressed.

The bound of an evacuation (docs/benchmarks.md) is made from this: no sender that does not know the
destination's memory can send less with the same compressor.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import zstandard

from lifeboat_lab.guests.guests import Guest
from lifeboat_lab.lab import Lab

PAGE_BYTES = 4096
_ZERO = bytes(PAGE_BYTES)
_BATCH_PAGES = 256
LEVEL = 1


@dataclass(frozen=True)
class MemoryBound:
    """Pages of a guest's memory, and what the distinct ones among them come to once compressed."""

    pages: int
    zero_pages: int
    distinct_pages: int
    compressed_bytes: int


def measure(lab: Lab, guest: Guest, host: str) -> MemoryBound:
    """Look at the memory of a running guest through `virsh dump --memory-only`: it is paused for a moment."""
    path = f"/var/tmp/memory-{guest.plan.uuid}"
    lab.exec(host, "virsh", "dump", "--memory-only", "--live", guest.plan.uuid, path)
    try:
        return measure_file(lab.host(host).root / path.lstrip("/"))
    finally:
        lab.exec(host, "rm", "-f", path)


def measure_file(path: Path) -> MemoryBound:
    """The bound of a memory image. The ELF header shifts nothing: QEMU aligns what follows to pages."""
    seen: set[bytes] = set()
    pages = zero = compressed = 0
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    batch: list[bytes] = []
    offset = path.stat().st_size % PAGE_BYTES
    with path.open("rb") as file:
        compressed += len(file.read(offset))
        while page := file.read(PAGE_BYTES):
            pages += 1
            if page == _ZERO:
                zero += 1
                continue
            digest = hashlib.blake2b(page, digest_size=16).digest()
            if digest in seen:
                continue
            seen.add(digest)
            batch.append(page)
            if len(batch) == _BATCH_PAGES:
                compressed += len(compressor.compress(b"".join(batch)))
                batch.clear()
    compressed += len(compressor.compress(b"".join(batch)))
    return MemoryBound(pages, zero, len(seen), compressed)
