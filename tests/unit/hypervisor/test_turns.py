# SPDX-License-Identifier: GPL-3.0-or-later
"""Calls on the checkpoints and layers of one VM come one after the other, whoever makes them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

import precache_proxy
from precache_proxy.errors import HypervisorError
from precache_proxy.evacuation.domains import Domains
from precache_proxy.hypervisor.connection import Hypervisor
from precache_proxy.hypervisor.turns import file_turn, turn_path
from precache_proxy.source.tracker import Tracker, VmReference

VM, OTHER = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"


class Overlap:
    """How many were inside at once at most."""

    def __init__(self) -> None:
        self._inside = 0
        self._lock = threading.Lock()
        self.most = 0

    def enter(self, *_domain: object) -> None:
        with self._lock:
            self._inside += 1
            self.most = max(self.most, self._inside)
        time.sleep(0.05)
        with self._lock:
            self._inside -= 1


@pytest_asyncio.fixture
async def hypervisor(tmp_path: Path) -> AsyncIterator[Hypervisor]:
    one = Hypervisor("test:///default", tmp_path / "turns")
    await one.start()
    yield one
    await one.stop()


async def test_calls_on_one_vm_do_not_overlap_and_those_on_two_do(hypervisor: Hypervisor) -> None:
    same, apart = Overlap(), Overlap()
    await asyncio.gather(*(hypervisor.call_in_turn(VM, same.enter, subject="VM a") for _ in range(4)))
    await asyncio.gather(*(hypervisor.call_in_turn(vm, apart.enter, subject="VM") for vm in (VM, OTHER)))
    assert (same.most, apart.most) == (1, 2)


async def test_the_source_and_an_evacuation_take_turns_on_a_vm(hypervisor: Hypervisor) -> None:
    domain = await hypervisor.lookup("test")
    uuid = domain.UUIDString()
    seen = Overlap()
    tracker, domains = Tracker(hypervisor), Domains(hypervisor)
    await asyncio.gather(
        tracker.on_domain(VmReference(uuid, "test"), seen.enter),
        domains.run_in_turn(uuid, seen.enter),
        tracker.on_domain(VmReference(uuid, "test"), seen.enter),
    )
    assert seen.most == 1


async def test_a_call_that_was_given_up_keeps_its_turn_until_it_is_answered(hypervisor: Hypervisor) -> None:
    answered = threading.Event()
    with pytest.raises(HypervisorError, match="did not answer wait within"):
        await hypervisor.call_in_turn(VM, answered.wait, 10, subject="VM a", timeout_seconds=0.05)
    with pytest.raises(HypervisorError, match="VM a: libvirt has not answered an earlier call"):
        await hypervisor.call_in_turn(VM, time.monotonic, subject="VM a", timeout_seconds=0.05)
    answered.set()
    await hypervisor.call_in_turn(VM, time.monotonic, subject="VM a", timeout_seconds=5)


async def test_who_waits_in_vain_leaves_the_turn_to_others(hypervisor: Hypervisor) -> None:
    waiting = asyncio.create_task(hypervisor.call_in_turn(VM, time.sleep, 0.2, subject="VM a"))
    await asyncio.sleep(0.05)
    cancelled = asyncio.create_task(hypervisor.call_in_turn(VM, time.sleep, 0.2, subject="VM a"))
    await asyncio.sleep(0.05)
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    await waiting
    await hypervisor.call_in_turn(VM, time.monotonic, subject="VM a", timeout_seconds=1)


async def test_another_process_waits_and_gives_up_waiting(hypervisor: Hypervisor, tmp_path: Path) -> None:
    path = turn_path(tmp_path / "turns", VM)
    ask = (
        "import sys; from pathlib import Path; from precache_proxy.hypervisor.turns import file_turn\n"
        "with file_turn(Path(sys.argv[1]), patience_seconds=0.2) as mine: print(mine)"
    )
    answered = threading.Event()
    held = asyncio.create_task(hypervisor.call_in_turn(VM, answered.wait, 10, subject="VM a"))
    await asyncio.sleep(0.05)

    environment = {**os.environ, "PYTHONPATH": str(Path(precache_proxy.__file__).parents[1])}

    def other() -> str:
        command = [sys.executable, "-c", ask, str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return done.stdout.strip()

    assert await asyncio.to_thread(other) == "False"
    answered.set()
    await held
    assert await asyncio.to_thread(other) == "True"
    with file_turn(None) as mine:
        assert mine
