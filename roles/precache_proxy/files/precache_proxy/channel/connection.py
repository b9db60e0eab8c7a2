# SPDX-License-Identifier: GPL-3.0-or-later
"""One TCP connection with TLS, on the event loop without a transport in between.

asyncio's TLS transport copies every byte through memory BIOs and buffers what it cannot send; here the
kernel's socket is written only when it can take a chunk, so that a message of a higher class never waits
behind much.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import ssl
import struct
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from precache_proxy.channel.frames import Frame, FrameParser
from precache_proxy.channel.liveness import Liveness
from precache_proxy.errors import LifeboatError, ProtocolError
from precache_proxy.units import KIB, MIB

_READ_BUDGET_BYTES = 1 * MIB
_WRITE_BUDGET_BYTES = 2 * MIB
_TCP_NOTSENT_LOWAT = 25
_TCP_CONGESTION = getattr(socket, "TCP_CONGESTION", 13)
_BBR = "bbr"
_TCP_USER_TIMEOUT = getattr(socket, "TCP_USER_TIMEOUT", 18)


def tune(raw: socket.socket, *, dead_seconds: float) -> str:
    """Socket options for the WAN; the congestion control in force is returned.

    Buffers are left to the kernel's autotuning: setting SO_RCVBUF would pin them at net.core.rmem_max.
    """
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    raw.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, 32 * KIB)
    raw.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, int(dead_seconds * 1000))
    try:
        raw.setsockopt(socket.IPPROTO_TCP, _TCP_CONGESTION, _BBR.encode())
    except OSError:
        pass  # not in this kernel, or not allowed: the host's default serves
    return raw.getsockopt(socket.IPPROTO_TCP, _TCP_CONGESTION, 16).split(b"\0")[0].decode(errors="replace")


@dataclass(frozen=True, slots=True)
class TcpState:
    """What the kernel knows of a connection (struct tcp_info, linux/tcp.h)."""

    serial: int
    round_trip_seconds: float
    least_round_trip_seconds: float
    unacknowledged: int
    acknowledged_bytes: int
    # It makes good for a loss, or has next to nothing under way: the kernel restores what it had before.
    recovers: bool


_serials = itertools.count(1)
# tcpi_ca_state at 1, _snd_mss 16, _unacked 24, _sacked 28, _rtt 68, _snd_cwnd 80, _bytes_acked 120, _min_rtt
# 148; microseconds.
_TCP_INFO = struct.Struct("=xB14xI4xII36xI8xI36xQ20xI")
_TCP_INFO_BYTES = _TCP_INFO.size
# TCP_CA_Recovery and what is worse; the segments that BBR leaves under way while it looks for a round trip.
_RECOVERY, _LEAST_SEGMENTS = 3, 4


class ConnectionOwner(Protocol):
    """What a connection needs of its session."""

    def next_chunk(self, connection: Connection) -> bytes | None:
        """What to send next on this connection."""

    def frame_arrived(self, connection: Connection, frame: Frame) -> None:
        """A whole frame; may raise a LifeboatError, which ends the connection."""

    def protocol_broken(self, error: ProtocolError) -> None:
        """The other side sent nonsense on a connection."""

    def connection_ended(self, connection: Connection, error: BaseException | None) -> None:
        """Closed, by either side."""


class Connection:
    """An established (hello is over) connection of a session."""

    def __init__(
        self, tls: ssl.SSLSocket, slot: int, congestion_control: str, owner: ConnectionOwner
    ) -> None:
        self.slot = slot
        self.serial = next(_serials)
        self.congestion_control = congestion_control
        self.synced = False  # the peer has told what it has; numbered frames may go
        self.urgent: deque[bytes] = deque()
        self.received_at = time.monotonic()
        self.liveness = Liveness()
        self.pinged_at = 0.0
        self.carried_bytes = 0  # both directions, without TLS
        self.closed = False
        self._tls = tls
        self._descriptor = tls.fileno()
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._parser = FrameParser()
        self._chunk: bytes | None = None
        self._writing = False
        self._write_needs_read = False
        self._low_water = 32 * KIB

    def start(self) -> None:
        """Begin to read and write."""
        self._loop.add_reader(self._descriptor, self._on_readable)
        # TLS may already hold decrypted bytes that came with the hello: the poll would not tell.
        self._loop.call_soon(self._on_readable)
        self.pump()

    def tcp_state(self) -> TcpState:
        """Round trip and progress as the kernel sees them."""
        info = self._tls.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        state, segment, unacknowledged, selectively, round_trip, window, acknowledged, least = (
            _TCP_INFO.unpack_from(info)
        )
        # Behind a loss the cumulative acknowledgement stands still, although most of it arrives.
        acknowledged += selectively * segment
        recovers = state >= _RECOVERY or window <= _LEAST_SEGMENTS
        return TcpState(
            self.serial, round_trip / 1e6, least / 1e6, unacknowledged, acknowledged, recovers=recovers
        )

    def renew_congestion_control(self) -> None:
        """Let BBR begin anew with the window and the round trip that are known.

        Where it has not seen a shorter round trip for 10 s it keeps four packets under way for 0.2 s to look
        for one (PROBE_RTT; Cardwell et al., 2016), on all connections about together. Who paces them by the
        path's own queue knows the round trip, and loses the line for so long.
        """
        if self.congestion_control != _BBR or self.closed:
            return
        try:
            # The same name again would change nothing.
            for name in (b"reno", _BBR.encode()):
                self._tls.setsockopt(socket.IPPROTO_TCP, _TCP_CONGESTION, name)
        except OSError:
            return  # not allowed any more: what is in force serves as well

    @property
    def busy(self) -> bool:
        """A chunk waits for the socket: it will ask for more by itself."""
        return self._chunk is not None

    def set_low_water(self, count_bytes: int) -> None:
        """How much unsent data the kernel may hold before the socket counts as full."""
        if not self.closed and not 0.5 < count_bytes / self._low_water < 2:
            self._low_water = count_bytes
            self._tls.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, count_bytes)

    def pump(self) -> None:
        """Send as much as the socket takes."""
        budget = _WRITE_BUDGET_BYTES
        while not self.closed:
            if self._chunk is None:
                self._chunk = self._owner.next_chunk(self)
                if self._chunk is None:
                    self._want_writable(False)
                    return
            if budget <= 0:
                self._want_writable(True)
                return
            try:
                # All or nothing: OpenSSL keeps its place and must be given the same chunk again.
                sent = self._tls.send(self._chunk)
                budget -= sent
                self.carried_bytes += sent
                self._chunk = None
                self._write_needs_read = False
            except ssl.SSLWantWriteError:
                self._want_writable(True)
                return
            except ssl.SSLWantReadError:
                self._write_needs_read = True
                self._want_writable(False)
                return
            except OSError as error:
                self.close(error)
                return

    def close(self, error: BaseException | None = None) -> None:
        """Close at once; the session is told."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._descriptor)
        self._loop.remove_writer(self._descriptor)
        self._chunk = None
        self._tls.close()
        self._owner.connection_ended(self, error)

    def _gone(self) -> bool:
        # A call, because the type checker does not know that a frame may close the connection.
        return self.closed

    def _want_writable(self, wanted: bool) -> None:
        if wanted != self._writing:
            self._writing = wanted
            if wanted:
                self._loop.add_writer(self._descriptor, self.pump)
            else:
                self._loop.remove_writer(self._descriptor)

    def _on_readable(self) -> None:
        budget = _READ_BUDGET_BYTES
        try:
            while budget > 0 and not self.closed:
                count = self._tls.recv_into(self._parser.buffer())
                if count == 0:
                    self.close(ConnectionResetError("closed by the other side"))
                    return
                budget -= count
                self.carried_bytes += count
                for frame in self._parser.received(count):
                    self._owner.frame_arrived(self, frame)
                    if self._gone():
                        return
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLWantWriteError:
            self._want_writable(True)
        except ProtocolError as error:
            self._owner.protocol_broken(error)
            self.close(error)
            return
        except (OSError, LifeboatError) as error:
            self.close(error)
            return
        if budget < _READ_BUDGET_BYTES:
            self.received_at = time.monotonic()
        if not self.closed:
            if self._tls.pending():
                self._loop.call_soon(self._on_readable)
            if self._write_needs_read:
                self._write_needs_read = False
                self.pump()
