# SPDX-License-Identifier: GPL-3.0-or-later
"""The configuration file (TOML): read whole, judged whole, every fault a finding, nothing half taken.

Durations are seconds or text like ``20m``; sizes are bytes or text like ``8GiB``; rates are bytes per
second or text like ``400Mbit/s``.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from datetime import time
from pathlib import Path

from precache_proxy.errors import ConfigurationError, Finding
from precache_proxy.typed_reader import REQUIRED, Reader
from precache_proxy.units import GIB, MIB

DEFAULT_PATH = Path("/etc/lifeboat/precache_proxy.toml")
DEFAULT_PORT = 4747
WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
# What goes into a certificate's subject alternative name and into file names.
NAME_PATTERN = re.compile(r"^[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?$")


@dataclass(frozen=True)
class ListenConfig:
    """Where peers reach this proxy; an empty address is every address, IPv6 and IPv4."""

    address: str = ""
    port: int = DEFAULT_PORT


@dataclass(frozen=True)
class TlsConfig:
    """The private CA of the sites and this proxy's certificate and key (PEM)."""

    ca: Path = Path("/etc/lifeboat/pki/ca.crt")
    certificate: Path = Path("/etc/lifeboat/pki/host.crt")
    key: Path = Path("/etc/lifeboat/pki/host.key")


@dataclass(frozen=True)
class PathsConfig:
    """Durable state, and what may be gone after a reboot."""

    state: Path = Path("/var/lib/lifeboat")
    run: Path = Path("/run/lifeboat")

    @property
    def control_socket(self) -> Path:
        """The UNIX socket of the control API."""
        return self.run / "control.sock"

    @property
    def lock(self) -> Path:
        """Held (flock) by the running proxy."""
        return self.run / "proxy.lock"


@dataclass(frozen=True)
class ControlConfig:
    """Who, besides root, may use the control socket."""

    group: str = "lifeboat"


@dataclass(frozen=True)
class HypervisorConfig:
    """The libvirt that we serve, and the user that its QEMU runs as (None: found out)."""

    uri: str = "qemu:///system"
    qemu_user: str | None = None


@dataclass(frozen=True)
class StoreConfig:
    """Replicas of the peers' VMs."""

    directory: Path = Path("/var/lib/lifeboat/store")
    keep_generations: int = 2
    minimum_free_bytes: int = 1 * GIB


@dataclass(frozen=True)
class SourceConfig:
    """Protection of the VMs that run here."""

    rpo_seconds: float = 15.0
    scratch_directory: Path = Path("/var/lib/lifeboat/scratch")
    scratch_limit_bytes: int = 4 * GIB
    pass_limit_seconds: float = 60.0
    slice_bytes: int = 256 * MIB


@dataclass(frozen=True)
class EvacuationConfig:
    """Moving running VMs. ``presume_source_dead_after_seconds`` None: never."""

    stall_seconds: float = 10.0
    presume_source_dead_after_seconds: float | None = None


@dataclass(frozen=True)
class MobilityConfig:
    """The mobility agent of this host; None: VMs' addresses are somebody else's business.

    ``wait_seconds``: how long one that does not answer may hold an arrived VM up.
    """

    socket: Path | None = None
    wait_seconds: float = 2.0


@dataclass(frozen=True)
class RateWindow:
    """A time of day, local, on some weekdays (0 = Monday), at which another rate holds.

    An end at or before the start is on the next day.
    """

    start: time
    end: time
    days: frozenset[int]
    rate_bytes_per_second: float | None


@dataclass(frozen=True)
class PeerConfig:
    """A hypervisor at another site. A rate of None is no limit."""

    name: str
    address: str
    port: int = DEFAULT_PORT
    connections: int = 5
    rate_bytes_per_second: float | None = None
    windows: tuple[RateWindow, ...] = ()


@dataclass(frozen=True)
class Config:
    """Everything that precache_proxy.toml says."""

    name: str
    site: str
    listen: ListenConfig = field(default_factory=ListenConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    hypervisor: HypervisorConfig = field(default_factory=HypervisorConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    evacuation: EvacuationConfig = field(default_factory=EvacuationConfig)
    mobility: MobilityConfig = field(default_factory=MobilityConfig)
    peers: tuple[PeerConfig, ...] = ()

    def peer(self, name: str) -> PeerConfig | None:
        """The peer of that name, or None."""
        return next((peer for peer in self.peers if peer.name == name), None)


def load(path: Path = DEFAULT_PATH) -> Config:
    """The configuration in ``path``. Raises ConfigurationError with every fault found."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigurationError(
            f"{path}: no such file; the role lifeboat.evacuation.precache_proxy writes it, or give --config"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: cannot be read ({error}); run as root or give --config") from error
    return parse(text, str(path))


def parse(text: str, file_name: str = "precache_proxy.toml") -> Config:
    """The configuration that ``text`` says. Raises ConfigurationError with every fault found."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(
            f"{file_name}: not valid TOML: {error}; nothing was taken from it"
        ) from error
    findings: list[Finding] = []
    config = _config(Reader(table, file_name, "", findings))
    _judge_peers(config, file_name, findings)
    if findings:
        facts = "\n".join(f"  {finding}" for finding in findings)
        raise ConfigurationError(
            f"{file_name}: {len(findings)} fault(s), nothing was taken from it:\n{facts}", findings
        )
    return config


def _config(top: Reader) -> Config:
    paths_reader = top.table("paths")
    state = paths_reader.path("state", PathsConfig.state)
    config = Config(
        name=top.name("name", NAME_PATTERN),
        site=top.name("site", NAME_PATTERN),
        paths=PathsConfig(state=state, run=paths_reader.path("run", PathsConfig.run)),
        listen=_listen(top.table("listen")),
        tls=_tls(top.table("tls")),
        control=ControlConfig(group=top.table("control").text("group", ControlConfig.group)),
        hypervisor=_hypervisor(top.table("hypervisor")),
        store=_store(top.table("store"), state),
        source=_source(top.table("source"), state),
        evacuation=_evacuation(top.table("evacuation")),
        mobility=_mobility(top.table("mobility")),
        peers=tuple(_peer(reader) for reader in top.tables("peers")),
    )
    top.finish()
    return config


def _listen(reader: Reader) -> ListenConfig:
    return ListenConfig(
        address=reader.text("address", ListenConfig.address, empty=True),
        port=reader.integer("port", DEFAULT_PORT, 1, 65535),
    )


def _tls(reader: Reader) -> TlsConfig:
    return TlsConfig(
        ca=reader.path("ca", TlsConfig.ca),
        certificate=reader.path("certificate", TlsConfig.certificate),
        key=reader.path("key", TlsConfig.key),
    )


def _hypervisor(reader: Reader) -> HypervisorConfig:
    user = reader.text("qemu_user", "", empty=True)
    return HypervisorConfig(uri=reader.text("uri", HypervisorConfig.uri), qemu_user=user or None)


def _store(reader: Reader, state: Path) -> StoreConfig:
    return StoreConfig(
        directory=reader.path("directory", state / "store"),
        keep_generations=reader.integer("keep_generations", StoreConfig.keep_generations, 1, 64),
        minimum_free_bytes=reader.size("minimum_free_bytes", StoreConfig.minimum_free_bytes, 0),
    )


def _source(reader: Reader, state: Path) -> SourceConfig:
    return SourceConfig(
        rpo_seconds=reader.duration("rpo_seconds", SourceConfig.rpo_seconds, 1, 30 * 86400),
        scratch_directory=reader.path("scratch_directory", state / "scratch"),
        scratch_limit_bytes=reader.size("scratch_limit_bytes", SourceConfig.scratch_limit_bytes, 64 * MIB),
        pass_limit_seconds=reader.duration("pass_limit_seconds", SourceConfig.pass_limit_seconds, 1, 3600),
        slice_bytes=reader.size("slice_bytes", SourceConfig.slice_bytes, 1 * MIB),
    )


def _evacuation(reader: Reader) -> EvacuationConfig:
    return EvacuationConfig(
        stall_seconds=reader.duration("stall_seconds", EvacuationConfig.stall_seconds, 1, 600),
        presume_source_dead_after_seconds=reader.optional_duration(
            "presume_source_dead_after_seconds", 300, 30 * 86400
        ),
    )


def _mobility(reader: Reader) -> MobilityConfig:
    configured = reader.text("socket", "", empty=True)
    return MobilityConfig(
        socket=reader.path("socket", Path("/run/lifeboat/mobility.sock")) if configured else None,
        wait_seconds=reader.duration("wait_seconds", MobilityConfig.wait_seconds, 0.1, 60),
    )


def _peer(reader: Reader) -> PeerConfig:
    return PeerConfig(
        name=reader.name("name", NAME_PATTERN),
        address=reader.text("address", REQUIRED),
        port=reader.integer("port", DEFAULT_PORT, 1, 65535),
        connections=reader.integer("connections", PeerConfig.connections, 1, 32),
        rate_bytes_per_second=reader.rate("rate_bytes_per_second"),
        windows=tuple(_window(window) for window in reader.tables("windows")),
    )


def _window(reader: Reader) -> RateWindow:
    return RateWindow(
        start=reader.clock("start"),
        end=reader.clock("end"),
        days=frozenset(WEEKDAYS.index(day) for day in reader.choices("days", WEEKDAYS, WEEKDAYS)),
        rate_bytes_per_second=reader.rate("rate_bytes_per_second"),
    )


def _judge_peers(config: Config, file_name: str, findings: list[Finding]) -> None:
    seen: set[str] = set()
    for peer in config.peers:
        subject = f"{file_name}: peer {peer.name}"
        if peer.name and peer.name == config.name:
            findings.append(
                Finding(subject, "is this proxy itself", "name a hypervisor at another site", "configuration")
            )
        if peer.name and peer.name in seen:
            findings.append(
                Finding(subject, "is there twice", "keep one [[peers]] of that name", "configuration")
            )
        seen.add(peer.name)
