# SPDX-License-Identifier: GPL-3.0-or-later
"""Table `evacuation`: one VM moved by stock libvirt and by Lifeboat, per load and WAN, beside the bound."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from lifeboat_bench import memory
from lifeboat_bench.ground import DESTINATION, SOURCE, Ground
from lifeboat_bench.result import Bar, Table
from lifeboat_lab import stock
from lifeboat_lab.guests.guests import Guest
from lifeboat_lab.guests.plan import GuestPlan

REGIONAL = "regional"
TRANS_PACIFIC = "trans-pacific"
RATIO_ROW = "40:1"
BOOT_SECONDS = 180.0
SEED_SECONDS = 900.0
# A stock migration that never converges is given up; the reduction is then "at least".
PATIENCE_SECONDS = 300.0
# Loads to measure, joined by commas; the whole table takes more than an hour.
ONLY = "LIFEBOAT_BENCH_ONLY"


@dataclass(frozen=True)
class Case:
    """A load on a WAN."""

    load: str
    profile: str
    plan: GuestPlan


def _cases() -> list[Case]:
    # So much disk that a memory moved as quickly as the bound allows is a tenth of what stock tools take;
    # less over the slow line, where each of three copies of it takes minutes.
    cases = [
        Case(load, profile, plan)
        for profile, content_mib in ((REGIONAL, 2048), (TRANS_PACIFIC, 768))
        for load, plan in _loads(content_mib).items()
    ]
    # What the papers' 97.5 % needs: a fortieth of the bytes, hence forty times as much disk as memory.
    big = GuestPlan("bench", workload="idle", ram_mib=128, content_mib=5200, disk_mib=6144)
    return [*cases, Case(RATIO_ROW, REGIONAL, big)]


def _loads(content_mib: int) -> dict[str, GuestPlan]:
    base = GuestPlan(
        "bench", workload="idle", ram_mib=256, content_mib=content_mib, disk_mib=content_mib + 256
    )
    return {
        "idle": base,
        "fsync-log": replace(base, workload="fsync-log"),
        "dirty-ram": replace(base, workload="fsync-log,dirty-ram", dirty_mib_per_second=4, dirty_mib=32),
        "file-tree": replace(base, workload="file-tree"),
        "page-cache": replace(base, workload="page-cache", ram_mib=384),
    }


def run(ground: Ground) -> Table:
    """Measure every case. Raises LabError where one fails."""
    table = Table("evacuation")
    wanted = [word for word in os.environ.get(ONLY, "").split(",") if word]
    for case in _cases():
        if not wanted or case.load in wanted or f"{case.load}@{case.profile}" in wanted:
            _measure(ground, table, case)
    table.circumstances["only"] = wanted
    _sum_up(table)
    table.circumstances["wan_checks"] = ground.wan_checks
    return table


def _measure(ground: Ground, table: Table, case: Case) -> None:
    wan = ground.set_wan(case.profile)
    rate = wan["rate_bits_per_second"] / 8
    round_trip = float(wan["round_trip_seconds"])
    ground.say(f"{case.load} on {case.profile}: virsh migrate --copy-storage-all")
    plain = _stock(ground, case.plan, storage=True, multifd_zstd=False)
    ground.say(f"{case.load} on {case.profile}: the same with multifd and zstd")
    packed = _stock(ground, case.plan, storage=True, multifd_zstd=True)
    ground.say(f"{case.load} on {case.profile}: memory only, multifd and zstd")
    memory_packed = _stock(ground, case.plan, storage=False, multifd_zstd=True)
    ground.say(f"{case.load} on {case.profile}: Lifeboat")
    job, bound_bytes, crossed, findings = _ours(ground, case.plan)
    lag = int(job["bound"]["lag_bytes_at_command"])
    bound = (bound_bytes + lag) / rate + 4 * round_trip
    eviction = float(job["eviction_seconds"])
    # As the stock tool's memory is counted: on the interface, both ways, frames and TLS and TCP with it. The
    # lag that was sent first is ours to bear here, too; only what the disks' mirror sent is not memory's.
    but_disks = crossed - int(job["bytes"]["disk_sent_bytes"])
    table.rows.append(
        {
            "load": case.load,
            "wan": case.profile,
            "disk_to_ram": case.plan.content_mib / case.plan.ram_mib,
            "plain_seconds": plain.seconds,
            "plain_finished": plain.finished,
            "plain_megabytes": plain.wire_bytes / 1e6,
            "multifd_zstd_seconds": packed.seconds,
            "multifd_zstd_downtime_seconds": packed.downtime_seconds,
            "memory_only_zstd_seconds": memory_packed.seconds,
            "memory_only_zstd_megabytes": memory_packed.wire_bytes / 1e6,
            "lifeboat_seconds": eviction,
            "lifeboat_megabytes": crossed / 1e6,
            "lifeboat_memory_megabytes": job["bytes"]["ram_sent_bytes"] / 1e6,
            "lifeboat_all_but_mirrored_megabytes": but_disks / 1e6,
            "lifeboat_downtime_seconds": job["downtime_seconds"],
            "qemu_downtime_seconds": job["qemu_downtime_seconds"],
            "bound_seconds": bound,
            "measured_over_bound": eviction / bound,
            "reduction": 1 - eviction / plain.seconds,
            "nothing_lost": not findings,
        }
    )
    what = f"{case.load} on {case.profile}"
    if findings:
        # A run that lost something has no time to report.
        table.rows[-1].update(lifeboat_seconds=None, reduction=None, measured_over_bound=None)
        table.circumstances[f"findings of {what}"] = list(findings)
        return
    table.bars.append(Bar(f"{what}: eviction", "<=", 1.25 * bound + 12 * round_trip + 1, eviction, "s"))
    table.bars.append(
        Bar(f"{what}: memory on the wire, against multifd zstd", "<=", memory_packed.wire_bytes / 1e6,
            but_disks / 1e6, "MB")
    )  # fmt: skip
    asked = 0.975 if case.load == RATIO_ROW else 0.9
    table.bars.append(Bar(f"{what}: reduction against plain", ">=", asked, 1 - eviction / plain.seconds))
    if case.profile == TRANS_PACIFIC:
        qemu = job["qemu_downtime_seconds"]
        table.bars.append(Bar(f"{what}: QEMU's downtime", "<=", 0.8 + round_trip, qemu, "s"))


def _start(ground: Ground, plan: GuestPlan, name: str) -> Guest:
    guest = ground.lab.guests.define(SOURCE, replace(plan, name=name, uuid=GuestPlan(name).uuid))
    guest.start()
    guest.wait_ready(BOOT_SECONDS)
    return guest


def _stock(ground: Ground, plan: GuestPlan, *, storage: bool, multifd_zstd: bool) -> stock.StockMigration:
    guest = _start(ground, plan, "stock")
    try:
        return stock.migrate(
            ground.lab,
            guest,
            SOURCE,
            DESTINATION,
            storage=storage,
            multifd_zstd=multifd_zstd,
            patience_seconds=PATIENCE_SECONDS,
        )
    finally:
        guest.remove()


def _ours(ground: Ground, plan: GuestPlan) -> tuple[dict[str, Any], int, int, tuple[str, ...]]:
    """The job, the bytes below which its memory cannot go, what crossed the WAN, and what was found wrong."""
    guest = _start(ground, plan, "ours")
    try:
        ground.source.protect(guest.name, DESTINATION)
        ground.source.wait_protected(guest.name, timeout_seconds=SEED_SECONDS)
        canary = guest.canary(SOURCE)
        floor = memory.measure(ground.lab, guest, SOURCE).compressed_bytes
        before = stock.crossed_bytes(ground.lab)
        job = ground.source.evacuate(guest.name)
        crossed = stock.crossed_bytes(ground.lab) - before
        findings = [] if job["verdict"] == "evacuated" else [f"{job['verdict']}: {job['sentence']}"]
        if not findings:
            findings += _lost(ground, guest, canary)
        return job, floor, crossed, tuple(findings)
    finally:
        _forget(ground, guest)


def _lost(ground: Ground, guest: Guest, canary: str) -> list[str]:
    if guest.running_on() != [DESTINATION]:
        return [f"runs on {guest.running_on()}"]
    findings = [] if guest.canary(DESTINATION) == canary else ["the canary in memory changed"]
    ground.exec(DESTINATION, "virsh", "suspend", guest.plan.uuid)
    return findings + list(guest.verify(DESTINATION).findings)


def _forget(ground: Ground, guest: Guest) -> None:
    for proxy in (ground.source, ground.destination):
        proxy.unprotect(guest.plan.uuid, keep_replica=False)
    guest.remove()


def _sum_up(table: Table) -> None:
    reductions = [row["reduction"] for row in table.rows if isinstance(row["reduction"], float)]
    bounds = [
        row["measured_over_bound"] for row in table.rows if isinstance(row["measured_over_bound"], float)
    ]
    table.summary["least_reduction"] = min(reductions, default=None)
    table.summary["worst_measured_over_bound"] = max(bounds, default=None)
    table.summary["rows_with_losses"] = sum(row["nothing_lost"] is not True for row in table.rows)
