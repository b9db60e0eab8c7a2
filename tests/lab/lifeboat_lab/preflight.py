# SPDX-License-Identifier: GPL-3.0-or-later
"""Can this machine carry a lab? Asked before anything is built; every finding at once."""

import os
import shutil
from pathlib import Path

from lifeboat_lab.errors import LabError
from lifeboat_lab.settings import CACHE, STATE
from lifeboat_lab.shell import run

INSTALLER = Path(__file__).resolve().parent.parent / "install-dependencies"
# Program and the Debian package that brings it; install-dependencies reads this table too.
PROGRAMS = {
    "mmdebstrap": "mmdebstrap",
    "systemd-nspawn": "systemd-container",
    "dpkg-scanpackages": "dpkg-dev",
    "ip": "iproute2",
    "nft": "nftables",
    "sysctl": "procps",
    "ssh": "openssh-client",
    "ping": "iputils-ping",
    "iperf3": "iperf3",
    "mke2fs": "e2fsprogs",
    "nsenter": "util-linux",
    "gcc": "gcc",
}
FILES = {
    "/usr/share/keyrings/debian-archive-keyring.gpg": "debian-archive-keyring",
    "/usr/lib/x86_64-linux-gnu/libc.a": "libc6-dev",
}
KERNEL_NEEDS = {"overlay": "overlayfs", "cgroup2": "unified control groups"}
NEEDED_MIB = {CACHE: 500, STATE: 2000}


def check() -> None:
    """Raise LabError with everything that is in the way; installs missing Debian packages first."""
    if os.geteuid() != 0:
        raise LabError("the lab makes namespaces, mounts and hosts: run it as root")
    release = Path("/etc/os-release").read_text() if Path("/etc/os-release").exists() else ""
    if not any(line.split("=", 1)[-1].strip('"').split() == ["debian"]
               for line in release.splitlines() if line.startswith("ID=")):  # fmt: skip
        raise LabError(
            "this machine is not Debian: the lab builds its hosts with Debian's tools; use Debian 12 or 13"
        )
    findings = _kernel_findings() + _space_findings()
    if findings:
        raise LabError("; ".join(findings))
    if missing_packages():
        run([str(INSTALLER)], timeout_seconds=1800)


def missing_packages() -> list[str]:
    """Debian packages that the lab needs on this machine and that are not installed."""
    missing = {package for program, package in PROGRAMS.items() if shutil.which(program) is None}
    missing |= {package for path, package in FILES.items() if not Path(path).exists()}
    return sorted(missing)


def _kernel_findings() -> list[str]:
    known = Path("/proc/filesystems").read_text().split()
    findings = []
    for name, title in KERNEL_NEEDS.items():
        if name not in known and run(["modprobe", name], check=False).returncode != 0:
            findings.append(f"kernel: has no {title}; boot Debian's own kernel")
    if not Path("/dev/net/tun").exists() and run(["modprobe", "tun"], check=False).returncode != 0:
        findings.append("kernel: has no TUN device; boot Debian's own kernel")
    return findings


def _space_findings() -> list[str]:
    findings = []
    for directory, needed_mib in NEEDED_MIB.items():
        place = directory
        while not place.exists():
            place = place.parent
        free_mib = shutil.disk_usage(place).free >> 20
        if free_mib < needed_mib:
            findings.append(f"{directory}: {needed_mib} MiB needed, {free_mib} MiB free; free space there")
    return findings


if __name__ == "__main__":
    for missing in missing_packages():
        print(missing)
