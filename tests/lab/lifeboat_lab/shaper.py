# SPDX-License-Identifier: GPL-3.0-or-later
"""The WAN's inner loop, `tests/lab/wan/shaper.c`, built once and loaded as a library."""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lifeboat_lab.images import cached
from lifeboat_lab.profiles import Profile
from lifeboat_lab.shell import run

SOURCE = Path(__file__).resolve().parent.parent / "wan" / "shaper.c"
FLAGS = ("-O2", "-Wall", "-Wextra", "-std=gnu11", "-shared", "-fPIC")
VNET_HEADER_BYTES = 10
LARGEST_PACKET_BYTES = 65536 + 128
PREFIX_BYTES = 6
IPV4_PREFIX_BYTES = 3


class _Counters(ctypes.Structure):
    _fields_ = (
        ("delivered_bytes", ctypes.c_uint64),
        ("delivered_packets", ctypes.c_uint64),
        ("dropped_queue_full", ctypes.c_uint64),
        ("dropped_loss", ctypes.c_uint64),
        ("dropped_cut", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class Site:
    """A site as the loop knows it: its device, and the first 48 bits of its addresses (by IPv4: 24)."""

    device: int
    prefix: bytes
    ipv4_prefix: bytes


def _compile(target: Path) -> None:
    run(["gcc", *FLAGS, "-o", str(target / "shaper.so"), str(SOURCE), "-lm"])


@cache
def library() -> ctypes.CDLL:
    """The compiled loop, from the cache unless its source changed. LabError if it will not compile."""
    built = cached(
        "wan",
        {"source": SOURCE.read_text(), "flags": FLAGS},
        10,
        _compile,
    )
    loaded = ctypes.CDLL(str(built / "shaper.so"), use_errno=True)
    path = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    loaded.shaper_new.restype = ctypes.c_void_p
    loaded.shaper_new.argtypes = (ctypes.c_uint64,)
    loaded.shaper_add_site.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p)
    loaded.shaper_set.restype = None
    loaded.shaper_set.argtypes = (ctypes.c_void_p, *[ctypes.c_double] * 4)
    loaded.shaper_offer.argtypes = (*path, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_double)
    loaded.shaper_take.restype = ctypes.c_size_t
    loaded.shaper_take.argtypes = (*path, ctypes.c_char_p, ctypes.c_double)
    loaded.shaper_clear.restype = None
    loaded.shaper_clear.argtypes = path
    loaded.shaper_counters.restype = None
    loaded.shaper_counters.argtypes = (*path, ctypes.POINTER(_Counters))
    loaded.shaper_run.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_double)
    return loaded


class Shaper:
    """Delay, rate and loss between any two sites, each direction on its own line; order is kept."""

    def __init__(self, sites: Sequence[Site], *, seed: int = 1) -> None:
        self._library = library()
        self._shaper = self._library.shaper_new(seed)
        for site in sites:
            if (len(site.prefix), len(site.ipv4_prefix)) != (
                PREFIX_BYTES,
                IPV4_PREFIX_BYTES,
            ) or self._library.shaper_add_site(self._shaper, site.device, site.prefix, site.ipv4_prefix) < 0:
                raise ValueError(
                    f"{len(sites)} sites, or prefixes of {len(site.prefix)} and {len(site.ipv4_prefix)} bytes"
                )

    def set(self, profile: Profile) -> None:
        """Shape by this profile from now on (its steps are the caller's to follow)."""
        self._library.shaper_set(
            self._shaper,
            profile.rate_bits_per_second / 8,
            profile.round_trip_seconds / 2,
            profile.loss,
            profile.queue_bytes,
        )

    def offer(self, source: int, destination: int, packet: bytes, now: float) -> bool:
        """Take in a packet with its virtio header; False when it is dropped."""
        return bool(self._library.shaper_offer(self._shaper, source, destination, packet, len(packet), now))

    def take(self, source: int, destination: int, now: float) -> bytes | None:
        """The next packet whose time has come."""
        buffer = ctypes.create_string_buffer(LARGEST_PACKET_BYTES)
        length = self._library.shaper_take(self._shaper, source, destination, buffer, now)
        return buffer.raw[:length] if length else None

    def clear(self, source: int, destination: int) -> None:
        """Lose everything that is on its way, as a cut cable does."""
        self._library.shaper_clear(self._shaper, source, destination)

    def counters(self, source: int, destination: int) -> dict[str, int]:
        """What happened to the packets of one direction."""
        counters = _Counters()
        self._library.shaper_counters(self._shaper, source, destination, ctypes.byref(counters))
        return {name: int(getattr(counters, name)) for name, _ in _Counters._fields_}

    def run(self, control: int, until: float = math.inf) -> bool:
        """Relay between the devices; True when `control` can be read, False at `until` (monotonic clock)."""
        return int(self._library.shaper_run(self._shaper, control, until)) == 1
