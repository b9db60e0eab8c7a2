# SPDX-License-Identifier: GPL-3.0-or-later
"""The whole data path of this host: what is wanted, and how to get the kernel there.

Tables, each of our own:

- *hosts* (all packets look here before the main table): VMs that are here -> their bridge; VMs that left
  here, and on an anchor the home prefixes -> the loop link; our tunnel's end -> decapsulation.
- *tunnels* (what came through the loop link): home address -> encapsulated to its care-of address; on a
  gateway everything else -> encapsulated to the anchor in use.
- *holds* (all packets look here before *hosts*, but those that have waited): VMs that are being moved ->
  the hold device, which is gone with this process and takes these routes along.
- *guests* (what VMs on our bridges send): from a home prefix that is not routed here, or to any home
  prefix -> the loop link.

One route replaced in *tunnels* is a hand-over at the anchor; one in *hosts* is it at a gateway.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

from mobility_agent.datapath import filters, judgement, neighbours, routes
from mobility_agent.datapath.comparison import Differences, compare
from mobility_agent.datapath.first_hop import Former
from mobility_agent.datapath.ground import LOOP_OUT, Ground, OuterSource, Rule
from mobility_agent.datapath.hold_device import HOLD, MTU_OCTETS, QUEUE_PACKETS
from mobility_agent.datapath.ipv4 import Ipv4FirstHop, answers_for_others
from mobility_agent.datapath.neighbours import Neighbour
from mobility_agent.datapath.netlink import Request, RouteSocket
from mobility_agent.datapath.routes import MAIN_TABLE, Route
from mobility_agent.datapath.settings import SEG6, PathSettings
from mobility_agent.datapath.wanted import LEAST_OUTER_OCTETS, OUTER_HEADER_OCTETS, Wanted
from mobility_agent.errors import Finding, KernelRefused, MobilityError
from mobility_agent.homes import Address, Home, is_single

logger = logging.getLogger(__name__)


class DataPath:
    """Keeps the kernel as it shall be; every method returns when the kernel has it."""

    def __init__(self, settings: PathSettings) -> None:
        self.settings = settings
        self._wanted = Wanted(settings)
        self._kernel = RouteSocket()
        self._ground = Ground()
        self._first_hop = Ipv4FirstHop(self._kernel)
        self._started = False
        # Of what the kernel refused a change: what stands there is not known any more.
        self._unsure: set[Home] = set()
        self._unsure_standing = False

    # --- what is wanted beside routes ---

    def _rules(self) -> list[Rule]:
        settings, priority = self.settings, self.settings.first_priority
        rules = [
            # What is encapsulated already is on its way out.
            Rule(priority, MAIN_TABLE, LOOP_OUT, _host(settings.address)),
            Rule(priority + 10, settings.tunnels_table, LOOP_OUT),
            # A home address that is bound nowhere: as if we were not there, and not round the loop again.
            Rule(priority + 11, MAIN_TABLE, LOOP_OUT),
            Rule(priority + 110, settings.hosts_table),
        ]
        if settings.bridges:
            rules += [
                # What has waited goes where the VM is now, and does not wait again.
                Rule(priority + 105, settings.hosts_table, HOLD),
                Rule(priority + 106, MAIN_TABLE, HOLD),
                Rule(priority + 109, settings.holds_table),
            ]
        # With a routing daemon every site knows the way to every VM.
        for bridge in settings.bridges if not settings.announce else ():
            for prefix in settings.prefixes:
                if not prefix.native:
                    rules.append(Rule(priority + 111, settings.guests_table, bridge, prefix.network))
                rules.append(Rule(priority + 112, settings.guests_table, bridge, destination=prefix.network))
        return rules

    def _neighbours(self) -> list[Neighbour]:
        found = [
            Neighbour(home.network_address, bridge, mac)
            for home, (bridge, mac) in self._wanted.local.items()
            if mac is not None and is_single(home)
        ]
        return found + self._tunnel_end()

    def _tunnel_end(self) -> list[Neighbour]:
        """The tunnel's end is no address of ours: somebody must answer for it on the link."""
        uplink = self._ground.on_link_device(self.settings.tunnel_address)
        return [] if uplink is None else [Neighbour(self.settings.tunnel_address, uplink)]

    # --- start and stop ---

    def start(self) -> None:
        """Lay the ground and make the kernel hold exactly what was declared. Raises MobilityError."""
        self._lay_ground()
        wanted = self._wanted.standing_routes()
        for home in self._wanted.homes():
            wanted += self._wanted.home_routes(home)
        put, removed = routes.reconcile(self._kernel, [route for route in wanted if self._possible(route)])
        self._reconcile_neighbours()
        self._ground.set_rules(self._rules())
        self._started = True
        self._unsure.clear()
        self._unsure_standing = False
        logger.info("data path: %d routes put, %d removed that nobody wants any more", put, removed)

    async def repair(self) -> None:
        """What :meth:`start` does, once started, and nobody waits for it. Raises MobilityError."""
        self._lay_ground()
        self._ground.set_rules(self._rules())
        found = await compare(self._wanted, self._neighbours, self.has_device)
        if found.standing or self.unsure:
            self.start()
            return
        # Of those nothing is taken for granted.
        self._unsure.update(found.homes)
        self._change(found.homes, [], [])
        known = self._wanted.homes()
        stale = [
            route
            for route in found.routes
            if route.former_priority is not None or route.destination not in known
        ]
        self._kernel.apply([routes.drop(route) for route in stale])
        self._repair_neighbours(found)
        if found.homes or stale:
            logger.info(
                "data path: routes of %d addresses put right, %d removed that nobody wants any more",
                len(found.homes),
                len(stale),
            )

    def _repair_neighbours(self, found: Differences) -> None:
        if not found.neighbours and not found.missing:
            return
        wanted = set(self._neighbours())
        places = {(entry.address, entry.device) for entry in wanted}
        changes = [neighbours.put(entry) for entry in found.missing if entry in wanted]
        gone = [entry for entry in found.neighbours if (entry.address, entry.device) not in places]
        self._kernel.apply(changes + [neighbours.drop(entry) for entry in gone])

    def _lay_ground(self) -> None:
        if self.settings.encapsulation == SEG6:
            # Left by a configuration that said ip6tnl: what is assigned is delivered, not decapsulated.
            self._ground.remove_tunnel()
            source = OuterSource()
            try:
                source.set(self.settings.address)
            finally:
                source.close()
        else:
            inner = self.settings.path_mtu_octets - OUTER_HEADER_OCTETS
            self._ground.make_tunnel(self.settings.tunnel_address, inner)
        self._ground.make_loop(max(self.settings.path_mtu_octets, 1500))
        filters.install(self.settings.tunnel_address, self.settings.peers)

    def _possible(self, route: Route) -> bool:
        present = route.device is None or self.has_device(route.device)
        if not present:
            logger.warning("%s: there is no such bridge yet; it follows when the bridge is there", route)
        return present

    def _reconcile_neighbours(self) -> None:
        present = set(neighbours.read(self._kernel))
        wanted = {entry for entry in self._neighbours() if self._ground.index(entry.device) is not None}
        places = {(entry.address, entry.device) for entry in wanted}
        stale = {entry for entry in present - wanted if (entry.address, entry.device) not in places}
        changes = [neighbours.put(entry) for entry in wanted - present]
        self._kernel.apply(changes + [neighbours.drop(entry) for entry in stale])

    def withdraw(self) -> None:
        """Take everything of ours out of the kernel. Raises the first failure after trying all."""
        failures: list[MobilityError] = []

        def attempt(step: object, *arguments: object) -> None:
            try:
                step(*arguments)  # type: ignore[operator]
            except MobilityError as error:
                failures.append(error)

        attempt(self._ground.set_rules, [])
        attempt(routes.reconcile, self._kernel, [])
        attempt(self._kernel.apply, [neighbours.drop(entry) for entry in neighbours.read(self._kernel)])
        attempt(filters.remove)
        attempt(self._ground.remove_loop)
        if self.settings.encapsulation == SEG6:
            attempt(self._clear_source)
        else:
            attempt(self._ground.remove_tunnel)
        self._started = False
        if failures:
            raise failures[0]

    def _clear_source(self) -> None:
        source = OuterSource()
        try:
            if source.read() == self.settings.address:
                source.set(IPv6Address(0))
        finally:
            source.close()

    def close(self) -> None:
        """Let go of the kernel; what stands there goes on forwarding."""
        self._kernel.close()
        self._ground.close()

    # --- changes while serving ---

    @property
    def unsure(self) -> bool:
        """Whether the kernel refused a change that has not been made good yet."""
        return bool(self._unsure) or self._unsure_standing

    def keep_tunnel_end(self) -> None:
        """Answer for the tunnel's end still: a link that was set down and up again has forgotten it.

        Raises OSError, MobilityError.
        """
        if self._started:
            self._kernel.apply([neighbours.put(entry) for entry in self._tunnel_end()])

    def mend(self) -> bool:
        """Try again what the kernel refused. True when something was mended; raises MobilityError."""
        if not self._started or not self.unsure:
            return False
        self.start()
        return True

    def _change(self, homes: Collection[Home], before: list[Route], more: list[Request]) -> None:
        if not self._started:
            return
        # Of those that the kernel refused before, nothing is taken for granted.
        refused = self._unsure.intersection(homes)
        before = [route for route in before if route.destination not in refused]
        present = before + [route for home in refused for route in self._wanted.places(home)]
        try:
            self._apply(self._now(homes), before, present, more)
        except MobilityError:
            self._unsure.update(homes)
            raise
        self._unsure.difference_update(refused)

    def _apply(
        self, after: list[Route], before: list[Route], present: list[Route], more: Sequence[Request] = ()
    ) -> None:
        """Put what of ``after`` is not in ``before``, then drop what of ``present`` has no successor."""
        places = {(route.destination, route.table) for route in after}
        gone = [route for route in present if (route.destination, route.table) not in places]
        # Into a tunnel only once it is there, out of it before it goes.
        gone.sort(key=lambda route: route.table != self.settings.hosts_table)
        try:
            self._kernel.apply([routes.put(route) for route in after if route not in before])
            self._kernel.apply([*(routes.drop(route) for route in gone), *more])
        except OSError as error:
            names = ", ".join(str(route) for route in after)
            raise KernelRefused(f"{names}: {error}; is the device there? see `ip link`") from error

    def _now(self, homes: Iterable[Home]) -> list[Route]:
        return [route for home in homes for route in self._wanted.home_routes(home)]

    def set_local(self, homes: Iterable[Home], bridge: str, mac: str | None) -> None:
        """The VM with these home addresses is on ``bridge`` here. Raises KernelRefused."""
        homes = tuple(homes)
        before = self._now(homes)
        former = [home for home in homes if self._wanted.local.get(home, (bridge, None))[0] != bridge]
        # Where it was on another bridge, its neighbour there goes.
        left = self._forget_local(former)
        for home in homes:
            self._wanted.local[home] = (bridge, mac)
            self._wanted.remote.pop(home, None)
            self._wanted.away.discard(home)
            self._wanted.lost.discard(home)
        entries = [Neighbour(h.network_address, bridge, mac) for h in homes if mac and is_single(h)]
        if self._started:
            try:
                self._kernel.apply([neighbours.put(entry) for entry in entries])
            except (OSError, MobilityError) as error:
                self._unsure.update(homes)
                if isinstance(error, MobilityError):
                    raise
                raise KernelRefused(f"bridge {bridge}: {error}; is it there? see `ip link`") from error
        self._change(homes, before, left)

    def set_remote(self, homes: Iterable[Home], care_of: IPv6Address) -> None:
        """An anchor's binding, or on a gateway a VM that went there: tunnelled to ``care_of``."""
        homes = tuple(homes)
        before = self._now(homes)
        for home in homes:
            self._wanted.remote[home] = care_of
            if self.settings.anchor:
                self._wanted.bound[home] = care_of
            if self.settings.anchor and care_of != self.settings.tunnel_address:
                # Our own gateway may not know yet where it went: the binding does.
                self._wanted.lost.discard(home)
        self._change(homes, before, [])

    def set_away(self, homes: Iterable[Home], care_of: IPv6Address | None) -> None:
        """The VM left this gateway: what still comes goes to ``care_of``, or by way of the anchor."""
        self._leave(homes, care_of, lost=False)

    def set_lost(self, homes: Iterable[Home]) -> None:
        """The VM left, nobody knows yet where to: what comes is dropped.

        Sent to the anchor it would come back, as long as the anchor believes the VM to be here.
        """
        self._leave(homes, None, lost=True)

    def _leave(self, homes: Iterable[Home], care_of: IPv6Address | None, *, lost: bool) -> None:
        homes = tuple(homes)
        before = self._now(homes)
        for home in homes:
            (self._wanted.lost if lost else self._wanted.away).add(home)
            (self._wanted.away if lost else self._wanted.lost).discard(home)
            if care_of is None:
                # On an anchor the binding stays: it is what says where the VM is.
                if not self.settings.anchor:
                    self._wanted.remote.pop(home, None)
            else:
                self._wanted.remote[home] = care_of
        self._change(homes, before, self._forget_local(homes))

    def clear(self, homes: Iterable[Home]) -> None:
        """Nothing of ours for these addresses any more, but what an anchor on this host has bound."""
        homes = tuple(homes)
        before = self._now(homes)
        for home in homes:
            self._wanted.remote.pop(home, None)
            if home in self._wanted.bound:
                self._wanted.remote[home] = self._wanted.bound[home]
            self._wanted.away.discard(home)
            self._wanted.lost.discard(home)
            self._wanted.held.discard(home)
        forgotten = self._forget_local(homes)
        self._change(homes, before, forgotten)

    def prepare_hold(self) -> None:
        """Make the hold device, which somebody has opened, ready for :meth:`hold`. Raises KernelRefused."""
        self._ground.make_hold(HOLD, MTU_OCTETS, QUEUE_PACKETS)

    def hold(self, homes: Iterable[IPv6Network]) -> None:
        """What comes for these waits in the hold device from now on. Raises KernelRefused."""
        homes = tuple(homes)
        before = self._now(homes)
        self._wanted.held.update(homes)
        self._change(homes, before, [])

    def end_hold(self, homes: Iterable[IPv6Network]) -> None:
        """What comes goes where the VM is again. Raises KernelRefused."""
        homes = tuple(homes)
        before = self._now(homes)
        self._wanted.held.difference_update(homes)
        self._change(homes, before, [])

    def clear_remote(self, homes: Iterable[Home]) -> None:
        """An anchor's binding ended; what a gateway on this host has of them stays."""
        homes = tuple(homes)
        before = self._now(homes)
        for home in homes:
            self._wanted.remote.pop(home, None)
            self._wanted.bound.pop(home, None)
        self._change(homes, before, [])

    def _forget_local(self, homes: Iterable[Home]) -> list[Request]:
        requests: list[Request] = []
        for home in homes:
            local = self._wanted.local.pop(home, None)
            if local is not None and local[1] is not None and is_single(home) and self._started:
                entry = Neighbour(home.network_address, *local)
                # With its bridge the neighbour is gone too.
                with contextlib.suppress(OSError):
                    requests.append(neighbours.drop(entry))
        return requests

    def set_anchor(self, tunnel: IPv6Address | None) -> None:
        """Through which anchor our VMs' packets leave; None: through none, they are told so."""
        if tunnel == self._wanted.anchor_tunnel and not self._unsure_standing:
            return
        before = self._wanted.standing_routes()
        self._wanted.anchor_tunnel = tunnel
        self._replace(before, self._wanted.standing_routes())

    def attract(self, prefixes: Iterable[IPv6Network]) -> None:
        """Let an unreachable route for each prefix stand in the main table, and for no other."""
        before = self._wanted.standing_routes()
        self._wanted.attracted = tuple(prefixes)
        self._replace(before, self._wanted.standing_routes())

    def learn_mtu(self, care_of: IPv6Address, outer_octets: int | None) -> bool:
        """A router said that the path to ``care_of`` carries so much; None: ask the path anew. Changed?"""
        known = self._wanted.mtu_octets.get(care_of)
        if outer_octets is not None and outer_octets >= min(known or 65535, self.settings.path_mtu_octets):
            return False
        homes = [home for home, at in self._wanted.remote.items() if at == care_of]
        before = self._wanted.standing_routes() + self._now(homes)
        if outer_octets is None:
            if self._wanted.mtu_octets.pop(care_of, None) is None:
                return False
        else:
            self._wanted.mtu_octets[care_of] = outer_octets
        self._replace(before, self._wanted.standing_routes() + self._now(homes))
        return True

    def _replace(self, before: list[Route], after: list[Route]) -> None:
        if not self._started:
            return
        if self._unsure_standing:
            # Which of the former ones stand nobody knows: all of them are made right at once.
            self.start()
            return
        try:
            self._apply(after, before, before)
        except MobilityError:
            self._unsure_standing = True
            raise

    def make_first_hop(self, bridge: str, mac: str, addresses: Iterable[IPv6Address]) -> bool:
        """Make this host the first hop on ``bridge``; False while there is no such bridge."""
        there = self._ground.make_first_hop(bridge, mac, addresses)
        if there and self.settings.ipv4_routers:
            self._first_hop.make(bridge, self.settings.ipv4_routers)
        return there

    def to_change(self, bridge: str, mac: str, addresses: Iterable[Address]) -> Former:
        """What :meth:`make_first_hop` is going to change."""
        facts, present = self._ground.bridge_facts(bridge), self._ground.link_mac(bridge)
        if facts is None:
            return Former()
        missing = {*addresses, *self.settings.ipv4_routers} - set(facts.addresses)
        answers = not self.settings.ipv4_routers or answers_for_others(bridge)
        own = present if present != mac else None
        return Former(own, sorted(map(str, missing)), not answers, given=mac.lower())

    def leave_first_hop(self, bridge: str, former: Former) -> None:
        """Undo what was changed. Raises KernelRefused, OSError."""
        if not self.has_device(bridge):
            return
        addresses = [ip_address(address) for address in former.addresses]
        routers = [address for address in addresses if isinstance(address, IPv4Address)]
        self._first_hop.leave(bridge, routers, proxy_arp=former.proxy_arp)
        ipv6 = [address for address in addresses if isinstance(address, IPv6Address)]
        self._ground.leave_first_hop(bridge, former.mac, ipv6)

    def obstacles(self, bridge: str, mac: str) -> list[Finding]:
        """Why this host should not be the first hop on ``bridge``; nothing where it is already."""
        if self._ground.link_mac(bridge) in {None, mac}:
            return []
        return judgement.of_bridge(self.settings, self._ground, bridge)

    def link_identity(self, device: str) -> tuple[str, IPv6Address]:
        """The device's MAC and link-local address. Raises ConfigurationError without either."""
        return self._ground.link_identity(device)

    def has_device(self, device: str) -> bool:
        """Whether there is such a device now."""
        return self._ground.index(device) is not None

    def bridge_came(self, bridge: str) -> None:
        """A bridge is there (again): put what leads to it."""
        homes = [home for home, (device, _unused) in self._wanted.local.items() if device == bridge]
        self._unsure.update(homes)
        self._change(homes, [], [])
        self._reconcile_neighbours()

    def findings(self) -> list[Finding]:
        """What of this host stands in the way; empty when all is well."""
        found = judgement.findings(self.settings, self._ground)
        for care_of, octets in self._wanted.mtu_octets.items():
            if octets < LEAST_OUTER_OCTETS:
                fact = f"carries {octets} octets: larger ones of the VMs' packets are lost in the tunnel"
                way_out = f"have it carry {LEAST_OUTER_OCTETS}; see what tunnels are on the way"
                found.append(Finding(f"path to {care_of}", fact, way_out, "unsupported"))
        return found


def _host(address: IPv6Address) -> IPv6Network:
    return IPv6Network(address)
