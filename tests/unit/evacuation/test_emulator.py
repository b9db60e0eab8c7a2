# SPDX-License-Identifier: GPL-3.0-or-later
"""A QEMU process that is halted, goes on, or ends: a real process of two threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from precache_proxy.evacuation.emulator import Emulators
from unit.evacuation.emulator_ground import FakeEmulator

VM = "11111111-2222-4333-8444-555555555555"
OTHER = "11111111-2222-4333-8444-555555555556"


@pytest.fixture
def emulator(tmp_path: Path) -> Iterator[FakeEmulator]:
    made = FakeEmulator(tmp_path, VM)
    yield made
    made.clear()


async def test_halted_no_thread_of_it_runs_and_it_goes_on_where_it_was(emulator: FakeEmulator) -> None:
    emulators = Emulators(emulator.pid_files)
    assert not await emulators.is_halted(VM)
    assert await emulators.halt(VM)
    assert await emulators.is_halted(VM)
    assert emulator.standing()
    assert await Emulators(emulator.pid_files).is_halted(VM), "a proxy that comes later finds it so"
    assert await emulators.go_on(VM)
    assert emulator.counting()
    assert not await emulators.go_on(VM), "it was not halted"


async def test_only_a_halted_one_is_ended(emulator: FakeEmulator) -> None:
    emulators = Emulators(emulator.pid_files)
    assert not await emulators.end(VM)
    assert emulator.counting()
    await emulators.halt(VM)
    assert await emulators.end(VM)
    assert emulator.ended
    assert not await emulators.end(VM)
    assert not await emulators.halt(VM), "there is none to halt"


async def test_another_vms_process_is_let_alone(tmp_path: Path, emulator: FakeEmulator) -> None:
    emulators = Emulators(emulator.pid_files)
    other = FakeEmulator(tmp_path, OTHER, "web2")
    try:
        # libvirt may have left a pid file whose number somebody else has by now.
        (emulator.pid_files / "a.pid").write_text(f"{other.process.pid}\n")
        (emulator.pid_files / "b.pid").write_text("not a number\n")
        assert await emulators.halt(VM)
        assert other.counting()
        assert not await emulators.is_halted(OTHER)
        assert await emulators.halt("11111111-2222-4333-8444-555555555557") is False
    finally:
        other.clear()
