# SPDX-License-Identifier: GPL-3.0-or-later
"""Table `precache`: the first copy of incompressible data and an empty pass, with `nbdcopy` beside it."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from ipaddress import ip_address
from statistics import median, quantiles
from typing import Self

from lifeboat_bench.ground import PEERS, SOURCE, Ground
from lifeboat_bench.result import Bar, Table
from lifeboat_lab import stock
from lifeboat_lab.errors import LabError
from lifeboat_lab.proxy import Proxy
from lifeboat_lab.settings import HOSTS
from lifeboat_lab.wan import carried_share

MIB = 1 << 20
IMAGES = "/var/lib/libvirt/images"
NBD_PORT = 10809
EMPTY_PASSES = 5
SETTLE_SECONDS = 60.0
COPY_SECONDS = 900.0
# TLS takes 22 bytes of 16 KiB.
TLS_SHARE = 1 - 22 / 16384


@dataclass(frozen=True)
class Case:
    """One WAN, how much is copied over it, and the share of the link asked for (None: a rate instead)."""

    name: str
    profile: str
    size_mib: int
    asked_share: float | None
    source: str = SOURCE

    @property
    def ip_version(self) -> int:
        """What its proxies speak."""
        return ip_address(HOSTS[self.source].peer_address).version

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.profile}, IPv{self.ip_version}"

    @property
    def hosts(self) -> tuple[str, str]:
        """Source and destination."""
        return self.source, PEERS[self.source]


# The first three copy for a minute and more: a beginning of a second is to count as it does for real disks.
CASES = (
    Case("regional", "rate=400mbit,rtt=40ms", 4096, 0.95),
    Case("regional-ipv4", "rate=400mbit,rtt=40ms", 4096, 0.95, source="home2"),
    Case("trans-pacific", "rate=50mbit,rtt=180ms", 768, 0.92),
    Case("long-fat", "rate=400mbit,rtt=180ms", 1536, 0.75),
    Case("local", "none", 2048, None),
)
# Which of them to measure, by name, joined by commas.
ONLY = "LIFEBOAT_BENCH_ONLY"
ASKED_BYTES_PER_SECOND = 150e6


def run(ground: Ground) -> Table:
    """Measure every case. Raises LabError where one fails."""
    table = Table("precache")
    wanted = [word for word in os.environ.get(ONLY, "").split(",") if word]
    unknown = set(wanted) - {case.name for case in CASES}
    if unknown:
        raise LabError(
            f"{ONLY}: no case {', '.join(sorted(unknown))}; choose some of "
            + ", ".join(case.name for case in CASES)
        )
    for number, case in enumerate(CASES):
        if wanted and case.name not in wanted:
            continue
        name = f"copy{number}"
        ground.say(f"{case.title}: {case.size_mib} MiB by nbdcopy, then by a first copy")
        _define(ground, case, name)
        try:
            _measure(ground, table, case, name)
        finally:
            ground.lab.exec(case.hosts[0], "virsh", "destroy", name, check=False)
    table.circumstances["only"] = wanted
    table.circumstances["wan_checks"] = ground.wan_checks
    return table


def _define(ground: Ground, case: Case, name: str) -> None:
    source = case.hosts[0]
    path = f"{IMAGES}/{name}.qcow2"
    raw = f"/var/tmp/{name}.raw"
    ground.exec(source, "sh", "-ec", f"head -c {case.size_mib}M /dev/urandom > {raw}; "
                f"qemu-img convert -O qcow2 {raw} {path}; rm {raw}")  # fmt: skip
    xml = (
        f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>"
        "<os><type arch='x86_64' machine='q35'>hvm</type></os><devices>"
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none'/>"
        f"<source file='{path}'/><target dev='vda' bus='virtio'/></disk></devices></domain>"
    )
    ground.lab.exec(source, "virsh", "define", "/dev/stdin", stdin=xml)


def _measure(ground: Ground, table: Table, case: Case, name: str) -> None:
    wan = ground.set_wan(case.profile, case.hosts)
    link = wan["rate_bits_per_second"] / 8
    round_trip = float(wan["round_trip_seconds"])
    size = case.size_mib * MIB
    source, destination = case.hosts
    proxy = Proxy(ground.lab.host(source))
    alone = size / _nbdcopy(ground, case, name)
    # Not before: a running VM's lock would refuse qemu-nbd. Paused: only the copy shall use the processors.
    ground.exec(source, "virsh", "start", "--paused", name)
    _settle(proxy, destination, round_trip)
    with LatencyWatch(proxy) as latency:
        began = time.monotonic()
        proxy.protect(name, destination, rpo_seconds=3600)
        # A tenth of a second is 0.3 % of half a minute, and is seen to a hundredth at the end.
        proxy.wait_protected(name, timeout_seconds=COPY_SECONDS, step_seconds=0.1, last_step_seconds=0.01)
        ours = size / (time.monotonic() - began)
    passes = [_empty_pass(ground, proxy, name) for _ in range(EMPTY_PASSES)]
    seconds, wire_bytes = median(p[0] for p in passes), median(p[1] for p in passes)
    table.rows.append(
        {
            "wan": case.profile,
            "ip": case.ip_version,
            "size_mib": case.size_mib,
            "nbdcopy_megabytes_per_second": alone / 1e6,
            "first_copy_megabytes_per_second": ours / 1e6,
            "nbdcopy_share_of_link": alone / link if link else None,
            "first_copy_share_of_link": ours / link if link else None,
            "bound_share_of_link": TLS_SHARE * carried_share(case.ip_version) if link else None,
            "ratio_to_nbdcopy": ours / alone,
            "control_calls": len(latency.seconds),
            "control_call_median_seconds": median(latency.seconds),
            "control_call_99th_percentile_seconds": quantiles(latency.seconds, n=100, method="inclusive")[98],
            "control_call_longest_seconds": max(latency.seconds),
            "empty_pass_seconds": seconds,
            "empty_pass_wire_bytes": wire_bytes,
        }
    )
    if case.asked_share is not None:
        table.bars.append(Bar(f"{case.title}: share of the link", ">=", case.asked_share, ours / link))
    else:
        table.bars.append(
            Bar("no WAN limit: first copy", ">=", ASKED_BYTES_PER_SECOND / 1e6, ours / 1e6, "MB/s")
        )
    table.bars += [
        Bar(f"{case.title}: empty pass", "<=", 0.3 + 2 * round_trip, seconds, "s"),
        Bar(f"{case.title}: empty pass on the wire", "<=", 4096, wire_bytes, "bytes"),
        Bar(
            f"{case.title}: longest call of the control class",
            "<=",
            round_trip + 0.05,
            max(latency.seconds),
            "s",
        ),
    ]


def _nbdcopy(ground: Ground, case: Case, name: str) -> float:
    """Seconds that `nbdcopy` with its defaults takes for the same image over the same WAN."""
    source, destination = case.hosts
    address = ground.lab.host(source).plan.peer_address
    authority = f"[{address}]" if case.ip_version == 6 else address
    ground.exec(source, "sh", "-ec", "qemu-nbd --fork --persistent --read-only --shared=8 "
                f"--pid-file=/run/nbd.pid --bind={address} --port={NBD_PORT} "
                f"-f qcow2 {IMAGES}/{name}.qcow2")  # fmt: skip
    try:
        began = time.monotonic()
        ground.exec(destination, "nbdcopy", f"nbd://{authority}:{NBD_PORT}", "/var/tmp/nbdcopy.raw")
        return time.monotonic() - began
    finally:
        ground.lab.exec(source, "sh", "-c", "kill $(cat /run/nbd.pid)", check=False)
        ground.lab.exec(destination, "rm", "-f", "/var/tmp/nbdcopy.raw")


def _settle(proxy: Proxy, destination: str, round_trip: float) -> None:
    """Wait until nbdcopy's queue has left the path, and the smoothed round trip: they are not ours."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < deadline:
        told = proxy.link(destination)["round_trip_seconds"]
        if told is not None and told < round_trip + 0.01:
            return
        time.sleep(0.5)
    raise LabError(f"link to {destination}: its round trip did not settle within {SETTLE_SECONDS:g} s")


def _empty_pass(ground: Ground, proxy: Proxy, name: str) -> tuple[float, int]:
    """Seconds that a pass over an idle VM takes, and what crossed the WAN meanwhile, both ways."""
    before = stock.crossed_bytes(ground.lab)
    began = time.monotonic()
    proxy.request("POST", f"/vms/{name}/pass")
    return time.monotonic() - began, stock.crossed_bytes(ground.lab) - before


class LatencyWatch:
    """How long calls of the control class took while something else filled the link.

    Each asks the peer for its clock, as `precache-proxy check` does: a stream is opened, asked and answered.
    """

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.seconds: list[float] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            checks = self._proxy.get("/check")["checks"]
            self.seconds += [one["seconds"] for one in checks if one["check"] == "clock"]
