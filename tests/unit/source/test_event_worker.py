# SPDX-License-Identifier: GPL-3.0-or-later
"""No backup is begun where libvirt's worker for events would stand still for it, or does already."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import libvirt
import pytest

from precache_proxy.hypervisor.events import DomainEvent
from precache_proxy.source import event_worker as event_worker_module
from precache_proxy.source.event_worker import BOOT_SECONDS, EventWorker
from precache_proxy.source.service import Source
from precache_proxy.source.tracker import Tracker, VmReference

WEB1 = VmReference("11111111-2222-4333-8444-555555555501", "web1")
OTHER = VmReference("11111111-2222-4333-8444-555555555502", "web2")


class Host:
    """One libvirt with one VM: a channel of a file, one that its guest opens, and the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.state_number = libvirt.VIR_DOMAIN_RUNNING
        self.port = "disconnected"
        self.asked = 0
        monkeypatch.setattr(event_worker_module, "time", SimpleNamespace(monotonic=lambda: self.now))

    async def on_domain(self, _vm: VmReference, work: Callable[[Any], Any]) -> Any:
        self.asked += 1
        return work(self)

    def state(self) -> list[int]:
        return [self.state_number, 0]

    def XMLDesc(self, _flags: int) -> str:  # noqa: N802 (libvirt's name)
        return (
            "<domain><devices><channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' "
            f"state='{self.port}'/></channel><channel type='pty'><target type='guestfwd'/></channel>"
            "</devices></domain>"
        )

    async def may_begin(self, worker: EventWorker, vm: VmReference = WEB1) -> bool:
        return await worker.wait_seconds(cast(Tracker, self), vm) == 0


async def test_a_guest_that_boots_is_waited_for_until_it_has_opened_its_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host, worker = Host(monkeypatch), EventWorker()
    worker.booted(WEB1.uuid)
    assert not await host.may_begin(worker)
    assert await host.may_begin(worker, OTHER), "others are not kept"
    host.now += 5
    host.port = "connected"
    assert await host.may_begin(worker)


async def test_a_guest_without_an_agent_is_waited_for_no_longer_than_libvirt_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host, worker = Host(monkeypatch), EventWorker()
    worker.booted(WEB1.uuid)
    host.now += BOOT_SECONDS - 0.25
    assert await worker.wait_seconds(cast(Tracker, host), WEB1) == pytest.approx(0.25)
    host.now += 0.25
    assert await host.may_begin(worker)


async def test_who_booted_long_ago_costs_no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    host, worker = Host(monkeypatch), EventWorker()
    assert await host.may_begin(worker)
    worker.booted(WEB1.uuid)
    host.now += BOOT_SECONDS
    assert await host.may_begin(worker)
    assert host.asked == 0


async def test_a_paused_guest_opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    host, worker = Host(monkeypatch), EventWorker()
    worker.booted(WEB1.uuid)
    host.state_number = libvirt.VIR_DOMAIN_PAUSED
    assert await host.may_begin(worker)


async def test_nothing_is_begun_while_an_end_is_overdue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_worker_module, "STUCK_SECONDS", 0.05)
    host, worker = Host(monkeypatch), EventWorker()
    async with worker.ending():
        assert await host.may_begin(worker), "an end takes a moment"
        await asyncio.sleep(0.2)
        assert worker.stands_still
        assert not await host.may_begin(worker, OTHER)
    assert await host.may_begin(worker, OTHER)
    with pytest.raises(TimeoutError):
        async with worker.ending(), asyncio.timeout(0.2):
            await asyncio.sleep(60)
    assert not worker.stands_still, "given up: the watchdog's matter"
    async with worker.ending():
        pass
    await asyncio.sleep(0.1)
    assert not worker.stands_still, "a late timer counts nothing"


@pytest.mark.parametrize(
    ("kind", "what", "detail", "waits"),
    [
        ("lifecycle", "started", libvirt.VIR_DOMAIN_EVENT_STARTED_BOOTED, True),
        ("lifecycle", "started", libvirt.VIR_DOMAIN_EVENT_STARTED_MIGRATED, False),
        ("lifecycle", "resumed", libvirt.VIR_DOMAIN_EVENT_RESUMED_UNPAUSED, False),
        ("reboot", "", 0, True),
    ],
)
async def test_boots_and_reboots_are_heard_of(
    monkeypatch: pytest.MonkeyPatch, kind: str, what: str, detail: int, *, waits: bool
) -> None:
    """Guests that arrive have their ports open; libvirt takes those events during a migration."""
    host, worker = Host(monkeypatch), EventWorker()
    source = Source.__new__(Source)
    source._environment = cast(Any, SimpleNamespace(backups=SimpleNamespace(event_worker=worker)))
    source._protections = {}
    source._on_event(DomainEvent(kind, WEB1.uuid, WEB1.name, what, detail))
    assert await host.may_begin(worker) is not waits
