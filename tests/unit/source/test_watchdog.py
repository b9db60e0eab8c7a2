# SPDX-License-Identifier: GPL-3.0-or-later
"""The watchdog ends what a dead proxy left open, in its turn where it gets one, and nothing else."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from precache_proxy.hypervisor.turns import TURNS, file_turn, turn_path
from precache_proxy.source import watchdog as watchdog_module
from precache_proxy.source.scratch import PassRecord, boottime_seconds
from precache_proxy.source.watchdog import Watchdog

VM = "11111111-2222-4333-8444-555555555501"


class Domain:
    """A VM with an open backup job, as libvirt's binding has it."""

    def __init__(self, socket: str) -> None:
        self.socket = socket
        self.aborted = 0

    def backupGetXMLDesc(self, _flags: int) -> str:  # noqa: N802
        return f"<domainbackup mode='pull'><server transport='unix' socket='{self.socket}'/></domainbackup>"

    def abortJob(self) -> None:  # noqa: N802
        self.aborted += 1


class Connection:
    """libvirt with that VM."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain

    def isAlive(self) -> int:  # noqa: N802
        return 1

    def lookupByUUIDString(self, uuid: str) -> Domain:  # noqa: N802
        assert uuid == VM
        return self._domain


def left_open(run: Path) -> Path:
    """The record of a pass whose proxy is gone."""
    path = run / "passes" / f"{VM}.json"
    record = PassRecord(VM, "/run/ours.sock", [], 1 << 30, boottime_seconds() + 60, proxy_pid=1)
    record.write(path)
    return path


def watchdog(run: Path, domain: Domain) -> Watchdog:
    return Watchdog(run, "test:///default", lambda _uri: Connection(domain))


def test_it_waits_for_a_call_on_the_same_vm(tmp_path: Path) -> None:
    path, domain = left_open(tmp_path), Domain("/run/ours.sock")
    held, over = threading.Event(), threading.Event()
    beside: list[int] = []

    def call() -> None:
        with file_turn(turn_path(tmp_path / TURNS, VM)):
            held.set()
            over.wait(10)
            beside.append(domain.aborted)

    other = threading.Thread(target=call)
    other.start()
    held.wait(10)
    threading.Timer(0.3, over.set).start()
    assert watchdog(tmp_path, domain).look() == [VM]
    other.join()
    assert beside == [0]
    assert domain.aborted == 1
    assert not path.exists()


def test_it_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that hangs in libvirt keeps its turn; the guest's scratch space cannot wait for that."""
    monkeypatch.setattr(watchdog_module, "PATIENCE_SECONDS", 0.1)
    left_open(tmp_path)
    domain = Domain("/run/ours.sock")
    with file_turn(turn_path(tmp_path / TURNS, VM)):
        assert watchdog(tmp_path, domain).look() == [VM]
    assert domain.aborted == 1


def test_a_job_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    path, domain = left_open(tmp_path), Domain("/run/theirs.sock")
    assert watchdog(tmp_path, domain).look() == []
    assert domain.aborted == 0
    assert not path.exists()
