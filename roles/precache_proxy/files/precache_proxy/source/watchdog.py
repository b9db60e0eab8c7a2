# SPDX-License-Identifier: GPL-3.0-or-later
"""Ends backup jobs that a dead or stuck proxy left open: a process of its own, with libvirt and nothing else.

While such a job is open, QEMU copies old data aside for every block that the guest overwrites; when the
scratch space is full the *guest* gets an I/O error. So what is open is written down before it is opened
(run/passes/<uuid>.json), and ended here when its proxy is gone, its time is over or its space nearly used up:
if, and only if, the VM's backup job is the one that was written down.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import libvirt

from precache_proxy.hypervisor.handles import ConnectionHandle, DomainHandle
from precache_proxy.hypervisor.turns import TURNS, file_turn, turn_path
from precache_proxy.source.backups import backup_socket
from precache_proxy.source.scratch import HARD_SHARE, PassRecord, allocated_bytes, boottime_seconds

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
# for a call of the proxy on the same VM that is under way
PATIENCE_SECONDS = 5.0
# The proxy itself ends a pass at HARD_SHARE: only what it failed to end is left for us.
_SCRATCH_SHARE = (1 + HARD_SHARE) / 2


def lock_holders(path: Path, locks: Path = Path("/proc/locks")) -> int:
    """How many flocks are held on a file. Read, not tried: a try could make a starting proxy fail."""
    try:
        status = path.stat()
        lines = locks.read_text().splitlines()
    except OSError:
        return 0
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    # "1: FLOCK  ADVISORY  WRITE 1234 00:1a:42 0 EOF"; a waiting lock has "->" as its second word
    return sum(1 for line in lines if (words := line.split())[1] == "FLOCK" and wanted in words)


def why_end(record: PassRecord, *, proxy_alive: bool) -> str:
    """Why the recorded job must end now, or ""."""
    if not proxy_alive:
        return f"its proxy (process {record.proxy_pid}) is gone"
    if boottime_seconds() > record.deadline_boottime_seconds:
        return "its time is over"
    used = allocated_bytes([Path(path) for path in record.scratch])
    if used >= record.scratch_limit_bytes * _SCRATCH_SHARE:
        return f"its scratch files have {used} of {record.scratch_limit_bytes} bytes"
    return ""


class Watchdog:
    """``look`` once, or ``run`` for ever. Blocking; libvirt is only connected to when there is work."""

    def __init__(
        self, run_directory: Path, uri: str, open_connection: Callable[[str], ConnectionHandle] = libvirt.open
    ) -> None:
        self._run_directory = run_directory
        self._turns = run_directory / TURNS
        self._uri = uri
        self._open = open_connection
        self._connection: ConnectionHandle | None = None

    def run(self, stop: threading.Event) -> None:
        """Look until told to stop. Errors of libvirt are logged once a look and tried again."""
        while not stop.wait(LOOK_SECONDS):
            try:
                self.look()
            except libvirt.libvirtError as error:
                logger.warning("watchdog: libvirt at %s: %s; trying again", self._uri, error)
                self._connection = None
            except OSError as error:
                logger.warning("watchdog: %s; trying again", error)

    def look(self) -> list[str]:
        """End what has to be ended; returns the UUIDs of VMs whose job was ended."""
        passes = self._run_directory / "passes"
        paths = sorted(passes.glob("*.json")) if passes.is_dir() else []
        if not paths:
            return []
        alive = lock_holders(self._run_directory / "proxy.lock") > 0
        ended: list[str] = []
        for path in paths:
            record = PassRecord.read(path)
            if record is None:
                continue
            reason = why_end(record, proxy_alive=alive)
            if not reason:
                continue
            if self._end(record):
                logger.error("watchdog: ended the backup job of VM %s: %s", record.domain, reason)
                ended.append(record.domain)
            self._clean(path, record)
        return ended

    def _domain(self, uuid: str) -> DomainHandle | None:
        if self._connection is None or not self._connection.isAlive():
            self._connection = self._open(self._uri)
        try:
            return self._connection.lookupByUUIDString(uuid)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise

    def _end(self, record: PassRecord) -> bool:
        """Whether a job was ended. A job that is not the recorded one is left alone."""
        domain = self._domain(record.domain)
        if domain is None:
            return False
        try:
            # A proxy that hangs in libvirt keeps its turn: the guest's disk cannot wait for that.
            with file_turn(turn_path(self._turns, record.domain), patience_seconds=PATIENCE_SECONDS):
                if backup_socket(domain.backupGetXMLDesc(0)) != record.socket:
                    return False
                domain.abortJob()
        except libvirt.libvirtError as error:
            code = error.get_error_code()
            if code in {libvirt.VIR_ERR_NO_DOMAIN_BACKUP, libvirt.VIR_ERR_OPERATION_INVALID}:
                return False
            raise
        return True

    @staticmethod
    def _clean(path: Path, record: PassRecord) -> None:
        """Forget the record, if it is still this one: a new proxy may have begun a new pass meanwhile."""
        if PassRecord.read(path) == record:
            path.unlink(missing_ok=True)


def run_watchdog(run_directory: Path, uri: str, stop: threading.Event) -> None:
    """What ``precache-proxy watchdog`` does until ``stop`` is set."""
    Watchdog(run_directory, uri).run(stop)
