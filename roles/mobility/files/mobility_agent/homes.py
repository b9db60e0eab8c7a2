# SPDX-License-Identifier: GPL-3.0-or-later
"""Home addresses of both kinds: anchors and their tunnels know IPv6 alone, IPv4 follows a VM by routing."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address
#: A home address as the network of it alone, or a prefix that is all one VM's.
Home = IPv4Network | IPv6Network


def only_ipv6(homes: Iterable[Home]) -> tuple[IPv6Network, ...]:
    """Those that an anchor can be told of."""
    return tuple(home for home in homes if isinstance(home, IPv6Network))


def is_single(home: Home) -> bool:
    """Whether it is one address, and no prefix."""
    return home.prefixlen == home.max_prefixlen


def within(home: Home, prefix: Home) -> bool:
    """Whether all of ``home`` is in ``prefix``; what is of the other kind is not."""
    if isinstance(home, IPv4Network) and isinstance(prefix, IPv4Network):
        return home.subnet_of(prefix)
    return isinstance(home, IPv6Network) and isinstance(prefix, IPv6Network) and home.subnet_of(prefix)
