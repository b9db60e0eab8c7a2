# SPDX-License-Identifier: GPL-3.0-or-later
"""What a channel must know: names, addresses, certificates, peers, rates. Plain data; no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from precache_proxy.units import KIB, MIB

DEFAULT_PORT = 4747
# Four for data, one for calls.
DEFAULT_CONNECTIONS = 5
MAXIMUM_CONNECTIONS = 32


class TrafficClass(IntEnum):
    """Who goes first: a class is served only when all before it have nothing to send, but for a floor."""

    CONTROL = 0
    HANDOFF = 1
    MIGRATION = 2
    PRECACHE = 3


@dataclass(frozen=True, slots=True)
class ClassLimits:
    """Bounds of a class: receive window per stream, and what a sender may queue before it has to
    wait (bytes).
    """

    minimum_window_bytes: int
    maximum_window_bytes: int
    send_queue_bytes: int
    short: bool = False  # one bandwidth-delay product instead of two


# MIGRATION is kept short on purpose: QEMU decides on the switch-over by the bandwidth that it sees.
CLASS_LIMITS: dict[TrafficClass, ClassLimits] = {
    TrafficClass.CONTROL: ClassLimits(256 * KIB, 4 * MIB, 256 * KIB),
    TrafficClass.HANDOFF: ClassLimits(256 * KIB, 64 * MIB, 1 * MIB),
    TrafficClass.MIGRATION: ClassLimits(256 * KIB, 32 * MIB, 128 * KIB, short=True),
    TrafficClass.PRECACHE: ClassLimits(256 * KIB, 64 * MIB, 1 * MIB),
}


@dataclass(frozen=True, slots=True)
class RateWindow:
    """From ``start`` to ``end`` (``HH:MM``, local time; may pass midnight) this rate holds; None = no limit.

    ``days`` are those on which the window starts, Monday = 0; empty = every day.
    """

    start: str
    end: str
    rate_bytes_per_second: float | None
    days: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Where a peer listens, and how it may be sent to."""

    host: str
    port: int = DEFAULT_PORT
    connections: int = DEFAULT_CONNECTIONS
    rate_bytes_per_second: float | None = None
    windows: tuple[RateWindow, ...] = ()


@dataclass(slots=True)
class ChannelConfig:
    """A channel's settings. ``listen_address`` empty = every address, IPv6 and IPv4; times in seconds."""

    name: str
    ca_path: Path
    certificate_path: Path
    key_path: Path
    peers: dict[str, PeerAddress] = field(default_factory=dict)
    listen_address: str = ""
    listen_port: int = DEFAULT_PORT
    session_grace_seconds: float = 60.0
    dead_peer_seconds: float = 10.0
    handshake_seconds: float = 10.0
    reconnect_minimum_seconds: float = 0.2
    reconnect_maximum_seconds: float = 10.0
    floor_share: float = 0.05
