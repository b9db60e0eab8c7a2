# SPDX-License-Identifier: GPL-3.0-or-later
"""Table `scale`: how long one step of the controller takes and how much memory, from 10 to 10,000 VMs.

No lab: the collection's own planner and controller against the simulator. A second part compares the
strategies over random sites.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time

from lifeboat_bench.result import Bar, Table
from lifeboat_simulator.comparison import NOISE_SHARE, compare, percentile
from lifeboat_simulator.run import Simulation
from lifeboat_simulator.sites import random_scene

SIZES = ((10, 1), (100, 10), (1000, 50), (10_000, 500))
SITES = int(os.environ.get("LIFEBOAT_SCALE_SITES", "1000"))


def run() -> Table:
    """Measure; every size in a process of its own, so that its memory is its own."""
    table = Table("scale")
    for vms, hypervisors in SIZES:
        done = subprocess.run(
            [sys.executable, "-m", "lifeboat_bench.scale", str(vms), str(hypervisors)],
            check=True,
            capture_output=True,
            text=True,
        )
        table.rows.append(json.loads(done.stdout))
    last = table.rows[-1]
    table.bars.append(
        Bar("10,000 VMs: longest control step", "<=", 0.5, _number(last["longest_step_seconds"]), "s")
    )
    table.bars.append(Bar("10,000 VMs: memory", "<=", 500.0, _number(last["memory_megabytes"]), "MB"))
    _compare(table)
    return table


def _number(value: object) -> float:
    return float(str(value))


def measure(vms: int, hypervisors: int) -> dict[str, object]:
    """One size: a whole evacuation with a deadline that not all of them make."""
    began = time.perf_counter()
    scene = random_scene(1, pairs=hypervisors, vms=vms, full_destinations=True, dependencies=True)
    result = Simulation(scene.site, scene.fresh(), "feedback", deadline_seconds=1200.0).run()
    return {
        "vms": vms,
        "hypervisors": 2 * hypervisors,
        "steps": result.steps,
        "longest_step_seconds": round(result.longest_step_seconds, 4),
        "mean_step_seconds": round(result.mean_step_seconds, 4),
        "memory_megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "out": len(result.out_at),
        "most_at_once": result.most_at_once,
        "broken_rules": len(result.faults),
        "run_seconds": round(time.perf_counter() - began, 1),
    }


def _compare(table: Table) -> None:
    """E of `feedback` over that of the better of the two simple ones, over random sites."""
    told = [compare(seed) for seed in range(SITES)]
    ratios = sorted(site.ratio for site in told)
    makespans = []
    for site in told:
        whole = [time for name, time in site.makespans.items() if site.out[name] >= site.out["feedback"]]
        makespans.append(site.makespans["feedback"] / min(whole))
    broken = sum(len(site.broken) for site in told)
    behind = sum(site.worse_by(NOISE_SHARE) for site in told)
    table.summary["random_sites"] = len(ratios)
    table.summary["expected_share_over_better_median"] = statistics.median(ratios)
    table.summary["expected_share_over_better_5th_percentile"] = percentile(ratios, 0.05)
    table.summary["expected_share_over_better_1st_percentile"] = percentile(ratios, 0.01)
    table.summary["expected_share_over_better_least"] = ratios[0]
    table.summary["sites_behind_by_more_than_noise"] = behind
    table.summary["makespan_over_best_median"] = statistics.median(makespans)
    table.summary["makespan_over_best_95th_percentile"] = percentile(makespans, 0.95)
    table.summary["rules_broken"] = broken
    better = "E over the better of sequential and parallel"
    table.bars.append(Bar(f"{better}: median", ">=", 1.0, statistics.median(ratios)))
    table.bars.append(Bar(f"{better}: 5th percentile", ">=", 0.95, percentile(ratios, 0.05)))
    table.bars.append(
        Bar(f"{better}: share of sites behind by more than noise", "<=", 0.0, behind / len(ratios))
    )
    table.bars.append(Bar("rules broken (capacity, memory, starvation, started twice)", "<=", 0, broken))


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]))))
