# SPDX-License-Identifier: GPL-3.0-or-later
"""Protecting a VM: what it and the peer have against it, all at once; and nothing half made."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from precache_proxy.blocks import images
from precache_proxy.channel.channel import Channel
from precache_proxy.errors import Conflict, HypervisorError, InvalidInput, NoSpace, StaleEpoch
from precache_proxy.hypervisor.connection import Hypervisor
from precache_proxy.hypervisor.domain_xml import parse_definition
from precache_proxy.source import raw_overlay
from precache_proxy.source.record import ProtectionRecord
from precache_proxy.source.request import Protect, vm_findings
from precache_proxy.source.service import Source
from precache_proxy.source.settings import SourceSettings
from precache_proxy.store.service import Store
from precache_proxy.store.settings import StoreSettings
from precache_proxy.units import MIB

VM = "11111111-2222-4333-8444-555555555577"


def definition(image: Path) -> str:
    return (
        f"<domain type='test'><name>web1</name><uuid>{VM}</uuid><memory>8192</memory>"
        "<os><type>hvm</type></os>"
        "<devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/>"
        f"<source file='{image}'/><target dev='vda' bus='virtio'/></disk></devices></domain>"
    )


@dataclass
class Link:
    """Carries calls to a real store."""

    store: Store
    is_up: bool = True
    state: str = "up"
    cause: str = ""
    sentence: str = "no answer"
    asked: list[str] = field(default_factory=list)
    answers_after_seconds: float = 0.0

    async def call(self, method: str, parameters: dict[str, Any], **_more: Any) -> dict[str, Any]:
        self.asked.append(method)
        if method == "store.status":
            return await self.store.status(parameters["vm"])
        assert (method, parameters["check"]) == ("store.prepare", True)
        answer = await self.store.prepare("home1", parameters)
        await asyncio.sleep(self.answers_after_seconds)
        return answer

    async def wait_up(self, _seconds: float | None) -> None: ...


@dataclass
class Sides:
    source: Source
    store: Store
    link: Link


@pytest.fixture
async def sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Sides]:
    """A VM of 64 MiB at home, a peer's store, and no passes between them."""
    image = tmp_path / "vda.qcow2"
    await images.create(image, 64 * MIB)
    hypervisor = Hypervisor("test:///default")
    await hypervisor.start()
    # the test driver has no backups, and nothing here makes one
    hypervisor.features = None
    domain = hypervisor.connection.defineXML(definition(image))
    store = Store(tmp_path / "store", tmp_path / "run", StoreSettings(2, 0))
    await store.start()
    link = Link(store)
    settings = SourceSettings("home1", ("backup1",), scratch_directory=tmp_path / "scratch", qemu_user="root")
    channel = cast(Channel, SimpleNamespace(links={"backup1": link}))
    source = Source(tmp_path / "source", tmp_path / "run", hypervisor, channel, settings)
    monkeypatch.setattr("precache_proxy.source.protection.Protection.start", lambda *_unused: None)
    await source.start()
    yield Sides(source, store, link)
    await source.stop()
    await store.stop()
    domain.undefine()
    await hypervisor.stop()


async def prepare(sides: Sides, peer: str = "home1", **parameters: Any) -> None:
    """A replica at the peer."""
    asked = {"vm": VM, "name": "web1", "epoch": 0, "disks": {"vda": 64 * MIB}, "definition": ""}
    await sides.store.prepare(peer, asked | parameters)


async def test_a_peer_that_takes_it_is_asked_and_changes_nothing(sides: Sides) -> None:
    assert await sides.source.check(Protect("web1", "backup1")) == []
    assert await sides.store.statuses() == []
    assert (await sides.source.protect(Protect("web1", "backup1")))["peer"] == "backup1"


async def test_a_hold_from_the_start_is_none_on_what_is_protected_later(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The move that held it may have ended by then: nobody would release it."""
    started_with: list[set[str]] = []
    monkeypatch.setattr(
        "precache_proxy.source.protection.Protection.start",
        lambda _self, holders=(): started_with.append(set(holders)),
    )
    await sides.source.stop()
    sides.source.hold_from_start(VM, "evacuation-1")
    await sides.source.start()
    await sides.source.protect(Protect("web1", "backup1"))
    assert started_with == [set()]


async def test_what_the_peer_has_against_it_is_told_before_anything_is_changed(sides: Sides) -> None:
    await prepare(sides, "stranger", epoch=0)
    with pytest.raises(Conflict, match="it belongs to stranger, not to home1") as refused:
        await sides.source.protect(Protect("web1", "backup1"))
    assert "nothing was changed" in refused.value.message
    assert sides.source.statuses() == []
    await sides.store.remove(VM)
    await prepare(sides, epoch=7)
    with pytest.raises(StaleEpoch, match="the VM's home has moved since"):
        await sides.source.check(Protect("web1", "backup1"))


async def test_room_and_what_the_vm_itself_lacks_are_told_together(sides: Sides) -> None:
    sides.store.settings = StoreSettings(2, 10**15)
    with pytest.raises(NoSpace, match="free on"):
        await sides.source.check(Protect("web1", "backup1"))
    with pytest.raises(InvalidInput) as refused:
        await sides.source.check(Protect("web1", "backup1", disks=("vda", "vdz")))
    assert [finding.cause for finding in refused.value.findings] == ["not-found", "no-space"]


async def test_a_peer_that_does_not_answer_is_a_note_and_no_refusal(sides: Sides) -> None:
    await prepare(sides, "stranger")
    sides.link.is_up = False
    [note] = await sides.source.check(Protect("web1", "backup1"))
    assert note == "peer backup1 could not be asked whether it takes the replica: no answer"
    assert (await sides.source.protect(Protect("web1", "backup1")))["peer"] == "backup1"


async def test_what_the_peer_told_when_it_was_asked_is_not_asked_for_once_more(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round trip less before the first block; later, or a second time, it is asked how it stands."""
    await prepare(sides)
    await sides.source.protect(Protect("web1", "backup1"))
    standing = sides.source._find("web1").replication.standing
    assert standing.needs_reconcile
    await standing.reconcile()
    assert (standing.replica_sizes, standing.needs_reconcile) == ({"vda": 64 * MIB}, False)
    assert sides.link.asked == ["store.prepare"]
    await standing.reconcile()
    assert sides.link.asked == ["store.prepare", "store.status"]
    standing.hear({"exists": False}, time.monotonic())
    monkeypatch.setattr("precache_proxy.source.standing._HEARD_SECONDS", 0.0)
    await standing.reconcile()
    assert sides.link.asked[2:] == ["store.status"]
    assert standing.replica_sizes == {"vda": 64 * MIB}


async def test_what_the_peer_told_is_as_old_as_the_question(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    await prepare(sides)
    monkeypatch.setattr("precache_proxy.source.standing._HEARD_SECONDS", 0.3)
    sides.link.answers_after_seconds = 0.4
    await sides.source.protect(Protect("web1", "backup1"))
    sides.link.answers_after_seconds = 0.0
    await sides.source._find("web1").replication.standing.reconcile()
    assert sides.link.asked == ["store.prepare", "store.status"]


async def test_a_replica_is_made_once(sides: Sides) -> None:
    """Only who is told so may leave out to take its marks back."""
    asked = {"vm": VM, "name": "web1", "epoch": 0, "disks": {"vda": 64 * MIB}, "definition": ""}
    checked = await sides.store.prepare("home1", {**asked, "check": True})
    assert (checked["findings"], checked["status"]["exists"]) == ([], False)
    assert (await sides.store.prepare("home1", asked))["created"] is True
    assert (await sides.store.prepare("home1", asked))["created"] is False


async def test_one_that_is_protected_already_is_not_judged_by_its_peer_again(sides: Sides) -> None:
    """It may be frozen there for its arrival, which is no reason to refuse what changes nothing."""
    await sides.source.protect(Protect("web1", "backup1"))
    sides.store.settings = StoreSettings(2, 10**15)
    assert (await sides.source.protect(Protect("web1", "backup1", priority=90)))["priority"] == 90


def test_a_second_peer_is_refused_with_both_ways_out(tmp_path: Path) -> None:
    vm = parse_definition(definition(tmp_path / "vda.qcow2"))
    assert vm_findings(Protect("web1", "backup1"), vm, "backup1") == []
    [found] = vm_findings(Protect("web1", "backup2"), vm, "backup1")
    assert (found.subject, found.cause) == ("VM web1", "conflict")
    assert "protected at backup1 already" in found.fact
    assert found.way_out == "unprotect it first, or keep backup1"


@pytest.mark.parametrize("fails", ["overlay", "record"])
async def test_a_change_that_fails_leaves_the_protection_as_it_was(
    sides: Sides, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    await sides.source.protect(Protect("web1", "backup1"))
    before = sides.source.status("web1")

    async def no_overlay(*_arguments: object) -> None:
        raise HypervisorError("VM web1: no snapshot")

    def no_record(*_arguments: object) -> None:
        raise NoSpace("VM web1: no space left for the record")

    with pytest.MonkeyPatch.context() as patch:
        if fails == "overlay":
            patch.setattr(raw_overlay, "put_on", no_overlay)
        else:
            patch.setattr(ProtectionRecord, "write", no_record)
        with pytest.raises((HypervisorError, NoSpace)):
            await sides.source.protect(
                Protect("web1", "backup1", 99.0, 90, ("vda",), raw_overlay_consent=True)
            )
    assert sides.source.status("web1") == before
    kept = ProtectionRecord.read(sides.source.directory / f"{VM}.json")
    assert kept is not None
    assert (kept.rpo_seconds, kept.priority, kept.only_disks) == (15.0, 50, None)


async def test_a_new_protection_that_fails_is_none(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_record(*_arguments: object) -> None:
        raise NoSpace("VM web1: no space left for the record")

    monkeypatch.setattr(ProtectionRecord, "write", no_record)
    with pytest.raises(NoSpace):
        await sides.source.protect(Protect("web1", "backup1"))
    assert sides.source.statuses() == []
    assert list(sides.source.directory.glob("*.json")) == []
