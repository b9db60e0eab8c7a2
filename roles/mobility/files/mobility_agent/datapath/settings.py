# SPDX-License-Identifier: GPL-3.0-or-later
"""What a data path is built from; importable where there is no pyroute2."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network

#: How packets are put into packets, as RFC 2473 has it: by the kernel's seg6, or by a device of ip6_tunnel.
SEG6, IP6TNL = "seg6", "ip6tnl"


@dataclass(frozen=True, slots=True)
class HomePrefix:
    """A home prefix; ``native``: this site's own routing carries what its VMs send."""

    network: IPv6Network
    native: bool = False


@dataclass(frozen=True, slots=True)
class PathSettings:
    """What the data path is built from.

    ``announce``: a routing daemon takes the VMs' routes out of the main table, and leads what they send.
    ``shared_bridges``: those of ``bridges`` that may lead to other hosts, too.
    ``ipv4_routers``: addresses of this gateway on every bridge, the first hop of IPv4 home prefixes.
    """

    address: IPv6Address
    tunnel_address: IPv6Address
    peers: frozenset[IPv6Address]
    prefixes: tuple[HomePrefix, ...]
    bridges: tuple[str, ...] = ()
    shared_bridges: frozenset[str] = frozenset()
    anchor: bool = False
    announce: bool = False
    path_mtu_octets: int = 1500
    encapsulation: str = SEG6
    ipv4_routers: tuple[IPv4Address, ...] = ()
    first_table: int = 7600
    first_priority: int = 890

    @property
    def hosts_table(self) -> int:
        """VMs here and gone."""
        return self.first_table

    @property
    def tunnels_table(self) -> int:
        """What is encapsulated, and to whom."""
        return self.first_table + 1

    @property
    def guests_table(self) -> int:
        """What VMs send."""
        return self.first_table + 2

    @property
    def holds_table(self) -> int:
        """What waits while a VM is moved."""
        return self.first_table + 3
