# SPDX-License-Identifier: GPL-3.0-or-later
"""What an evacuation may expect of the source: it waits for no comparison, and nothing is taken from it."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from precache_proxy.channel.settings import TrafficClass
from precache_proxy.errors import Conflict, NoSpace, NotFound, VmStateChanged
from precache_proxy.source import protection as protection_module
from precache_proxy.source.autostart import AfterBoot
from precache_proxy.source.backups import Backups
from precache_proxy.source.gate import PriorityGate
from precache_proxy.source.passes import Generation, GenerationPlan, PassResult
from precache_proxy.source.protection import Protection
from precache_proxy.source.record import ProtectionRecord, Sealed
from precache_proxy.source.scratch import ScratchPool
from precache_proxy.source.service import Source
from precache_proxy.source.settings import SourceSettings

VM = "11111111-2222-4333-8444-555555555501"


class Link:
    """A peer that answers ``store.status`` with what it is told to."""

    state, cause, sentence = "up", "up", ""

    def __init__(self) -> None:
        self.status: dict[str, Any] = {"exists": False}
        self.asked = asyncio.Event()

    async def call(self, _method: str, _parameters: object, **_unused: object) -> dict[str, Any]:
        self.asked.set()
        return self.status


def a_pool(tmp_path: Path) -> ScratchPool:
    return ScratchPool(tmp_path / "scratch", pass_limit_bytes=4096, open_pass_limit=1)


def a_protection(tmp_path: Path, **record: Any) -> tuple[Protection, Link]:
    link = Link()
    environment = SimpleNamespace(
        directory=tmp_path, run_directory=tmp_path, passes=PriorityGate(1), long_work=PriorityGate(1),
        link=lambda _peer: link, settings=SourceSettings("home1", ("backup1",)),
        backups=Backups(cast(Any, None), tmp_path, a_pool(tmp_path), cast(Any, None)),
        after_boot=AfterBoot(tmp_path / "autostart.json"),
    )  # fmt: skip
    made = ProtectionRecord(VM, "web1", "backup1", 15.0, **record)
    return Protection(made, cast(Any, environment)), link


def a_source(tmp_path: Path, protection: Protection) -> Source:
    """A source side that has this one only, and was not started."""
    settings = SourceSettings(name="home1", peers=("backup1",), scratch_directory=tmp_path)
    source = Source(tmp_path, tmp_path, cast(Any, None), cast(Any, None), settings)
    source._protections[VM] = protection
    return source


def reconciled_at_once(monkeypatch: pytest.MonkeyPatch, protection: Protection) -> None:
    """Its peer is not asked where the protection stands."""

    async def reconcile() -> None:
        protection.replication.standing.needs_reconcile = False

    protection.replication.standing.needs_reconcile = False
    monkeypatch.setattr(protection.replication.standing, "reconcile", reconcile)


def never_ends(monkeypatch: pytest.MonkeyPatch, protection: Protection, work: str) -> asyncio.Event:
    """Have a piece of the replication's work go on until it is cancelled; set once it has begun."""
    begun = asyncio.Event()

    async def for_ever(**_unused: object) -> None:
        begun.set()
        await asyncio.sleep(60)

    monkeypatch.setattr(protection.replication, work, for_ever)
    return begun


async def test_a_hold_ends_a_comparison_that_somebody_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protection, _link = a_protection(tmp_path, sealed=Sealed(7, "lifeboat-e0-g7", 1.0, 1.0))
    protection.replication.standing.needs_reconcile = False
    comparing = never_ends(monkeypatch, protection, "run_pass")
    verify = asyncio.create_task(protection.run_pass(reason="verify", compare_all=True))
    await asyncio.wait_for(comparing.wait(), 5)
    await asyncio.wait_for(protection.hold("evacuation-1"), 5)
    with pytest.raises(Conflict, match=r"comparison was ended.*evacuation-1"):
        await verify
    assert protection.state == "held"


async def test_a_first_copy_that_a_hold_cut_asks_the_peer_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the peer did for it may not have been heard."""
    protection, _link = a_protection(tmp_path)
    protection.replication.standing.needs_reconcile = False
    copying = never_ends(monkeypatch, protection, "seed")
    protection.start()
    await asyncio.wait_for(copying.wait(), 5)
    await asyncio.wait_for(protection.hold("evacuation-1"), 5)
    assert protection.replication.standing.needs_reconcile
    await protection.stop()


async def test_one_that_is_held_from_the_start_begins_nothing_until_it_is_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its QEMU may be halted: a pass would wait for it, and the hold for the pass."""
    protection, link = a_protection(tmp_path)
    protection.replication.standing.needs_reconcile = False
    copying = never_ends(monkeypatch, protection, "seed")
    protection.start({"evacuation-1"})
    await asyncio.sleep(0.2)
    assert (protection.state, copying.is_set(), link.asked.is_set()) == ("held", False, False)
    await asyncio.wait_for(protection.hold("evacuation-1"), 1)
    protection.release("evacuation-1")
    await asyncio.wait_for(copying.wait(), 5)
    await protection.stop()


def test_where_the_peer_has_no_room_it_is_asked_again_how_it_stands(tmp_path: Path) -> None:
    protection, _link = a_protection(tmp_path)
    protection.replication.standing.needs_reconcile = False
    protection._failed(NoSpace("store: no room"))
    assert protection.state == "no-space"
    assert protection.replication.standing.needs_reconcile


async def test_a_vm_that_is_being_moved_is_not_unprotected(tmp_path: Path) -> None:
    protection, _link = a_protection(tmp_path, sealed=Sealed(7, "lifeboat-e0-g7", 1.0, 1.0))
    source = a_source(tmp_path, protection)
    protection.record.write(tmp_path)
    await protection.hold("evacuation-1")
    for keep_replica in (True, False):
        with pytest.raises(Conflict, match=r"being moved.*evacuation-1.*cancel it"):
            await source.unprotect(VM, keep_replica=keep_replica)
    assert source.status(VM)["state"] == "held"
    assert ProtectionRecord.read(tmp_path / f"{VM}.json") == protection.record


@pytest.mark.parametrize(
    "status",
    [
        {"exists": False},
        # from an earlier stay of the VM there, and older than what it kept now
        {"exists": True, "state": "detached", "epoch": 0, "sealed": {"generation": 3, "checkpoint": "c"}},
    ],
    ids=["nothing", "history"],
)
async def test_waiting_for_the_old_home_is_no_failure_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: dict[str, Any]
) -> None:
    """Just after a hand-off the old home still makes what it kept a replica; it is wrong when that lasts."""
    protection, link = a_protection(
        tmp_path, return_overlays={"vda": ["/overlay", "qcow2", 4096]}, return_generation=7, epoch=1
    )
    link.status = status
    monkeypatch.setattr(protection_module, "RETRY_SECONDS", (0.01,))
    protection.start()
    await asyncio.wait_for(link.asked.wait(), 5)
    await asyncio.sleep(0.05)
    assert (protection.state, protection.cause) == ("seeding", "way-back"), protection.sentence
    assert "backup1" in protection.sentence
    monkeypatch.setattr(protection_module, "OLD_HOME_SECONDS", 0.0)
    await asyncio.sleep(0.1)
    assert protection.state == "failing"
    assert "resync" in protection.sentence
    assert protection.record.return_overlays, "nothing was given up"
    await protection.stop()


async def test_a_link_that_goes_down_in_a_pass_is_told_at_once(tmp_path: Path) -> None:
    protection, link = a_protection(tmp_path, sealed=Sealed(7, "lifeboat-e0-g7", 1.0, 1.0))
    protection.state, protection.cause, protection.sentence = "protected", "ok", "generation 7 is sealed"
    assert protection.status()["state"] == "protected"
    link.state, link.cause, link.sentence = "down", "unreachable", "no answer in time"
    told = protection.status()
    assert (told["state"], told["cause"]) == ("unreachable", "unreachable")
    assert told["sentence"] == "peer backup1: no answer in time"
    # what an operator has to settle says more than that
    protection.state, protection.cause = "stopped", "stale-epoch"
    assert protection.status()["state"] == "stopped"


async def test_postponed_passes_wait_and_come_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protection, _link = a_protection(tmp_path, sealed=Sealed(7, "lifeboat-e0-g7", 1.0, 1.0))
    protection.replication.standing.needs_reconcile = False
    passed = asyncio.Event()

    async def note(**_unused: object) -> PassResult:
        passed.set()
        return PassResult(8, skipped=True, reason="periodic")

    monkeypatch.setattr(protection.replication, "run_pass", note)
    protection.postpone(60.0)
    protection.start()
    await asyncio.sleep(0.1)
    assert not passed.is_set()
    # Somebody wakes it: that is no reason to pass.
    protection.wake()
    await asyncio.sleep(0.05)
    assert not passed.is_set()
    protection.postpone(0.2)
    assert 0.0 < protection.status()["postponed_seconds"] <= 0.2
    await asyncio.wait_for(passed.wait(), 5)
    assert protection.postponed_seconds == 0.0
    # What is asked for is done meanwhile: an evacuation's catch-up does not wait.
    passed.clear()
    protection.postpone(60.0)
    await protection.run_pass(reason="catch-up")
    assert passed.is_set()
    passed.clear()
    protection.postpone(0.0)
    protection.wake()
    await asyncio.wait_for(passed.wait(), 5)
    await protection.stop()


async def test_what_a_vm_needs_to_leave_at_all_is_not_postponed(tmp_path: Path) -> None:
    first_copy, _link = a_protection(tmp_path)
    first_copy.postpone(60.0)
    assert first_copy.postponed_seconds == 0.0
    resync, _link = a_protection(tmp_path, sealed=Sealed(7, "lifeboat-e0-g7", 1.0, 1.0), resync_cause="lost")
    resync.postpone(60.0)
    assert resync.postponed_seconds == 0.0


@pytest.mark.parametrize("knows", [None, {}], ids=["older-peer", "peer-was-told-nothing"])
async def test_the_peer_is_told_what_was_asked_for(tmp_path: Path, knows: dict[str, Any] | None) -> None:
    """Should this host die, the peer goes on with that; one of an older release is not bothered."""
    protection, link = a_protection(
        tmp_path,
        sealed=Sealed(7, "c", 1.0, 1.0, disks=["vda"]),
        autostart=True,
        passed_off={"vda": "as it is"},
    )
    replication = protection.replication
    replication.standing.replica_protection = knows
    told: list[dict[str, Any]] = []

    async def call(method: str, parameters: dict[str, Any], **_unused: object) -> dict[str, Any]:
        assert method == "store.prepare"
        told.append(parameters["protection"])
        return {"protection": parameters["protection"]}

    async def look() -> tuple[Any, Any, bool]:
        return SimpleNamespace(autostart=False, xml="<domain/>"), SimpleNamespace(tracked={}, absent=[]), True

    async def sizes(*_unused: object, **_more: object) -> dict[str, int]:
        return {"vda": 4096}

    link.call = call  # type: ignore[method-assign]
    replication.disks = cast(
        Any,
        SimpleNamespace(
            look=look, sizes=sizes, check_images=lambda _layout: None, unchanged=lambda **_more: nullcontext()
        ),
    )  # fmt: skip
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("precache_proxy.source.replication.read_attachments", lambda _definition: {})
            assert (await replication.run_pass(reason="periodic")).skipped
    assert told == ([] if knows is None else [{"rpo_seconds": 15.0, "priority": 0, "autostart": True}])


async def test_an_evacuation_does_not_queue_behind_the_passes_of_other_vms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are starved by the memory that crosses before them: they would keep it for their whole length."""
    protection, _link = a_protection(tmp_path, sealed=Sealed(7, "lifeboat-e0-g7", 1.0, 1.0))
    protection.replication.standing.needs_reconcile = False
    reasons: list[str] = []

    async def note(*, reason: str, **_unused: object) -> PassResult:
        reasons.append(reason)
        return PassResult(8, skipped=True, reason=reason)

    monkeypatch.setattr(protection.replication, "run_pass", note)
    async with protection._environment.passes.turn(0):
        protection.start()
        await asyncio.sleep(0.05)
        assert reasons == [], "its periodic pass waits for the other's"
        await asyncio.wait_for(protection.hold("evacuation-1"), 5)
        await asyncio.wait_for(protection.run_pass(reason="evacuation"), 5)
        assert reasons == ["evacuation"]
    protection.release("evacuation-1")
    protection.wake()
    await asyncio.sleep(0.05)
    assert reasons == ["evacuation", "periodic"]
    await protection.stop()


async def test_a_hold_waits_for_no_queue_that_a_pass_on_demand_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asked for it gets it: it is made without the queue. One that has its turn is left alone."""
    protection, _link = a_protection(tmp_path, sealed=Sealed(7, "lifeboat-e0-g7", 1.0, 1.0))
    protection.replication.standing.needs_reconcile = False
    go_on = asyncio.Event()

    async def make(*, reason: str, **_unused: object) -> PassResult:
        await go_on.wait()
        return PassResult(8, reason=reason)

    monkeypatch.setattr(protection.replication, "run_pass", make)
    passes = protection._environment.passes
    go_on.set()
    async with passes.turn(0):
        asked = asyncio.create_task(protection.run_pass(reason="asked for"))
        await asyncio.sleep(0.05)
        assert not asked.done()
        await asyncio.wait_for(protection.hold("evacuation-1"), 5)
        assert (await asked).reason == "asked for"
    protection.release("evacuation-1")
    # Begun, and cancelled by whoever asked: the place is free afterwards.
    go_on.clear()
    asked = asyncio.create_task(protection.run_pass(reason="asked for"))
    await asyncio.sleep(0.05)
    hold = asyncio.create_task(protection.hold("evacuation-2"))
    await asyncio.sleep(0.05)
    assert not asked.done()
    assert not hold.done()
    asked.cancel()
    await asyncio.wait_for(hold, 5)
    protection.release("evacuation-2")
    async with passes.turn(0):
        # Cancelled in the queue, just as its turn comes.
        asked = asyncio.create_task(protection.run_pass(reason="asked for"))
        await asyncio.sleep(0.05)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    async with asyncio.timeout(1), passes.turn(0):
        pass


async def test_passes_of_a_held_vm_are_not_starved_by_memory(tmp_path: Path) -> None:
    """Neither the one that the hold waits for, nor those of the evacuation itself."""
    protection, _link = a_protection(
        tmp_path, sealed=Sealed(7, "c", 1.0, 1.0, disks=["vda"]), passed_off={"vda": "otherwise"}
    )
    replication = protection.replication
    scratch = protection._environment.backups._scratch
    replication.standing.needs_reconcile = False
    classes: list[TrafficClass] = []

    async def look() -> tuple[Any, Any, bool]:
        return SimpleNamespace(autostart=False, xml="<domain/>"), SimpleNamespace(tracked={}, absent=[]), True

    async def answer(value: Any) -> Any:
        return value

    async def make(plan: GenerationPlan, *_unused: object, **_more: object) -> PassResult:
        classes.append(plan.traffic_class)
        return PassResult(8)

    replication.disks = cast(
        Any,
        SimpleNamespace(
            look=look, sizes=lambda *_unused, **_more: answer({"vda": 4096}), source=lambda *_a, **_b: None,
            check_images=lambda _layout: None, refused={}, transferable_xml=lambda: answer("<domain/>"),
            unchanged=lambda **_more: nullcontext(),
        ),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("precache_proxy.source.replication.read_attachments", lambda _definition: {})
        patch.setattr(replication, "_make", make)
        patch.setattr(replication.standing, "save", lambda: answer(None))
        await replication.run_pass(reason="periodic", compare_all=True)
        async with scratch.lease("another", limit_seconds=60) as lease:
            await protection.hold("evacuation-1")
            waiting = asyncio.create_task(scratch.lease(VM, limit_seconds=60).__aenter__())
            await asyncio.wait_for(lease.over.wait(), 5)
        await waiting
        await replication.run_pass(reason="evacuation", compare_all=True)
        protection.release("evacuation-1")
        assert not scratch._urgent
        await replication.run_pass(reason="periodic", compare_all=True)
    assert classes == [TrafficClass.PRECACHE, TrafficClass.MIGRATION, TrafficClass.PRECACHE]


@pytest.mark.parametrize(
    ("sent_as", "then"),
    [
        (TrafficClass.PRECACHE, TrafficClass.MIGRATION),
        # a residual goes before memory already
        (TrafficClass.HANDOFF, TrafficClass.HANDOFF),
    ],
)
def test_a_pass_under_way_is_hastened(sent_as: TrafficClass, then: TrafficClass) -> None:
    plan = GenerationPlan(VM, "web1", 0, 8, 7, "<domain/>", {"vda": 4096}, {}, traffic_class=sent_as)
    generation = Generation(cast(Any, None), plan)
    generation.hasten()  # before it has a stream
    generation._stream = cast(Any, SimpleNamespace(traffic_class=sent_as))
    generation.hasten()
    assert cast(Any, generation._stream).traffic_class is then


async def test_a_start_that_met_a_reader_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protection, _link = a_protection(tmp_path, sealed=Sealed(7, "lifeboat-e0-g7", 1.0, 1.0))
    reconciled_at_once(monkeypatch, protection)
    asked = asyncio.Event()

    async def find_it_started(**_unused: object) -> None:
        asked.set()
        raise VmStateChanged("VM web1: it was started while its images were in use here; ask again")

    monkeypatch.setattr(protection.replication, "run_pass", find_it_started)
    protection.start()
    try:
        await asyncio.wait_for(asked.wait(), 5)
        await asyncio.sleep(0.05)
        assert (protection.state, protection.cause) == ("protected", "ok")
        # the event of its start comes as soon as it runs
        asked.clear()
        protection.wake()
        await asyncio.wait_for(asked.wait(), 5)
    finally:
        await protection.stop()


async def test_what_happens_to_a_vm_while_its_pass_fails_is_looked_at_soon_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A VM that is undefined, and defined again, during a pass: the pass ends in an error that waits long."""
    monkeypatch.setattr(protection_module, "RETRY_SECONDS", (0.05,))
    protection, _link = a_protection(tmp_path, sealed=Sealed(7, "lifeboat-e0-g7", 1.0, 1.0))
    reconciled_at_once(monkeypatch, protection)
    passes, may_end, again = 0, asyncio.Event(), asyncio.Event()

    async def fail(**_unused: object) -> None:
        nonlocal passes
        passes += 1
        if passes == 1:
            await may_end.wait()
        else:
            again.set()
        raise NotFound("VM web1: not defined on this host any more")

    monkeypatch.setattr(protection.replication, "run_pass", fail)
    protection.start()
    try:
        await asyncio.sleep(0.1)
        protection.changed()
        may_end.set()
        await asyncio.wait_for(again.wait(), 5)
        await asyncio.sleep(0.2)
        assert (passes, protection.state) == (2, "stopped"), "nothing has happened since: as ever"
    finally:
        await protection.stop()


async def test_a_resync_that_is_asked_for_during_a_pass_follows_it_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass began before the word, and the next one is due much later."""
    monkeypatch.setattr(protection_module, "RETRY_SECONDS", (0.05,))
    protection, _link = a_protection(tmp_path, sealed=Sealed(7, "lifeboat-e0-g7", 1.0, 1.0))
    reconciled_at_once(monkeypatch, protection)
    under_way, may_end, compared = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def run_pass(*, compare_all: bool, **_unused: object) -> SimpleNamespace:
        if compare_all:
            compared.set()
            protection.record.resync_cause = ""
        else:
            under_way.set()
            await may_end.wait()
        return SimpleNamespace(skipped=True)

    monkeypatch.setattr(protection.replication, "run_pass", run_pass)
    source = a_source(tmp_path, protection)
    protection.start()
    try:
        await asyncio.wait_for(under_way.wait(), 5)
        await source.resync(VM)
        may_end.set()
        await asyncio.wait_for(compared.wait(), 5)
    finally:
        await protection.stop()
