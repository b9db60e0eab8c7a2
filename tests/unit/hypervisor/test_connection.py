# SPDX-License-Identifier: GPL-3.0-or-later
"""The connection, on libvirt's own test driver."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator

import libvirt
import pytest
import pytest_asyncio

from precache_proxy.errors import HypervisorError, NotFound
from precache_proxy.hypervisor.connection import Hypervisor, libvirt_code
from precache_proxy.hypervisor.events import DomainEvent


@pytest_asyncio.fixture
async def hypervisor() -> AsyncIterator[Hypervisor]:
    one = Hypervisor("test:///default")
    await one.start()
    yield one
    await one.stop()


async def test_lookup_by_name_and_by_uuid(hypervisor: Hypervisor) -> None:
    by_name = await hypervisor.lookup("test")
    by_uuid = await hypervisor.lookup(by_name.UUIDString().upper())
    assert by_uuid.name() == "test"
    assert (by_name.UUIDString(), "test", True) in await hypervisor.list_domains()


async def test_a_vm_that_is_undefined_while_all_are_listed_hides_none_of_the_others(
    hypervisor: Hypervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    xml = "<domain type='test'><name>leaving</name><memory>1024</memory><os><type>hvm</type></os></domain>"
    leaving = await hypervisor.call(hypervisor.connection.defineXML, xml)
    names = [name for _uuid, name, _active in await hypervisor.list_domains()]
    assert sorted(names) == ["leaving", "test"]
    listed = hypervisor.connection.listAllDomains(0)
    leaving.undefine()
    monkeypatch.setattr(hypervisor.connection, "listAllDomains", lambda _flags: listed)
    assert [name for _uuid, name, _active in await hypervisor.list_domains()] == ["test"]


async def test_an_unknown_vm_is_named(hypervisor: Hypervisor) -> None:
    for name in ("no such vm", "00000000-0000-0000-0000-000000000000"):
        with pytest.raises(NotFound, match=f"VM {name}.*virsh list"):
            await hypervisor.lookup(name)


async def test_a_vm_named_like_a_uuid_is_found(hypervisor: Hypervisor) -> None:
    name = "11111111-2222-3333-4444-555555555555"
    xml = f"<domain type='test'><name>{name}</name><memory>1024</memory><os><type>hvm</type></os></domain>"
    await hypervisor.call(hypervisor.connection.defineXML, xml)
    assert (await hypervisor.lookup(name)).name() == name


async def test_errors_name_the_subject_and_keep_libvirts_code(hypervisor: Hypervisor) -> None:
    domain = await hypervisor.lookup("test")
    with pytest.raises(HypervisorError, match="VM test: libvirt refused or failed") as caught:
        await hypervisor.call(domain.create, subject="VM test")
    assert libvirt_code(caught.value) == libvirt.VIR_ERR_INTERNAL_ERROR


async def test_a_call_that_does_not_answer_is_given_up(hypervisor: Hypervisor) -> None:
    with pytest.raises(HypervisorError, match="VM web1: libvirt did not answer sleep within"):
        await hypervisor.call(time.sleep, 0.5, subject="VM web1", timeout_seconds=0.05)


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("in_turn", [False, True])
async def test_a_cancellation_is_not_forgotten_for_an_answer(
    hypervisor: Hypervisor, *, in_turn: bool, turns: int
) -> None:
    """A task that is to end would go on for ever: at the stop of a proxy, or where it was given a time."""
    answered = threading.Event()
    if in_turn:
        call = asyncio.create_task(hypervisor.call_in_turn("uuid", answered.set, subject="VM test"))
    else:
        call = asyncio.create_task(hypervisor.call(answered.set))
    await asyncio.sleep(0)
    assert answered.wait(5), "the loop has not heard of it yet"
    time.sleep(0.05)  # noqa: ASYNC251 (it is not to hear of it)
    for _turn in range(turns):
        await asyncio.sleep(0)
    if call.done():
        return
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_lifecycle_events_arrive_in_the_loop(hypervisor: Hypervisor) -> None:
    seen: list[DomainEvent] = []
    stopped = asyncio.Event()

    async def subscriber(event: DomainEvent) -> None:
        seen.append(event)
        if event.what == "stopped":
            stopped.set()

    unsubscribe = hypervisor.subscribe(subscriber)
    domain = await hypervisor.lookup("test")
    await hypervisor.call(domain.destroy)
    await asyncio.wait_for(stopped.wait(), 10)
    assert [(event.kind, event.name) for event in seen if event.what == "stopped"] == [("lifecycle", "test")]
    unsubscribe()
    count = len(seen)
    await hypervisor.call(domain.create)
    await asyncio.sleep(0.1)
    assert len(seen) == count


async def test_definition_of_the_test_driver(hypervisor: Hypervisor) -> None:
    definition = await hypervisor.definition("test")
    assert (definition.name, definition.type) == ("test", "test")
    assert definition.disk("vda") is not None
    assert not definition.autostart
    assert hypervisor.features is not None
    assert not hypervisor.features.backup
    assert "incremental backup" in hypervisor.features.findings()[0].fact


async def test_no_libvirt_is_one_sentence() -> None:
    hypervisor = Hypervisor("qemu+unix:///system?socket=/nonexistent/libvirt-sock")
    with pytest.raises(HypervisorError, match=r"qemu\+unix.*no answer.*systemctl status libvirtd"):
        await hypervisor.start(timeout_seconds=1.0)
    with pytest.raises(HypervisorError):
        await hypervisor.lookup("test")
