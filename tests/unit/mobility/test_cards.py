# SPDX-License-Identifier: GPL-3.0-or-later
"""A VM with several cards: each address is led to the card that it names, the others to the first."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv6Network
from pathlib import Path
from typing import Any, cast

import pytest

from mobility_agent.config import parse
from mobility_agent.durable import Journal
from mobility_agent.errors import InvalidInput
from mobility_agent.gateway.attachments import Attachment
from mobility_agent.gateway.definition import METADATA_URI, read_definition
from mobility_agent.gateway.duty import GatewayDuty
from unit.mobility.test_gateway_duty import ANCHORS, BACKUP, CONFIG, KEYS, VM, Kernel

FIRST, SECOND = ("vmbr0", "52:54:00:00:00:01"), ("vmbr1", "52:54:00:00:00:02")
ON_FIRST, ON_SECOND = IPv6Network("2001:db8:100::5"), IPv6Network("2001:db8:100::6")


def definition(card: str) -> str:
    return f"""<domain id="1"><uuid>{VM}</uuid><name>web1</name><metadata>
      <addresses xmlns="{METADATA_URI}">
        <address>2001:db8:100::5</address><address card="{card}">2001:db8:100::6</address>
      </addresses></metadata><devices>
      <interface type="bridge"><mac address="{FIRST[1]}"/><source bridge="{FIRST[0]}"/></interface>
      <interface type="network"><mac address="{SECOND[1].upper()}"/>
        <source network="Inner" bridge="{SECOND[0]}"/></interface></devices></domain>"""


@pytest.mark.parametrize("card", [SECOND[1], SECOND[1].upper(), "Inner", "vmbr1"])
def test_an_address_names_its_card_by_mac_network_or_bridge(card: str) -> None:
    found = read_definition(definition(card))
    assert found.homes == (ON_FIRST, ON_SECOND)
    place = found.place(["vmbr0", "vmbr1"])
    assert place is not None
    assert ((place.bridge, place.mac), place.cards, place.astray) == (FIRST, {ON_SECOND: SECOND}, ())


@pytest.mark.parametrize(("card", "ours"), [("52:54:00:00:00:09", ["vmbr0", "vmbr1"]), ("Inner", ["vmbr0"])])
def test_an_address_of_a_card_that_is_not_here_is_led_to_the_first(card: str, ours: list[str]) -> None:
    place = read_definition(definition(card)).place(ours)
    assert place is not None
    assert (place.cards, place.astray) == ({}, (ON_SECOND,))
    [complaint] = place.complaints(VM)
    assert f"{ON_SECOND} is of a card that is on no bridge of this gateway; it is led to" in complaint
    assert read_definition(definition(card)).place(["br9"]) is None


class Cards(Kernel):
    """A kernel that knows the cards, too."""

    def __init__(self) -> None:
        super().__init__()
        self.cards: dict[IPv6Network, tuple[str, str]] = {}

    def set_local(self, homes: Iterable[IPv6Network], bridge: str, mac: str) -> None:
        homes = tuple(homes)
        super().set_local(homes, bridge, mac)
        self.cards.update(dict.fromkeys(homes, (bridge, mac)))


class Responder:
    """Remembers what it was told to say."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str | None]] = []

    def announce(self, address: object, mac: str | None = None) -> None:
        self.said.append((str(address), mac))


def gateway(directory: Path) -> tuple[GatewayDuty, Cards, dict[str, Responder]]:
    text = CONFIG.format(state=directory, announce="") + '[[bridges]]\nname = "vmbr1"\n' + ANCHORS
    kernel, journal = Cards(), Journal(directory / "attachments.journal")
    responders = {"vmbr0": Responder(), "vmbr1": Responder()}
    duty = GatewayDuty(
        parse(text, KEYS), cast(Any, kernel), journal, lambda *_sent: None, cast(Any, responders)
    )
    duty.restore()
    duty.start()
    return duty, kernel, responders


async def test_each_card_has_its_address_over_a_restart_and_until_it_leaves(tmp_path: Path) -> None:
    duty, kernel, responders = gateway(tmp_path)
    homes = (ON_FIRST, ON_SECOND)
    told = await duty.arrive(VM, homes, FIRST[1], FIRST[0], 1, cards={ON_SECOND: SECOND})
    assert told["cards"] == [{"address": str(ON_SECOND), "bridge": SECOND[0], "mac": SECOND[1]}]
    assert kernel.cards == {ON_FIRST: FIRST, ON_SECOND: SECOND}
    assert responders["vmbr0"].said == [("2001:db8:100::5", FIRST[1])]
    assert responders["vmbr1"].said == [("2001:db8:100::6", SECOND[1])]
    await duty.stop()

    duty, kernel, responders = gateway(tmp_path)
    assert kernel.cards == {ON_FIRST: FIRST, ON_SECOND: SECOND}
    duty.neighbourhood.bridge_came("vmbr1")
    await duty.depart(VM, BACKUP)
    assert kernel.leads == {ON_FIRST: BACKUP, ON_SECOND: BACKUP}
    assert responders["vmbr0"].said == [("2001:db8:100::5", None)]
    assert responders["vmbr1"].said == [("2001:db8:100::6", SECOND[1]), ("2001:db8:100::6", None)]
    await duty.stop()


async def test_a_card_on_a_bridge_that_is_none_of_ours_is_refused(tmp_path: Path) -> None:
    duty, kernel, _responders = gateway(tmp_path)
    with pytest.raises(InvalidInput, match="no gateway on bridge br9; use one of vmbr0, vmbr1"):
        await duty.arrive(
            VM, (ON_FIRST, ON_SECOND), FIRST[1], FIRST[0], 1, cards={ON_SECOND: ("br9", SECOND[1])}
        )
    assert kernel.cards == {}
    await duty.stop()


def test_a_record_without_cards_is_read_as_before() -> None:
    before = Attachment(VM, (ON_FIRST,), FIRST[1], FIRST[0], 1, 0.0)
    assert "cards" not in before.as_record()
    assert Attachment.from_record(VM, before.as_record()) == before
    assert before.places() == {FIRST: (ON_FIRST,)}
