# SPDX-License-Identifier: GPL-3.0-or-later
"""Table `coordination`: a site of eight VMs on two hosts emptied by each strategy, on lines of three kinds.

By the playbook that an operator uses. The VMs go there by one strategy and back by the next: the lab is the
same from both sides, and what is measured is the same work each time.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lifeboat_bench.crowd import VMS, Crowd
from lifeboat_bench.ground import PEERS, Ground
from lifeboat_bench.result import Bar, Table
from lifeboat_lab.guests.plan import GuestPlan

FEEDBACK = "feedback"
# One at a time, two, four (`static:N` is per pair of hosts, of which there are two), all at once.
FIXED = ("sequential", "static:1", "static:2", "parallel")
# The last: a VM's way in takes longer than its memory, so that one at a time leaves the line idle.
WANS = ("trans-pacific", "step", "regional")
# A line that changes under way: from when its steps are counted is part of the run.
STEPS = "step"
# Which WANs to measure, joined by commas; the whole table takes about an hour.
ONLY = "LIFEBOAT_BENCH_ONLY"


@dataclass(frozen=True)
class Run:
    """One emptying of a site; seconds from the command. ``wire_bytes``: of all VMs together."""

    strategy: str
    out: tuple[float, ...]
    individual: tuple[float, ...]
    wire_bytes: int

    @property
    def makespan(self) -> float:
        """When the last was out."""
        return max(self.out)

    def expected_share(self, horizon: float) -> float:
        """E: the share that is out, in the mean over the time up to ``horizon``."""
        return sum(max(horizon - out, 0.0) for out in self.out) / (len(self.out) * horizon)


def _empty(crowd: Crowd, strategy: str, wan: str) -> Run:
    """Move all to the other site. Raises LabError where one was not out, or lost anything."""
    crowd.wait_protected()
    crowd.ground.lab.wan.set(wan)
    crowd.begin({"evacuate_strategy": strategy}).end().require_success()
    crowd.at_home = not crowd.at_home
    crowd.check()
    vms = crowd.reported().values()
    return Run(
        strategy,
        tuple(float(vm["out_seconds"]) for vm in vms),
        tuple(float(vm["eviction_seconds"]) for vm in vms),
        sum(int(vm["wire_bytes"] or 0) for vm in vms),
    )


@dataclass(frozen=True)
class Rehearsed:
    """What a rehearsal foresees: the makespan in seconds, bytes of all VMs together, the line's bytes a
    second."""

    makespan: float
    wire_bytes: int
    bytes_per_second: float


def _rehearse(crowd: Crowd) -> Rehearsed:
    """What feedback would come to now. Raises LabError."""
    crowd.wait_protected()
    told = json.loads(crowd.rehearse({"evacuate_strategy": FEEDBACK}).read_text())
    return Rehearsed(
        float(told["makespan_seconds"]),
        sum(int(vm["wire_bytes"]) for vm in told["vms"]),
        sum(float(rate or 0) for rate in told["uplinks"].values()),
    )


def run(ground: Ground) -> Table:
    """Measure the table on a fresh lab of four hosts. Raises LabError where a run lost something."""
    table = Table("coordination")
    crowd = Crowd(
        ground,
        [
            GuestPlan(
                f"vm{number}", ram_mib=96, disk_mib=64, content_mib=8,
                workload="fsync-log" if number % 4 < 2 else "idle", records_per_second=2,
            )
            for number in range(VMS)
        ],
    )  # fmt: skip
    crowd.build()
    wanted = [word for word in os.environ.get(ONLY, "").split(",") if word]
    for wan in WANS:
        if wanted and wan not in wanted:
            continue
        # Only a line that stands can be measured: the first of the steps is that of the first WAN.
        ground.set_wan(WANS[0] if wan == STEPS else wan)
        runs, rehearsed = [], None
        for strategy in (*FIXED, FEEDBACK):
            if strategy == FEEDBACK and wan != STEPS:
                # Just before it: what guests have in their memories grows from minute to minute. A line that
                # will change under way cannot be rehearsed.
                rehearsed = _rehearse(crowd)
            ground.say(f"{strategy} on {wan}")
            runs.append(_empty(crowd, strategy, wan))
            ground.say(f"{strategy} on {wan}: the last was out after {runs[-1].makespan:.1f} s")
        _report(table, wan, runs, rehearsed)
    table.circumstances |= {"vms": VMS, "pairs": PEERS, "wan_checks": ground.wan_checks, "only": wanted}
    return table


def _report(table: Table, wan: str, runs: Sequence[Run], rehearsed: Rehearsed | None) -> None:
    # E is compared over one time for all: until the slowest of them was through.
    horizon = max(run.makespan for run in runs)
    best_makespan = min(run.makespan for run in runs)
    best_mean = min(statistics.mean(run.individual) for run in runs)

    def spread(run: Run) -> float:
        return (run.makespan / best_makespan) * (statistics.mean(run.individual) / best_mean)

    for run in runs:
        table.rows.append(
            {
                "wan": wan,
                "strategy": run.strategy,
                "makespan_seconds": run.makespan,
                "mean_out_seconds": statistics.mean(run.out),
                "mean_individual_seconds": statistics.mean(run.individual),
                "longest_individual_seconds": max(run.individual),
                "expected_share": run.expected_share(horizon),
                "j": spread(run),
            }
        )
    by_name = {run.strategy: run for run in runs}
    ours, fixed = by_name[FEEDBACK], [by_name[name] for name in FIXED]
    best = max(run.expected_share(horizon) for run in fixed)
    table.bars += [
        Bar(f"{wan}: E against the best fixed", ">=", 1.0 if wan == STEPS else 0.95,
            ours.expected_share(horizon) / best),
        Bar(f"{wan}: makespan against the best fixed", "<=", 1.1,
            ours.makespan / min(run.makespan for run in fixed)),
        Bar(f"{wan}: J against parallel", "<=", 1.0, spread(ours) / spread(by_name["parallel"])),
        Bar(f"{wan}: J against sequential", "<=", 1.02, spread(ours) / spread(by_name["sequential"])),
    ]  # fmt: skip
    if rehearsed is not None:
        table.summary[f"{wan}_rehearsed_makespan_seconds"] = rehearsed.makespan
        table.summary[f"{wan}_rehearsed_megabytes"] = rehearsed.wire_bytes / 1e6
        table.summary[f"{wan}_crossed_megabytes"] = ours.wire_bytes / 1e6
        table.summary[f"{wan}_rehearsed_megabits_a_second"] = rehearsed.bytes_per_second * 8 / 1e6
        off = abs(rehearsed.makespan - ours.makespan) / ours.makespan
        table.bars.append(Bar(f"{wan}: rehearsal's makespan off by, share", "<=", 0.15, off))
    table.summary[f"{wan}_individual_times_shorter_than_parallel"] = statistics.mean(
        by_name["parallel"].individual
    ) / statistics.mean(ours.individual)
