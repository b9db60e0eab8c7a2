# SPDX-License-Identifier: GPL-3.0-or-later
"""What the gateway does on libvirt's events, and what it reads in a definition."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from ipaddress import IPv6Network
from typing import Any, cast

import pytest

from mobility_agent.gateway.attachments import AWAY, HERE, Attachment
from mobility_agent.gateway.definition import METADATA_URI, VmNetwork, read_definition
from mobility_agent.gateway.hypervisor import Event, Moves
from mobility_agent.homes import Home, only_ipv6
from mobility_agent.messages.options import HandoffIndicator

VM = "11111111-2222-4333-8444-555555555501"
HOME = IPv6Network("2001:db8:100::5/128")
PLACE = ("vmbr0", "52:54:00:00:00:01")


@dataclass
class Duty:
    """A gateway that only keeps what it is told."""

    attachments: dict[str, Attachment] = field(default_factory=dict)
    told: list[tuple[Any, ...]] = field(default_factory=list)
    over: list[str] = field(default_factory=list)
    cards: dict[Home, tuple[str, str]] = field(default_factory=dict)

    async def arrive(
        self,
        vm: str,
        homes: Any,
        mac: str,
        bridge: str,
        epoch: int,
        *,
        handoff: Any,
        evident: bool,
        cards: Any,
    ) -> None:
        self.cards = dict(cards)
        self.told.append(("arrive", vm, homes, (bridge, mac), epoch, handoff, evident))

    async def depart(self, vm: str, to: Any, *, withdraw: bool = False) -> None:
        self.told.append(("depart", vm, withdraw))

    def hold(self, vm: str) -> bool:
        self.told.append(("hold", vm))
        return True

    def runs_again(self, vm: str) -> None:
        self.told.append(("runs again", vm))

    def ended(self, vm: str) -> None:
        self.over.append(vm)

    def follows(self, _vm: str, homes: Any) -> Any:
        return only_ipv6(homes)

    async def reconcile(self, running: set[str]) -> None:
        self.told.append(("reconcile", running))


class Hypervisor:
    """A libvirt with one VM."""

    def __init__(self, homes: tuple[Home, ...] = (HOME,)) -> None:
        self.homes = homes
        self.active = True
        self.cards: tuple[tuple[str, str], ...] = (("br9", "52:54:00:00:00:09"), PLACE)
        self.placed: tuple[tuple[Home, tuple[str, str] | None], ...] = ()

    async def read(self, vm: str) -> VmNetwork:
        return VmNetwork(vm, "web1", self.cards, self.homes, active=self.active, placed=self.placed)


def moves(state: str | None = None, homes: tuple[Home, ...] = (HOME,)) -> tuple[Moves, Duty]:
    duty = Duty()
    if state is not None:
        duty.attachments[VM] = Attachment(VM, (HOME,), PLACE[1], PLACE[0], 4, 0.0, state=state)
    pytest.importorskip("libvirt")
    made = Moves(cast(Any, duty), "test:///default", frozenset({"vmbr0"}))
    made.hypervisor = cast(Any, Hypervisor(homes))
    return made, duty


def arrived(epoch: int, handoff: HandoffIndicator, evident: bool) -> tuple[Any, ...]:
    return ("arrive", VM, (HOME,), PLACE, epoch, handoff, evident)


async def test_one_that_comes_is_claimed_when_it_runs_and_not_before() -> None:
    made, duty = moves()
    await made._act(VM, Event.STARTED, Event.STARTED_MIGRATED)
    assert duty.told == []
    await made._act(VM, Event.RESUMED, 0)
    assert duty.told == [arrived(0, HandoffIndicator.BETWEEN_GATEWAYS, True)]


@pytest.mark.parametrize("handoff", [HandoffIndicator.UNCHANGED, HandoffIndicator.NEW_INTERFACE])
async def test_an_address_is_led_to_its_card_once_that_is_plugged_in(handoff: HandoffIndicator) -> None:
    made, duty = moves(HERE)
    duty.attachments[VM] = replace(duty.attachments[VM], handoff=handoff)
    hypervisor = cast(Hypervisor, made.hypervisor)
    hypervisor.placed = ((HOME, None),)
    await made._act(VM, Event.CARDS, 0)
    assert duty.told == [], "no card of ours has changed"
    second = ("vmbr0", "52:54:00:00:00:02")
    hypervisor.cards, hypervisor.placed = (*hypervisor.cards, second), ((HOME, second),)
    await made._act(VM, Event.CARDS, 0)
    assert duty.told == [arrived(4, handoff, False)], "claimed as it was"
    assert duty.cards == {HOME: second}


async def test_where_its_first_card_is_taken_out_it_is_led_to_the_next() -> None:
    made, duty = moves(HERE)
    hypervisor = cast(Hypervisor, made.hypervisor)
    hypervisor.cards = (("vmbr0", "52:54:00:00:00:02"),)
    await made._act(VM, Event.CARDS, 0)
    ((what, _vm, _homes, place, *_rest),) = duty.told
    assert (what, place) == ("arrive", ("vmbr0", "52:54:00:00:00:02"))
    # And with its last one nobody is asked to lead it nowhere.
    duty.told.clear()
    hypervisor.cards = ()
    await made._act(VM, Event.CARDS, 0)
    assert duty.told == []


async def test_the_cards_of_one_that_is_not_here_are_nobodys_business() -> None:
    for made, duty in (moves(), moves(AWAY)):
        cast(Hypervisor, made.hypervisor).cards = (("vmbr0", "52:54:00:00:00:02"),)
        await made._act(VM, Event.CARDS, 0)
        assert duty.told == []


async def test_one_that_the_proxy_told_of_is_left_as_it_was_told() -> None:
    made, duty = moves(HERE)
    await made._act(VM, Event.STARTED, Event.STARTED_MIGRATED)
    await made._act(VM, Event.RESUMED, 0)
    assert duty.told == []


async def test_one_resumed_by_hand_that_nobody_saw_coming_makes_no_epoch_up() -> None:
    made, duty = moves()
    await made._act(VM, Event.RESUMED, 0)
    assert duty.told == [arrived(0, HandoffIndicator.NEW_INTERFACE, False)]


async def test_one_that_never_ran_here_and_ends_is_nobodys_departure() -> None:
    made, duty = moves()
    await made._act(VM, Event.STARTED, Event.STARTED_MIGRATED)
    await made._act(VM, Event.STOPPED, 0)
    await made._act(VM, Event.RESUMED, 0)
    assert duty.told == [arrived(0, HandoffIndicator.NEW_INTERFACE, False)]


@pytest.mark.parametrize("detail", [Event.STOPPED_MIGRATED, 0])
async def test_of_one_that_is_bound_elsewhere_it_is_told_when_it_ends_here(detail: int) -> None:
    made, duty = moves(AWAY)
    await made._act(VM, Event.STOPPED, detail)
    assert (duty.told, duty.over) == ([], [VM])


@pytest.mark.parametrize(("detail", "withdraw"), [(Event.STOPPED_MIGRATED, False), (0, True)])
async def test_one_that_leaves_is_followed_and_one_that_stops_withdrawn(detail: int, withdraw: bool) -> None:
    made, duty = moves(HERE)
    await made._act(VM, Event.STOPPED, detail)
    assert duty.told == [("depart", VM, withdraw)]


async def test_an_agent_that_starts_claims_what_runs_and_not_what_is_arriving() -> None:
    made, duty = moves()
    await made._on_connected({VM: False})
    assert duty.told == [("reconcile", {VM})]
    await made._on_connected({VM: True})
    assert duty.told[2:] == [("runs again", VM), arrived(0, HandoffIndicator.NEW_INTERFACE, False)]


async def test_one_that_ended_or_arrived_while_libvirt_was_asked_is_not_claimed_from_whom_has_it() -> None:
    made, duty = moves(AWAY)
    made.hypervisor.active = False  # type: ignore[attr-defined]
    await made._on_connected({VM: True})
    assert duty.told == [("reconcile", {VM}), ("runs again", VM)]
    made, duty = moves(AWAY)
    read = made.hypervisor.read

    async def told_meanwhile(vm: str) -> Any:
        duty.attachments[VM] = Attachment(VM, (HOME,), PLACE[1], PLACE[0], 5, 0.0, state=HERE)
        return await read(vm)

    made.hypervisor.read = told_meanwhile  # type: ignore[method-assign]
    await made._on_connected({VM: True})
    assert duty.told == [("reconcile", {VM}), ("runs again", VM)]


async def test_what_comes_waits_from_the_stop_of_a_move_on_and_of_no_other_stop() -> None:
    made, duty = moves(HERE)
    paused = 0
    made._on_event(VM, Event.SUSPENDED, paused)
    assert duty.told == []
    # At once, whatever else is still to be followed.
    made._on_event(VM, Event.SUSPENDED, Event.SUSPENDED_MIGRATED)
    made._on_event(VM, Event.RESUMED, Event.RESUMED_MIGRATED)
    assert duty.told == [("hold", VM), ("runs again", VM)]
    made._on_event(VM, Event.SUSPENDED, Event.SUSPENDED_POSTCOPY)
    assert duty.told[2:] == [("hold", VM)]


def test_libvirt_numbers_its_events_as_we_do() -> None:
    libvirt = pytest.importorskip("libvirt")
    assert libvirt.VIR_DOMAIN_EVENT_SUSPENDED == Event.SUSPENDED
    assert libvirt.VIR_DOMAIN_EVENT_SUSPENDED_MIGRATED == Event.SUSPENDED_MIGRATED
    assert libvirt.VIR_DOMAIN_EVENT_SUSPENDED_POSTCOPY == Event.SUSPENDED_POSTCOPY
    assert libvirt.VIR_DOMAIN_EVENT_RESUMED == Event.RESUMED


async def test_addresses_given_and_taken_while_it_runs_are_followed() -> None:
    made, duty = moves(HERE)
    await made._act(VM, Event.METADATA, 0)
    assert duty.told == [arrived(4, HandoffIndicator.NEW_INTERFACE, False)]
    made, duty = moves(HERE, homes=())
    await made._act(VM, Event.METADATA, 0)
    assert duty.told == [("depart", VM, True)]
    made, duty = moves(AWAY)
    await made._act(VM, Event.METADATA, 0)
    assert duty.told == []


async def test_one_that_is_off_is_not_claimed_when_it_is_given_addresses() -> None:
    made, duty = moves()
    made.hypervisor.active = False  # type: ignore[attr-defined]
    await made._act(VM, Event.METADATA, 0)
    assert duty.told == []


def test_a_definition_tells_addresses_bridges_and_macs() -> None:
    told = read_definition(
        f"""<domain><name>web1</name><uuid>{VM}</uuid>
        <metadata><m:addresses xmlns:m='{METADATA_URI}'><m:address>2001:db8:100::5</m:address>
        <m:address>rubbish</m:address></m:addresses></metadata>
        <devices>
        <interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='vmbr0'/></interface>
        <interface type='network'><mac address='52:54:00:00:00:02'/><source network='default'/></interface>
        </devices></domain>"""
    )
    assert told == VmNetwork(VM, "web1", (PLACE,), (HOME,), declared=True, active=False)
    assert read_definition(f"<domain id='7'><uuid>{VM}</uuid></domain>").active


def test_a_definition_may_say_that_there_are_no_addresses_or_nothing_at_all() -> None:
    text = "<domain><name>web1</name><uuid>" + VM + "</uuid><metadata>{}</metadata><devices/></domain>"
    none = read_definition(text.format(f"<m:addresses xmlns:m='{METADATA_URI}'/>"))
    assert (none.homes, none.declared) == ((), True)
    assert not read_definition(text.format("")).declared
