# SPDX-License-Identifier: GPL-3.0-or-later
"""Live migration as libvirt does it unaided, disks and all: what Lifeboat is measured against."""

import json
import re
import time
from dataclasses import dataclass

from lifeboat_lab.errors import LabError
from lifeboat_lab.guests.guests import Guest
from lifeboat_lab.lab import Lab

_TIMED_OUT = 124  # the exit code of timeout(1)


@dataclass(frozen=True)
class StockMigration:
    """What one `virsh migrate` came to. `wire_bytes` counts both directions of the WAN.

    Not `finished`: given up after `seconds`, the guest is where it was. A guest that writes all the
    time keeps stock mirroring busy for ever on a long, thin line.
    """

    finished: bool
    seconds: float
    wire_bytes: int
    downtime_seconds: float | None


def migrate(
    lab: Lab,
    guest: Guest,
    source: str,
    destination: str,
    *,
    storage: bool = True,
    multifd_zstd: bool = False,
    patience_seconds: float = 900,
) -> StockMigration:
    """Move a running guest with `virsh migrate`; raises LabError when that fails.

    The destination's images are made beforehand and not counted: libvirt would need a storage pool for it.
    """
    options = ["--live", "--p2p", "--verbose"]
    for path, image_format in guest.images(source).values():
        told = lab.exec(source, "qemu-img", "info", "-U", "--output=json", path).stdout
        size = str(json.loads(told)["virtual-size"])
        lab.exec(destination, "qemu-img", "create", "-q", "-f", image_format, path, size)
    # Without its disks the guest is only good for being timed: what it reads there are empty ones.
    options.append("--copy-storage-all" if storage else "--unsafe")
    if multifd_zstd:
        options += ["--parallel", "--parallel-connections", "4", "--comp-methods", "zstd"]
    before = crossed_bytes(lab)
    began = time.monotonic()
    command = ("virsh", "migrate", *options, guest.plan.uuid, f"qemu+ssh://{destination}/system")
    ended = lab.exec(
        source,
        "timeout",
        f"{patience_seconds:.0f}",
        *command,
        check=False,
        timeout_seconds=patience_seconds + 60,
    )
    seconds = time.monotonic() - began
    if ended.returncode == _TIMED_OUT:
        lab.exec(source, "virsh", "domjobabort", guest.plan.uuid, check=False)
        return StockMigration(False, seconds, crossed_bytes(lab) - before, None)
    if ended.returncode != 0:
        raise LabError(f"virsh migrate of {guest.name}: {ended.stderr.strip()}")
    return StockMigration(True, seconds, crossed_bytes(lab) - before, _downtime(lab, guest, destination))


def crossed_bytes(lab: Lab) -> int:
    """Bytes that the WAN delivered so far between the two sites, both directions."""
    counters = lab.wan.counters()
    return sum(int(counters[path]["delivered_bytes"]) for path in ("home-backup", "backup-home"))


def _downtime(lab: Lab, guest: Guest, destination: str) -> float | None:
    """QEMU's own figure, which stays with the domain where it arrived."""
    text = lab.exec(destination, "virsh", "domjobinfo", "--completed", guest.plan.uuid, check=False).stdout
    found = re.search(r"Total downtime:\s+(\d+)\s+ms", text)
    return int(found.group(1)) / 1000 if found else None
