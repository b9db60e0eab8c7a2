# SPDX-License-Identifier: GPL-3.0-or-later
"""Live migration as libvirt does it unaided, disks and all: what Lifeboat is measured against."""

import json
import re
import time
from dataclasses import dataclass

from lifeboat_lab.guests.guests import Guest
from lifeboat_lab.lab import Lab


@dataclass(frozen=True)
class StockMigration:
    """What one `virsh migrate` came to. `wire_bytes` counts both directions of the WAN."""

    seconds: float
    wire_bytes: int
    downtime_seconds: float | None


def migrate(
    lab: Lab, guest: Guest, source: str, destination: str, *, storage: bool = True, multifd_zstd: bool = False
) -> StockMigration:
    """Move a running guest with `virsh migrate`; raises LabError when that fails.

    The destination's images are made beforehand and not counted: libvirt would need a storage pool for it.
    """
    allow_stock_migration(lab, source, destination)
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
    lab.exec(source, "virsh", "migrate", *options, guest.plan.uuid, f"qemu+ssh://{destination}/system",
             timeout_seconds=1800)  # fmt: skip
    seconds = time.monotonic() - began
    return StockMigration(seconds, crossed_bytes(lab) - before, _downtime(lab, guest, destination))


def crossed_bytes(lab: Lab) -> int:
    """Bytes that the WAN delivered so far between the two sites, both directions."""
    counters = lab.wan.counters()
    return sum(int(counters[path]["delivered_bytes"]) for path in ("home-backup", "backup-home"))


def _downtime(lab: Lab, guest: Guest, destination: str) -> float | None:
    """QEMU's own figure, which stays with the domain where it arrived."""
    text = lab.exec(destination, "virsh", "domjobinfo", "--completed", guest.plan.uuid, check=False).stdout
    found = re.search(r"Total downtime:\s+(\d+)\s+ms", text)
    return int(found.group(1)) / 1000 if found else None


def allow_stock_migration(lab: Lab, source: str, destination: str) -> None:
    """Let root of one host reach root of another by SSH: what stock `virsh migrate` over qemu+ssh needs."""
    lab.exec(source, "sh", "-ec", "mkdir -p /root/.ssh; test -f /root/.ssh/id_ed25519 || "
             "ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519")  # fmt: skip
    public = (lab.host(source).root / "root/.ssh/id_ed25519.pub").read_text()
    authorized = lab.host(destination).root / "root/.ssh/authorized_keys"
    text = authorized.read_text() if authorized.exists() else ""
    if public not in text:
        authorized.write_text(text + public)
    keys = lab.exec(destination, "cat", "/etc/ssh/ssh_host_ed25519_key.pub").stdout.split()
    known = lab.host(source).root / "root/.ssh/known_hosts"
    line = f"{destination} {keys[0]} {keys[1]}\n"
    if not known.exists() or line not in known.read_text():
        with known.open("a") as file:
            file.write(line)
