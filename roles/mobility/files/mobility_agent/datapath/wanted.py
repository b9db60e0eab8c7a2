# SPDX-License-Identifier: GPL-3.0-or-later
"""What the data path shall be, and which routes that takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Address, IPv6Network

from mobility_agent.datapath.ground import LOOP_IN, LOOP_NEXT_HOP, LOOP_OUT, TUNNEL
from mobility_agent.datapath.hold_device import HOLD
from mobility_agent.datapath.routes import DEFAULT, MAIN_TABLE, Kind, Route
from mobility_agent.datapath.settings import SEG6, PathSettings
from mobility_agent.homes import Home

OUTER_HEADER_OCTETS = 40
_MINIMUM_MTU = 1280
#: What a path must carry: of less no sender can be told, and nobody fragments the outer packet.
LEAST_OUTER_OCTETS = _MINIMUM_MTU + OUTER_HEADER_OCTETS


@dataclass(slots=True)
class Wanted:
    """The state that the kernel shall have."""

    settings: PathSettings
    local: dict[Home, tuple[str, str | None]] = field(default_factory=dict)
    remote: dict[Home, IPv6Address] = field(default_factory=dict)
    #: On an anchor, where its bindings say that it is: what a gateway on the same host says goes before.
    bound: dict[Home, IPv6Address] = field(default_factory=dict)
    away: set[Home] = field(default_factory=set)
    lost: set[Home] = field(default_factory=set)
    #: What comes for these waits, wherever they are led otherwise.
    held: set[Home] = field(default_factory=set)
    attracted: tuple[IPv6Network, ...] = ()
    anchor_tunnel: IPv6Address | None = None
    mtu_octets: dict[IPv6Address, int] = field(default_factory=dict)

    def homes(self) -> set[Home]:
        """Every home address of which anything is wanted."""
        return self.local.keys() | self.remote.keys() | self.away | self.lost | self.held

    def _inner_mtu(self, care_of: IPv6Address | None) -> int:
        outer = self.settings.path_mtu_octets
        if care_of is not None:
            outer = min(outer, self.mtu_octets.get(care_of, outer))
        return max(outer - OUTER_HEADER_OCTETS, _MINIMUM_MTU)

    def _into_tunnel(self, destination: IPv6Network, care_of: IPv6Address) -> Route:
        settings = self.settings
        if settings.encapsulation == SEG6:
            return Route(destination, settings.tunnels_table, LOOP_OUT, segment=care_of)
        return Route(
            destination, settings.tunnels_table, TUNNEL, segment=care_of, outer_source=settings.address
        )

    def _into_loop(self, destination: IPv6Network, table: int, care_of: IPv6Address | None) -> Route:
        return Route(destination, table, LOOP_IN, LOOP_NEXT_HOP, mtu=self._inner_mtu(care_of))

    def home_routes(self, home: Home) -> list[Route]:
        """A home address's routes, tunnels first, and last what goes before all of them."""
        waiting = [Route(home, self.settings.holds_table, HOLD)] if home in self.held else []
        return self._leading_routes(home) + waiting

    def _leading_routes(self, home: Home) -> list[Route]:
        settings = self.settings
        local = self.local.get(home)
        if isinstance(home, IPv4Network):
            # Routing alone carries it: no table before the main one, no tunnel to where it went.
            return [Route(home, MAIN_TABLE, local[0])] if local is not None else []
        if local is not None:
            found = [Route(home, settings.hosts_table, local[0])]
            if settings.announce:
                found.append(Route(home, MAIN_TABLE, local[0]))
            return found
        if home in self.lost:
            return [Route(home, settings.hosts_table, kind=Kind.BLACKHOLE)]
        care_of = self.remote.get(home)
        found = []
        if care_of is not None and care_of != settings.tunnel_address:
            found.append(self._into_tunnel(home, care_of))
        # Where the prefix leads into the loop anyway, one route less for each VM.
        special = self._inner_mtu(care_of) != self._inner_mtu(None)
        if home in self.away or (found and (special or not settings.anchor)):
            found.append(self._into_loop(home, settings.hosts_table, care_of))
        return found

    def standing_routes(self) -> list[Route]:
        """What does not depend on any VM."""
        settings = self.settings
        found = []
        if settings.encapsulation == SEG6:
            end = IPv6Network(settings.tunnel_address)
            found.append(Route(end, settings.hosts_table, LOOP_OUT, decapsulate=True))
        if settings.anchor:
            found += [
                self._into_loop(prefix.network, settings.hosts_table, None) for prefix in settings.prefixes
            ]
        found += [Route(prefix, MAIN_TABLE, kind=Kind.UNREACHABLE) for prefix in self.attracted]
        anchor = self.anchor_tunnel
        if anchor == settings.tunnel_address:
            # This host is the anchor: what VMs send leaves by its own routing.
            found.append(Route(DEFAULT, settings.guests_table, kind=Kind.THROW))
        elif anchor is not None:
            found.append(self._into_tunnel(DEFAULT, anchor))
            found.append(self._into_loop(DEFAULT, settings.guests_table, anchor))
        elif settings.bridges and not settings.announce:
            found.append(Route(DEFAULT, settings.guests_table, kind=Kind.UNREACHABLE))
        return found

    def places(self, home: Home) -> list[Route]:
        """Wherever routes of a home address may stand: what is not wanted of it is removed from there."""
        if isinstance(home, IPv4Network):
            return [Route(home, MAIN_TABLE)]
        settings = self.settings
        tables = (settings.hosts_table, settings.tunnels_table, settings.holds_table)
        found = [Route(home, table) for table in tables]
        return [*found, Route(home, MAIN_TABLE)] if settings.announce else found
