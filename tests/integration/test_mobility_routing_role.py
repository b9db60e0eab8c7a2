# SPDX-License-Identifier: GPL-3.0-or-later
"""FRR and radvd as the role mobility sets them up on hosts that have neither, and a router that follows a VM.

The router between the lab's sites runs FRR too: it knows the way to the home prefix from the gateways alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Network
from typing import Any

import pytest
import yaml
from testinfra.host import Host

from integration.lab_host import lab_host
from integration.mobility_lab import GATEWAYS, PLAY, wait
from integration.playbook_runner import PlaybookResult
from integration.routing_daemons import Routing, frr_configuration, needs_frr
from lifeboat_lab import mobility as lab_mobility
from lifeboat_lab.lab import Lab
from lifeboat_lab.mobility import ask, open_settings
from lifeboat_lab.settings import HOSTS, site_router

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900), needs_frr]

RunPlaybook = Callable[..., PlaybookResult]
HOME_PREFIX = IPv6Network("2001:db8:100::/64")
VM, MAC = "00000001-1111-2222-3333-444444444444", "52:54:00:10:00:05"
# What a kernel makes of the prefix and that MAC (RFC 4291 appendix A).
HOME = IPv6Address("2001:db8:100::5054:ff:fe10:5")
# Beside it, an address of IPv4, configured in the guest as ever; and what the router pings it from.
IPV4_PREFIX, IPV4_ROUTER, IPV4_HOME = "198.51.100.0/24", "198.51.100.1", "198.51.100.5"
ASKING = "203.0.113.1/32"
ROUTER_NUMBER, NUMBERS = 65000, {"home1": 65001, "backup1": 65002}
PACKAGES = ("frr", "frr-pythontools", "radvd")


@dataclass(frozen=True)
class Sites:
    """The lab with the role run once, and how that went."""

    lab: Lab
    run: RunPlaybook
    dry: PlaybookResult

    def ways(self) -> set[str | None]:
        """The sites' links on which the router sends the VM's packets; None where it knows no way."""
        found: set[str | None] = set()
        for home in (str(HOME), IPV4_HOME):
            kind = "-6" if ":" in home else "-4"
            shown = json.loads(
                self.lab.exec("router", "ip", "-json", kind, "route", "show", home).stdout or "[]"
            )
            found.add(str(shown[0]["dev"]) if shown else None)
        return found

    def answers(self) -> bool:
        """Whether the VM answers a client at a third place; by IPv4 the router, for want of such a client."""
        words = ("ping", "-c", "1", "-W", "1")
        return all(
            self.lab.exec(member, *words, home, check=False).returncode == 0
            for member, home in (("client", str(HOME)), ("router", IPV4_HOME))
        )

    def plug(self, host: str) -> None:
        """The VM's card on this host's bridge: a namespace, whose kernel asks for its addresses itself."""
        shell = (
            "ip netns add vm && ip link add vmport type veth peer name eth0 netns vm "
            f"&& ip -n vm link set eth0 address {MAC} && ip link set vmport master vmbr0 up "
            "&& ip -n vm link set lo up && ip -n vm link set eth0 up "
            f"&& ip -n vm address add {IPV4_HOME}/24 dev eth0 && ip -n vm route add default via {IPV4_ROUTER}"
        )
        self.lab.exec(host, "sh", "-c", shell)

    def unplug(self, host: str) -> None:
        """No card any more."""
        self.lab.exec(host, "sh", "-c", "ip link del vmport; ip netns del vm", check=False)

    def has_made_its_address(self, host: str) -> bool:
        """Whether the VM on this host has its address and its router, by what was advertised."""
        shown = self.lab.exec(
            host, "ip", "-n", "vm", "-6", "address", "show", "dev", "eth0", "-tentative"
        ).stdout
        routes = self.lab.exec(host, "ip", "-n", "vm", "-6", "route", "show", "default").stdout
        return f"{HOME}/64" in shown and "via fe80::1 " in routes


def _lead_ipv4(lab: Lab) -> None:
    """The hosts' own way out for IPv4, over links that have no IPv4 address; and one at the other end."""
    lab.exec("router", "ip", "address", "replace", ASKING, "dev", "lo")
    for name in GATEWAYS:
        way = ("via", "inet6", site_router(HOSTS[name].site), "dev", "site0")
        # Their routes go with their addresses.
        lab.exec(name, "ip", "-4", "address", "flush", "dev", "site0")
        lab.exec(name, "ip", "-4", "route", "add", "default", *way)


def _give_ipv4_back(lab: Lab) -> None:
    """As the lab has it."""
    lab.exec("router", "ip", "address", "del", ASKING, "dev", "lo", check=False)
    for name in GATEWAYS:
        lab.network.connect_ipv4(HOSTS[name])


@pytest.fixture(scope="module")
def sites(lab: Lab, lab_playbook: RunPlaybook, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    """Two gateways that speak BGP with the router between the sites, set up by the role."""
    work = tmp_path_factory.mktemp("routing")
    inventory = lab_mobility.inventory(GATEWAYS, (), [])
    inventory["mobility"]["vars"] |= {
        "mobility_prefixes": [
            {"prefix": str(HOME_PREFIX), "advertise": True},
            {"prefix": IPV4_PREFIX, "router": IPV4_ROUTER},
        ],
        "mobility_router_advertisements": True,
    }
    for name, number in NUMBERS.items():
        inventory["mobility"]["hosts"][name] |= {
            "mobility_bgp_as": number,
            "mobility_bgp_router_id": f"192.0.2.{number - 64999}",
            "mobility_bgp_neighbors": [{"address": site_router(HOSTS[name].site), "as": ROUTER_NUMBER}],
        }
    path = work / "mobility.yml"
    path.write_text(yaml.safe_dump(inventory))

    def run(**arguments: Any) -> PlaybookResult:
        return lab_playbook(PLAY, options=("-i", str(path)), **arguments)

    neighbours = [(HOSTS[name].address, number) for name, number in NUMBERS.items()]
    text = frr_configuration("router", ROUTER_NUMBER, neighbours, [str(HOME_PREFIX), IPV4_PREFIX])
    open_settings(lab, GATEWAYS)
    _lead_ipv4(lab)
    router = Routing(lambda *words: lab.command("router", words), work / "router", text)
    try:
        dry = run(check=True).require_success()
        run().require_success()
        yield Sites(lab, run, dry)
    finally:
        router.end()
        _give_ipv4_back(lab)
        for name in GATEWAYS:
            lab.exec(name, "systemctl", "disable", "--now", "mobility-agent", "lifeboat-radvd", check=False)
            lab.exec(name, "apt-get", "purge", "--quiet", "--yes", *PACKAGES, check=False)


@pytest.fixture(params=GATEWAYS)
def host(sites: Sites, request: pytest.FixtureRequest) -> Host:
    return lab_host(sites.lab, request.param)


def test_a_dry_run_tells_the_packages_first_and_a_second_run_changes_nothing(sites: Sites) -> None:
    assert any("Tell which packages would be installed" in task for task in sites.dry.changed_tasks)
    assert sites.run().require_success().changed_tasks == []


def test_the_role_leaves_frr_speaking_bgp_and_readable_to_nobody_else(host: Host) -> None:
    for package in PACKAGES:
        assert host.package(package).is_installed
    service = host.service("frr")
    assert service.is_running
    assert service.is_enabled
    assert host.file("/etc/frr/daemons").contains("^bgpd=yes")
    configuration = host.file("/etc/frr/frr.conf")
    assert (configuration.mode, configuration.user) == (0o640, "root")
    number = NUMBERS[host.backend.hostname]
    running = host.check_output("vtysh -c 'show running-config'")
    assert f"router bgp {number}" in running
    assert "redistribute kernel route-map lifeboat-homes" in running

    def established() -> bool:
        told = json.loads(host.check_output("vtysh -c 'show bgp ipv6 unicast summary json'"))
        return [peer["state"] for peer in told["peers"].values()] == ["Established"]

    wait(established, 60)


def test_the_role_leaves_an_advertiser_of_its_own_and_no_failed_unit(host: Host) -> None:
    service = host.service("lifeboat-radvd")
    assert service.is_running
    assert service.is_enabled
    # Debian's own has no configuration, and so nothing to say.
    assert not host.service("radvd").is_running
    told = host.check_output("systemctl show lifeboat-radvd -p NRestarts,ProtectSystem,NoNewPrivileges")
    assert "NRestarts=0" in told
    assert "ProtectSystem=strict" in told
    failed = host.check_output("systemctl list-units --failed --plain --no-legend")
    assert not [
        line for line in failed.splitlines() if line.startswith(("frr", "radvd", "lifeboat", "mobility"))
    ]


def test_the_gateway_forwards_ipv4_and_answers_arp_for_who_is_elsewhere(host: Host) -> None:
    assert host.sysctl("net.ipv4.ip_forward") == 1
    # By the sandboxed agent itself: bridges come and go.
    assert host.sysctl("net.ipv4.conf.vmbr0.proxy_arp") == 1
    assert host.sysctl("net.ipv4.neigh.vmbr0.proxy_delay") == 0
    assert f"{IPV4_ROUTER}/32" in host.check_output("ip -4 address show dev vmbr0")


def test_a_vm_makes_its_address_and_the_router_follows_it_to_the_other_site(sites: Sites) -> None:
    words = ("--mac", MAC, "--bridge", "vmbr0", "--address", str(HOME), "--address", IPV4_HOME)
    home, backup = GATEWAYS
    assert sites.ways() == {None}
    try:
        sites.plug(home)
        wait(lambda: sites.has_made_its_address(home))
        ask(sites.lab, home, "arrive", VM, "--epoch", "1", *words)
        wait(lambda: sites.ways() == {"br-home"}, 60)
        wait(sites.answers)

        sites.unplug(home)
        ask(sites.lab, backup, "arrive", VM, "--epoch", "2", *words)
        ask(sites.lab, home, "depart", VM, "--to", backup)
        sites.plug(backup)
        wait(lambda: sites.ways() == {"br-backup"})
        wait(lambda: sites.has_made_its_address(backup))
        wait(sites.answers)

        ask(sites.lab, backup, "depart", VM, "--withdraw")
        wait(lambda: sites.ways() == {None})
    finally:
        for name in GATEWAYS:
            sites.unplug(name)
            sites.lab.exec(name, "mobility-agent", "depart", VM, "--withdraw", check=False)
