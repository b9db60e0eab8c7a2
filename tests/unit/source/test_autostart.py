# SPDX-License-Identifier: GPL-3.0-or-later
"""Autostart of a protected VM: never with nobody, and never with libvirt and us at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from precache_proxy.errors import NoSpace, PeerUnreachable
from precache_proxy.evacuation.guard import FENCED, LEAVING, TOMBSTONE, Forbidden, Guard
from precache_proxy.hypervisor.connection import Hypervisor
from precache_proxy.source import autostart
from precache_proxy.source.record import ProtectionRecord


@pytest.fixture
async def hypervisor() -> AsyncIterator[Hypervisor]:
    """Libvirt's test driver, which has one VM."""
    made = Hypervisor("test:///default")
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def domain(hypervisor: Hypervisor) -> Any:
    found = await hypervisor.lookup("test")
    await hypervisor.call(found.setAutostart, 1, subject="test")
    return found


@pytest.fixture
def record(domain: Any) -> ProtectionRecord:
    return ProtectionRecord(domain.UUIDString(), "test", "backup1", 15.0)


async def test_it_is_durable_with_us_before_libvirt_forgets_it(
    hypervisor: Hypervisor, domain: Any, record: ProtectionRecord
) -> None:
    at_save: list[tuple[bool, bool]] = []

    async def save() -> None:
        at_save.append((record.autostart, bool(domain.autostart())))

    await autostart.take_over(hypervisor, record, save)
    assert at_save == [(True, True)]
    assert not domain.autostart()
    await autostart.take_over(hypervisor, record, save)
    assert len(at_save) == 1
    assert record.autostart, "what was taken over once is not forgotten because libvirt has it no more"
    await autostart.give_back(hypervisor, record)
    assert domain.autostart()


async def test_where_it_cannot_be_kept_in_mind_it_stays_with_libvirt(
    hypervisor: Hypervisor, domain: Any, record: ProtectionRecord
) -> None:
    async def save() -> None:
        raise NoSpace("no space")

    with pytest.raises(NoSpace):
        await autostart.take_over(hypervisor, record, save)
    assert domain.autostart()


class Peer:
    is_up = True

    async def wait_up(self, _seconds: float | None) -> None:
        if not self.is_up:
            raise PeerUnreachable("peer backup1: no answer")

    async def call(self, _method: str, _parameters: object) -> dict[str, Any]:
        return {"exists": True, "epoch": 0, "state": "sealed"}


def booted(tmp_path: Path, hypervisor: Hypervisor, peer: Peer) -> Any:
    """What the proxy has when it starts."""
    return SimpleNamespace(
        directory=tmp_path / "source",
        hypervisor=hypervisor,
        link=lambda _peer: peer,
        after_boot=autostart.AfterBoot(tmp_path / "autostart.json"),
    )


async def test_a_restart_of_the_proxy_forgets_no_start_and_makes_none_anew(
    hypervisor: Hypervisor,
    domain: Any,
    record: ProtectionRecord,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(autostart, "_ASK_AGAIN_SECONDS", 0.01)
    if domain.isActive():
        domain.destroy()
    record.autostart = True
    peer = Peer()
    peer.is_up = False
    for _start in range(2):
        proxy = booted(tmp_path, hypervisor, peer)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(autostart.start_after_boot(proxy, [record]), 0.2)
        assert "waits for backup1 to say that it does not run there" in proxy.after_boot.waits[record.uuid]
        assert not domain.isActive()
    assert caplog.text.count("its start after boot waits: waits for backup1") == 2, "each proxy says it once"
    peer.is_up = True
    late = ProtectionRecord("4e7d1c22-0000-4000-8000-000000000001", "late", "backup1", 15.0, autostart=True)
    proxy = booted(tmp_path, hypervisor, peer)
    await asyncio.wait_for(autostart.start_after_boot(proxy, [record, late]), 5)
    assert domain.isActive()
    assert proxy.after_boot.waits == {}, "what was protected after the boot is nobody's to start"
    domain.destroy()
    proxy = booted(tmp_path, hypervisor, peer)
    await asyncio.wait_for(autostart.start_after_boot(proxy, [record]), 5)
    assert not domain.isActive(), "stopped since, so it stays so"


async def test_an_upgrade_starts_nobody_who_was_shut_off_since_the_boot(
    hypervisor: Hypervisor, domain: Any, record: ProtectionRecord, tmp_path: Path
) -> None:
    if domain.isActive():
        domain.destroy()
    record.autostart = True
    (tmp_path / "autostart.done").touch()
    proxy = booted(tmp_path, hypervisor, Peer())
    await asyncio.wait_for(autostart.start_after_boot(proxy, [record]), 5)
    assert not domain.isActive()


async def test_a_vm_that_is_started_by_hand_or_not_protected_any_more_waits_no_longer(
    hypervisor: Hypervisor,
    domain: Any,
    record: ProtectionRecord,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(autostart, "_ASK_AGAIN_SECONDS", 0.01)
    record.autostart = True
    peer = Peer()
    peer.is_up = False
    for start in (True, False):
        if domain.isActive():
            domain.destroy()
        (tmp_path / "autostart.json").unlink(missing_ok=True)
        proxy = booted(tmp_path, hypervisor, peer)
        starting = asyncio.create_task(autostart.start_after_boot(proxy, [record]))
        await asyncio.sleep(0.05)
        assert not starting.done()
        if start:
            domain.create()
        else:
            proxy.after_boot.decided(record.uuid)
        await asyncio.wait_for(starting, 5)
        assert proxy.after_boot.waits == {}


@pytest.mark.parametrize("cause", [LEAVING, FENCED])
async def test_what_forbids_for_now_is_waited_for_and_a_tombstone_is_not(
    hypervisor: Hypervisor,
    domain: Any,
    record: ProtectionRecord,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cause: str,
) -> None:
    monkeypatch.setattr(autostart, "_ASK_AGAIN_SECONDS", 0.01)
    record.autostart = True
    if domain.isActive():
        domain.destroy()
    environment = booted(tmp_path, hypervisor, Peer())
    environment.after_boot.begin([record])
    guard = Guard(tmp_path, tmp_path / "run")
    guard.prepare_directories()

    def forbid(why: str) -> None:
        guard.forbid(Forbidden(record.uuid, why, "sentence", "job1", 1))

    forbid(cause)
    starting = asyncio.create_task(autostart._start(environment, record))
    await asyncio.sleep(0.1)
    assert not starting.done()
    assert not domain.isActive()
    assert f"forbids it ({cause})" in environment.after_boot.waits[record.uuid]
    forbid(TOMBSTONE)
    await asyncio.wait_for(starting, 5)
    assert not domain.isActive()

    (guard.directory / f"{record.uuid}.json").write_text("{")
    environment.after_boot.waits[record.uuid] = ""
    starting = asyncio.create_task(autostart._start(environment, record))
    await asyncio.sleep(0.1)
    assert not domain.isActive(), "what cannot be read forbids"
    forbid(cause)
    guard.allow(record.uuid, job="job1")
    await asyncio.wait_for(starting, 5)
    assert domain.isActive()
