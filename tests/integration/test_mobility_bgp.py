# SPDX-License-Identifier: GPL-3.0-or-later
"""Instead of anchors: gateways put VMs' routes where FRR takes them, and routers follow the VM by BGP.

Needs FRR's daemons: the package frr, or LIFEBOAT_FRR naming a directory that it was unpacked into.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import pytest

from integration.mobility_agents import GATEWAYS, ROOT, Agents, Conversation
from integration.mobility_net import HOME_PREFIX, Guest, Namespace, Net, eventually, pings, small_internet

UNPACKED = Path(os.environ.get("LIFEBOAT_FRR", "/"))
DAEMONS = UNPACKED / "usr/lib/frr"
AUTONOMOUS_SYSTEMS = {"router": 65000, "gateway1": 65001, "gateway2": 65002}

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not (DAEMONS / "bgpd").exists(), reason="FRR is not installed, nor named by LIFEBOAT_FRR"
    ),
]


def role_configuration(name: str, neighbours: list[tuple[str, int]]) -> str:
    """What the role writes into frr.conf."""
    template = (ROOT / "roles/mobility/templates/frr.conf.j2").read_text()
    # As Ansible has Jinja.
    environment = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined, autoescape=False)
    number = AUTONOMOUS_SYSTEMS[name]
    return environment.from_string(template).render(
        ansible_managed="test",
        mobility_name=name,
        mobility_prefixes=[{"prefix": str(HOME_PREFIX)}],
        mobility_bgp_as=number,
        mobility_bgp_router_id=f"192.0.2.{number - 64999}",
        mobility_bgp_neighbors=[{"address": address, "as": system} for address, system in neighbours],
    )


class Routing:
    """zebra and bgpd in one namespace."""

    def __init__(self, space: Namespace, directory: Path, configuration: str) -> None:
        directory.mkdir(parents=True)
        path = directory / "frr.conf"
        path.write_text(configuration)
        library = UNPACKED / "usr/lib/x86_64-linux-gnu"
        environment = os.environ | {"LD_LIBRARY_PATH": f"{library}:{library / 'frr'}"}
        # Where FRR is only unpacked nobody has made its group.
        group = directory / "group"
        group.write_text(Path("/etc/group").read_text() + "frrvty:x:65533:root\n")
        common = ["-f", str(path), "-z", str(directory / "zserv.api"), "--vty_socket", str(directory)]
        common += ["-u", "root", "-g", "root", "--log", f"file:{directory / 'log'}"]
        self.processes = []
        for daemon in ("zebra", "bgpd"):
            words = [str(DAEMONS / daemon), *common, "-i", str(directory / f"{daemon}.pid")]
            script = f"mount --bind {group} /etc/group && exec {shlex.join(words)}"
            process = subprocess.Popen(
                space.command("unshare", "--mount", "sh", "-c", script),
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            self.processes.append(process)
            eventually((directory / "zserv.api").exists, 20)

    def end(self) -> None:
        """End both."""
        for process in reversed(self.processes):
            process.terminate()
            process.wait(20)


class Routed(Agents):
    """Two gateways without anchors."""

    def __init__(self, net: Net, directory: Path) -> None:
        super().__init__(net, directory)
        for name in (*self.of,):
            if name not in GATEWAYS:
                del self.of[name]
                continue
            settings = self.of[name].settings
            settings["announce"] = True
            settings["peers"] = [peer for peer in settings["peers"] if peer["name"] in GATEWAYS]


@contextmanager
def routed(directory: Path) -> Iterator[Routed]:
    with small_internet() as net:
        net["router"].ip(f"route del {HOME_PREFIX}")
        agents = Routed(net, directory)
        routing: list[Routing] = []
        try:
            links = {name: str(net.ADDRESSES[name] - 1) for name in GATEWAYS}
            hub = [(str(net.ADDRESSES[name]), AUTONOMOUS_SYSTEMS[name]) for name in GATEWAYS]
            routing.append(
                Routing(net["router"], directory / "frr-router", role_configuration("router", hub))
            )
            for name in GATEWAYS:
                text = role_configuration(name, [(links[name], AUTONOMOUS_SYSTEMS["router"])])
                routing.append(Routing(net[name], directory / f"frr-{name}", text))
            for agent in agents.of.values():
                agent.start()
            yield agents
        finally:
            agents.kill()
            for one in routing:
                one.end()


def way(net: Net, guest: Guest) -> str | None:
    """The gateway to which the router sends the guest's packets."""
    found: list[dict[str, Any]] = net["router"].show("route", "show", str(guest.home))
    device = found[0].get("dev") if found else None
    return None if device is None else str(device)


def test_routers_follow_a_vm_by_bgp_and_its_connection_goes_on(tmp_path: Path) -> None:
    with routed(tmp_path) as agents:
        net = agents.net
        guest, other = net.guest("routed", "gateway1"), net.guest("neighbour", "gateway1")
        agents["gateway1"].arrive(guest, 1)
        agents["gateway1"].arrive(other, 1)
        eventually(lambda: way(net, guest) == "gateway1", 60)
        assert pings(net["client"], guest.home)
        talk = Conversation(net["client"], guest)
        for epoch, to in ((2, "gateway2"), (3, "gateway1"), (4, "gateway2")):
            agents.move(guest, to, epoch)
            eventually(lambda to=to: way(net, guest) == to, 20)
            talk.goes_on()
        talk.end()
        assert talk.failures == []
        # Neighbours at two sites reach each other, by what routing knows.
        assert guest.pings(other.home)
        # The site that it left dies: nothing of it is needed any more.
        net["router"].ip("link set gateway1 down")
        assert pings(net["client"], guest.home)
        agents["gateway2"].depart(guest, withdraw=True)
        eventually(lambda: way(net, guest) is None, 20)
