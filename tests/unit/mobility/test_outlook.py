# SPDX-License-Identifier: GPL-3.0-or-later
"""What an agent says of a VM that may move: would its addresses follow it?"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from aiohttp.test_utils import TestClient, TestServer

from mobility_agent.control.api import Api
from mobility_agent.control.parts import Parts
from mobility_agent.gateway.definition import METADATA_URI, bridges_elsewhere
from mobility_agent.messages.headers import Heartbeat
from unit.mobility.test_gateway_duty import HOME, MAC, VM, Gateway

_CARD = '<interface type="{}"><mac address="52:54:00:00:00:01"/><source {}bridge="{{}}"/></interface>'
BRIDGE, NETWORK = _CARD.format("bridge", ""), _CARD.format("network", 'network="lan" ')


def definition(*interfaces: str, addresses: tuple[str, ...] = ("2001:db8:100::5",)) -> str:
    told = "".join(f"<address>{address}</address>" for address in addresses)
    return (
        f'<domain><name>web1</name><metadata><addresses xmlns="{METADATA_URI}">{told}</addresses></metadata>'
        f"<devices>{''.join(interfaces)}</devices></domain>"
    )


@asynccontextmanager
async def asking(gateway: Gateway) -> AsyncIterator[Any]:
    """``ask(definition, arriving)`` gives the facts with their ways out."""
    parts = Parts(gateway.config, cast(Any, gateway.kernel), cast(Any, None))
    parts.gateway = gateway.duty
    async with TestClient(TestServer(Api(parts).application())) as client:

        async def ask(text: str, *, arriving: bool) -> list[str]:
            body = {"definition": text, "arriving": arriving}
            answer = await client.post(f"/v1/vms/{VM}/outlook", json=body)
            assert answer.status == 200, await answer.text()
            findings = (await answer.json())["findings"]
            assert all(found["subject"] == "VM web1" and found["way_out"] for found in findings)
            return [found["fact"] for found in findings]

        yield ask
    await gateway.duty.stop()


async def _hear_anchors(gateway: Gateway) -> None:
    await asyncio.sleep(0.01)
    for name, message in list(gateway.sent):
        peer = gateway.config.peer(name)
        if isinstance(message, Heartbeat) and peer is not None:
            gateway.duty.take(peer, Heartbeat(message.sequence, response=True))


async def test_a_vm_that_may_come_is_judged_as_if_it_came(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    async with asking(gateway) as ask:
        (silent,) = await ask(definition(BRIDGE.format("vmbr0")), arriving=True)
        assert silent == "no anchor answers the gateway that it would come to (anchor1, anchor2)"
        await _hear_anchors(gateway)
        assert await ask(definition(BRIDGE.format("vmbr0")), arriving=True) == []
        wrong = definition(BRIDGE.format("br9"), addresses=("2001:db8:200::5", "192.0.2.1"))
        assert await ask(wrong, arriving=True) == [
            "2001:db8:200::5/128 is in no home prefix",
            "192.0.2.1/32 is IPv4, which tunnels do not carry",
            "no gateway on bridge br9",
        ]
        # Nothing was changed by asking.
        assert gateway.duty.attachments.get(VM) is None


async def test_an_address_that_another_vm_has_there_is_told(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    async with asking(gateway) as ask:
        await _hear_anchors(gateway)
        other = "22222222-2222-3333-4444-555555555555"
        await gateway.duty.arrive(other, (HOME,), MAC, "vmbr0", 1)
        (fact,) = await ask(definition(BRIDGE.format("vmbr0")), arriving=True)
        assert fact == f"{HOME} is the address of VM {other}, which is here"


async def test_a_vm_that_is_to_leave_must_be_reached_here_first(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    async with asking(gateway) as ask:
        text = definition(BRIDGE.format("vmbr0"))
        (fact,) = await ask(text, arriving=False)
        assert fact == f"the mobility agent here does not lead {HOME} to it"
        await gateway.arrive(1)
        (fact,) = await ask(text, arriving=False)
        assert fact == "no anchor has acknowledged its addresses here (anchor1, anchor2)"
        await gateway.answer(1, gateway.config.tunnel_address, anchors=("anchor2",))
        assert await ask(text, arriving=False) == []
        (fact,) = await ask(definition(addresses=("2001:db8:100::6",)), arriving=False)
        assert fact.endswith(f"2001:db8:100::6/128, and the mobility agent here leads {HOME} to it")


async def test_without_home_addresses_there_is_nothing_to_say(tmp_path: Path) -> None:
    async with asking(Gateway(tmp_path)) as ask:
        for arriving in (True, False):
            assert await ask(definition(addresses=()), arriving=arriving) == []


@pytest.mark.parametrize(
    ("interfaces", "bridges"),
    [
        ((), []),
        ((BRIDGE.format("br9"), BRIDGE.format("vmbr0")), ["vmbr0"]),
        ((BRIDGE.format("br9"),), ["br9"]),
        # What a libvirt network is called here is not what its bridge is called there.
        ((NETWORK.format("virbr7"),), []),
        ((BRIDGE.format("br9"), NETWORK.format("virbr7")), []),
    ],
)
def test_on_which_bridge_a_vm_would_be_elsewhere(interfaces: tuple[str, ...], bridges: list[str]) -> None:
    assert bridges_elsewhere(definition(*interfaces), ["vmbr0"]) == bridges
    # That of a card which an address names is asked of, too.
    named = definition(*interfaces).replace("<address>", '<address card="br9">')
    of_card = ["br9"] if BRIDGE.format("br9") in interfaces else []
    assert set(bridges_elsewhere(named, ["vmbr0"])) == {*bridges, *of_card}
