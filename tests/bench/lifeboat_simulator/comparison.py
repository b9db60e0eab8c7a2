# SPDX-License-Identifier: GPL-3.0-or-later
"""One random site, emptied by each strategy: how much of it is safe if the power fails at a random moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ansible_collections.lifeboat.evacuation.plugins.module_utils._interval import interval_seconds

from lifeboat_simulator.model import Processors
from lifeboat_simulator.run import Simulation
from lifeboat_simulator.sites import random_scene

STRATEGIES = ("feedback", "sequential", "parallel")
LIMIT_SECONDS = 3600.0
# What is noise: the controller has to find out what a line carries, by trying, a look at a time.
NOISE_SHARE = 0.1
NOISE_LOOKS = 3


@dataclass(frozen=True)
class Comparison:
    """What came of it. ``shares`` is E by strategy, over the longest makespan, ``horizon_seconds``."""

    seed: int
    vms: int
    look_seconds: float
    horizon_seconds: float
    shares: dict[str, float]
    out: dict[str, int]
    makespans: dict[str, float]
    broken: list[str]

    @property
    def better(self) -> float:
        """E of the better of `sequential` and `parallel`."""
        return max(self.shares["sequential"], self.shares["parallel"])

    @property
    def ratio(self) -> float:
        """E of `feedback` over that."""
        return self.shares["feedback"] / self.better if self.better else 1.0

    @property
    def later_seconds(self) -> float:
        """By how much a VM is out later than by the better one, in the mean; below 0: sooner."""
        return (self.better - self.shares["feedback"]) * self.horizon_seconds

    def worse_by(self, share: float) -> bool:
        """Whether `feedback` is behind by more than that share, and by more than a few looks."""
        return self.ratio < 1 - share and self.later_seconds > NOISE_LOOKS * self.look_seconds

    def __str__(self) -> str:
        told = ", ".join(f"{name} {share:.3f}" for name, share in self.shares.items())
        return (
            f"seed {self.seed}: {self.vms} VMs, E {told}: {self.ratio:.2f} times, "
            f"{self.later_seconds:.1f} s later in the mean of {self.horizon_seconds:.0f} s"
        )


def compare(seed: int, processors: Processors | None = None) -> Comparison:
    """Every strategy on the same site, whose hosts share so many processors."""
    results = {}
    for strategy in STRATEGIES:
        scene = random_scene(seed)
        links = replace(scene.fresh(), processors=processors)
        results[strategy] = Simulation(scene.site, links, strategy, limit_seconds=LIMIT_SECONDS).run()
    horizon = max(result.makespan for result in results.values())
    return Comparison(
        seed,
        len(scene.site.vms),
        interval_seconds(pair.round_trip_seconds for pair in scene.site.pairs),
        horizon,
        {name: result.expected_share(horizon) for name, result in results.items()},
        {name: len(result.out_at) for name, result in results.items()},
        {name: result.makespan for name, result in results.items()},
        [f"{name}, {fault}" for name, result in results.items() for fault in result.faults],
    )


def percentile(ratios: Sequence[float], share: float) -> float:
    """The value below which that share of them lies."""
    return sorted(ratios)[int(share * len(ratios))]
