# SPDX-License-Identifier: GPL-3.0-or-later
"""Is everything there? A disk image is copied on its host, its journal replayed in the copy, and all that the
guest acknowledged looked for. The image itself is only read, so a running guest's or a replica's will do."""

import hashlib
import uuid
from dataclasses import dataclass
from pathlib import Path

from lifeboat_lab.guests.records import read_log
from lifeboat_lab.hosts import Host


@dataclass(frozen=True)
class DiskReport:
    """One disk: how many records its log holds and everything that is wrong."""

    image: str
    records: int
    findings: tuple[str, ...]


def examine(
    host: Host, image: str, image_format: str, manifest: dict[str, str], *, has_log: bool
) -> DiskReport:
    """Examine an image on a running host.

    `manifest` is path below /content -> SHA-256 of what the disk was made with.
    Raises LabError when the image cannot be read at all.
    """
    work = f"/var/tmp/lab-verify-{uuid.uuid4().hex}"  # on the host's disk
    host.exec("mkdir", work)
    try:
        raw = f"{work}/disk.raw"
        host.exec("qemu-img", "convert", "--force-share", "-f", image_format, "-O", "raw", image, raw,
                  timeout_seconds=1800)  # fmt: skip
        return _examine_raw(host, image, work, manifest, has_log=has_log)
    finally:
        host.exec("rm", "-rf", work)


def _examine_raw(host: Host, image: str, work: str, manifest: dict[str, str], *, has_log: bool) -> DiskReport:
    findings = []
    raw = f"{work}/disk.raw"
    replay = host.exec("e2fsck", "-y", "-E", "journal_only", raw, check=False, timeout_seconds=600)
    if replay.returncode not in {0, 1}:
        findings.append(f"journal cannot be replayed: {replay.stdout.strip()} {replay.stderr.strip()}")
    check = host.exec("e2fsck", "-fn", raw, check=False, timeout_seconds=1800)
    if check.returncode != 0:
        findings.append(f"file system is not clean: {check.stdout.strip()[-600:]}")
    records = 0
    if has_log:
        host.exec("debugfs", "-R", f"dump /log/records {work}/records", raw)
        path = _outside(host, f"{work}/records")
        log = read_log(path.read_bytes() if path.exists() else b"")
        records = log.count
        findings += log.findings
    if manifest:
        host.exec("debugfs", "-R", f"rdump /content {work}", raw, timeout_seconds=1800)
        for name, digest in manifest.items():
            path = _outside(host, f"{work}/content/{name}")
            if not path.exists():
                findings.append(f"content {name} is missing")
            elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                findings.append(f"content {name} differs")
    return DiskReport(image, records, tuple(findings))


def _outside(host: Host, path: str) -> Path:
    return host.root / path.lstrip("/")
