# SPDX-License-Identifier: GPL-3.0-or-later
"""Random sites, the same for the same seed."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass

from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import (
    DestinationSummary,
    PairSummary,
    SiteSummary,
    VmSummary,
)

from lifeboat_simulator.model import Links, TruePair

MB = 1e6
MBIT = 1e6 / 8


@dataclass(frozen=True)
class Scene:
    """What is told to the controller, and what is true."""

    site: SiteSummary
    links: Links

    def fresh(self) -> Links:
        """The links as they are before a run."""
        return copy.deepcopy(self.links)


def random_scene(
    seed: int,
    *,
    pairs: int | None = None,
    vms: int | None = None,
    full_destinations: bool = False,
    dependencies: bool = False,
) -> Scene:
    """A site: how wide its uplink is, whether that is known, and what one stream carries, all differ."""
    dice = random.Random(seed)
    count = pairs if pairs is not None else dice.choice([1, 1, 2, 2, 3, 4, 8])
    number = vms if vms is not None else dice.randint(2, 24)
    uplink = dice.choice([10, 50, 100, 400, 1000]) * MBIT * max(1.0, count / 8)
    stream = dice.choice([4, 15, 40, 80]) * MB
    trip = dice.choice([0.005, 0.01, 0.04, 0.1, 0.18])
    own = uplink if dice.random() < 0.7 else uplink * dice.uniform(0.3, 1.0)
    known = uplink if dice.random() < 0.5 else None
    told_pairs, true_pairs = [], {}
    for index in range(count):
        key = (f"home{index + 1}", f"backup{index + 1}")
        told_pairs.append(PairSummary(*key, "uplink", round_trip_seconds=trip))
        true_pairs[key] = TruePair(key, "uplink", own, stream, trip, cores=dice.choice([2, 4, 16]))
    told_vms = [_vm(dice, index, count, number, uplink, dependencies=dependencies) for index in range(number)]
    needed: dict[str, float] = {}
    for vm in told_vms:
        needed[vm.destination] = needed.get(vm.destination, 0.0) + vm.memory_bytes
    destinations = tuple(
        DestinationSummary(
            f"backup{index + 1}",
            "backup",
            needed.get(f"backup{index + 1}", 0.0) * dice.uniform(0.4, 1.2) if full_destinations else None,
        )
        for index in range(count)
    )
    site = SiteSummary("home", tuple(told_vms), tuple(told_pairs), destinations, {"uplink": known})
    return Scene(site, Links({"uplink": uplink}, true_pairs))


def _vm(
    dice: random.Random, index: int, pairs: int, number: int, uplink: float, *, dependencies: bool
) -> VmSummary:
    host = dice.randrange(pairs) + 1
    memory = min(dice.lognormvariate(0.0, 0.8) * 400 * MB, 4000 * MB)
    ratio = dice.uniform(0.2, 0.6)
    # Most guests dirty little against what can be sent, a few nearly as much, or more.
    dirty = uplink / ratio * dice.choice([0.0, 0.01, 0.02, 0.05, 0.1, 0.3, 0.6, 1.5])
    after: tuple[str, ...] = ()
    if dependencies and index and dice.random() < 0.3:
        after = (f"vm{dice.randrange(index)}",)
    return VmSummary(
        uuid=f"00000000-0000-4000-8000-{index:012d}",
        name=f"vm{index}",
        source=f"home{host}",
        destination=f"backup{host}",
        lag_bytes=dice.uniform(0, 20) * MB,
        memory_bytes=memory * dice.uniform(1.0, 2.0),
        memory_used_bytes=memory,
        dirty_bytes_per_second=min(dirty, 200 * MB),
        written_bytes_per_second=dice.uniform(0, 0.2) * MB,
        packed_ratio=ratio,
        priority=50,
        group=f"group{dice.randrange(max(1, number // 6))}" if dice.random() < 0.1 else "",
        after=after,
    )
