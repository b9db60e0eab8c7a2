# SPDX-License-Identifier: GPL-3.0-or-later
"""When a guest's writes wait for the WAN: foreseen, or seen; and what QEMU is told then."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import libvirt
import libvirt_qemu
import pytest

from precache_proxy.errors import HypervisorError
from precache_proxy.evacuation.mirroring import (
    MirrorWatch,
    WriteRate,
    changeable,
    emulator_version,
    guest_writes,
    needs_synchronous_writes,
    write_synchronously,
)


@pytest.mark.parametrize(
    ("requests", "written", "channel", "round_trip", "needed"),
    [
        (0.0, 0.0, 6e6, 0.18, False),
        (2.0, 20_000.0, 6e6, 0.18, False),
        (5.0, 4e6, 6e6, 0.01, True),  # more than half of what can be sent
        (20.0, 80_000.0, 6e6, 0.18, True),  # twenty synced records a second over a long way
        (20.0, 80_000.0, None, 0.18, True),
        (20.0, 80_000.0, 50e6, 0.01, False),
        (20.0, 80_000.0, None, None, False),
    ],
)
def test_foreseen(
    requests: float, written: float, channel: float | None, round_trip: float | None, needed: bool
) -> None:
    assert needs_synchronous_writes(WriteRate(requests, written), channel, round_trip) is needed


def test_where_it_cannot_be_mended_later_any_write_is_one_too_many() -> None:
    assert needs_synchronous_writes(WriteRate(0.1, 1.0), 6e6, 0.01, changeable=False)
    assert needs_synchronous_writes(None, 6e6, 0.01, changeable=False), "not known is not none"
    assert not needs_synchronous_writes(WriteRate(0.0, 0.0), 6e6, 0.18, changeable=False)
    assert (changeable(7_002_022), changeable(8_002_000), changeable(None)) == (False, True, True)


def test_what_is_not_known_speaks_for_the_background() -> None:
    assert not needs_synchronous_writes(None, 6e6, 0.18)


async def test_what_a_guest_writes_is_counted_by_its_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("precache_proxy.evacuation.mirroring.time", SimpleNamespace(monotonic=clock))
    counts = iter([(7, 7000, 10, 40_960, -1), (9, 9000, 16, 90_112, -1), (0, 0, 3, 8192, -1)])

    class Counting:
        def blockStats(self, disk: str) -> tuple[int, ...]:  # noqa: N802
            assert disk == "", "all of them"
            return next(counts)

    domains: Any = Domains(Counting())
    before = await guest_writes(domains, "web1")
    clock.now += 0.5
    after = await guest_writes(domains, "web1")
    assert before is not None
    assert after is not None
    assert after.since(before) == WriteRate(12.0, 98_304.0)
    clock.now += 0.5
    anew = await guest_writes(domains, "web1")
    assert anew is not None
    assert anew.since(after) == WriteRate(0.0, 0.0), "another QEMU counts from the start"


async def test_what_libvirt_does_not_tell_is_not_known() -> None:
    class Silent:
        def blockStats(self, _disk: str) -> tuple[int, ...]:  # noqa: N802
            raise libvirt.libvirtError("no statistics")

    silent: Any = Domains(Silent())
    assert await guest_writes(silent, "web1") is None


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def seen(watch: MirrorWatch, clock: Clock, remaining: list[int], step: float = 0.5) -> float | None:
    """Tell the watch what remains, every ``step`` seconds; after how many seconds it has had enough."""
    for number, left in enumerate(remaining):
        if watch.observe({"disk_total_bytes": 1 << 30, "disk_remaining_bytes": left}):
            return number * step
        clock.now += step
    return None


def test_a_mirror_that_gets_on_is_left_alone() -> None:
    clock = Clock()
    assert seen(MirrorWatch(0.18, clock), clock, list(range(100 << 20, 0, -(1 << 20)))) is None


def test_a_mirror_that_runs_after_the_guest() -> None:
    clock = Clock()
    waited = seen(MirrorWatch(0.18, clock), clock, [5 << 20, 1 << 20, *[131072] * 20])
    assert waited == 1.0 + 1.5, "six round trips of 180 ms after the last progress, at the next look"


def test_it_is_not_told_before_the_mirror_or_after_the_memory_began() -> None:
    clock = Clock()
    watch = MirrorWatch(None, clock)
    for _look in range(20):
        assert not watch.observe({"disk_total_bytes": 0, "disk_remaining_bytes": 0})
        clock.now += 1
    assert not watch.observe({"disk_total_bytes": 1, "disk_remaining_bytes": 1, "memory_total_bytes": 1})
    clock.now += 60
    assert not watch.observe({"disk_total_bytes": 1, "disk_remaining_bytes": 1})


def test_it_is_told_again_until_it_is_mended() -> None:
    clock = Clock()
    watch = MirrorWatch(None, clock)
    told = []
    for _look in range(6):
        told.append(watch.observe({"disk_total_bytes": 1 << 20, "disk_remaining_bytes": 65536}))
        clock.now += 1
    assert told == [False, True, True, True, True, True]
    watch.mended()
    assert not watch.observe({"disk_total_bytes": 1 << 20, "disk_remaining_bytes": 65536})


def test_nothing_left_to_send_is_no_mirror_that_runs_behind() -> None:
    clock = Clock()
    assert seen(MirrorWatch(0.18, clock), clock, [0] * 20) is None


class Domains:
    """Runs what it is given, as the real ones do."""

    def __init__(self, domain: Any = None) -> None:
        self._domain = domain

    async def run(self, vm: str, function: Callable[[Any], Any]) -> Any:
        try:
            return function(self._domain or vm)
        except libvirt.libvirtError as error:
            raise HypervisorError(str(error)) from error


async def test_qemu_is_told_of_each_mirror_that_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    jobs = [
        {"type": "mirror", "device": "drive-virtio-disk0", "actively-synced": False},
        {"type": "mirror", "device": "drive-virtio-disk1", "actively-synced": True},
        {"type": "commit", "device": "drive-virtio-disk2"},
    ]

    def answer(_domain: object, text: str, _flags: int) -> str:
        asked.append(json.loads(text))
        return json.dumps({"return": jobs if asked[-1]["execute"] == "query-block-jobs" else {}})

    monkeypatch.setattr(libvirt_qemu, "qemuMonitorCommand", answer)
    await write_synchronously(Domains(), "x")  # type: ignore[arg-type]
    assert [command["execute"] for command in asked] == ["query-block-jobs", "block-job-change"]
    assert asked[1]["arguments"] == {
        "id": "drive-virtio-disk0",
        "type": "mirror",
        "copy-mode": "write-blocking",
    }


async def test_a_qemu_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(_domain: object, text: str, _flags: int) -> str:
        if "query" in text:
            return json.dumps({"return": [{"type": "mirror", "device": "d"}]})
        return json.dumps({"error": {"class": "CommandNotFound", "desc": "not found"}})

    monkeypatch.setattr(libvirt_qemu, "qemuMonitorCommand", answer)
    with pytest.raises(HypervisorError, match="block-job-change: not found"):
        await write_synchronously(Domains(), "x")  # type: ignore[arg-type]


async def test_the_version_is_that_of_the_running_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the one that runs the VM: an upgrade of the host's packages does not change it under way."""

    def answer(_domain: object, text: str, _flags: int) -> str:
        assert json.loads(text) == {"execute": "query-version"}
        return json.dumps({"return": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": "Debian"}})

    monkeypatch.setattr(libvirt_qemu, "qemuMonitorCommand", answer)
    found = await emulator_version(Domains(), "x")  # type: ignore[arg-type]
    assert (found, changeable(found)) == (7_002_022, False)

    asked: list[str] = []
    monkeypatch.setattr(libvirt_qemu, "qemuMonitorCommand", lambda *words: asked.append(str(words)))
    connection = libvirt.open("test:///default")

    class Real:
        async def run(self, vm: str, function: Callable[[Any], Any]) -> Any:
            return function(connection.lookupByName(vm))

    guess = await emulator_version(Real(), "test", decides=False)  # type: ignore[arg-type]
    assert (guess, asked) == (connection.getVersion(), []), "libvirt's word will do, and leaves no mark"

    def refuse(*_unused: object) -> str:
        raise libvirt.libvirtError("no monitor")

    monkeypatch.setattr(libvirt_qemu, "qemuMonitorCommand", refuse)
    assert await emulator_version(Domains(), "x") is None  # type: ignore[arg-type]
