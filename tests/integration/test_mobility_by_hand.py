# SPDX-License-Identifier: GPL-3.0-or-later
"""VMs that somebody moves by hand, with `virsh migrate --live`: agents have libvirt's events to go by."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from ipaddress import IPv6Address

import pytest
import yaml

from integration.mobility_lab import ANCHORS, GATEWAYS, PLAY, PREFIX, inventory, wait
from integration.playbook_runner import PlaybookResult
from integration.run_watch import none_twice
from lifeboat_lab.guests.guests import Guest
from lifeboat_lab.guests.plan import GuestPlan
from lifeboat_lab.lab import Lab
from lifeboat_lab.mobility import (
    METADATA_URI,
    ask,
    binding,
    holder,
    keep_address,
    lead_prefix_to,
    open_settings,
)
from lifeboat_lab.network import GUEST_GATEWAY_MAC
from lifeboat_lab.probes import ECHO_COMMAND, Probe

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

RunPlaybook = Callable[..., PlaybookResult]
SOURCE, DESTINATION = GATEWAYS
# A bridge for guests' second cards, which they know by a libvirt network of another name.
SECOND_BRIDGE, NETWORK = "vmbr1", "second"
SECOND_MAC = "52:54:00:00:01:02"
NETWORK_XML = (
    f"<network><name>{NETWORK}</name><forward mode='bridge'/><bridge name='{SECOND_BRIDGE}'/></network>"
)


@pytest.fixture(scope="module", autouse=True)
def agents(lab: Lab, lab_playbook: RunPlaybook, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two gateways and two anchors, and no precache proxy that would tell an agent of anything."""
    path = tmp_path_factory.mktemp("mobility") / "mobility.yml"
    groups = inventory()
    bridges = [{"name": name, "mac": GUEST_GATEWAY_MAC} for name in ("vmbr0", SECOND_BRIDGE)]
    groups["mobility"]["vars"]["mobility_bridges"] = bridges
    path.write_text(yaml.safe_dump(groups))
    open_settings(lab, (*GATEWAYS, *ANCHORS))
    for name in GATEWAYS:
        words = f"ip link add {SECOND_BRIDGE} type bridge && ip link set {SECOND_BRIDGE} up"
        lab.exec(name, "sh", "-c", words)
        lab.exec(name, "virsh", "net-define", "/dev/stdin", stdin=NETWORK_XML)
        lab.exec(name, "virsh", "net-start", NETWORK)
    lab_playbook(PLAY, options=("-i", str(path))).require_success()
    lead_prefix_to(lab, PREFIX, ANCHORS[0])
    yield
    lab.wan.set("none")
    for name in (*GATEWAYS, *ANCHORS):
        lab.exec(name, "systemctl", "disable", "--now", "mobility-agent", check=False)
    for name in GATEWAYS:
        lab.exec(name, "virsh", "net-destroy", NETWORK, check=False)
        lab.exec(name, "virsh", "net-undefine", NETWORK, check=False)
        lab.exec(name, "ip", "link", "del", SECOND_BRIDGE, check=False)
    lead_prefix_to(lab, PREFIX, SOURCE)


def named(lab: Lab, guest: Guest) -> None:
    """Have its definition say its address and that of a second card."""
    homes = f"<address>{guest.address}</address><address card='{SECOND_MAC}'>{second(guest)}</address>"
    words = (
        "--uri",
        METADATA_URI,
        "--key",
        "mobility",
        "--set",
        f"<addresses>{homes}</addresses>",
        "--config",
    )
    lab.exec(SOURCE, "virsh", "metadata", guest.plan.uuid, *words)


def plug(lab: Lab, guest: Guest, how: str) -> None:
    """Give it a second card: with its next start (``--config``), or under way (``--live``)."""
    words = ("--type", "network", "--source", NETWORK, "--model", "virtio", "--mac", SECOND_MAC, how)
    lab.exec(SOURCE, "virsh", "attach-interface", guest.plan.uuid, *words)


SET_UP = (
    "run ip link set eth1 up; echo 0 >/proc/sys/net/ipv6/conf/eth1/accept_dad; ip -6 addr add {}/128 dev eth1"
)


@pytest.fixture
def guest(lab: Lab) -> Iterator[Guest]:
    """A VM with an address on each of two cards, bound where it runs."""
    guest = lab.guests.define(SOURCE, GuestPlan("byhand", workload="idle", disk_mib=64, content_mib=1))
    plug(lab, guest, "--config")
    named(lab, guest)
    guest.start()
    guest.wait_ready()
    guest.ask(SET_UP.format(second(guest)))
    guest.ask(ECHO_COMMAND)
    settled(lab, guest, SOURCE)
    yield guest
    for name in GATEWAYS:
        lab.exec(name, "systemctl", "start", "mobility-agent")
    guest.remove()


def second(guest: Guest) -> IPv6Address:
    """The address of its second card."""
    return IPv6Address(guest.address) + 0x1000


def settled(lab: Lab, guest: Guest, at: str) -> int:
    """Wait until it is bound there by all anchors, and reached at both cards; its epoch."""
    for anchor in ANCHORS:
        wait(lambda anchor=anchor: holder(lab, anchor, guest.plan.uuid) == at)
    for address in (guest.address, str(second(guest))):
        wait(lambda address=address: answers(lab, address))
    found = binding(lab, ANCHORS[0], guest.plan.uuid)
    assert found is not None
    return int(found["epoch"])


def answers(lab: Lab, address: str) -> bool:
    """Whether a client at a third place reaches it."""
    return lab.exec("client", "ping", "-c", "1", "-W", "1", address, check=False).returncode == 0


def migrate(
    lab: Lab, guest: Guest, source: str, destination: str, *, abort_after: float | None = None
) -> None:
    """Move it as an operator does who knows of no agent."""
    for path, image_format in guest.images(source).values():
        told = lab.exec(source, "qemu-img", "info", "-U", "--output=json", path).stdout
        size = str(json.loads(told)["virtual-size"])
        lab.exec(destination, "qemu-img", "create", "-q", "-f", image_format, path, size)
    command = (
        f"virsh migrate --live --p2p --copy-storage-all --persistent --undefinesource {guest.plan.uuid} "
        f"qemu+ssh://{destination}/system"
    )
    if abort_after is not None:
        command = f"{command} & sleep {abort_after}; virsh domjobabort {guest.plan.uuid}; ! wait $!"
    lab.exec(source, "bash", "-c", command, timeout_seconds=300)


def is_led_to_its_cards(lab: Lab, guest: Guest, host: str) -> bool:
    """Whether the kernel there has both addresses on their bridges, with the MACs of libvirt's cards."""
    places = {
        guest.address: ("vmbr0", guest.plan.mac_address()),
        str(second(guest)): (SECOND_BRIDGE, SECOND_MAC),
    }
    for address, (bridge, mac) in places.items():
        shown = lab.exec(host, "ip", "-json", "-6", "route", "show", address, "table", "7600").stdout
        known = lab.exec(host, "ip", "-json", "-6", "neigh", "show", address, "nud", "permanent").stdout
        if [route.get("dev") for route in json.loads(shown or "[]")] != [bridge]:
            return False
        if [(one["dev"], one["lladdr"]) for one in json.loads(known or "[]")] != [(bridge, mac)]:
            return False
    return True


def sends_on(lab: Lab, guest: Guest, host: str, to: str) -> bool:
    """Whether what still comes to this host for the VM goes on to the other, and nothing to a bridge."""
    found = next((vm for vm in ask(lab, host, "vms")["vms"] if vm["vm"] == guest.plan.uuid), None)
    if found is None or found["state"] != "away" or found["to"] is None:
        return False
    for address in (guest.address, str(second(guest))):
        tunnel = lab.exec(host, "ip", "-6", "route", "show", address, "table", "7601").stdout
        known = lab.exec(host, "ip", "-json", "-6", "neigh", "show", address, "nud", "permanent").stdout
        if found["to"] not in tunnel or json.loads(known or "[]"):
            return False
    taps = lab.exec(host, "ip", "-json", "link", "show", "master", SECOND_BRIDGE).stdout
    assert json.loads(taps or "[]") == []
    return bool(found["to"] == ask(lab, to, "status")["tunnel_address"])


def test_a_vm_moved_by_hand_there_and_back_keeps_its_addresses_and_connections(
    lab: Lab, guest: Guest
) -> None:
    epoch = settled(lab, guest, SOURCE)
    assert is_led_to_its_cards(lab, guest, SOURCE)
    lab.wan.set("rate=400mbit,rtt=20ms")
    probe = Probe(lab, guest.address)
    try:
        for source, destination in (GATEWAYS, GATEWAYS[::-1], GATEWAYS):
            with none_twice(lab, [guest.plan.uuid]):
                migrate(lab, guest, source, destination)
            assert guest.running_on() == [destination]
            wait(lambda source=source, destination=destination: sends_on(lab, guest, source, destination))
            epoch += 1
            assert settled(lab, guest, destination) == epoch
            assert is_led_to_its_cards(lab, guest, destination)
    finally:
        seen = probe.end()
        lab.wan.set("none")
    print(
        json.dumps({"gap": seen.longest_gap_seconds(), "stall": seen.longest_stall_seconds(), "epoch": epoch})
    )
    assert seen.failure == ""
    assert seen.goes_on


def test_a_move_by_hand_that_is_called_off_leaves_the_binding_as_it_was(lab: Lab, guest: Guest) -> None:
    before = binding(lab, ANCHORS[0], guest.plan.uuid)
    lab.wan.set("rate=8mbit,rtt=20ms")
    probe = Probe(lab, guest.address)
    try:
        migrate(lab, guest, SOURCE, DESTINATION, abort_after=6)
        assert guest.running_on() == [SOURCE]
        wait(lambda: answers(lab, guest.address))
    finally:
        seen = probe.end()
        lab.wan.set("none")
    assert seen.failure == ""
    after = binding(lab, ANCHORS[0], guest.plan.uuid)
    assert before is not None
    assert after is not None
    keys = ("gateway", "epoch", "since_seconds", "addresses")
    assert [after[key] for key in keys] == [before[key] for key in keys]
    assert is_led_to_its_cards(lab, guest, SOURCE)


@pytest.mark.parametrize("dead", [(SOURCE,), (DESTINATION,), GATEWAYS], ids="-".join)
def test_a_move_by_hand_while_agents_are_dead_is_found_when_they_are_back(
    lab: Lab, guest: Guest, dead: tuple[str, ...]
) -> None:
    # Evacuated before: in its epoch nobody may take it who has only found it running.
    ask(lab, SOURCE, "arrive", guest.plan.uuid, "--epoch", "3")
    for anchor in ANCHORS:
        wait(lambda anchor=anchor: (binding(lab, anchor, guest.plan.uuid) or {}).get("epoch") == 3)
    probe = Probe(lab, guest.address)
    try:
        for name in dead:
            lab.exec(name, "systemctl", "kill", "--signal=KILL", "mobility-agent")
            lab.exec(name, "systemctl", "stop", "mobility-agent")
        migrate(lab, guest, SOURCE, DESTINATION)
        assert guest.running_on() == [DESTINATION]
        for name in reversed(dead):
            lab.exec(name, "systemctl", "start", "mobility-agent")
        settled(lab, guest, DESTINATION)
        assert is_led_to_its_cards(lab, guest, DESTINATION)
        wait(lambda: sends_on(lab, guest, SOURCE, DESTINATION))
    finally:
        seen = probe.end()
    print(json.dumps({"dead": dead, "gap": seen.longest_gap_seconds()}))
    assert seen.failure == ""
    assert seen.goes_on


def test_neighbours_that_believe_each_other_on_link_reach_each_other_wherever_they_are(
    lab: Lab, guest: Guest
) -> None:
    other = lab.guests.define(SOURCE, GuestPlan("neighbour", workload="idle", disk_mib=64, content_mib=1))
    try:
        keep_address(lab, other, SOURCE)
        other.start()
        other.wait_ready()
        wait(lambda: answers(lab, other.address))
        for one in (guest, other):
            one.ask(f"run ip -6 route add {PREFIX} dev eth0")
        for source, destination in ((DESTINATION, SOURCE), GATEWAYS, GATEWAYS[::-1]):
            if guest.running_on() == [source]:
                migrate(lab, guest, source, destination)
            apart = destination == DESTINATION
            for one, target in ((other, guest), (guest, other)):
                wait(lambda one=one, target=target: reaches(one, target))
                known = one.ask(f"run ip -6 neigh show {target.address} dev eth0")
                assert (GUEST_GATEWAY_MAC if apart else target.plan.mac_address()) in known
    finally:
        other.remove()


def reaches(guest: Guest, target: Guest) -> bool:
    """Whether the target answers this guest."""
    words = f"ping -6 -c 1 -W 2 {target.address} >/dev/null 2>&1 && echo reached"
    return "reached" in guest.ask(f"run {words}")


def test_an_address_is_led_to_a_card_that_is_plugged_in_under_way(lab: Lab) -> None:
    guest = lab.guests.define(SOURCE, GuestPlan("plugged", workload="idle", disk_mib=64, content_mib=1))
    try:
        # libvirt gives a q35 machine as many ports as it has devices: without a spare one none can be added.
        told = lab.exec(SOURCE, "virsh", "dumpxml", "--inactive", guest.plan.uuid).stdout
        port = "<controller type='pci' model='pcie-root-port'/>"
        spared = told.replace("</devices>", f"{port}</devices>")
        lab.exec(SOURCE, "virsh", "define", "/dev/stdin", stdin=spared)
        named(lab, guest)
        guest.start()
        guest.wait_ready()
        for anchor in ANCHORS:
            wait(lambda anchor=anchor: holder(lab, anchor, guest.plan.uuid) == SOURCE)
        before = binding(lab, ANCHORS[0], guest.plan.uuid)
        assert not is_led_to_its_cards(lab, guest, SOURCE), "there is one card only"
        plug(lab, guest, "--live")
        try:
            wait(lambda: is_led_to_its_cards(lab, guest, SOURCE))
        except AssertionError:
            print(lab.exec(SOURCE, "journalctl", "-u", "mobility-agent", "-n", "20", "-o", "cat").stdout)
            raise
        guest.ask("run for i in 1 2 3 4 5 6 7 8 9; do [ -e /sys/class/net/eth1 ] || sleep 1; done")
        guest.ask(SET_UP.format(second(guest)))
        epoch = settled(lab, guest, SOURCE)
        assert before is not None
        assert epoch == before["epoch"], "it is only led otherwise"
    finally:
        guest.remove()
