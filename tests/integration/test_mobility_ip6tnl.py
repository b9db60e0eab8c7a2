# SPDX-License-Identifier: GPL-3.0-or-later
"""Tunnels by ip6tnl instead of seg6: what any kernel can show of it, and the whole where there is one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from ipaddress import IPv6Address, IPv6Network

import pytest

from integration.mobility_net import Net, pings, small_internet
from integration.test_mobility_datapath import Paths
from mobility_agent.datapath import routes
from mobility_agent.datapath.ground import TUNNEL
from mobility_agent.datapath.netlink import RouteSocket
from mobility_agent.datapath.path import DataPath
from mobility_agent.datapath.routes import Route
from mobility_agent.datapath.settings import IP6TNL, SEG6
from mobility_agent.errors import Unsupported


def _kernel_has_ip6tnl() -> bool:
    words = ["unshare", "--net", "ip", "link", "add", "probe0", "type", "ip6tnl", "external"]
    return subprocess.run(words, check=False, capture_output=True).returncode == 0


HAS_IP6TNL = _kernel_has_ip6tnl()


class Tunnels(Paths):
    """Data paths by ip6tnl, but for those in ``seg6``."""

    def __init__(self, net: Net, seg6: tuple[str, ...] = ()) -> None:
        self.seg6 = seg6
        super().__init__(net)

    def make(self, name: str) -> DataPath:
        """As there, with the other way into packets."""
        self.encapsulation = SEG6 if name in self.seg6 else IP6TNL
        return super().make(name)


@pytest.fixture
def net() -> Iterator[Net]:
    with small_internet() as net:
        yield net


def test_the_kernel_takes_routes_into_such_a_tunnel_and_gives_them_back(net: Net) -> None:
    space = net["gateway1"]
    care_of, source = IPv6Address("2001:db8:b2::d"), net.ADDRESSES["gateway1"]
    # It looks at the device only when a packet comes: any will do for reading back.
    wanted = Route(IPv6Network("2001:db8:100::5"), 7601, "up0", segment=care_of, outer_source=source)
    kernel = space.inside(RouteSocket)
    try:
        space.inside(kernel.apply, [space.inside(routes.put, wanted)])
        assert space.inside(routes.read, kernel) == [wanted]
        (shown,) = space.show("route", "show", "table", "7601")
        assert (shown["encap"], shown["src"], shown["dst"]) == ("ip6", str(source), str(care_of))
        assert space.inside(routes.reconcile, kernel, []) == (0, 1)
    finally:
        kernel.close()


@pytest.mark.skipif(HAS_IP6TNL, reason="this kernel has ip6tnl")
def test_a_kernel_without_it_is_told_of_in_one_sentence_and_nothing_is_changed(net: Net) -> None:
    paths = Tunnels(net)
    space = net["gateway1"]
    with pytest.raises(
        Unsupported, match="this kernel has no ip6tnl; load its module ip6_tunnel, or set"
    ) as told:
        space.inside(paths.of["gateway1"].start)
    assert "\n" not in told.value.message
    assert space.show("route", "show", "table", "all", "proto", "76") == []
    assert not space.inside(paths.of["gateway1"].has_device, TUNNEL)


@pytest.mark.skipif(not HAS_IP6TNL, reason="this kernel has no ip6tnl")
@pytest.mark.parametrize(
    "seg6", [(), ("anchor1",), ("gateway1", "gateway2")], ids=["all", "gateways", "anchor"]
)
def test_a_guest_is_reached_through_it_and_moves(net: Net, seg6: tuple[str, ...]) -> None:
    paths = Tunnels(net, seg6)
    paths.start()
    guest = net.guest("guest1", "gateway1")
    paths.bind(guest, "gateway1")
    assert pings(net["client"], guest.home)
    guest.plug("gateway2")
    paths.bind(guest, "gateway2")
    away = (IPv6Network(guest.home),)
    net["gateway1"].inside(paths.of["gateway1"].set_away, away, net.tunnel("gateway2"))
    assert pings(net["client"], guest.home)
    assert guest.pings(net.ADDRESSES["client"])
    assert pings(net["client"], guest.home, size=1412)
    assert not pings(net["client"], guest.home, size=1413, seconds=2)
    for name, path in paths.of.items():
        net[name].inside(path.withdraw)
        assert not net[name].inside(path.has_device, TUNNEL)
