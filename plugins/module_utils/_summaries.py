# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a coordinated evacuation knows before it decides: VMs, pairs of proxies, uplinks, destinations.

All of it are values: nothing here reads a clock, a file or a socket. Bytes, seconds, bytes per second.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, field, replace
from enum import StrEnum

# What a stream of memory becomes on the wire where nothing was seen yet (stock multifd zstd: 43 of 94 MB).
DEFAULT_PACKED_RATIO = 0.45
# What one VM's stream is believed to carry before one was seen: packing is one core's work.
DEFAULT_STREAM_BYTES_PER_SECOND = 60e6
DEFAULT_PRIORITY = 50
# As the proxies have it.
DEFAULT_SHUTDOWN_SECONDS = 60.0
# QEMU's own need beside the guest's memory, as the proxies' preflight has it.
QEMU_OVERHEAD_BYTES = 128 * 2**20


class Rung(StrEnum):
    """How a VM gets out; the order is that of the ladder, from what its users notice least."""

    LIVE = "live"
    PAUSED = "paused"
    RESTART = "restart"
    STAY = "stay"


LADDER: tuple[Rung, ...] = (Rung.LIVE, Rung.PAUSED, Rung.RESTART, Rung.STAY)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: what, the fact, the way out."""

    subject: str
    fact: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.fact}; {self.way_out}"


@dataclass(frozen=True, slots=True)
class VmSummary:
    """A VM that is to leave.

    ``source`` and ``destination`` name proxies; ``memory_bytes`` is what the destination must have free,
    QEMU's own need counted and what has arrived already not; ``memory_used_bytes`` what must cross;
    ``packed_ratio`` is wire over raw. ``after`` names VMs that must be out before this one starts. ``rungs``
    is what the operator allows, in the ladder's order; ``shutdown_seconds`` how long its guest may take to
    shut down for a restart at most, and ``power_off`` whether it is switched off after that (else it stays).
    """

    uuid: str
    name: str
    source: str
    destination: str
    lag_bytes: float = 0.0
    memory_bytes: float = 0.0
    memory_used_bytes: float = 0.0
    dirty_bytes_per_second: float = 0.0
    written_bytes_per_second: float = 0.0
    packed_ratio: float = DEFAULT_PACKED_RATIO
    priority: int = DEFAULT_PRIORITY
    group: str = ""
    after: tuple[str, ...] = ()
    rungs: tuple[Rung, ...] = (Rung.LIVE, Rung.PAUSED, Rung.STAY)
    longest_stop_seconds: float = 60.0
    running: bool = True
    shutdown_seconds: float = DEFAULT_SHUTDOWN_SECONDS
    power_off: bool = True

    @property
    def weight(self) -> float:
        """How much its rescue counts: ten steps of priority double it."""
        return float(2.0 ** ((self.priority - DEFAULT_PRIORITY) / 10.0))

    @property
    def sampled_memory_bytes(self) -> float | None:
        """What its memory comes to on the wire as a packed sample of it says; None: nobody took one."""
        sampled = self.running and self.packed_ratio != DEFAULT_PACKED_RATIO
        return self.memory_used_bytes * self.packed_ratio if sampled else None

    @property
    def pair(self) -> tuple[str, str]:
        """The two proxies that it crosses."""
        return (self.source, self.destination)


@dataclass(frozen=True, slots=True)
class PairSummary:
    """Two proxies and the way between them; ``uplink`` names what several pairs may share.

    ``expected_bytes_per_second`` is what the way carried when it was last pressed: it may carry more.
    """

    source: str
    destination: str
    uplink: str
    bytes_per_second: float | None = None
    round_trip_seconds: float = 0.0
    stream_bytes_per_second: float = DEFAULT_STREAM_BYTES_PER_SECOND
    expected_bytes_per_second: float | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What VMs name it by."""
        return (self.source, self.destination)


@dataclass(frozen=True, slots=True)
class DestinationSummary:
    """What a destination can still take; None: not known, and then not judged.

    ``store_free_bytes`` without what its store must leave free.
    """

    name: str
    site: str = ""
    memory_free_bytes: float | None = None
    store_free_bytes: float | None = None


@dataclass(frozen=True)
class SiteSummary:
    """Everything that one evacuation sees. ``uplinks`` holds rates that are known beforehand.

    ``hosts`` are the names of the site's proxies, those that protect nothing included; ``processors`` how
    many a source has, where it says so.
    """

    site: str
    vms: tuple[VmSummary, ...]
    pairs: tuple[PairSummary, ...]
    destinations: tuple[DestinationSummary, ...] = ()
    uplinks: t.Mapping[str, float | None] = field(default_factory=dict)
    hosts: tuple[str, ...] = ()
    processors: t.Mapping[str, int] = field(default_factory=dict)

    def guessed(self) -> SiteSummary:
        """The same with a guess at uplinks that nobody knows: what one of its pairs carried when it was last
        pressed, for pairs of a site mostly share its uplink."""
        guesses: dict[str, float] = {}
        for pair in self.pairs:
            if pair.expected_bytes_per_second:
                guesses[pair.uplink] = max(guesses.get(pair.uplink, 0.0), pair.expected_bytes_per_second)
        known = {name: rate for name, rate in self.uplinks.items() if rate}
        return replace(self, uplinks={**self.uplinks, **guesses, **known})

    def pair(self, vm: VmSummary) -> PairSummary:
        """The pair that a VM crosses; one of unknown quality where none was told of."""
        for pair in self.pairs:
            if pair.key == vm.pair:
                return pair
        return PairSummary(vm.source, vm.destination, self.site)
