# SPDX-License-Identifier: GPL-3.0-or-later
"""A VM that runs is tracked from the layer that arrived; wherever that is cut short, nothing is lost."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import libvirt
import pytest

from precache_proxy.blocks import images
from precache_proxy.errors import HypervisorError, LifeboatError
from precache_proxy.evacuation import arrivals as arrivals_module
from precache_proxy.evacuation import landing as landing_module
from precache_proxy.evacuation import layers, tracking
from precache_proxy.evacuation.arrival import Arrival, ArrivalDisk, ArrivalState
from precache_proxy.evacuation.arrival_network import NothingToDo
from precache_proxy.evacuation.arrival_records import ArrivalRecords
from precache_proxy.evacuation.arrivals import Arrivals
from precache_proxy.evacuation.guard import Guard
from precache_proxy.evacuation.job import Mode
from precache_proxy.evacuation.landing import Landing
from precache_proxy.evacuation.reconcile import Presence
from precache_proxy.evacuation.tracking import Tracking
from precache_proxy.hypervisor.domain_xml import Definition, parse_definition
from precache_proxy.hypervisor.qemu_user import QemuUser
from precache_proxy.units import KIB

VM = "11111111-2222-4333-8444-555555555501"
CHECKPOINT = "lifeboat-e1-g8"


class Killed(BaseException):
    """The proxy is gone from one line to the next."""


class Machine:
    """A libvirt whose VM has one disk: the layer that takes its writes, and the one that it starts from."""

    def __init__(self, arrival: Arrival) -> None:
        disk = arrival.disks["vda"]
        self.overlay, self.top = disk.overlay, disk.top
        self.live = self.persistent = disk.overlay
        self.is_there = Presence.RUNNING
        self.counted_in: list[str] = []
        self.refusals = 0

    def power_cut(self) -> None:
        """Whatever is written now is found by a start after the power has gone at this moment."""
        assert Path(self.persistent).exists()
        if self.persistent != self.live:
            assert (self.persistent, self.live) == (self.top, self.overlay), "it starts below what it writes"

    def xml_of(self, path: str) -> str:
        return (
            f"<domain><name>web1</name><uuid>{VM}</uuid><devices><disk type='file' device='disk'>"
            f"<driver name='qemu' type='qcow2'/><source file='{path}'/><target dev='vda' bus='virtio'/>"
            "</disk></devices></domain>"
        )

    async def presence(self, _vm: str) -> Presence:
        return self.is_there

    async def is_persistent(self, _vm: str) -> bool:
        return True

    async def xml(self, _vm: str, *, inactive: bool) -> str:
        return self.xml_of(self.persistent if inactive else self.live)

    async def definition(self, vm: str, *, inactive: bool = False) -> Definition:
        return parse_definition(await self.xml(vm, inactive=inactive))

    async def define(self, xml: str, _name: str) -> None:
        disk = parse_definition(xml).disk("vda")
        assert disk is not None
        self.persistent = disk.path
        self.power_cut()

    async def run_in_turn(self, _vm: str, function: Callable[[Any], Any], **_unused: Any) -> Any:
        return function(self)

    async def resume(self, _vm: str) -> None:
        self.is_there = Presence.RUNNING

    async def destroy(self, _vm: str) -> None:
        self.is_there = Presence.SHUT_OFF

    # -- the domain itself

    def listAllCheckpoints(self, _flags: int) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(getName=lambda: CHECKPOINT)] if self.counted_in else []

    def checkpointCreateXML(self, xml: str, _flags: int) -> None:  # noqa: N802
        assert CHECKPOINT in xml
        self.power_cut()
        self.counted_in.append(self.live)

    def snapshotCreateXML(self, xml: str, flags: int) -> None:  # noqa: N802
        assert self.top in xml
        if self.refusals:
            self.refusals -= 1
            raise HypervisorError("libvirt refused or failed: another job is under way")
        if flags & libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT:
            assert Path(self.top).stat().st_size > 0
        else:
            Path(self.top).touch()
        if self.is_there is Presence.RUNNING:
            assert self.persistent == self.top, "libvirt would name it only after it is written to"
        if self.persistent == self.live:
            self.persistent = self.top
        # Persistent bitmaps of the active layer are continued in the one that comes on top.
        self.counted_in = [*self.counted_in, self.top] if self.counted_in else []
        self.live = self.top
        self.power_cut()


@pytest.fixture
async def arrival(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Arrival:
    """It runs here, on the layer that it arrived in."""
    definitions = tmp_path / "definitions"
    definitions.mkdir()
    monkeypatch.setattr(layers, "DEFINITIONS_DIRECTORY", definitions)
    overlay = tmp_path / "vda-arrival.qcow2"
    await images.create(overlay, 512 * KIB)
    made = Arrival("j1", VM, "web1", "home1", 1, 7, ArrivalState.ACTIVATED)
    made.disks["vda"] = ArrivalDisk(
        "/replica", "qcow2", str(overlay), str(tmp_path / "vda-top.qcow2"), 512 * KIB
    )
    return made


@pytest.fixture
def machine(arrival: Arrival) -> Machine:
    return Machine(arrival)


async def tracked(arrival: Arrival, machine: Machine, tmp_path: Path) -> ArrivalRecords:
    records = ArrivalRecords(tmp_path / "arrivals")
    await Tracking(cast(Any, machine), records).begin_while_running(arrival)
    return records


def is_tracked(arrival: Arrival, machine: Machine, records: ArrivalRecords) -> None:
    assert (machine.live, machine.persistent) == (machine.top, machine.top)
    assert machine.top in machine.counted_in, "what it writes from now on is counted"
    assert (arrival.checkpoint, arrival.cause) == (CHECKPOINT, "")
    records.load()
    assert [item.checkpoint for item in records.all()] == [CHECKPOINT]


async def test_what_it_writes_is_in_the_layer_that_arrived_or_counted(
    arrival: Arrival, machine: Machine, tmp_path: Path
) -> None:
    """The checkpoint comes before the overlay: a write between them is in both, never in neither."""
    is_tracked(arrival, machine, await tracked(arrival, machine, tmp_path))
    assert machine.counted_in == [machine.overlay, machine.top]
    information = await images.info(Path(machine.top), "qcow2")
    assert information[0].size_bytes == 512 * KIB


@pytest.mark.parametrize("line", ["arrival-tops-named", "arrival-changed-over"])
async def test_a_proxy_that_is_killed_on_the_way_goes_on_from_there(
    arrival: Arrival, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    def killed(name: str) -> None:
        if name == line:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(tracking, "crash_point", killed)
        with pytest.raises(Killed):
            await tracked(arrival, machine, tmp_path)
    machine.power_cut()
    before = os.stat(machine.top).st_ino
    is_tracked(arrival, machine, await tracked(arrival, machine, tmp_path))
    assert os.stat(machine.top).st_ino == before, "what a start may have written to is no one's to make anew"


async def test_a_top_that_nothing_names_is_made_anew(
    arrival: Arrival, machine: Machine, tmp_path: Path
) -> None:
    """A kill while it was made left half of it."""
    Path(machine.top).write_bytes(b"QF")
    is_tracked(arrival, machine, await tracked(arrival, machine, tmp_path))


async def test_what_libvirt_refuses_is_repeated_and_leads_to_all_that_was_written(
    arrival: Arrival, machine: Machine, tmp_path: Path
) -> None:
    machine.refusals = 1
    with pytest.raises(HypervisorError, match="another job"):
        await tracked(arrival, machine, tmp_path)
    assert (arrival.checkpoint, arrival.cause) == ("", "")
    machine.power_cut()
    is_tracked(arrival, machine, await tracked(arrival, machine, tmp_path))


async def test_one_that_was_started_from_its_top_uncounted_is_not_taken_for_counted(
    arrival: Arrival, machine: Machine, tmp_path: Path
) -> None:
    await images.create(Path(machine.top), 512 * KIB, backing=machine.overlay)
    machine.live = machine.persistent = machine.top
    await tracked(arrival, machine, tmp_path)
    assert (arrival.checkpoint, arrival.cause) == ("", "tracking-lost")
    assert "ran before" in arrival.sentence


async def test_one_that_has_ended_needs_a_comparison(
    arrival: Arrival, machine: Machine, tmp_path: Path
) -> None:
    machine.is_there = Presence.SHUT_OFF
    await tracked(arrival, machine, tmp_path)
    assert (arrival.checkpoint, arrival.cause, machine.live) == ("", "tracking-lost", machine.overlay)
    assert not Path(machine.top).exists()


async def test_a_libvirt_that_does_not_answer_decides_nothing(
    arrival: Arrival, machine: Machine, tmp_path: Path
) -> None:
    machine.is_there = Presence.UNKNOWN
    with pytest.raises(HypervisorError, match="asked again"):
        await tracked(arrival, machine, tmp_path)
    assert (arrival.cause, machine.counted_in) == ("", [])


async def test_a_landing_tracks_before_it_protects_the_way_back(
    arrival: Arrival, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And repeats what libvirt refused; nothing is adopted from a layer that is still written to."""
    monkeypatch.setattr(landing_module, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(landing_module, "SETTLE_SECONDS", 0.0)
    machine.refusals = 2
    records = ArrivalRecords(tmp_path / "arrivals")
    adopted: list[tuple[str, str]] = []
    done = asyncio.Event()

    class Source:
        async def adopt_for_return(self, _vm: str, *, checkpoint: str, **_told: Any) -> None:
            adopted.append((checkpoint, machine.live))
            done.set()
            raise LifeboatError("enough")

    class Store:
        async def detach(self, _vm: str) -> dict[str, Any]:
            return {}

    way = Landing(
        records, cast(Any, machine), cast(Any, Source()), cast(Any, Store()), {},
        Tracking(cast(Any, machine), records),
    )  # fmt: skip
    way.begin(arrival)
    await asyncio.wait_for(done.wait(), 5)
    await way.stop()
    assert adopted[0] == (CHECKPOINT, machine.top)
    assert machine.refusals == 0


def arrivals(tmp_path: Path, machine: Machine) -> Arrivals:
    state, run = tmp_path / "state", tmp_path / "run"
    state.mkdir()
    guard = Guard(state, run)
    guard.prepare_directories()
    made = Arrivals(
        state, run, cast(Any, machine), guard, cast(Any, None), NothingToDo(), QemuUser(65534, 65534),
        presume_source_dead_after_seconds=None,
    )  # fmt: skip
    made.load()
    return made


@pytest.mark.parametrize(("mode", "layer"), [(Mode.LIVE, "overlay"), (Mode.RESTART, "top")])
async def test_only_one_that_brings_its_memory_runs_before_it_is_tracked(
    arrival: Arrival, machine: Machine, tmp_path: Path, mode: Mode, layer: str
) -> None:
    there = arrivals(tmp_path, machine)
    arrival.state, arrival.mode, machine.is_there = ArrivalState.PREPARED, mode.value, Presence.ARRIVED
    await there.records.save(arrival)
    there.records.add(arrival)
    ran_on: list[str] = []

    async def resume(_vm: str) -> None:
        ran_on.append(machine.live)
        machine.is_there = Presence.RUNNING

    machine.resume = resume  # type: ignore[method-assign]
    answer = await there.release("home1", {"job": "j1", "vm": VM})
    assert answer["state"] == "activated"
    assert ran_on == [getattr(machine, layer)]
    assert arrival.checkpoint == ("" if mode is Mode.LIVE else CHECKPOINT)


async def test_a_release_does_not_wait_for_the_tracking_of_one_that_has_just_come(
    arrival: Arrival, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked for four times a second: a release that comes then would find its lock taken."""
    monkeypatch.setattr(arrivals_module, "ARRIVAL_POLL_SECONDS", 0.01)
    monkeypatch.setattr(arrivals_module, "RELEASE_SECONDS", 0.2)
    there = arrivals(tmp_path, machine)
    arrival.state, machine.is_there = ArrivalState.PREPARED, Presence.ARRIVED
    await there.records.save(arrival)
    there.records.add(arrival)
    there.watch_all()
    await asyncio.sleep(0.1)
    assert not there.records.lock(VM).locked()
    assert (arrival.checkpoint, machine.live) == ("", machine.overlay)
    # One that is left to stand is tracked as it stands.
    async with asyncio.timeout(5):
        while not arrival.checkpoint:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (machine.live, machine.is_there) == (machine.top, Presence.ARRIVED)
    await there.stop()
