# SPDX-License-Identifier: GPL-3.0-or-later
"""Table `peacetime`: what protection costs a guest that writes, and the host that keeps idle ones."""

from __future__ import annotations

import os
import time
from operator import truediv
from pathlib import Path
from statistics import median

from lifeboat_bench.ground import DESTINATION, SOURCE, Ground
from lifeboat_bench.result import Bar, Table
from lifeboat_lab.guests.guests import Guest
from lifeboat_lab.guests.plan import GuestPlan

PROFILE = "regional"
RPO_SECONDS = (5.0, 15.0, 60.0)
ASKED_RPO_SECONDS = 15.0
ROUNDS = 3
WINDOW_SECONDS = 45.0
IDLE_VMS = 50
IDLE_SECONDS = 60.0
BOOT_SECONDS = 180.0
SEED_SECONDS = 600.0
AS_FAST_AS_POSSIBLE = 100_000
# Which parts to measure, joined by commas: RPOs in seconds, and `idle` (all: about 25 minutes).
ONLY = "LIFEBOAT_BENCH_ONLY"


def run(ground: Ground) -> Table:
    """Measure both parts. Raises LabError where one fails."""
    table = Table("peacetime")
    wanted = [word for word in os.environ.get(ONLY, "").split(",") if word]
    rpos = [seconds for seconds in RPO_SECONDS if not wanted or f"{seconds:g}" in wanted]
    ground.set_wan(PROFILE)
    if rpos:
        _throughput(ground, table, rpos)
    if not wanted or "idle" in wanted:
        _idle(ground, table)
    table.circumstances["only"] = wanted
    table.circumstances["wan_checks"] = ground.wan_checks
    return table


def _throughput(ground: Ground, table: Table, rpos: list[float]) -> None:
    """Acknowledged writes a second, protected and not in turn, so that a drift of the machine hits both."""
    plan = GuestPlan("writer", workload="fsync-log", content_mib=64, disk_mib=2048,
                     records_per_second=AS_FAST_AS_POSSIBLE)  # fmt: skip
    guest = ground.lab.guests.define(SOURCE, plan)
    guest.start()
    guest.wait_ready(BOOT_SECONDS)
    for rpo_seconds in rpos:
        protected, unprotected, shares = [], [], []
        for number in range(ROUNDS):
            ground.say(f"RPO {rpo_seconds:g} s, round {number + 1} of {ROUNDS}")
            unprotected.append(_records_per_second(guest))
            ground.source.protect(guest.name, DESTINATION, rpo_seconds=rpo_seconds)
            ground.source.wait_protected(guest.name, timeout_seconds=SEED_SECONDS)
            open_before = _open_seconds(ground, guest)
            protected.append(_records_per_second(guest))
            shares.append((_open_seconds(ground, guest) - open_before) / WINDOW_SECONDS)
            ground.source.unprotect(guest.plan.uuid, keep_replica=False)
        ratio = median(protected) / median(unprotected)
        table.rows.append(
            {
                "rpo_seconds": rpo_seconds,
                "unprotected_writes_per_second": median(unprotected),
                "protected_writes_per_second": median(protected),
                "ratio": ratio,
                "least_ratio": min(map(truediv, protected, unprotected)),
                "greatest_ratio": max(map(truediv, protected, unprotected)),
                "share_of_time_with_a_pass_open": median(shares),
            }
        )
        if rpo_seconds == ASKED_RPO_SECONDS:
            table.bars.append(Bar("writes protected / unprotected at RPO 15 s", ">=", 0.95, ratio))
    guest.destroy(SOURCE)


def _records_per_second(guest: Guest) -> float:
    before, began = guest.told().highest_acknowledged, time.monotonic()
    time.sleep(WINDOW_SECONDS)
    return (guest.told().highest_acknowledged - before) / (time.monotonic() - began)


def _open_seconds(ground: Ground, guest: Guest) -> float:
    return float(ground.source.vm(guest.plan.uuid)["passes"]["open_seconds"])


def _idle(ground: Ground, table: Table) -> None:
    """Memory and processor time of proxy and libvirtd with many protected, paused VMs."""
    ground.say(f"defining and protecting {IDLE_VMS} idle VMs")
    for number in range(IDLE_VMS):
        _define_idle(ground, f"idle{number}")
    for number in range(IDLE_VMS):
        ground.source.protect(f"idle{number}", DESTINATION)
    for number in range(IDLE_VMS):
        ground.source.wait_protected(f"idle{number}", timeout_seconds=SEED_SECONDS)
    # The first passes after seeding are not what an idle day is like.
    time.sleep(20)
    places = {name: Path(f"/proc/{_pid(ground, unit)}") for name, unit in
              (("proxy", "precache-proxy.service"), ("libvirtd", "libvirtd.service"))}  # fmt: skip
    before = {name: _processor_seconds(place) for name, place in places.items()}
    began = time.monotonic()
    time.sleep(IDLE_SECONDS)
    elapsed = time.monotonic() - began
    shares = {name: (_processor_seconds(place) - before[name]) / elapsed for name, place in places.items()}
    resident = _resident_bytes(places["proxy"]) / 1e6
    per_ten = sum(shares.values()) / IDLE_VMS * 10
    table.summary.update(
        idle_vms=IDLE_VMS,
        proxy_resident_megabytes=resident,
        proxy_core_share=shares["proxy"],
        libvirtd_core_share=shares["libvirtd"],
        core_share_per_ten_vms=per_ten,
    )
    table.bars.append(Bar(f"proxy resident with {IDLE_VMS} idle VMs", "<=", 200.0, resident, "MB"))
    table.bars.append(Bar("share of a core per ten idle VMs, libvirtd's too", "<=", 0.02, per_ten))


def _define_idle(ground: Ground, name: str) -> None:
    path = f"/var/lib/libvirt/images/{name}.qcow2"
    ground.exec(SOURCE, "qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
    xml = (
        f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory><vcpu>1</vcpu>"
        "<os><type arch='x86_64' machine='q35'>hvm</type></os><devices>"
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{path}'/>"
        "<target dev='vda' bus='virtio'/></disk></devices></domain>"
    )
    ground.lab.exec(SOURCE, "virsh", "define", "/dev/stdin", stdin=xml)
    ground.exec(SOURCE, "virsh", "start", "--paused", name)


def _pid(ground: Ground, unit: str) -> int:
    """The unit's main process as this machine numbers it: the one whose innermost number the host tells."""
    inside = ground.exec(SOURCE, "systemctl", "show", "-P", "MainPID", unit).strip()
    namespace = (ground.lab.host(SOURCE).root.parent / "ns/pid_for_children").readlink()
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            numbers = next(
                line for line in status.read_text().splitlines() if line.startswith("NSpid:")
            ).split()
            if numbers[-1] == inside and (status.parent / "ns/pid").readlink() == namespace:
                return int(status.parent.name)
        except OSError:
            continue
    raise ProcessLookupError(f"{unit}: its process {inside} was not found")


def _processor_seconds(place: Path) -> float:
    fields = (place / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident_bytes(place: Path) -> int:
    line = next(line for line in (place / "status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024
