# SPDX-License-Identifier: GPL-3.0-or-later
"""What a guest writes, as seen between passes: known soon, forgotten soon, and never beyond what was seen."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precache_proxy.errors import PeerUnreachable
from precache_proxy.hypervisor.domain_xml import parse_definition
from precache_proxy.source.layout import Layout
from precache_proxy.source.passes import GenerationPlan, PassResult
from precache_proxy.source.record import ProtectionRecord, Sealed
from precache_proxy.source.replication import Replication
from precache_proxy.source.written_rate import WrittenRate

VM = "11111111-2222-4333-8444-555555555501"


def test_nothing_is_known_at_first_and_the_open_interval_counts_already() -> None:
    written = WrittenRate()
    assert written.bytes_per_second(0, None) is None
    assert written.bytes_per_second(5_000_000, 0.2) is None, "too short to say anything"
    assert written.bytes_per_second(5_000_000, 10.0) == 500_000
    written.passed(6_000_000, 12.0)
    assert written.bytes_per_second(0, 0.0) == 500_000
    assert written.bytes_per_second(999, None) == 500_000, "nobody knows since when"


def test_a_guest_that_becomes_idle_is_seen_to() -> None:
    written = WrittenRate()
    written.passed(15_000_000, 15.0)
    rates = []
    for _pass in range(6):
        written.passed(0, 15.0)
        rates.append(written.bytes_per_second(0, 0.0))
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.0, abs=20_000)


@given(
    st.lists(st.tuples(st.integers(0, 10**9), st.floats(1, 3600)), min_size=1, max_size=20),
    st.integers(0, 10**9),
    st.floats(0, 3600),
)
def test_it_is_between_the_least_and_the_most_that_was_seen(
    intervals: list[tuple[int, float]], changed: int, since: float
) -> None:
    written = WrittenRate()
    for changed_bytes, seconds in intervals:
        written.passed(changed_bytes, seconds)
    rates = [changed_bytes / seconds for changed_bytes, seconds in intervals]
    told = written.bytes_per_second(0, None)
    assert told is not None
    assert min(rates) * 0.999 <= told <= max(rates) * 1.001
    now = written.bytes_per_second(changed, since)
    assert now is not None
    if since > 0:
        rates.append(changed / since)
        assert min(rates) * 0.999 <= now <= max(rates) * 1.001


class OneVm:
    """A replication whose guest has written what the test says, and whose passes end as it says."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.changed_bytes, self.fails = 1000.0, 0, False
        self.rates_under_way: list[float | None] = []
        clock = SimpleNamespace(monotonic=lambda: self.now, time=time.time)
        monkeypatch.setattr("precache_proxy.source.replication.time", clock)
        monkeypatch.setattr("precache_proxy.source.replication.Generation", self._generation)
        sealed = Sealed(7, "lifeboat-e0-g7", 0.0, 0.0, "", ["vda"])
        record = ProtectionRecord(VM, "web1", "backup1", 15.0, epoch=0, sealed=sealed)
        environment = SimpleNamespace(directory=tmp_path, link=lambda _peer: None)
        self.replication = Replication(record, cast(Any, environment))
        self.replication.clean_at = self.now
        disk = SimpleNamespace(path=str(tmp_path / "vda"))
        Path(disk.path).touch()
        definition = parse_definition(f"<domain><name>web1</name><uuid>{VM}</uuid><devices/></domain>")

        async def look() -> tuple[Any, Layout, bool]:
            return definition, Layout(tracked={"vda": cast(Any, disk)}), True

        async def dirty(*_arguments: object, **_more: object) -> dict[str, int]:
            return {"vda": self.changed_bytes}

        async def sizes(*_arguments: object, **_more: object) -> dict[str, int]:
            return {"vda": 1 << 30}

        async def nothing(*_arguments: object) -> None:
            return None

        async def xml() -> str:
            return "<domain/>"

        replication = self.replication
        for part, name, value in (
            (replication.disks, "look", look), (replication.disks, "sizes", sizes),
            (replication.disks, "transferable_xml", xml), (replication, "_dirty", dirty),
            (replication.disks, "check_images", lambda _layout: None),
            (replication.disks, "records", lambda *_unused: {"vda": None}),
            (replication.disks, "source", lambda *_unused, active: None),
            (replication.standing, "save", nothing), (replication.standing, "drop_superseded", nothing),
        ):  # fmt: skip
            monkeypatch.setattr(part, name, value)

    def _generation(self, _link: object, plan: GenerationPlan, _pace: object) -> Any:
        async def run(_source: object) -> dict[str, Any]:
            for _look in range(3):
                self.now += 100
                self.rates_under_way.append(self.replication.written_bytes_per_second)
            if self.fails:
                raise PeerUnreachable("backup1: no answer")
            return {}

        result = SimpleNamespace(reason="", data_bytes=0, zero_bytes=0, wire_bytes=0, digest="")
        made = [] if self.fails else ["lifeboat-e0-g8"]
        return SimpleNamespace(run=run, result=result, made=made, seal_sent=False)

    async def run_pass(self, written_bytes: int, after_seconds: float, *, leave_bytes: int = 0) -> PassResult:
        """What the guest wrote since the last pass that was sealed."""
        self.now, self.changed_bytes = self.now + after_seconds, written_bytes
        return await self.replication.run_pass(reason="timer", leave_bytes=leave_bytes)


async def test_a_pass_that_takes_long_makes_no_guest_slower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = OneVm(tmp_path, monkeypatch)
    await vm.run_pass(10_000_000, 10)
    assert vm.rates_under_way == [1_000_000] * 3, "300 s in which nobody looked"
    # It is sealed, and what was written meanwhile has not been asked for yet.
    assert vm.replication.written_bytes_per_second == 1_000_000
    sealed = vm.replication.record.sealed
    assert sealed is not None
    vm.replication.note_dirty(300_000_000, sealed)
    assert vm.replication.written_bytes_per_second == 1_000_000
    vm.replication.note_dirty(1, Sealed(7, "lifeboat-e0-g7", 0.0, 0.0, "", ["vda"]))
    assert vm.replication.dirty_bytes == 300_000_000, "told of the generation before"


async def test_a_pass_that_fails_has_counted_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = OneVm(tmp_path, monkeypatch)
    await vm.run_pass(10_000_000, 10)
    clean_at, vm.fails = vm.replication.clean_at, True
    assert clean_at is not None
    # The guest wrote these blocks at first and nothing more; every attempt has them to send.
    for _attempt in range(3):
        with pytest.raises(PeerUnreachable):
            await vm.run_pass(400_000_000, 100)
        assert vm.replication.clean_at == clean_at
    vm.fails = False
    await vm.run_pass(400_000_000, 100)
    interval_seconds = vm.replication.clean_at - clean_at
    rate = vm.replication.written_bytes_per_second
    assert rate == pytest.approx((0.5 * 10_000_000 + 400_000_000) / (0.5 * 10 + interval_seconds))


async def test_a_pass_that_may_leave_so_much_is_not_made_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = OneVm(tmp_path, monkeypatch)
    await vm.run_pass(10_000_000, 10)
    sealed, clean_at = vm.replication.record.sealed, vm.replication.clean_at
    assert sealed is not None
    vm.rates_under_way.clear()
    result = await vm.run_pass(300_000, 10, leave_bytes=300_000)
    assert (result.skipped, result.data_bytes, result.generation) == (True, 0, sealed.generation)
    assert not vm.rates_under_way, "nothing was sent"
    assert vm.replication.record.sealed is sealed
    # They wait, and are told as what they are.
    assert (vm.replication.dirty_bytes, vm.replication.clean_at) == (300_000, clean_at)
    await vm.run_pass(300_001, 10, leave_bytes=300_000)
    assert vm.rates_under_way, "one byte more is worth a pass"


async def test_a_disk_that_is_gone_waits_for_no_later_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = OneVm(tmp_path, monkeypatch)
    await vm.run_pass(10_000_000, 10)
    vm.rates_under_way.clear()
    vm.replication.record.disks["vdb"] = cast(Any, None)
    await vm.run_pass(1, 10, leave_bytes=300_000)
    assert vm.rates_under_way


async def test_what_a_disk_has_grown_by_waits_for_no_later_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass that its caller makes later is a residual, which sends what bitmaps count."""
    vm = OneVm(tmp_path, monkeypatch)
    await vm.run_pass(10_000_000, 10)

    async def sizes(*_arguments: object, **_more: object) -> dict[str, int]:
        return {"vda": 2 << 30}

    monkeypatch.setattr(vm.replication.disks, "sizes", sizes)
    vm.rates_under_way.clear()
    await vm.run_pass(1, 10, leave_bytes=300_000)
    assert vm.rates_under_way
    vm.rates_under_way.clear()
    await vm.run_pass(1, 10, leave_bytes=300_000)
    assert not vm.rates_under_way, "the peer has it now"
