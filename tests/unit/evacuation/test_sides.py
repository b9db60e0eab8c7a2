# SPDX-License-Identifier: GPL-3.0-or-later
"""What both sides of an evacuation do where a kill or an unclear answer left them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from precache_proxy.errors import (
    Conflict,
    HypervisorError,
    InvalidInput,
    LifeboatError,
    NotFound,
    PeerUnreachable,
    StaleEpoch,
)
from precache_proxy.evacuation import rollback
from precache_proxy.evacuation.arrival import NO_CONTACT, Arrival, ArrivalDisk, ArrivalJournal, ArrivalState
from precache_proxy.evacuation.arrival_network import NothingToDo
from precache_proxy.evacuation.arrival_tender import ArrivalTender
from precache_proxy.evacuation.arrivals import Arrivals
from precache_proxy.evacuation.guard import Guard
from precache_proxy.evacuation.reconcile import Presence
from precache_proxy.hypervisor.qemu_user import QemuUser
from precache_proxy.source.record import ProtectionRecord
from precache_proxy.source.replication import Replication

VM = "11111111-2222-4333-8444-555555555501"


class Replicas:
    """A store with one replica of home1, and no media."""

    media: Any = None

    def __init__(self, state: str = "frozen") -> None:
        self.state, self.thawed = state, 0

    async def status(self, vm: str) -> dict[str, Any]:
        if vm != VM:
            raise NotFound(vm)
        return {"vm": vm, "name": "web1", "state": self.state, "peer": "home1"}

    async def statuses(self) -> list[dict[str, Any]]:
        return [await self.status(VM)]

    async def depths(self, vm: str) -> dict[str, int]:
        assert vm == VM
        return {"vda": 2}

    async def thaw(self, vm: str) -> None:
        assert vm == VM
        self.state, self.thawed = "sealed", self.thawed + 1


class Machines:
    """A libvirt that says one thing of every VM."""

    def __init__(self, presence: Presence) -> None:
        self.is_there = presence

    async def presence(self, _vm: str) -> Presence:
        return self.is_there


def arrivals(
    tmp_path: Path,
    store: Replicas,
    presence: Presence = Presence.ABSENT,
    *,
    machines: Machines | None = None,
) -> Arrivals:
    state, run = tmp_path / "state", tmp_path / "run"
    state.mkdir(exist_ok=True)
    made = Arrivals(
        state, run, cast(Any, machines or Machines(presence)), Guard(state, run), cast(Any, store),
        NothingToDo(), QemuUser(65534, 65534), presume_source_dead_after_seconds=None,
    )  # fmt: skip
    made.load()
    return made


async def test_a_replica_frozen_by_a_killed_prepare_takes_generations_again(tmp_path: Path) -> None:
    store = Replicas()
    there = arrivals(tmp_path, store)
    await there.footprint.thaw_unclaimed()
    assert store.thawed == 1
    store.state = "frozen"
    assert await there.abort("home1", {"job": "j1", "vm": VM}) == {"state": "aborted"}
    assert store.thawed == 2


@pytest.mark.parametrize("state", [ArrivalState.PREPARED, ArrivalState.RELEASED, ArrivalState.ACTIVATED])
async def test_a_replica_that_an_arrival_needs_stays_frozen(tmp_path: Path, state: ArrivalState) -> None:
    store = Replicas()
    there = arrivals(tmp_path, store)
    await there.records.save(Arrival("j0", VM, "web1", "home1", 1, 7, state))
    there.load()
    await there.footprint.thaw_unclaimed()
    await there.abort("home1", {"job": "another", "vm": VM})
    assert store.thawed == 0


async def test_already_there_is_said_only_of_a_vm_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(*_arguments: object) -> list[Any]:
        return []

    monkeypatch.setattr("precache_proxy.evacuation.preflight.destination_findings", nothing)
    question = {"vm": VM, "name": "web1", "epoch": 1, "definition": "<domain/>"}
    for presence, expected in ((Presence.RUNNING, True), (Presence.UNKNOWN, True), (Presence.ABSENT, False)):
        there = arrivals(tmp_path, Replicas("sealed"), presence)
        await there.records.save(Arrival("j0", VM, "web1", "home1", 1, 7, ArrivalState.LANDED))
        there.load()
        answer = await there.check("home1", question)
        assert answer["already_there"] is expected
        assert bool(answer["findings"]) is not expected


async def test_only_its_own_home_may_send_a_vm_onto_a_replica(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(*_arguments: object) -> list[Any]:
        return []

    monkeypatch.setattr("precache_proxy.evacuation.preflight.destination_findings", nothing)
    there = arrivals(tmp_path, Replicas("sealed"))
    wanted = {"vm": VM, "name": "web1", "epoch": 1, "generation": 7, "definition": "<domain/>", "disks": {}}
    with pytest.raises(InvalidInput, match="belongs to home1, not to home2"):
        await there.prepare("home2", wanted | {"job": "j1"})
    with pytest.raises(InvalidInput, match="not a job's number"):
        await there.prepare("home1", wanted | {"job": "../j1"})
    assert there.records.all() == []


@pytest.mark.parametrize("state", [ArrivalState.ACTIVATED, ArrivalState.LANDED])
async def test_an_old_copy_does_not_arrive_after_the_way_back(tmp_path: Path, state: ArrivalState) -> None:
    """Its home was restored from a backup, say, and counts the epochs from there."""
    there = arrivals(tmp_path, Replicas("sealed"))
    await there.records.save(Arrival("j0", VM, "web1", "home1", 2, 7, state))
    there.load()
    wanted = {"vm": VM, "name": "web1", "generation": 7, "definition": "<domain/>", "disks": {}}
    for epoch in (0, 1, 2):
        with pytest.raises(StaleEpoch, match=f"it arrived here with epoch 2, .* epoch {epoch}; the copy"):
            await there.prepare("home1", wanted | {"job": "j1", "epoch": epoch})
    assert [item.id for item in there.records.all()] == ["j0"]


@pytest.mark.parametrize(
    ("state", "ends_the_copy_here"),
    [("activated", True), ("landed", True), ("released", False), ("prepared", False), (None, False)],
)
async def test_only_a_vm_that_runs_there_ends_the_copy_here(
    state: str | None, ends_the_copy_here: bool
) -> None:
    async def call(method: str, _parameters: dict[str, Any], _timeout: float) -> dict[str, Any]:
        if method == "abort":
            raise Conflict("libvirt here says unknown; asked again shortly")
        return {"known": True, "state": state, "vm": "unknown"}

    async def save() -> None:
        return None

    job = SimpleNamespace(id="j1", peer="backup1", owes_abort=True, settled="", progress={})
    departure = cast(Any, SimpleNamespace(job=job, call=call, save=save, complaint=""))
    if ends_the_copy_here:
        with pytest.raises(rollback.ActivatedThere):
            await rollback.settle_debt(departure)
    else:
        await rollback.settle_debt(departure)
        assert job.owes_abort, "asked again"


@pytest.mark.parametrize(("sealed_at", "in_place"), [(0.0, True), (1000.0, False)])
async def test_what_an_evacuation_left_as_a_base_is_sealed_without_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sealed_at: float, in_place: bool
) -> None:
    class Chains(dict[str, Any]):
        definition = f"<domain type='kvm'><name>web1</name><uuid>{VM}</uuid><devices/></domain>"
        attachments: dict[str, Path] = {}  # noqa: RUF012

    class Sealed(Replicas):
        media = SimpleNamespace(claim=lambda _vm, _epoch: None)

        async def sealed_chain(self, _vm: str, _generation: int) -> Chains:
            return Chains()

        async def freeze_for_arrival(self, _vm: str, _generation: int, _epoch: int) -> Chains:
            return Chains()

    async def nothing(*_arguments: object) -> list[Any]:
        return []

    monkeypatch.setattr("precache_proxy.evacuation.preflight.destination_findings", nothing)
    monkeypatch.setattr("precache_proxy.evacuation.cold_arrival.stand_ready", nothing)
    monkeypatch.setattr(
        "precache_proxy.evacuation.arrivals.find_places", lambda *_arguments: SimpleNamespace(paths={})
    )
    there = arrivals(tmp_path, Sealed())
    monkeypatch.setattr(there.footprint, "make", nothing)
    asked_for = {"autostart": True, "rpo_seconds": 30.0, "priority": 70}
    made = await there.prepare_from_generation("home1", "f0", VM, 7, 3, sealed_at, asked_for)
    await there.stop()
    assert (made.fails_over, made.state_is_in_place) == (True, in_place)
    assert (made.autostart, made.protection) == (True, {"rpo_seconds": 30.0, "priority": 70})
    # It is on record: a restart of the proxy must not wipe what is in place either.
    assert [item.state_is_in_place for item in arrivals(tmp_path, Sealed()).records.all()] == [in_place]


async def test_a_way_back_that_nobody_counted_is_compared(tmp_path: Path) -> None:
    record = ProtectionRecord(
        VM, "web1", "home1", 15.0, epoch=1, return_generation=7, return_checkpoint="",
        return_overlays={"vda": ["/images/web1.arrival", "qcow2", 4096]},
    )  # fmt: skip
    replication = Replication(record, cast(Any, SimpleNamespace(directory=tmp_path)))
    await replication.standing._reconcile_return({"generation": 7})
    assert record.resync_cause
    assert record.return_overlays == {}
    assert record.sealed is not None
    assert (record.sealed.generation, record.sealed.checkpoint) == (7, "")


async def test_writes_before_the_checkpoint_are_not_taken_for_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An arrival that runs already gets no checkpoint late: what it wrote meanwhile would be lost."""

    async def absent(*_arguments: object) -> bool:
        return False

    async def never(*_arguments: object) -> None:
        raise LifeboatError("an overlay or a checkpoint was made")

    monkeypatch.setattr("precache_proxy.evacuation.layers.has_checkpoint", absent)
    monkeypatch.setattr("precache_proxy.evacuation.layers.put_overlays", never)
    monkeypatch.setattr("precache_proxy.evacuation.layers.create_checkpoint", never)
    there = arrivals(tmp_path, Replicas(), Presence.RUNNING)
    overlay = tmp_path / "vda.qcow2"
    overlay.touch()
    arrival = Arrival("j0", VM, "web1", "home1", 1, 7)
    arrival.disks["vda"] = ArrivalDisk("/replica", "qcow2", str(overlay), "/top", 4096)
    await there.tracking.begin(arrival)
    assert arrival.checkpoint == ""
    assert "ran before" in arrival.sentence


class Resuming(Machines):
    """Runs what it is told to run."""

    async def resume(self, _vm: str) -> None:
        self.is_there = Presence.RUNNING


class SilentHome:
    """A link to a home that does not answer, until it does."""

    step: str | None = None

    async def call(self, _method: str, _asked: Any, *, timeout_seconds: float) -> dict[str, Any]:
        assert timeout_seconds > 0
        if self.step is None:
            raise PeerUnreachable("home1: no answer")
        return {"known": True, "step": self.step}


def standing(tmp_path: Path) -> tuple[Arrivals, ArrivalTender, SilentHome, Arrival]:
    """An arrival that stands here whole, and whoever tends it."""
    machines = Resuming(Presence.ARRIVED)
    there = arrivals(tmp_path, Replicas(), machines=machines)
    arrival = Arrival("j0", VM, "web1", "home1", 1, 7, checkpoint="lifeboat-e1-g8")
    there.records.add(arrival)
    home = SilentHome()
    tender = ArrivalTender(there, cast(Any, machines), {"home1": home}, lambda _arrival: None)
    return there, tender, home, arrival


async def test_a_settled_vm_is_not_told_as_undecided_any_more(tmp_path: Path) -> None:
    there, tender, _home, arrival = standing(tmp_path)
    await tender.tend(arrival)
    assert arrival.cause == NO_CONTACT
    assert "settle j0 source-dead" in arrival.sentence
    await there.declare_source_dead(arrival)
    [kept] = ArrivalJournal(tmp_path / "state" / "arrivals").load()
    for told in (arrival, kept):
        assert (told.state, told.cause, told.sentence) == (ArrivalState.ACTIVATED, "", "")


async def test_a_home_that_answers_again_takes_the_alarm_away(tmp_path: Path) -> None:
    _there, tender, home, arrival = standing(tmp_path)
    await tender.tend(arrival)
    assert arrival.cause == NO_CONTACT
    home.step = "migrate"
    await tender.tend(arrival)
    assert (arrival.state, arrival.cause, arrival.sentence) == (ArrivalState.PREPARED, "", "")


class Ending(Machines):
    """Notes what is ended."""

    def __init__(self, presence: Presence) -> None:
        super().__init__(presence)
        self.ended = 0

    async def destroy(self, _vm: str) -> None:
        self.ended, self.is_there = self.ended + 1, Presence.SHUT_OFF


async def test_a_vm_that_was_off_is_ended_here_though_libvirt_was_silent_first(tmp_path: Path) -> None:
    state, run = tmp_path / "state", tmp_path / "run"
    state.mkdir()
    machines = Ending(Presence.UNKNOWN)
    there = Arrivals(
        state, run, cast(Any, machines), Guard(state, run), cast(Any, Replicas()), NothingToDo(),
        QemuUser(65534, 65534), presume_source_dead_after_seconds=None,
    )  # fmt: skip
    there.load()
    arrival = Arrival("j0", VM, "web1", "home1", 1, 7, ArrivalState.ACTIVATED, mode="restart", boots=False)
    for silent in (Presence.UNKNOWN, Presence.INCOMING):
        machines.is_there = silent
        with pytest.raises(HypervisorError, match="does not say that it has ended"):
            await there.activation.settle_down(arrival)
        assert "ended_at" not in arrival.timings
    machines.is_there = Presence.ARRIVED
    await there.activation.settle_down(arrival)
    assert (machines.ended, "ended_at" in arrival.timings) == (1, True)
