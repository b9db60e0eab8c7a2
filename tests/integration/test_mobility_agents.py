# SPDX-License-Identifier: GPL-3.0-or-later
"""Gateways and anchors at work: guests move, agents die, packets are lost, strangers interfere."""

from __future__ import annotations

import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from integration.mobility_agents import (
    ANCHORS,
    REFRESH_SECONDS,
    Agents,
    Conversation,
    Refused,
    agents_running,
    probe_gap,
)
from integration.mobility_net import BRIDGE, ROUTER_MAC, eventually, pings


def test_an_arrival_is_bound_everywhere_and_shown(agents: Agents) -> None:
    guest = agents.settle()
    for anchor in ("anchor1", "anchor2"):
        binding = agents[anchor].binding(guest)
        assert binding is not None
        assert (binding["gateway"], binding["epoch"]) == ("gateway1", 1)
        assert binding["addresses"] == [f"{guest.home}/128"]
    assert guest.pings(agents.net.ADDRESSES["client"])


def test_a_conversation_survives_twenty_moves(agents: Agents) -> None:
    guest = agents.settle()
    talk = Conversation(agents.net["client"], guest)
    for epoch in range(2, 22):
        agents.move(guest, "gateway2" if epoch % 2 == 0 else "gateway1", epoch)
        talk.goes_on(20)
    talk.end()
    assert agents["anchor1"].holder(guest) == "gateway1"
    assert agents["anchor1"].binding(guest)["epoch"] == 21  # type: ignore[index]


def test_the_home_site_dies_right_after_the_move(agents: Agents) -> None:
    guest = agents.settle()
    talk = Conversation(agents.net["client"], guest)
    agents.move(guest, "gateway2", 2, tell=False)
    agents["gateway1"].kill()
    agents.net["gateway1"].ip("link set up0 down")
    talk.goes_on()
    talk.end()


def test_one_of_two_anchors_dies(agents: Agents) -> None:
    guest = agents.settle()
    talk = Conversation(agents.net["client"], guest)
    agents["anchor1"].kill()
    agents.net["anchor1"].ip("link set up0 down")
    agents.net.attract("anchor2")
    before = time.monotonic()
    talk.goes_on(10)
    assert time.monotonic() - before < 8
    talk.end()
    status = agents["gateway1"].ask("GET", "/v1/status")["gateway"]
    assert status["anchor_in_use"] == "anchor2"
    assert "anchor anchor1: no answer" in agents["gateway1"].log


def test_an_anchor_that_was_down_during_a_move_learns_of_it(agents: Agents) -> None:
    guest = agents.settle()
    agents["anchor1"].kill()
    agents.move(guest, "gateway2", 2)
    agents["anchor1"].start()
    eventually(lambda: agents["anchor1"].holder(guest) == "gateway2")
    assert pings(agents.net["client"], guest.home)


def test_a_restarted_anchor_keeps_its_bindings_and_forwards_meanwhile(agents: Agents) -> None:
    guest = agents.settle()
    agents["anchor1"].kill()
    assert pings(agents.net["client"], guest.home)
    agents["anchor1"].start()
    assert agents["anchor1"].holder(guest) == "gateway1"
    assert "bindings restored, start" in agents["anchor1"].log
    eventually(lambda: "anchor anchor1: restarted; 1 registrations sent again" in agents["gateway1"].log)


def test_an_anchor_that_lost_everything_gets_it_back(agents: Agents) -> None:
    guest = agents.settle()
    agents["anchor1"].kill()
    state = agents["anchor1"].directory / "state"
    (state / "bindings.journal").unlink()
    agents.net["anchor1"].run("ip", "-6", "route", "flush", "table", "7601")
    agents["anchor1"].start()
    eventually(lambda: agents["anchor1"].holder(guest) == "gateway1")
    assert pings(agents.net["client"], guest.home)


def test_a_restarted_gateway_registers_again_and_no_packet_is_lost(agents: Agents) -> None:
    guest = agents.settle()
    talk = Conversation(agents.net["client"], guest)
    with ThreadPoolExecutor(1) as threads:
        probes = threads.submit(probe_gap, agents.net["client"], guest.home, 20)
        agents["gateway1"].kill()
        talk.goes_on()
        agents["gateway1"].start()
        talk.goes_on()
        eventually(lambda: agents["gateway1"].vm(guest)["acknowledged"] == ["anchor1", "anchor2"])
        assert not probes.done(), "all of it was to be seen"
        _longest_gap_seconds, lost = probes.result()
    talk.end()
    assert lost == 0


def test_the_newer_epoch_wins_and_the_other_is_told_and_withdraws(agents: Agents) -> None:
    guest = agents.settle(epoch=4)
    guest.plug("gateway2")
    agents["gateway2"].arrive(guest, 5, wait_seconds=30)
    told = eventually(lambda: (vm := agents["gateway1"].vm(guest))["state"] == "away" and vm)
    assert told["to"] == str(agents.net.tunnel("gateway2"))
    assert "in epoch 5: withdrawn here" in agents["gateway1"].log
    assert agents.net["gateway1"].show("neigh", "show", "nud", "permanent", "dev", "vmbr0") == []


def test_the_older_epoch_cannot_take_a_vm(agents: Agents) -> None:
    guest = agents.settle(epoch=4)
    agents["gateway2"].arrive(guest, 3)
    eventually(lambda: agents["gateway2"].vm(guest)["state"] == "away")
    assert agents["anchor1"].holder(guest) == "gateway1"
    assert "claims epoch 3, but epoch 4 is known; refused (stale-epoch)" in agents["anchor1"].log
    assert pings(agents.net["client"], guest.home)


def test_the_same_epoch_cannot_take_a_vm(agents: Agents) -> None:
    guest = agents.settle(epoch=4)
    agents["gateway2"].arrive(guest, 4)
    eventually(lambda: agents["gateway2"].vm(guest)["state"] == "away")
    assert agents["anchor1"].holder(guest) == "gateway1"
    assert "refused (same-epoch)" in agents["anchor1"].log


def test_a_gateway_that_slept_through_the_move_cannot_steal_it_back(agents: Agents) -> None:
    guest = agents.settle()
    agents["gateway1"].kill()
    agents.move(guest, "gateway2", 2, tell=False)
    eventually(lambda: agents["anchor2"].holder(guest) == "gateway2")
    agents["gateway1"].start()
    told = eventually(lambda: (vm := agents["gateway1"].vm(guest))["state"] == "away" and vm)
    assert told["to"] == str(agents.net.tunnel("gateway2"))
    assert agents["anchor1"].holder(guest) == "gateway2"
    assert pings(agents.net["client"], guest.home)


def test_lost_acknowledgements_are_asked_for_again(agents: Agents) -> None:
    net = agents.net
    guest = net.guest("guest1", "gateway1")
    net["gateway1"].run("nft", "add table ip6 loss")
    chain = "add chain ip6 loss input { type filter hook input priority 0; }"
    net["gateway1"].run("nft", chain)
    net["gateway1"].run("nft", "add rule ip6 loss input meta l4proto 135 drop")
    agents["gateway1"].arrive(guest, 1)
    eventually(lambda: agents["anchor1"].holder(guest) == "gateway1")
    time.sleep(1)
    assert agents["gateway1"].vm(guest)["acknowledged"] == []
    net["gateway1"].run("nft", "delete table ip6 loss")
    eventually(lambda: agents["gateway1"].vm(guest)["acknowledged"] == ["anchor1", "anchor2"], 5)


def test_a_withdrawn_vm_is_bound_nowhere(agents: Agents) -> None:
    guest = agents.settle()
    agents["gateway1"].depart(guest, withdraw=True)
    eventually(lambda: agents["anchor1"].holder(guest) is None and agents["anchor2"].holder(guest) is None)
    assert agents["anchor1"].binding(guest)["state"] == "withdrawn"  # type: ignore[index]

    def forgotten() -> bool:
        try:
            return not agents["gateway1"].vm(guest)
        except Refused as error:
            return error.status == 404

    # It forgets it when both have said so, which they do once that is on their disks.
    eventually(forgotten)


def test_split_neighbours_believe_each_other_on_link(agents: Agents) -> None:
    one, other = agents.settle("guest1", "gateway1"), agents.settle("guest2", "gateway2")
    assert one.pings(other.home)
    assert other.pings(one.home)
    # The two come together at one site: each is told the other's own MAC.
    agents.move(other, "gateway1", 2)
    assert one.pings(other.home)
    (entry,) = one.space.show("neigh", "show", "to", str(other.home))
    assert entry["lladdr"] == other.mac
    # And apart again: the gateway answers for the one that left.
    agents.move(other, "gateway2", 3)
    assert one.pings(other.home)
    (entry,) = one.space.show("neigh", "show", "to", str(other.home))
    assert entry["lladdr"] == ROUTER_MAC


def test_nobody_is_told_that_an_address_of_its_own_is_taken(agents: Agents) -> None:
    guest = agents.settle()
    # Duplicate address detection for its own address, and for one that no VM has.
    guest.space.sysctl(eth0__accept_dad=2, eth0__dad_transmits=2)
    guest.space.ip(
        f"address del {guest.home}/64 dev eth0",
        f"address add {guest.home}/64 dev eth0",
        "address add 2001:db8:100::77/64 dev eth0",
    )
    time.sleep(3)
    (shown,) = guest.space.show("address", "show", "dev", "eth0")
    flags = {info["local"]: info.get("dadfailed", False) for info in shown["addr_info"]}
    assert flags[str(guest.home)] is False
    assert flags["2001:db8:100::77"] is False


def test_a_narrow_hop_on_the_way_is_learnt_by_the_sender(agents: Agents) -> None:
    guest = agents.settle(at="gateway2")
    net = agents.net
    talk = Conversation(net["client"], guest)
    talk.goes_on()
    net["router"].ip("link set gateway2 mtu 1380")
    talk.goes_on(20)
    talk.end()
    assert "carries 1380 octets; senders are told so" in agents["anchor1"].log


def test_an_address_given_to_another_vm_after_its_first_one_left(tmp_path: Path) -> None:
    with agents_running(tmp_path, forward_seconds=1) as agents:
        first = agents.settle()
        agents.move(first, "gateway2", 2)
        agents["gateway2"].depart(first, withdraw=True)
        first.plug(None)
        first.space.ip("address flush dev eth0 scope global")
        second = agents.net.guest("second", at="gateway1")
        second.space.ip(f"address add {first.home}/128 dev eth0 nodad")
        answer = agents["gateway1"].arrive(second, 1, addresses=[str(first.home)], wait_seconds=30)
        assert len(answer["acknowledged"]) == 2
        assert pings(agents.net["client"], first.home)
        # What was still forwarded for the first one ends now.
        time.sleep(1.5)
        assert pings(agents.net["client"], first.home, seconds=10)


def test_one_whose_arrival_is_evident_gets_an_epoch_that_is_new_enough(agents: Agents) -> None:
    guest = agents.settle(epoch=5)
    agents["gateway2"].arrive(guest, 5, wait_seconds=30)
    assert agents["anchor1"].holder(guest) == "gateway1"
    # The anchors know a newer epoch than the proxy counts: somebody moved it by hand meanwhile.
    agents["gateway2"].arrive(guest, 3, evident=True, wait_seconds=30)
    for name in ANCHORS:
        eventually(lambda name=name: agents[name].holder(guest) == "gateway2")
    # And back to a gateway that itself knows better: asked for at once, no refusal in between.
    agents["gateway1"].turn_page()
    answer = agents["gateway1"].arrive(guest, 4, evident=True, wait_seconds=30)
    assert (sorted(answer["acknowledged"]), answer["epoch"]) == (sorted(ANCHORS), 7)
    assert "claimed as" not in agents["gateway1"].log


def test_an_arrival_is_read_from_the_vms_definition(agents: Agents) -> None:
    guest = agents.net.guest("defined", at="gateway1")
    domain = (
        "<domain><name>g</name><metadata><m:addresses xmlns:m='urn:lifeboat:mobility:1'><m:address>{}"
        "</m:address></m:addresses></metadata><devices><interface type='bridge'><mac address='{}'/>"
        "<source bridge='{}'/></interface></devices></domain>"
    )
    path = f"/v1/vms/{guest.vm}/arrive"
    body = {"epoch": 1, "definition": domain.format(guest.home, guest.mac, BRIDGE), "wait_seconds": 5}
    assert agents["gateway1"].ask("POST", path, body)["addresses"] == [f"{guest.home}/128"]
    assert agents["anchor1"].holder(guest) == "gateway1"
    # Most VMs have none: whoever tells of them all is not told off for it.
    without = {"epoch": 1, "definition": "<domain><name>g</name></domain>"}
    other = "99999999-1111-2222-3333-444444444444"
    answer = agents["gateway1"].ask("POST", f"/v1/vms/{other}/arrive", without)
    assert answer == {"vm": other, "state": "no-home-address"}
    with pytest.raises(Refused, match="no XML"):
        agents["gateway1"].ask("POST", path, {"epoch": 2, "definition": "<domain"})


def test_each_card_of_a_vm_has_its_own_address(tmp_path: Path) -> None:
    with agents_running(tmp_path) as agents:
        net, gateway = agents.net, agents["gateway1"]
        guest, mac = net.guest("two", at="gateway1"), "52:54:00:00:01:02"
        second = guest.home + 0x100
        gateway.space.ip("link add vmbr1 type bridge", "link set vmbr1 up")
        net.wire(guest.space, "eth1", gateway.space, "second")
        gateway.space.ip("link set second master vmbr1")
        guest.space.ip(f"link set eth1 address {mac}", f"address add {second}/128 dev eth1 nodad")
        gateway.settings["bridges"].append({"name": "vmbr1"})
        gateway.stop()
        gateway.start()
        card = "<interface type='bridge'><mac address='{}'/><source bridge='{}'/></interface>"
        definition = (
            "<domain><name>g</name><metadata><addresses xmlns='urn:lifeboat:mobility:1'>"
            f"<address>{guest.home}</address><address card='{mac}'>{second}</address></addresses></metadata>"
            f"<devices>{card.format(guest.mac, BRIDGE)}{card.format(mac, 'vmbr1')}</devices></domain>"
        )
        body = {"epoch": 1, "definition": definition, "wait_seconds": 5}
        answer = gateway.ask("POST", f"/v1/vms/{guest.vm}/arrive", body)
        assert answer["cards"] == [{"address": f"{second}/128", "bridge": "vmbr1", "mac": mac}]
        for home, device, known in ((guest.home, BRIDGE, guest.mac), (second, "vmbr1", mac)):
            (route,) = gateway.space.show("route", "show", str(home), "table", "7600")
            assert route["dev"] == device
            (neighbour,) = gateway.space.show("neigh", "show", str(home))
            assert (neighbour["dev"], neighbour["lladdr"]) == (device, known)
            assert pings(net["client"], home)


def test_stop_withdraws_if_told_so(tmp_path: Path) -> None:
    with agents_running(tmp_path, withdraw_on_stop=True) as agents:
        agents.settle()
        agents["gateway1"].stop()
        space = agents.net["gateway1"]
        assert space.show("route", "show", "table", "all", "proto", "76") == []
        assert [rule for rule in space.show("rule", "show") if rule.get("protocol") == "76"] == []
        assert "lifeboat" not in space.run("nft", "list", "ruleset").stdout
        assert "lbtun0" not in space.run("ip", "link", "show").stdout


def test_stop_leaves_the_data_path_otherwise(agents: Agents) -> None:
    guest = agents.settle()
    agents["gateway1"].stop()
    agents["anchor1"].stop()
    assert pings(agents.net["client"], guest.home)


def test_a_bridge_that_comes_later_is_taken_up(agents: Agents) -> None:
    guest = agents.settle()
    net = agents.net
    net["gateway1"].ip("link del vmbr0")
    eventually(lambda: "bridge vmbr0: is gone" in agents["gateway1"].log)
    net["gateway1"].ip(
        "link add vmbr0 type bridge", "link set vmbr0 up", f"link set v{guest.number}1 master vmbr0"
    )
    eventually(lambda: "bridge vmbr0: this gateway is its first hop" in agents["gateway1"].log)
    assert pings(net["client"], guest.home)


@pytest.mark.parametrize("name", ["gateway1", "anchor1"])
def test_a_link_that_was_set_down_leads_to_the_tunnels_end_again(agents: Agents, name: str) -> None:
    guest, net = agents.settle(), agents.net
    with agents[name].suspended():
        # The kernel forgets with it for whom it answered there.
        net[name].ip("link set up0 down")
        net[name].ip("link set up0 up", f"route replace default via {net.ADDRESSES[name] - 1}")
        assert net[name].show("neigh", "show", "proxy", "dev", "up0") == []
    eventually(lambda: net[name].show("neigh", "show", "proxy", "dev", "up0"), 15)
    assert pings(net["client"], guest.home)
    assert guest.pings(net.ADDRESSES["client"])


def test_two_agents_on_one_host_are_refused(agents: Agents) -> None:
    second = agents["gateway1"]
    first, second.process = second.process, None
    second.start(wait=False)
    assert second.process is not None
    assert second.process.wait(20) == 4
    assert "another agent runs here" in second.log
    second.process = first


def test_the_anchor_takes_the_prefix_over_when_the_home_router_falls_silent(tmp_path: Path) -> None:
    watched = "2001:db8:b1::2"
    attraction = {"mode": "when-silent", "watch": watched, "silent_seconds": 1}
    with agents_running(tmp_path, attraction=attraction) as agents:
        net = agents.net
        time.sleep(2)
        assert not _attracts(agents, "anchor1")
        net["router"].ip("link set gateway1 down")
        eventually(lambda: _attracts(agents, "anchor1"), 30)
        net["router"].ip("link set gateway1 up")
        eventually(lambda: not _attracts(agents, "anchor1"), 30)


def test_an_attracting_anchor_goes_on_attracting_over_a_restart(tmp_path: Path) -> None:
    attraction = {"mode": "when-silent", "watch": "2001:db8:b1::2", "silent_seconds": 1}
    with agents_running(tmp_path, attraction=attraction) as agents:
        net, anchor = agents.net, agents["anchor1"]
        for mode in ("when-silent", "always"):
            net["router"].ip("link set gateway1 down")
            eventually(lambda: _attracts(agents, "anchor1"), 30)
            changes = subprocess.Popen(
                net["anchor1"].command("ip", "-6", "monitor", "route"), stdout=subprocess.PIPE, text=True
            )
            anchor.stop()
            anchor.settings["attraction"]["mode"] = mode
            anchor.start()
            time.sleep(1.5)
            changes.terminate()
            told = [line for line in changes.communicate(timeout=10)[0].splitlines() if "unreachable" in line]
            assert told == []
            assert _attracts(agents, "anchor1")


def test_a_native_home_that_comes_back_leads_packets_to_where_its_vm_went(tmp_path: Path) -> None:
    attraction = {"mode": "when-silent", "watch": "2001:db8:b1::2", "silent_seconds": 1}
    with agents_running(tmp_path, attraction=attraction) as agents:
        net, home = agents.net, agents["gateway1"]
        home.stop()
        home.settings["prefixes"][0]["native"] = True
        home.start()
        net.attract("gateway1")
        guest = agents.settle()
        talk = Conversation(net["client"], guest)
        # The home site has no power any more, and the VM runs at the backup site.
        home.kill()
        net["router"].ip("link set gateway1 down")
        for table in ("7600", "7601", "7602"):
            net["gateway1"].run("ip", "-6", "route", "flush", "table", table, check=False)
        guest.plug("gateway2")
        agents["gateway2"].arrive(guest, 2)
        eventually(lambda: _attracts(agents, "anchor1"))
        net.attract("anchor1")
        talk.goes_on(20)
        # The home router is back before its gateway, which alone knows whom to ask: nothing is handed back.
        net["router"].ip("link set gateway1 up")
        time.sleep(2)
        assert _attracts(agents, "anchor1")
        talk.goes_on()
        # The gateway's hypervisor says that nothing runs, before any anchor can be reached.
        net["router"].ip("link set gateway1 down")
        home.start()
        home.depart(guest, withdraw=True)
        assert (home.vm(guest)["state"], home.vm(guest)["to"]) == ("away", None)
        net["router"].ip("link set gateway1 up")
        eventually(lambda: home.vm(guest)["to"] == str(net.tunnel("gateway2")))
        # It hears of it again with its first heartbeat; should that be lost, when the binding is refreshed.
        eventually(lambda: not _attracts(agents, "anchor1"), REFRESH_SECONDS + 30)
        net.attract("gateway1")
        talk.goes_on()
        talk.end()
        assert agents["anchor1"].holder(guest) == "gateway2"


def test_a_loop_link_that_somebody_removed_is_made_anew_and_registrations_go_on(agents: Agents) -> None:
    guest = agents.settle()
    agents.net["gateway1"].ip("link del lbtun0")
    # What VMs send would go by the other anchor now, and there is no link for it.
    agents["anchor1"].kill()
    agents.net["anchor1"].ip("link set up0 down")
    agents.net.attract("anchor2")
    status = lambda: agents["gateway1"].ask("GET", "/v1/status")["gateway"]  # noqa: E731
    eventually(lambda: status()["anchor_in_use"] == "anchor2")
    assert guest.pings(agents.net.ADDRESSES["client"])
    assert status()["anchors"]["anchor2"]["state"] == "up"


def test_one_of_two_anchors_dies_and_new_packets_pass_within_three_seconds(tmp_path: Path) -> None:
    # With the default of half a second between heartbeats.
    with agents_running(tmp_path, heartbeat_seconds=0.5) as agents, ThreadPoolExecutor(1) as threads:
        guest = agents.settle()
        probes = threads.submit(probe_gap, agents.net["client"], guest.home, 6)
        time.sleep(1)
        agents["anchor1"].kill()
        agents.net["anchor1"].ip("link set up0 down")
        agents.net.attract("anchor2")
        longest_gap_seconds, lost = probes.result()
        print(f"one anchor of two died: {longest_gap_seconds:.2f} s without an answer, {lost} probes lost")
        assert lost > 0
        assert longest_gap_seconds < 3


def _attracts(agents: Agents, anchor: str) -> bool:
    return bool(agents.net[anchor].show("route", "show", "table", "main", "proto", "76"))


def test_state_written_by_a_killed_agent_is_whole(agents: Agents, tmp_path: Path) -> None:
    guest = agents.settle()
    for epoch in range(2, 6):
        agents["gateway1"].arrive(guest, epoch)
        agents["gateway1"].kill()
        agents["gateway1"].start()
        assert agents["gateway1"].vm(guest)["epoch"] == epoch
    eventually(lambda: agents["anchor1"].binding(guest)["epoch"] == 5)  # type: ignore[index]
    copy = tmp_path / "copy"
    shutil.copytree(agents["anchor1"].directory / "state", copy)
    assert (copy / "bindings.journal").read_bytes().endswith(b"\n")
