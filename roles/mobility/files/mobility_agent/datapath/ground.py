# SPDX-License-Identifier: GPL-3.0-or-later
"""What stands as long as the agent serves: the loop link, policy rules, first-hop addresses, outer source.

The loop link is a veth pair with both ends here. A packet for a tunnel leaves through the one end, by a route
with the tunnel's MTU, and comes in at the other, where it is encapsulated. seg6 encapsulates on input, before
the kernel compares sizes; without the loop a packet-too-big would be about the outer packet and go to this
host. Through the loop the *sender* learns it, about its own packet.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import Any

from pyroute2 import IPRoute, NetlinkError  # type: ignore[import-untyped,import-not-found,unused-ignore]
from pyroute2.netlink import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
    NLM_F_REQUEST,
    genlmsg,
    nla,
)
from pyroute2.netlink.generic import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
    GenericNetlinkSocket,
)

from mobility_agent.datapath.bridges import BridgeFacts
from mobility_agent.datapath.routes import PROTOCOL
from mobility_agent.errors import ConfigurationError, Conflict, KernelRefused, Unsupported

LOOP_IN, LOOP_OUT = "lbtun0", "lbtun1"
TUNNEL = "lbtun2"
LOOP_NEXT_HOP = IPv6Address("fe80::2")
_MODE_NONE = 1
_NO_DUPLICATE_DETECTION = 0x02
_NEIGHBOUR_PERMANENT = 0x80


@dataclass(frozen=True, slots=True)
class Rule:
    """A policy rule of ours: packets that fit look into ``table``."""

    priority: int
    table: int
    device: str | None = None
    source: IPv6Network | None = None
    destination: IPv6Network | None = None


@contextlib.contextmanager
def _told_as(subject: str) -> Iterator[None]:
    try:
        yield
    except NetlinkError as error:
        raise KernelRefused(
            f"{subject}: the kernel refused: {error}; the agent needs CAP_NET_ADMIN"
        ) from error


class Ground:
    """Links, addresses and rules of the network namespace that the agent runs in."""

    def __init__(self) -> None:
        self._route = IPRoute()

    def close(self) -> None:
        """Let go of the kernel."""
        self._route.close()

    def index(self, device: str) -> int | None:
        """The device's number, None where it is not there."""
        # Asked for each of thousands of routes: a system call, not a dump of all links.
        try:
            return socket.if_nametoindex(device)
        except OSError:
            return None

    def make_loop(self, mtu: int) -> None:
        """The loop link, up, without addresses of its own. Raises KernelRefused."""
        with _told_as(f"loop link {LOOP_IN}"):
            if self.index(LOOP_IN) is None:
                self._route.link("add", ifname=LOOP_IN, kind="veth", peer=LOOP_OUT)
            for device in (LOOP_IN, LOOP_OUT):
                index = self._route.link_lookup(ifname=device)[0]
                no_address = {"attrs": [("AF_INET6", {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", _MODE_NONE)]})]}
                self._route.link("set", index=index, mtu=mtu, IFLA_AF_SPEC=no_address)
                self._route.link("set", index=index, state="up")
            other = self._route.get_links(ifname=LOOP_OUT)[0]
            self._route.neigh(
                "replace",
                family=socket.AF_INET6,
                dst=str(LOOP_NEXT_HOP),
                lladdr=other.get_attr("IFLA_ADDRESS"),
                ifindex=self._route.link_lookup(ifname=LOOP_IN)[0],
                state=_NEIGHBOUR_PERMANENT,
            )

    def make_hold(self, device: str, mtu: int, queue_packets: int) -> None:
        """Set a TUN device up, without addresses of its own. Raises KernelRefused."""
        with _told_as(f"device {device}"):
            index = self.index(device)
            if index is None:
                raise KernelRefused(f"device {device}: is gone as soon as it was made; see `ip link`")
            no_address = {"attrs": [("AF_INET6", {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", _MODE_NONE)]})]}
            self._route.link("set", index=index, mtu=mtu, txqlen=queue_packets, IFLA_AF_SPEC=no_address)
            self._route.link("set", index=index, state="up")

    def remove_loop(self) -> None:
        """Take the loop link away, and with it every route through it."""
        index = self.index(LOOP_IN)
        if index is not None:
            with _told_as(f"loop link {LOOP_IN}"):
                self._route.link("del", index=index)

    def make_tunnel(self, address: IPv6Address, mtu: int) -> None:
        """The one device of ip6tnl through which all tunnels go: each route says where to.

        ``address`` is where they end, and so is on the device. Raises Unsupported, KernelRefused.
        """
        if self.index(TUNNEL) is None:
            try:
                self._route.link("add", ifname=TUNNEL, kind="ip6tnl", ip6tnl_collect_metadata=True)
            except NetlinkError as error:
                if error.code != errno.EOPNOTSUPP:
                    raise KernelRefused(f"tunnel {TUNNEL}: the kernel refused: {error}") from error
                raise Unsupported(
                    "tunnels: this kernel has no ip6tnl; load its module ip6_tunnel, or set "
                    "encapsulation to seg6"
                ) from error
        index = self._route.link_lookup(ifname=TUNNEL)[0]
        with _told_as(f"tunnel {TUNNEL}"):
            no_address = {"attrs": [("AF_INET6", {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", _MODE_NONE)]})]}
            self._route.link("set", index=index, mtu=mtu, IFLA_AF_SPEC=no_address)
            self._route.link("set", index=index, state="up")
            if not self.has_address(address):
                self._route.addr(
                    "add", index=index, family=socket.AF_INET6, address=str(address), prefixlen=128
                )

    def remove_tunnel(self) -> None:
        """Take the device of ip6tnl away."""
        index = self.index(TUNNEL)
        if index is not None:
            with _told_as(f"tunnel {TUNNEL}"):
                self._route.link("del", index=index)

    def rules(self) -> set[Rule]:
        """The policy rules that carry our protocol number."""
        found: set[Rule] = set()
        for message in self._route.get_rules(family=socket.AF_INET6):
            if message.get_attr("FRA_PROTOCOL") != PROTOCOL:
                continue
            found.add(
                Rule(
                    priority=message.get_attr("FRA_PRIORITY") or 0,
                    table=message.get_attr("FRA_TABLE") or message["table"],
                    device=message.get_attr("FRA_IIFNAME"),
                    source=_network(message.get_attr("FRA_SRC"), message["src_len"]),
                    destination=_network(message.get_attr("FRA_DST"), message["dst_len"]),
                )
            )
        return found

    def set_rules(self, wanted: Iterable[Rule]) -> None:
        """Make our rules be exactly these. Raises KernelRefused."""
        wanted_set, present = set(wanted), self.rules()
        with _told_as("policy rules"):
            for rule in sorted(wanted_set - present, key=lambda rule: rule.priority):
                self._route.rule("add", **_rule_arguments(rule))
            for rule in present - wanted_set:
                self._route.rule("del", **_rule_arguments(rule))

    def make_first_hop(self, device: str, mac: str, addresses: Iterable[IPv6Address]) -> bool:
        """Give a bridge the router's MAC and link-local addresses, the same at every site (RFC 6543).

        Without duplicate address detection: the same address is *meant* to be at several places. Returns
        False when there is no such device (yet).
        """
        links = self._route.get_links(ifname=device) if self.index(device) is not None else []
        if not links:
            return False
        index = links[0]["index"]
        with _told_as(f"bridge {device}"):
            if str(links[0].get_attr("IFLA_ADDRESS")).lower() != mac.lower():
                self._route.link("set", index=index, address=mac)
            present = {
                IPv6Address(message.get_attr("IFA_ADDRESS"))
                for message in self._route.get_addr(family=socket.AF_INET6, index=index)
            }
            for address in addresses:
                if address not in present:
                    self._route.addr(
                        "add",
                        index=index,
                        family=socket.AF_INET6,
                        address=str(address),
                        prefixlen=64,
                        IFA_FLAGS=_NO_DUPLICATE_DETECTION,
                    )
        return True

    def leave_first_hop(self, device: str, mac: str | None, addresses: Iterable[IPv6Address]) -> None:
        """Take the addresses off a bridge, and give it its own MAC back where it is known."""
        index = self.index(device)
        if index is None:
            return
        with _told_as(f"bridge {device}"):
            for message in self._route.get_addr(family=socket.AF_INET6, index=index):
                if IPv6Address(message.get_attr("IFA_ADDRESS")) in set(addresses):
                    self._route.addr(
                        "del",
                        index=index,
                        family=socket.AF_INET6,
                        address=message.get_attr("IFA_ADDRESS"),
                        prefixlen=message["prefixlen"],
                    )
            if mac is not None:
                self._route.link("set", index=index, address=mac)

    def link_mac(self, device: str) -> str | None:
        """The device's MAC, in lower case; None where it is not there."""
        links = self._route.get_links(ifname=device) if self.index(device) is not None else []
        return str(links[0].get_attr("IFLA_ADDRESS")).lower() if links else None

    def bridge_facts(self, device: str) -> BridgeFacts | None:
        """The bridge's addresses and ports; None where it is not there."""
        index = self.index(device)
        if index is None:
            return None
        addresses = [
            ip_address(message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS"))
            for message in self._route.get_addr(index=index)
        ]
        ports = [
            (str(link.get_attr("IFLA_IFNAME")), str(link.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") or ""))
            for link in self._route.get_links()
            if link.get_attr("IFLA_MASTER") == index
        ]
        return BridgeFacts(tuple(addresses), tuple(sorted(ports)))

    def link_identity(self, device: str) -> tuple[str, IPv6Address]:
        """The device's MAC and link-local address. Raises ConfigurationError without either."""
        links = self._route.get_links(ifname=device) if self.index(device) is not None else []
        for message in self._route.get_addr(family=socket.AF_INET6, index=links[0]["index"]) if links else ():
            address = IPv6Address(message.get_attr("IFA_ADDRESS"))
            if address.is_link_local:
                return str(links[0].get_attr("IFLA_ADDRESS")), address
        raise ConfigurationError(f"link {device}: is not there or has no link-local address; see `ip link`")

    def on_link_device(self, address: IPv6Address) -> str | None:
        """The device on whose link ``address`` would be looked for by neighbour discovery, if any."""
        for message in self._route.get_addr(family=socket.AF_INET6):
            own = IPv6Address(message.get_attr("IFA_ADDRESS"))
            if own.is_link_local or own.is_loopback or message["prefixlen"] == 128 or own == address:
                continue
            if address in IPv6Network((int(own), message["prefixlen"]), strict=False):
                link = self._route.get_links(message["index"])[0]
                return str(link.get_attr("IFLA_IFNAME"))
        return None

    def has_address(self, address: IPv6Address) -> bool:
        """Whether ``address`` is one of this host's own."""
        return any(
            IPv6Address(message.get_attr("IFA_ADDRESS")) == address
            for message in self._route.get_addr(family=socket.AF_INET6)
        )


def _network(address: str | None, length: int) -> IPv6Network | None:
    return IPv6Network((address, length)) if address is not None else None


def _rule_arguments(rule: Rule) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "family": socket.AF_INET6,
        "priority": rule.priority,
        "table": rule.table,
        "protocol": PROTOCOL,
    }
    if rule.device is not None:
        arguments["iifname"] = rule.device
    for name, network in (("src", rule.source), ("dst", rule.destination)):
        if network is not None:
            arguments[name] = str(network.network_address)
            arguments[f"{name}_len"] = network.prefixlen
    return arguments


class _Seg6Message(genlmsg):  # type: ignore[misc]
    """Of the kernel's SEG6 family (linux/seg6_genl.h): the outer source address."""

    nla_map = (
        ("SEG6_ATTR_UNSPEC", "none"),
        ("SEG6_ATTR_DST", "packed"),
        ("SEG6_ATTR_DSTLEN", "int32"),
        ("SEG6_ATTR_HMACKEYID", "uint32"),
        ("SEG6_ATTR_SECRET", "packed"),
        ("SEG6_ATTR_SECRETLEN", "uint8"),
        ("SEG6_ATTR_ALGID", "uint8"),
        ("SEG6_ATTR_HMACINFO", "packed"),
    )

    class packed(nla):  # type: ignore[misc]  # noqa: N801 pyroute2 finds it by this name
        """An IPv6 address as 16 octets."""

        fields = (("value", "16s"),)


_SET_SOURCE, _GET_SOURCE = 3, 4


class OuterSource:
    """The source address of everything that this namespace encapsulates: one for all of seg6."""

    def __init__(self) -> None:
        self._socket = GenericNetlinkSocket()
        try:
            self._socket.bind("SEG6", _Seg6Message)
        except (NetlinkError, OSError, KeyError) as error:
            self._socket.close()
            raise Unsupported(
                f"tunnels: this kernel has no seg6 ({error}); use one with CONFIG_IPV6_SEG6_LWTUNNEL"
            ) from error

    def read(self) -> IPv6Address:
        """The address in force; ``::`` means that the kernel chooses."""
        message = _Seg6Message()
        message["cmd"], message["version"] = _GET_SOURCE, 1
        answer = self._socket.nlm_request(message, msg_type=self._socket.prid, msg_flags=NLM_F_REQUEST)
        return IPv6Address(answer[0].get_attr("SEG6_ATTR_DST"))

    def set(self, address: IPv6Address) -> None:
        """Set it. Raises Conflict when somebody else has set another, KernelRefused."""
        present = self.read()
        if present not in {address, IPv6Address(0)} and address != IPv6Address(0):
            raise Conflict(
                f"tunnels: the outer source address of this host is {present}, set by somebody else; "
                f"tunnels of ours need {address}: clear it with `ip sr tunsrc set ::`, or set address to it"
            )
        message = _Seg6Message()
        message["cmd"], message["version"] = _SET_SOURCE, 1
        message["attrs"] = [("SEG6_ATTR_DST", address.packed)]
        with _told_as(f"outer source address {address}"):
            self._socket.nlm_request(message, msg_type=self._socket.prid, msg_flags=NLM_F_REQUEST | 4)

    def close(self) -> None:
        """Let go of the kernel."""
        self._socket.close()
