# SPDX-License-Identifier: GPL-3.0-or-later
"""SIGKILL of an agent at every named point: afterwards it is known where each VM is, and its packets come."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from integration.mobility_agents import (
    ANCHORS,
    GATEWAYS,
    Agent,
    Agents,
    Conversation,
    Refused,
    agents_running,
)
from integration.mobility_net import BRIDGE, FIRST_HOP, HOME_PREFIX, ROUTER_MAC, Guest, eventually, pings
from mobility_agent.crash_points import CRASH_POINTS

pytestmark = pytest.mark.timeout(180)

# The agent that broke the connection has been killed.
BROKEN = (OSError, http.client.HTTPException, ValueError)
KNOWN = r"gateway: [1-9]\d* VMs known"
RESTORED = "bindings restored, start"
# By the word that it was told of it, or by the answer to its own claim: whichever comes first.
WITHDRAWN = r"in epoch 2(, this gateway claimed epoch 1)?: withdrawn here"
REMOVED = r"[1-9]\d* removed that nobody wants any more"


@dataclass(frozen=True)
class Case:
    """Who is killed where, while a VM leaves gateway1 for gateway2, and what the log says afterwards.

    ``again``: whoever told the agent of the VM has had no answer and tells it again, as the proxy does.
    """

    point: str
    victim: str
    log: str
    again: bool = False


OF_A_MOVE = (
    Case("arrival-routed", "gateway2", REMOVED, again=True),
    Case("arrival-claimed", "gateway2", REMOVED, again=True),
    Case("arrival-recorded", "gateway2", KNOWN),
    Case("arrival-acknowledged", "gateway2", KNOWN),
    Case("departure-led-on", "gateway1", WITHDRAWN),
    Case("departure-recorded", "gateway1", KNOWN),
    Case("departure-revoked", "gateway1", WITHDRAWN),
    Case("forwarding-ended", "gateway1", KNOWN),
    Case("binding-routed", "anchor1", RESTORED),
    Case("binding-recorded", "anchor1", RESTORED),
    Case("binding-answered", "anchor1", RESTORED),
    Case("loss-told", "anchor1", RESTORED),
    Case("loss-confirmed", "anchor1", RESTORED),
)
ELSEWHERE = {
    "arrival-raised", "arrival-adopted", "withdrawal-asked", "withdrawal-confirmed", "attraction-routed",
    "stop-first-hop-left",
}  # fmt: skip
# Where a gateway learns of its loss from the anchors, nobody else may tell it before.
TOLD_BY_ANCHORS = {"departure-revoked", "loss-told", "loss-confirmed"}


@pytest.fixture(scope="module")
def shared_agents(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agents]:
    with agents_running(tmp_path_factory.mktemp("agents"), forward_seconds=2) as agents:
        yield agents


def kept(agent: Agent, name: str) -> dict[str, Any]:
    """What its journal holds; fails where a line of it is damaged."""
    records: dict[str, Any] = {}
    for line in (agent.directory / "state" / name).read_bytes().splitlines():
        told, _, text = line.partition(b" ")
        assert int(told, 16) == zlib.crc32(text)
        key, record = json.loads(text)
        records[key] = record
    return {key: record for key, record in records.items() if record is not None}


def ours(agent: Agent) -> list[str]:
    """The policy rules of the agent."""
    rules = agent.space.show("rule", "show")
    return sorted(json.dumps(rule) for rule in rules if rule.get("protocol") == "76")


def restarted(agent: Agent, crash_at: str | None = None) -> None:
    """The agent from its beginning, to be killed at ``crash_at``."""
    if agent.process is not None:
        agent.stop()
    agent.crash_at = crash_at
    agent.start()


def leads_here(agent: Agent, guest: Guest) -> bool:
    """Whether this gateway leads the guest's packets to its bridge, by a neighbour that it need not ask."""
    found = agent.space.show("route", "show", str(guest.home), "table", "7600")
    neighbours = agent.space.show("neigh", "show", "nud", "permanent", "dev", BRIDGE)
    known = [entry["lladdr"] for entry in neighbours if entry["dst"] == str(guest.home)]
    assert known in ([], [guest.mac])
    return bool([route for route in found if route.get("dev") == BRIDGE]) and bool(known)


def tunnelled_to(agent: Agent, guest: Guest) -> str:
    """What the anchor's kernel does with the guest's packets."""
    return agent.space.run("ip", "-6", "route", "show", str(guest.home), "table", "7601").stdout


def check(agents: Agents, guest: Guest, at: str, epoch: int) -> None:
    """The guest is bound there and nowhere else, by all that anybody knows; nobody takes it from there."""
    net, there = agents.net, agents[at]
    eventually(lambda: there.vm(guest)["acknowledged"] == [*ANCHORS])
    assert (there.vm(guest)["state"], there.vm(guest)["epoch"]) == ("here", epoch)
    former = next(agents[name] for name in GATEWAYS if name != at)
    for _round in range(2):
        eventually(lambda: leads_here(there, guest))
        for name in ANCHORS:
            binding = agents[name].binding(guest)
            assert binding is not None
            assert (binding["gateway"], binding["epoch"], binding["state"]) == (at, epoch, "bound")
            assert str(net.tunnel(at)) in tunnelled_to(agents[name], guest)
            eventually(lambda name=name: "untold" not in kept(agents[name], "bindings.journal")[guest.vm])
        with contextlib.suppress(Refused):
            eventually(lambda: former.vm(guest)["to"] == str(net.tunnel(at)))
        assert not leads_here(former, guest)
        assert pings(net["client"], guest.home)
        assert guest.pings(net.ADDRESSES["client"])
        # With what it has on disk the other gateway begins anew: it must not take the VM back.
        restarted(former)
        agents.together()
    assert kept(there, "attachments.journal")[guest.vm]["state"] == "here"
    for agent in agents.of.values():
        assert "is damaged" not in agent.log


@pytest.mark.parametrize("case", OF_A_MOVE, ids=lambda case: case.point)
def test_killed_while_a_vm_moves(agents: Agents, case: Case) -> None:
    victim = agents[case.victim]
    guest = agents.settle()
    rules = ours(victim)
    talk = Conversation(agents.net["client"], guest)
    restarted(victim, case.point)
    agents.together()
    eventually(lambda: agents["gateway1"].vm(guest)["acknowledged"] == [*ANCHORS])
    guest.plug(None)
    with contextlib.suppress(*BROKEN):
        agents["gateway2"].arrive(guest, 2)
    guest.plug("gateway2")
    if case.point not in TOLD_BY_ANCHORS:
        with contextlib.suppress(*BROKEN):
            agents["gateway1"].depart(guest, to="gateway2")
    victim.killed_itself()
    # An anchor may be quicker than the disk: then whoever told of it has no answer yet, either.
    quicker = case.point == "arrival-acknowledged" and guest.vm not in kept(victim, "attachments.journal")
    log = REMOVED if quicker else case.log
    victim.turn_page()
    victim.start()
    eventually(lambda: re.search(log, victim.log))
    assert ours(victim) == rules
    if case.again or quicker:
        # Recorded nowhere, it leaves nothing behind until it is told of again.
        with pytest.raises(Refused):
            victim.vm(guest)
        assert not leads_here(victim, guest)
        victim.arrive(guest, 2)
    check(agents, guest, "gateway2", 2)
    talk.goes_on(20)
    talk.end()


def test_killed_before_the_epoch_that_it_made_up_is_recorded(agents: Agents) -> None:
    guest = agents.settle(epoch=5)
    talk = Conversation(agents.net["client"], guest)
    restarted(agents["gateway2"], "arrival-raised")
    agents.together()
    guest.plug("gateway2")
    with contextlib.suppress(*BROKEN):
        agents["gateway2"].arrive(guest, 3, evident=True)
    agents["gateway2"].killed_itself()
    # As above: the anchors' answer may come before the first claim is recorded.
    quicker = guest.vm not in kept(agents["gateway2"], "attachments.journal")
    agents["gateway2"].turn_page()
    agents["gateway2"].start()
    if quicker:
        agents["gateway2"].arrive(guest, 3, evident=True)
    eventually(lambda: "knew epoch 5, claimed as 6" in agents["gateway2"].log)
    check(agents, guest, "gateway2", 6)
    talk.goes_on(20)
    talk.end()


@contextlib.contextmanager
def libvirt_at(agent: Agent, guest: Guest, directory: Path) -> Iterator[None]:
    """From its next start on the agent sees the guest run, by libvirt's own test driver."""
    pytest.importorskip("libvirt")
    definition = directory / "host.xml"
    definition.write_text(
        f"<node><domain type='test'><name>g</name><uuid>{guest.vm}</uuid><memory>8192</memory>"
        f"<metadata><addresses xmlns='urn:lifeboat:mobility:1'><address>{guest.home}</address></addresses>"
        "</metadata><os><type>hvm</type></os><devices><interface type='bridge'>"
        f"<mac address='{guest.mac}'/><source bridge='{BRIDGE}'/></interface></devices></domain></node>"
    )
    agent.settings["hypervisor"] = f"test://{definition}"
    try:
        yield
    finally:
        agent.kill()
        del agent.settings["hypervisor"]


def test_killed_after_its_claim_it_finds_the_vm_running_and_keeps_it(agents: Agents, tmp_path: Path) -> None:
    guest, victim = agents.settle(), agents["gateway2"]
    talk = Conversation(agents.net["client"], guest)
    restarted(victim, "arrival-claimed")
    agents.together()
    guest.plug("gateway2")
    with contextlib.suppress(*BROKEN):
        victim.arrive(guest, 2)
    victim.killed_itself()
    eventually(lambda: agents["gateway1"].vm(guest)["state"] == "away")
    victim.turn_page()
    with libvirt_at(victim, guest, tmp_path):
        victim.start()
        eventually(lambda: "has it here already in epoch 2, confirmed as that" in victim.log)
        check(agents, guest, "gateway2", 2)
        talk.goes_on(20)
        talk.end()


def test_killed_before_the_epoch_that_it_took_up_is_recorded(agents: Agents, tmp_path: Path) -> None:
    guest, victim = agents.settle(epoch=5), agents["gateway2"]
    agents["gateway1"].depart(guest, withdraw=True)
    eventually(lambda: all(agents[name].holder(guest) is None for name in ANCHORS))
    guest.plug("gateway2")
    victim.stop()
    with libvirt_at(victim, guest, tmp_path):
        victim.crash_at = "arrival-adopted"
        victim.start(wait=False)
        victim.killed_itself()
        victim.turn_page()
        victim.start()
        eventually(lambda: "knew epoch 5, claimed as that" in victim.log)
        check(agents, guest, "gateway2", 5)


@pytest.mark.parametrize(
    ("point", "log"),
    [
        ("withdrawal-asked", r"VM \S+: withdrawn"),
        ("withdrawal-confirmed", r"forgotten, no anchor has it anywhere"),
    ],
)
def test_killed_while_a_vm_is_withdrawn(agents: Agents, point: str, log: str) -> None:
    guest, victim = agents.settle(), agents["gateway1"]
    restarted(victim, point)
    agents.together()
    eventually(lambda: victim.vm(guest)["acknowledged"] == [*ANCHORS])
    with contextlib.suppress(*BROKEN):
        victim.depart(guest, withdraw=True)
    guest.plug(None)
    victim.killed_itself()
    victim.turn_page()
    victim.start()
    if point == "withdrawal-asked":
        # Libvirt, or whoever told of it and had no answer, says again that it does not run.
        victim.depart(guest, withdraw=True)
    eventually(lambda: re.search(log, victim.log))
    for name in ANCHORS:
        eventually(lambda name=name: agents[name].holder(guest) is None)
        assert tunnelled_to(agents[name], guest) == ""
    eventually(lambda: guest.vm not in kept(victim, "attachments.journal"))
    assert not leads_here(victim, guest)
    assert victim.space.show("route", "show", str(guest.home), "table", "7600") == []
    # And it may start elsewhere.
    guest.plug("gateway2")
    agents["gateway2"].arrive(guest, 2, wait_seconds=5)
    check(agents, guest, "gateway2", 2)


def test_killed_while_it_takes_the_home_prefix_over(tmp_path: Path) -> None:
    with agents_running(tmp_path) as agents:
        net, anchor = agents.net, agents["anchor1"]
        router = net.space("homerouter")
        net.wire(net["router"], "home0", router, "up0")
        net["router"].ip("address add 2001:db8:d1::1/64 dev home0 nodad")
        router.ip("address add 2001:db8:d1::2/64 dev up0 nodad", "route add default via 2001:db8:d1::1")
        anchor.settings |= {
            "attraction": {"mode": "when-silent", "watch": "2001:db8:d1::2", "silent_seconds": 1.0}
        }
        guest = agents.settle()

        def attracts() -> bool:
            found = anchor.space.show("route", "show", str(HOME_PREFIX), "table", "main", "proto", "76")
            return [route.get("type") for route in found] == ["unreachable"]

        restarted(anchor, "attraction-routed")
        assert not attracts()
        router.ip("link set up0 down")
        anchor.killed_itself()
        assert attracts(), "its kernel goes on attracting"
        assert pings(net["client"], guest.home)
        anchor.turn_page()
        anchor.start()
        eventually(lambda: "silent; this anchor takes over" in anchor.log)
        assert attracts()
        # The same on the way back: handed back, and killed before that is kept.
        restarted(anchor, "attraction-routed")
        assert attracts()
        router.ip("link set up0 up", "route replace default via 2001:db8:d1::1")
        anchor.killed_itself()
        assert not attracts()
        anchor.turn_page()
        anchor.start()
        eventually(lambda: "answers again; it has back" in anchor.log)
        assert not attracts()
        eventually(lambda: agents["gateway1"].vm(guest)["acknowledged"] == [*ANCHORS])
        assert pings(net["client"], guest.home)


def test_killed_while_it_withdraws_at_its_stop(tmp_path: Path) -> None:
    with agents_running(tmp_path, withdraw_on_stop=True) as agents:
        net, gateway = agents.net, agents["gateway1"]
        guest = agents.settle()
        rules = ours(gateway)

        def first_hop() -> tuple[str, bool]:
            (link,) = net["gateway1"].show("link", "show", "dev", BRIDGE)
            shown = json.dumps(net["gateway1"].show("address", "show", "dev", BRIDGE))
            return link["address"], f'"{FIRST_HOP}"' in shown

        restarted(gateway, "stop-first-hop-left")
        assert first_hop() == (ROUTER_MAC, True)
        assert gateway.process is not None
        gateway.process.terminate()
        gateway.killed_itself()
        mac, there = first_hop()
        assert mac != ROUTER_MAC
        assert not there
        gateway.start()
        assert first_hop() == (ROUTER_MAC, True)
        assert ours(gateway) == rules
        eventually(lambda: gateway.vm(guest)["acknowledged"] == [*ANCHORS])
        assert pings(net["client"], guest.home)
        assert guest.pings(net.ADDRESSES["client"])
        # A stop that is not killed finds again what was there before all of it.
        gateway.stop()
        assert first_hop() == (mac, False)
        assert ours(gateway) == []


def test_every_point_is_in_the_table() -> None:
    tested = {case.point for case in OF_A_MOVE}
    assert not tested & ELSEWHERE
    assert tested | ELSEWHERE == CRASH_POINTS.keys()
