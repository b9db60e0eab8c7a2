# SPDX-License-Identifier: GPL-3.0-or-later
"""What mobility_agent.toml says, every fault in it told at once."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path

from mobility_agent.datapath.settings import IP6TNL, SEG6, HomePrefix, PathSettings
from mobility_agent.errors import ConfigurationError, Finding
from mobility_agent.homes import Home
from mobility_agent.key_ring import Ring
from mobility_agent.messages.codec import Key
from mobility_agent.typed_reader import Reader

DEFAULT_PATH = Path("/etc/lifeboat/mobility_agent.toml")
DEFAULT_RUN = Path("/run/lifeboat")
#: RFC 6543 section 4 reserves this MAC for the gateways of Proxy Mobile IPv6: no other device has it.
ROUTER_MAC = "00:00:5e:00:52:13"
FIRST_HOP = IPv6Address("fe80::1")


@dataclass(frozen=True, slots=True)
class Peer:
    """Another agent: where it signals from, where its tunnels end, by which key we know it.

    Between a gateway and an anchor the gateway's key is used both ways. ``key``: the peer's as a gateway, by
    which it is answered until it has spoken; ``accepted_keys``: what it may speak by.
    """

    name: str
    address: IPv6Address
    tunnel_address: IPv6Address
    anchor: bool
    gateway: bool
    key: Key
    accepted_keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class Bridge:
    """A link of VMs on which this gateway is the first hop; ``shared``: other hosts may be on it, too."""

    name: str
    mac: str = ROUTER_MAC
    link_local: IPv6Address = FIRST_HOP
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Prefix:
    """A home prefix; ``link``: on an anchor, the device that is the home link.

    ``link_gateways``: the gateways whose bridge is that link: a VM that is bound to one of them is at home.
    ``watch``: the home router of this prefix, where each has its own.
    """

    network: IPv6Network
    native: bool = False
    link: str | None = None
    link_gateways: frozenset[str] = frozenset()
    watch: IPv6Address | None = None


@dataclass(frozen=True, slots=True)
class Ipv4Prefix:
    """A home prefix of IPv4; ``router``: its VMs' default router, the same at every site."""

    network: IPv4Network
    router: IPv4Address


@dataclass(frozen=True, slots=True)
class Attraction:
    """How an anchor gets the packets for the home prefixes.

    ``never``: somebody else's routing leads them here. ``always``: an unreachable route for each stands in
    the main table, for a routing daemon to announce. ``when-silent``: only while ``watch`` (the home router)
    has not answered for ``silent_seconds``.
    """

    mode: str = "never"
    watch: IPv6Address | None = None
    silent_seconds: float = 3.0


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that the agent is told."""

    name: str
    address: IPv6Address
    tunnel_address: IPv6Address
    gateway: bool
    anchor: bool
    prefixes: tuple[Prefix, ...]
    bridges: tuple[Bridge, ...]
    peers: tuple[Peer, ...]
    attraction: Attraction
    state: Path
    run: Path
    group: str
    hypervisor: str
    lifetime_seconds: int
    heartbeat_seconds: float
    timestamp_window_seconds: float
    forward_seconds: float
    path_mtu_octets: int
    withdraw_on_stop: bool
    announce: bool
    own_key: Key
    #: By what anchors may answer this host as a gateway: more than one while keys are changed.
    own_keys: tuple[Key, ...] = ()
    learn_addresses: bool = False
    encapsulation: str = SEG6
    ipv4_prefixes: tuple[Ipv4Prefix, ...] = ()

    @property
    def networks(self) -> tuple[Home, ...]:
        """All home prefixes, of both kinds."""
        ipv6 = tuple(prefix.network for prefix in self.prefixes)
        return ipv6 + tuple(prefix.network for prefix in self.ipv4_prefixes)

    @property
    def control_socket(self) -> Path:
        """Where the control interface listens."""
        return self.run / "mobility.sock"

    @property
    def partners(self) -> tuple[Peer, ...]:
        """Whom to talk to: the peers and, on a gateway that is an anchor too, this host itself.

        So its own anchor knows of its own VMs as it knows of everybody's, by the same messages.
        """
        if not (self.gateway and self.anchor):
            return self.peers
        key = self.own_key
        itself = Peer(self.name, self.address, self.tunnel_address, True, True, key, (key,))
        # Last: what VMs send leaves by another anchor while there is one.
        return (*self.peers, itself)

    @property
    def anchors(self) -> tuple[Peer, ...]:
        """The anchors, in the order in which they are preferred."""
        return tuple(peer for peer in self.partners if peer.anchor)

    def peer(self, name: str) -> Peer | None:
        """The peer of that name."""
        return next((peer for peer in self.peers if peer.name == name), None)

    def path_settings(self) -> PathSettings:
        """What the data path is built from."""
        return PathSettings(
            address=self.address,
            tunnel_address=self.tunnel_address,
            peers=frozenset(peer.address for peer in self.peers),
            prefixes=tuple(HomePrefix(prefix.network, prefix.native) for prefix in self.prefixes),
            bridges=tuple(bridge.name for bridge in self.bridges) if self.gateway else (),
            shared_bridges=frozenset(bridge.name for bridge in self.bridges if bridge.shared),
            anchor=self.anchor,
            announce=self.announce,
            path_mtu_octets=self.path_mtu_octets,
            encapsulation=self.encapsulation,
            ipv4_routers=tuple(prefix.router for prefix in self.ipv4_prefixes),
        )


def load(path: Path = DEFAULT_PATH) -> Config:
    """The configuration in ``path`` and the keys that it names. Raises ConfigurationError."""
    return _read(path, _text(path), None)


def parse(text: str, keys_text: str) -> Config:
    """As :func:`load`, for files that are not written yet. Raises ConfigurationError."""
    return _read(DEFAULT_PATH, text, keys_text)


def _read(path: Path, text: str, keys_text: str | None) -> Config:
    findings: list[Finding] = []
    top = Reader(_toml(path, text), str(path), findings)
    keys_path = top.path("keys", path.with_name("mobility_keys.toml"))
    keys_toml = _toml(keys_path, _text(keys_path) if keys_text is None else keys_text)
    ring = Ring(Reader(keys_toml, str(keys_path), findings), keys_path)
    if not ring.keys:
        way_out = "set mobility_keys (from Ansible vault)"
        findings.append(Finding(str(keys_path), "holds no key", way_out, "configuration"))
    config = _config(top, ring)
    top.finish()
    _judge(config, path, findings)
    if findings:
        facts = "\n".join(f"  {finding}" for finding in findings)
        raise ConfigurationError(
            f"{path}: {len(findings)} fault(s), nothing was taken from it:\n{facts}", findings
        )
    return config


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        way_out = "the role lifeboat.evacuation.mobility writes it, or give --config"
        raise ConfigurationError(f"{path}: no such file; {way_out}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: cannot be read ({error}); run as root") from error


def _toml(path: Path, text: str) -> dict[str, object]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path}: not valid TOML: {error}; nothing was taken from it") from error


def _config(top: Reader, ring: Ring) -> Config:
    gateway, anchor = top.boolean("gateway", default=False), top.boolean("anchor", default=False)
    peers: list[Peer] = []
    own_key, own_keys = ring.own(top, needed=gateway)
    for reader in top.tables("peers"):
        peer_gateway = reader.boolean("gateway", default=False)
        # A gateway talks to anchors only, by its own key: of other gateways it need not know any.
        key, accepted = ring.of_peer(reader, own_key, needed=anchor and peer_gateway)
        peers.append(
            Peer(
                name=reader.name("name"),
                address=reader.address("address"),
                tunnel_address=reader.address("tunnel_address"),
                anchor=reader.boolean("anchor", default=False),
                gateway=peer_gateway,
                key=key,
                accepted_keys=accepted,
            )
        )
    attraction, paths = top.table("attraction"), top.table("paths")
    mode = attraction.choice("mode", "never", ("never", "always", "when-silent"))
    prefixes = tuple(top.tables("prefixes"))
    unwatched = mode == "when-silent" and not all(reader.has("watch") for reader in prefixes)
    watched = unwatched or attraction.has("watch")
    return Config(
        name=top.name("name"),
        address=top.address("address"),
        tunnel_address=top.address("tunnel_address"),
        gateway=gateway,
        anchor=anchor,
        prefixes=tuple(
            Prefix(
                reader.network("prefix"),
                reader.boolean("native", default=False),
                reader.text("link") if reader.has("link") else None,
                # Asked for by name: taken for away, a VM at home would lose its address to the anchor.
                reader.names("link_gateways") if reader.has("link") else frozenset(),
                reader.address("watch") if reader.has("watch") else None,
            )
            for reader in prefixes
        ),
        bridges=tuple(
            Bridge(
                reader.text("name"),
                reader.mac("mac", ROUTER_MAC),
                reader.link_local("link_local", FIRST_HOP),
                reader.boolean("shared", default=False),
            )
            for reader in top.tables("bridges")
        ),
        peers=tuple(peers),
        attraction=Attraction(
            mode,
            attraction.address("watch") if watched else None,
            attraction.seconds("silent_seconds", 3.0, 1, 3600),
        ),
        state=paths.path("state", Path("/var/lib/lifeboat/mobility")),
        run=paths.path("run", DEFAULT_RUN),
        group=top.text("group", "lifeboat"),
        hypervisor=top.text("hypervisor", "none"),
        lifetime_seconds=top.whole("lifetime_seconds", 120, 8, 3600),
        heartbeat_seconds=top.seconds("heartbeat_seconds", 0.5, 0.05, 60),
        timestamp_window_seconds=top.seconds("timestamp_window_seconds", 10, 0.1, 3600),
        forward_seconds=top.seconds("forward_seconds", 60, 1, 3600),
        path_mtu_octets=top.whole("path_mtu_octets", 1500, 1320, 65535),
        withdraw_on_stop=top.boolean("withdraw_on_stop", default=False),
        announce=top.boolean("announce", default=False),
        own_key=own_key,
        own_keys=own_keys,
        learn_addresses=top.boolean("learn_addresses", default=False),
        encapsulation=top.choice("encapsulation", SEG6, (SEG6, IP6TNL)),
        ipv4_prefixes=tuple(
            Ipv4Prefix(reader.ipv4_network("prefix"), reader.ipv4_address("router"))
            for reader in top.tables("ipv4_prefixes")
        ),
    )


def _judge(config: Config, path: Path, findings: list[Finding]) -> None:
    def fault(subject: str, fact: str, way_out: str) -> None:
        findings.append(Finding(f"{path}: {subject}", fact, way_out, "configuration"))

    if not config.gateway and not config.anchor:
        fault("gateway", "neither a gateway nor an anchor", "set gateway = true or anchor = true")
    if config.gateway and not config.anchors and not config.announce:
        way_out = "add a peer with anchor = true, two are better; or announce = true for a routing daemon"
        fault("peers", "a gateway without any anchor", way_out)
    if config.announce and (config.anchors or config.anchor or not config.gateway):
        way_out = "use either anchors or a routing daemon"
        fault("announce", "is for gateways that have no anchors", way_out)
    if config.learn_addresses and (not config.gateway or config.announce or config.hypervisor == "none"):
        # Nobody else would notice that another VM has the address.
        way_out = "set it to false, or use anchors and libvirt on a gateway"
        fault("learn_addresses", "needs a gateway with anchors and libvirt", way_out)
    if config.gateway and not config.bridges:
        fault("bridges", "a gateway without a bridge of VMs", "add [[bridges]]")
    if not config.prefixes and not config.ipv4_prefixes:
        fault("prefixes", "no home prefix", "add [[prefixes]]")
    _judge_ipv4(config, fault)
    names: dict[str, str] = {}
    addresses: dict[IPv6Address, str] = {config.address: "address", config.tunnel_address: "tunnel_address"}
    if config.address == config.tunnel_address:
        fault("tunnel_address", "is the same as address", "give tunnels an address of their own")
    for peer in config.peers:
        if peer.name in names or peer.name == config.name:
            fault(f"peer {peer.name}", "is there twice, or is this host", "keep each peer once")
        names[peer.name] = peer.name
        for address in (peer.address, peer.tunnel_address):
            if address in addresses:
                fault(
                    f"peer {peer.name}",
                    f"{address} is also that of {addresses[address]}",
                    "give each its own",
                )
            addresses[address] = peer.name
    gateways = {peer.name for peer in config.peers if peer.gateway} | (
        {config.name} if config.gateway else set()
    )
    for index, prefix in enumerate(config.prefixes):
        for name in sorted(prefix.link_gateways - gateways):
            way_out = "name gateways out of the peers, or this host where it is one"
            fault(f"prefix {prefix.network}", f"link_gateways names {name}, which is no gateway", way_out)
        for other in config.prefixes[:index]:
            if prefix.network.overlaps(other.network):
                fault(f"prefix {prefix.network}", f"overlaps {other.network}", "a prefix is on one link only")
        for address, whose in addresses.items():
            if address in prefix.network:
                fault(
                    f"prefix {prefix.network}",
                    f"contains {address} ({whose}): tunnels would lead into themselves",
                    "take addresses that are no home addresses",
                )


def _judge_ipv4(config: Config, fault: Callable[[str, str, str], None]) -> None:
    for index, prefix in enumerate(config.ipv4_prefixes):
        subject = f"prefix {prefix.network}"
        if not config.announce:
            way_out = "give VMs IPv6 addresses, or let routing follow them: announce = true (mobility_bgp_as)"
            fault(subject, "is IPv4, which the tunnels of anchors do not carry", way_out)
        if prefix.router not in prefix.network:
            fault(subject, f"does not contain its router {prefix.router}", "name an address of the prefix")
        for other in config.ipv4_prefixes[:index]:
            if prefix.network.overlaps(other.network):
                fault(subject, f"overlaps {other.network}", "a prefix is on one link only")
