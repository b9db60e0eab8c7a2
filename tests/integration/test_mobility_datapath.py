# SPDX-License-Identifier: GPL-3.0-or-later
"""The data path in real network namespaces: real routes, real tunnels, real TCP."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from ipaddress import IPv6Address, IPv6Network

import pytest

from integration.mobility_net import (
    BRIDGE,
    FIRST_HOP,
    HOME_PREFIX,
    ROUTER_MAC,
    Guest,
    Net,
    pings,
    small_internet,
    stream,
)
from mobility_agent.datapath import filters
from mobility_agent.datapath.path import DataPath
from mobility_agent.datapath.settings import SEG6, HomePrefix, PathSettings
from mobility_agent.errors import Conflict, KernelRefused

NODES = ("anchor1", "gateway1", "gateway2")


class Paths:
    """A data path on the anchor and both gateways."""

    encapsulation = SEG6

    def __init__(self, net: Net) -> None:
        self.net = net
        self.of: dict[str, DataPath] = {}
        for name in NODES:
            self.make(name)
        for name in ("gateway1", "gateway2"):
            path = self.of[name]
            net[name].inside(path.make_first_hop, BRIDGE, ROUTER_MAC, [FIRST_HOP])
            net[name].inside(path.set_anchor, net.tunnel("anchor1"))

    def make(self, name: str) -> DataPath:
        """A data path as a (re)started agent makes it; it is not started yet."""
        net = self.net
        settings = PathSettings(
            address=net.ADDRESSES[name],
            tunnel_address=net.tunnel(name),
            peers=frozenset(net.ADDRESSES[other] for other in NODES if other != name),
            prefixes=(HomePrefix(HOME_PREFIX),),
            bridges=(BRIDGE,) if name.startswith("gateway") else (),
            anchor=name.startswith("anchor"),
            encapsulation=self.encapsulation,
        )
        self.of[name] = net[name].inside(DataPath, settings)
        return self.of[name]

    def start(self) -> None:
        """Put it all into the kernels."""
        for name in NODES:
            assert self.net[name].inside(self.of[name].findings) == []
            self.net[name].inside(self.of[name].start)

    def bind(self, guest: Guest, gateway: str) -> None:
        """The guest is at this gateway, and the anchor knows."""
        homes = (IPv6Network(guest.home),)
        self.net[gateway].inside(self.of[gateway].set_local, homes, BRIDGE, guest.mac)
        self.net["anchor1"].inside(self.of["anchor1"].set_remote, homes, self.net.tunnel(gateway))


@pytest.fixture
def paths() -> Iterator[Paths]:
    with small_internet() as net:
        paths = Paths(net)
        yield paths
        for name, path in paths.of.items():
            net[name].inside(path.close)


def test_a_guest_is_reached_at_its_home_address_and_moves(paths: Paths) -> None:
    net = paths.net
    paths.start()
    guest = net.guest("guest1", "gateway1")
    paths.bind(guest, "gateway1")
    assert pings(net["client"], guest.home)
    guest.plug("gateway2")
    paths.bind(guest, "gateway2")
    net["gateway1"].inside(paths.of["gateway1"].set_away, (IPv6Network(guest.home),), net.tunnel("gateway2"))
    assert pings(net["client"], guest.home)
    assert guest.pings(net.ADDRESSES["client"])
    # What still comes to the old gateway goes on to the new one.
    net.attract("gateway1")
    assert pings(net["client"], guest.home)


def test_the_tunnel_is_plain_ipv6_in_ipv6_from_the_configured_source(paths: Paths) -> None:
    net = paths.net
    paths.start()
    guest = net.guest("guest1", "gateway1")
    paths.bind(guest, "gateway1")
    fields = ["-T", "fields", "-e", "ipv6.src", "-e", "ipv6.dst", "-e", "ipv6.nxt", "-e", "ipv6.routing.type"]
    words = ["tshark", "-i", "any", "-l", "-c", "16", "-a", "duration:10", "-f", "ip6 proto 41", *fields]
    capture = subprocess.Popen(
        net["router"].command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert capture.stderr is not None
    for line in capture.stderr:
        if "Capturing on" in line:
            break
    while capture.poll() is None:
        pings(net["client"], guest.home)
    told, _ = capture.communicate(timeout=20)
    anchor, gateway = net.ADDRESSES["anchor1"], net.ADDRESSES["gateway1"]
    client, home = net.ADDRESSES["client"], guest.home
    assert set(told.splitlines()) == {
        f"{anchor},{client}\t{net.tunnel('gateway1')},{home}\t41,58\t",
        f"{gateway},{home}\t{net.tunnel('anchor1')},{client}\t41,58\t",
    }


def test_the_sender_learns_packet_too_big_in_both_directions(paths: Paths) -> None:
    net = paths.net
    paths.start()
    guest = net.guest("guest1", "gateway2")
    paths.bind(guest, "gateway2")
    client = net.ADDRESSES["client"]
    # 40 and 8 octets of headers: 1460 fits the tunnel in 1500, one more does not.
    assert pings(net["client"], guest.home, size=1412)
    assert guest.pings(client, size=1412)
    assert not pings(net["client"], guest.home, size=1413, seconds=2)
    assert not guest.pings(client, size=1413, seconds=2)
    (learnt,) = net["client"].show("route", "get", str(guest.home))
    assert learnt["metrics"][0]["mtu"] == 1460
    (learnt,) = guest.space.show("route", "get", str(client))
    assert learnt["metrics"][0]["mtu"] == 1460


def test_full_size_tcp_learns_the_tunnels_size_in_both_directions(paths: Paths) -> None:
    net = paths.net
    paths.start()
    guest = net.guest("guest1", "gateway2")
    paths.bind(guest, "gateway2")
    # 1460 octets less 40 and 20 of headers and 12 of the timestamp option.
    assert stream(net["client"], guest.space, guest.home, 30 << 20) == 1388
    assert stream(guest.space, net["client"], net.ADDRESSES["client"], 30 << 20) == 1388


def test_a_narrower_path_is_learnt_and_forgotten(paths: Paths) -> None:
    net = paths.net
    paths.start()
    guest = net.guest("guest1", "gateway2")
    paths.bind(guest, "gateway2")
    anchor = paths.of["anchor1"]
    tunnel = net.tunnel("gateway2")
    assert net["anchor1"].inside(anchor.learn_mtu, tunnel, 1400)
    assert not net["anchor1"].inside(anchor.learn_mtu, tunnel, 1450)
    assert pings(net["client"], guest.home, size=1312)
    assert not pings(net["client"], guest.home, size=1313, seconds=2)
    net["client"].ip("route flush cache")
    assert net["anchor1"].inside(anchor.learn_mtu, tunnel, None)
    assert pings(net["client"], guest.home, size=1412)


def test_only_registered_peers_may_send_into_the_tunnel(paths: Paths) -> None:
    net = paths.net
    paths.start()
    guest = net.guest("guest1", "gateway2")
    paths.bind(guest, "gateway2")
    # The client builds a tunnel of its own: to the gateway's end, from its own address.
    client, tunnel = net["client"], net.tunnel("gateway2")
    client.ip(f"route add {guest.home} encap seg6 mode encap.red segs {tunnel} dev up0")
    assert not pings(client, guest.home, seconds=2)
    net["gateway2"].inside(filters.install, tunnel, [net.ADDRESSES["anchor1"], net.ADDRESSES["client"]])
    assert pings(client, guest.home)


def test_guests_of_one_prefix_at_two_sites_reach_each_other(paths: Paths) -> None:
    net = paths.net
    paths.start()
    one, other = net.guest("guest1", "gateway1"), net.guest("guest2", "gateway2")
    paths.bind(one, "gateway1")
    paths.bind(other, "gateway2")
    # Neighbour discovery for the other is the responder's work; here the answer is put by hand.
    for guest, far in ((one, other), (other, one)):
        guest.space.ip(f"neigh replace {far.home} lladdr {ROUTER_MAC} dev eth0 nud permanent")
    assert one.pings(other.home)
    assert one.pings(other.home, size=1412)
    assert not one.pings(other.home, size=1413, seconds=2)


def test_a_restart_changes_nothing_and_what_is_stale_goes(paths: Paths) -> None:
    net = paths.net
    paths.start()
    guest = net.guest("guest1", "gateway1")
    paths.bind(guest, "gateway1")
    gone = IPv6Network("2001:db8:100::dead/128")
    net["gateway1"].inside(paths.of["gateway1"].set_local, (gone,), BRIDGE, "52:54:00:00:00:99")
    before = net["gateway1"].show("route", "show", "table", "all", "proto", "76")
    assert pings(net["client"], guest.home)
    pinging = subprocess.Popen(
        net["client"].command("ping", "-6", "-i", "0.01", "-c", "200", "-q", str(guest.home)),
        stdout=subprocess.PIPE,
        text=True,
    )
    net["gateway1"].inside(paths.of["gateway1"].close)
    again = paths.make("gateway1")
    net["gateway1"].inside(again.set_local, (IPv6Network(guest.home),), BRIDGE, guest.mac)
    net["gateway1"].inside(again.set_anchor, net.tunnel("anchor1"))
    net["gateway1"].inside(again.start)
    told, _ = pinging.communicate(timeout=20)
    assert " 0% packet loss" in told
    after = net["gateway1"].show("route", "show", "table", "all", "proto", "76")
    assert [route for route in before if route["dst"] != str(gone.network_address)] == after
    permanent = net["gateway1"].show("neigh", "show", "nud", "permanent", "dev", BRIDGE)
    assert [entry["dst"] for entry in permanent] == [str(guest.home)]


def test_what_somebody_broke_is_put_right_while_others_go_on(paths: Paths) -> None:
    net, path = paths.net, paths.of["gateway1"]
    space = net["gateway1"]
    guest = net.guest("one", at="gateway1")
    paths.start()
    paths.bind(guest, "gateway1")
    crowd = [IPv6Network(HOME_PREFIX.network_address + 0x20000 + number) for number in range(600)]
    space.inside(path.set_local, crowd, BRIDGE, guest.mac)
    turns: list[int] = []

    async def repair() -> None:
        async def count() -> None:
            while True:
                turns.append(len(turns))
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        await path.repair()
        counting.cancel()

    def state() -> list[str]:
        told = space.run("ip", "-6", "route", "show", "table", "all", "proto", "76").stdout
        told += space.run("ip", "-6", "neigh", "show", "nud", "permanent").stdout
        told += space.run("ip", "-6", "rule", "show").stdout
        return sorted(told.splitlines())

    before = state()
    assert any(str(crowd[-1].network_address) in line for line in before)
    for breakage in (
        f"route del {guest.home} table 7600",
        f"route replace {crowd[7]} dev {BRIDGE} table 7600 proto 76 metric 9",
        f"route replace {crowd[9]} dev up0 table 7600 proto 76 metric 1024",
        f"route add {HOME_PREFIX.network_address + 0x99} dev {BRIDGE} table 7600 proto 76",
        f"neigh del {guest.home} dev {BRIDGE}",
        f"neigh add {HOME_PREFIX.network_address + 0x99} dev {BRIDGE} lladdr {guest.mac} protocol 76",
        "rule del priority 900",
        "route flush table 7602",
        f"route add {HOME_PREFIX} dev {BRIDGE} table 7602 proto 76",
    ):
        space.ip(breakage)
        assert state() != before
        turns.clear()
        space.inside(asyncio.run, repair())
        assert state() == before, breakage
        # Two looks at more than six hundred, a few dozen at a time.
        assert len(turns) > 30
    assert pings(net["client"], guest.home)


def test_withdrawing_takes_out_all_of_ours_and_nothing_else(paths: Paths) -> None:
    net = paths.net
    foreign = (
        "route add 2001:db8:77::/64 dev up0 proto static",
        "route add 2001:db8:78::/64 dev up0 table 7600 proto static",
        "rule add from 2001:db8:77::/64 table 100 pref 500",
        f"neigh add 2001:db8:100::77 lladdr 02:00:00:00:00:01 dev {BRIDGE} nud permanent",
    )
    space = net["gateway1"]
    space.ip(*foreign)
    views = [
        ("route", "show", "table", "all"),
        ("rule", "show"),
        ("neigh", "show", "nud", "permanent"),
        ("neigh", "show", "proxy"),
        ("link", "show"),
    ]

    def state() -> list[object]:
        """All that the kernel shows of what an agent may touch."""
        shown = [space.show(*view) for view in views]
        shown[0] = [route for route in shown[0] if route.get("protocol") != "kernel"]
        return [
            *shown,
            space.run("nft", "list", "ruleset").stdout,
            space.run("ip", "sr", "tunsrc", "show").stdout,
        ]

    before = state()
    paths.start()
    guest = net.guest("guest1", "gateway1")
    guest.plug(None)
    space.ip(f"link del v{guest.number}1")
    paths.bind(guest, "gateway1")
    assert state() != before
    space.inside(paths.of["gateway1"].withdraw)
    assert state() == before


def test_anothers_outer_source_is_not_overwritten(paths: Paths) -> None:
    net = paths.net
    net["gateway1"].run("ip", "sr", "tunsrc", "set", "2001:db8:b1::99")
    with pytest.raises(Conflict, match="set by somebody else"):
        net["gateway1"].inside(paths.of["gateway1"].start)


def test_a_bridge_that_is_not_there_is_named(paths: Paths) -> None:
    net = paths.net
    paths.start()
    with pytest.raises(KernelRefused, match="bridge nowhere"):
        net["gateway1"].inside(
            paths.of["gateway1"].set_local, (IPv6Network("2001:db8:100::9"),), "nowhere", "52:54:00:00:00:09"
        )


def test_what_stands_in_the_way_is_found_all_at_once(paths: Paths) -> None:
    net = paths.net
    space = net["gateway1"]
    space.sysctl(all__forwarding=0, up0__proxy_ndp=0)
    space.ip(f"address add {net.tunnel('gateway1')}/128 dev lo")
    space.ip(f"address del {net.ADDRESSES['gateway1']}/64 dev up0")
    space.ip("address add 2001:db8:b1::5/64 dev up0 nodad")
    told = {(finding.subject, finding.cause) for finding in space.inside(paths.of["gateway1"].findings)}
    assert told == {
        (f"address {net.ADDRESSES['gateway1']}", "configuration"),
        (f"tunnel_address {net.tunnel('gateway1')}", "conflict"),
        (f"tunnel_address {net.tunnel('gateway1')}", "configuration"),
        ("this host", "configuration"),
    }


def test_a_kernel_that_answers_late_for_the_tunnels_end_is_told_of(paths: Paths) -> None:
    space = paths.net["gateway1"]
    assert space.inside(paths.of["gateway1"].findings) == []
    space.answer_late(centiseconds=80)
    (found,) = space.inside(paths.of["gateway1"].findings)
    assert "after up to 0.8 s" in found.fact
    assert "proxy_delay=0" in found.way_out


def test_the_first_hop_has_one_mac_and_address_everywhere(paths: Paths) -> None:
    net = paths.net
    for name in ("gateway1", "gateway2"):
        (link,) = net[name].show("link", "show", "dev", BRIDGE)
        assert link["address"] == ROUTER_MAC
        addresses = net[name].show("address", "show", "dev", BRIDGE)[0]["addr_info"]
        assert str(FIRST_HOP) in {info["local"] for info in addresses}
        assert not net[name].inside(paths.of[name].make_first_hop, "nowhere", ROUTER_MAC, [FIRST_HOP])


def test_a_stranger_to_the_home_prefix_still_gets_native_routing(paths: Paths) -> None:
    net = paths.net
    paths.start()
    assert pings(net["client"], net.ADDRESSES["gateway1"])
    assert pings(net["gateway1"], IPv6Address("2001:db8:c::2"))
