# SPDX-License-Identifier: GPL-3.0-or-later
"""Is everything there? A disk image is copied on its host, its journal replayed in the copy, and all that the
guest acknowledged looked for. The image itself is only read, so a running guest's or a replica's will do."""

import hashlib
import shutil
import sqlite3
import tempfile
import uuid
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from lifeboat_lab.guests.records import read_log
from lifeboat_lab.hosts import Host


@dataclass(frozen=True)
class DiskReport:
    """One disk: how many records its log holds and everything that is wrong."""

    image: str
    records: int
    rows: int
    findings: tuple[str, ...]


def examine(
    host: Host, image: str, image_format: str, manifest: dict[str, str], workloads: Sequence[str]
) -> DiskReport:
    """Examine an image on a running host.

    `manifest` is path below /content -> SHA-256 of what the disk was made with; of `workloads`, fsync-log and
    database are those that the disk holds something of.
    Raises LabError when the image cannot be read at all.
    """
    work = f"/var/tmp/lab-verify-{uuid.uuid4().hex}"  # on the host's disk
    host.exec("mkdir", work)
    try:
        raw = f"{work}/disk.raw"
        host.exec("qemu-img", "convert", "--force-share", "-f", image_format, "-O", "raw", image, raw,
                  timeout_seconds=1800)  # fmt: skip
        return _examine_raw(host, image, work, manifest, workloads)
    finally:
        host.exec("rm", "-rf", work)


def _examine_raw(
    host: Host, image: str, work: str, manifest: dict[str, str], workloads: Sequence[str]
) -> DiskReport:
    findings = []
    raw = f"{work}/disk.raw"
    # What mounting does: replay the journal, drop files that were deleted while open. Nothing else is mended.
    replay = host.exec("e2fsck", "-p", raw, check=False, timeout_seconds=600)
    if replay.returncode not in {0, 1}:
        findings.append(f"journal cannot be replayed: {replay.stdout.strip()} {replay.stderr.strip()}")
    check = host.exec("e2fsck", "-fn", raw, check=False, timeout_seconds=1800)
    if check.returncode != 0:
        findings.append(f"file system is not clean: {check.stdout.strip()[-600:]}")
    records = rows = 0
    if "fsync-log" in workloads:
        host.exec("debugfs", "-R", f"dump /log/records {work}/records", raw)
        path = _outside(host, f"{work}/records")
        log = read_log(path.read_bytes() if path.exists() else b"")
        records = log.count
        findings += log.findings
    if "database" in workloads:
        rows, wrong = _examine_database(host, work)
        findings += wrong
    if manifest:
        host.exec("debugfs", "-R", f"rdump /content {work}", raw, timeout_seconds=1800)
        for name, digest in manifest.items():
            path = _outside(host, f"{work}/content/{name}")
            if not path.exists():
                findings.append(f"content {name} is missing")
            elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                findings.append(f"content {name} differs")
    return DiskReport(image, records, rows, tuple(findings))


def _examine_database(host: Host, work: str) -> tuple[int, list[str]]:
    """Open the copy as SQLite would after a power cut; its journal, if there is one, is rolled back first."""
    host.exec("debugfs", "-R", f"rdump /var/lib/lab {work}", f"{work}/disk.raw", timeout_seconds=600)
    copied = _outside(host, f"{work}/lab")
    if not (copied / "database.sqlite").exists():
        return 0, []
    with tempfile.TemporaryDirectory() as outside:
        # SQLite resolves the links of a path itself and would leave the host's file system by /proc.
        shutil.copytree(copied, outside, dirs_exist_ok=True)
        return _read_database(Path(outside) / "database.sqlite")


def _read_database(path: Path) -> tuple[int, list[str]]:
    try:
        with closing(sqlite3.connect(path)) as database:
            verdict = database.execute("PRAGMA integrity_check").fetchone()[0]
            findings = [] if verdict == "ok" else [f"database: {verdict}"]
            rows = 0
            for number, payload, digest in database.execute(
                "SELECT number, payload, digest FROM log ORDER BY number"
            ):
                rows += 1
                if number != rows:
                    return rows - 1, [*findings, f"database: row {rows} is missing"]
                if hashlib.sha256(payload).hexdigest() != digest:
                    findings.append(f"database: row {number} is damaged")
    except sqlite3.Error as error:
        return 0, [f"database: {error}"]
    return rows, findings[:10]


def _outside(host: Host, path: str) -> Path:
    return host.root / path.lstrip("/")
