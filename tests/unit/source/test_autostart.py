# SPDX-License-Identifier: GPL-3.0-or-later
"""Autostart of a protected VM: never with nobody, and never with libvirt and us at once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from precache_proxy.errors import NoSpace
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
