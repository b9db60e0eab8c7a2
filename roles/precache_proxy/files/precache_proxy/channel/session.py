# SPDX-License-Identifier: GPL-3.0-or-later
"""A session: the streams that one side opened, and the TCP connections that carry them.

It outlives its connections. What was sent on a connection that broke, and is not acknowledged, goes again on
another; a new connection carries numbered frames only after each side has told what it has (acknowledgements,
then SYNC).
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Protocol

from precache_proxy.channel.chunk_size import ChunkSize
from precache_proxy.channel.connection import Connection
from precache_proxy.channel.counters import LinkCounters
from precache_proxy.channel.dues import Dues
from precache_proxy.channel.frames import (
    HEADER,
    SEQUENCED,
    Frame,
    FrameFlag,
    FrameType,
    pack,
    pack_acknowledge,
    pack_header,
    pack_json,
    pack_u64,
    unpack_json,
    unpack_u64,
)
from precache_proxy.channel.liveness import SilenceWatch
from precache_proxy.channel.pacer import Pacer
from precache_proxy.channel.scheduler import Scheduler
from precache_proxy.channel.settings import TrafficClass
from precache_proxy.channel.stream import Stream
from precache_proxy.channel.stream_table import StreamTable
from precache_proxy.channel.window import RoundTrip
from precache_proxy.errors import LifeboatError, ProtocolError, from_dict
from precache_proxy.units import GIB

log = logging.getLogger(__name__)

# AES-GCM keys serve for 2^24.5 records (RFC 8446, 5.5); far below that a connection is replaced.
_RENEW_BYTES = 128 * GIB
# With fewer, a connection for calls only would take half of what copies have, or all.
_LEAST_FOR_CALLS = 3


class SessionOwner(Protocol):
    """What a session needs of its link."""

    def stream_opened(self, stream: Stream) -> None:
        """The peer has opened a stream."""

    def connection_lost(self, session: Session, error: BaseException | None) -> None:
        """A connection is gone; the session still knows its streams."""

    def connection_synced(self, session: Session) -> None:
        """A connection carries streams now."""

    def session_broken(self, session: Session, error: LifeboatError) -> None:
        """One side said what the other does not understand, or goes: the session cannot go on."""


class Session:
    """``dialed``: we dialled it and open its streams; else the peer did, and opens them."""

    def __init__(
        self,
        identifier: str,
        peer: str,
        *,
        dialed: bool,
        owner: SessionOwner,
        counters: LinkCounters,
        pacer: Pacer,
        floor_share: float,
    ) -> None:
        self.identifier = identifier
        self.peer = peer
        self.dialed = dialed
        self.peer_instance = ""  # set by the first connection
        self.established = False  # dialled: the peer accepted a connection of it at least once
        self.connections: dict[int, Connection] = {}
        self.round_trip = RoundTrip()
        self._table = StreamTable(self, peer, ours=dialed, counters=counters, round_trip=self.round_trip)
        self.streams = self._table.streams
        self.closed = False
        self.empty_since = time.monotonic()
        self.congestion_control = ""
        self._owner = owner
        self._counters = counters
        self._pacer = pacer
        self._loop = asyncio.get_running_loop()
        self._scheduler = Scheduler(floor_share)
        self._dues = Dues(self.wake)
        self._pumping = False
        self._size = ChunkSize(time.monotonic())
        self._silence = SilenceWatch(time.monotonic())
        self._sent_wire_bytes = 0

    # -- streams

    def open_stream(
        self,
        kind: str,
        traffic_class: TrafficClass,
        header: dict[str, Any],
        label: str,
        window_bytes: int | None,
    ) -> Stream:
        """A new stream of ours. Raises Conflict when too many are open, InvalidInput on a long header."""
        stream = self._table.open(kind, traffic_class, header, label, window_bytes)
        self.activate(stream)
        return stream

    def activate(self, stream: Stream) -> None:
        """The stream has something to send."""
        if not self.closed and stream.has_work and self._scheduler.activate(stream):
            self.wake()

    def reclassify(self, stream: Stream, before: TrafficClass) -> None:
        """The stream's class has changed."""
        self._scheduler.remove(stream, before)
        self.activate(stream)

    def owe_acknowledgement(self, stream: Stream, *, soon: bool) -> None:
        """Tell the peer what has arrived: at once, or with what else goes within 10 ms."""
        if self.closed or stream.identifier not in self.streams:
            return
        self._dues.acknowledge(stream, soon=soon)

    def announce_reset(self, stream: Stream, error: LifeboatError) -> None:
        """Tell the peer until it has confirmed."""
        self._drop(stream)
        if not self.closed:
            self._dues.reset(stream, error)

    def forget(self, stream: Stream) -> None:
        """Both halves are over: tell the peer so once more, then know it no longer."""
        if stream.identifier in self.streams:
            frame = pack_acknowledge(stream.identifier, *stream.acknowledgement())
            self._drop(stream)
            self._dues.farewell([frame])

    def _drop(self, stream: Stream) -> None:
        self.streams.pop(stream.identifier, None)
        self._dues.forget(stream)
        self._scheduler.remove(stream, stream.traffic_class)

    def count_acknowledged(self, raw_bytes: int) -> None:
        """The peer has these bytes."""
        self._counters.acknowledged_raw_bytes += raw_bytes

    # -- connections

    def attach(self, connection: Connection) -> None:
        """Take an established connection into its slot; tell the peer what we have, then SYNC."""
        before = self.connections.pop(connection.slot, None)
        if before is not None:
            before.close(ConnectionResetError("replaced by a newer connection"))
        self.connections[connection.slot] = connection
        self.congestion_control = connection.congestion_control
        for stream in self.streams.values():
            if stream.opened:
                connection.urgent.append(pack_acknowledge(stream.identifier, *stream.acknowledgement()))
        connection.urgent.extend(self._dues.unconfirmed_resets)
        connection.urgent.append(pack(FrameType.SYNC))
        self._ping(connection)
        connection.start()

    def connection_ended(self, connection: Connection, error: BaseException | None) -> None:
        """Closed, by either side: what it carried and nobody acknowledged goes again."""
        if self.connections.get(connection.slot) is connection:
            del self.connections[connection.slot]
        if self.closed:
            return
        if not self.connections:
            self.empty_since = time.monotonic()
        self._give_again(connection)
        self._owner.connection_lost(self, error)

    def _give_again(self, connection: Connection) -> None:
        """What this connection was given may never come: it goes again on the others."""
        for stream in list(self.streams.values()):
            stream.connection_lost(connection)
        self._dues.repeat(self.streams.values())
        self._dues.farewell(connection.liveness.take_unproved())
        self.wake()

    def protocol_broken(self, error: ProtocolError) -> None:
        """The peer sent nonsense, which would come again on every connection: give the session up."""
        log.warning("session with %s is given up: %s", self.peer, error.message)
        self.goodbye(error)
        self._owner.session_broken(self, error)

    def fail(self, error: LifeboatError) -> None:
        """The session is over: every stream is reset with this error."""
        self.closed = True
        for connection in list(self.connections.values()):
            connection.close(error)
        for stream in list(self.streams.values()):
            stream.fail(error)
        self.streams.clear()
        self._dues.clear()

    def goodbye(self, error: LifeboatError) -> None:
        """Tell the peer that this process ends, as far as the sockets take it now."""
        frame = pack(FrameType.GOODBYE, pack_json(error.as_dict()))
        for connection in list(self.connections.values()):
            connection.urgent.append(frame)
            if not connection.busy:
                connection.pump()

    # -- sending

    @property
    def highest_waiting(self) -> TrafficClass:
        """For the link: whose session goes first when the rate allows something again."""
        highest = self._scheduler.highest()
        return TrafficClass.PRECACHE if highest is None else highest

    @property
    def sent_wire_bytes(self) -> int:
        """Since the session began."""
        return self._sent_wire_bytes

    @property
    def has_backlog(self) -> bool:
        """Something waits to be sent."""
        return self._scheduler.highest() is not None and bool(self.connections)

    def wake(self) -> None:
        """There is something to send: ask the connections, once in this turn of the loop."""
        if not self._pumping and self.connections:
            self._pumping = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping = False
        for connection in self._likeliest_first():
            if not connection.busy:
                connection.pump()

    def _likeliest_first(self) -> list[Connection]:
        """The one that heard from the peer last is the least likely to be stuck, for what is told once."""
        return sorted(self.connections.values(), key=lambda each: (each.liveness.silent, -each.received_at))

    def _connection_for_calls(self) -> Connection | None:
        """The one that carries no class but control, where there are three at least.

        Behind a copy a call would wait in a socket: most of all in one whose congestion window is new.
        """
        alive = [each for each in self.connections.values() if each.synced and not each.liveness.silent]
        if len(alive) < _LEAST_FOR_CALLS:
            return None
        return min(alive, key=lambda each: each.slot)

    def _find_silent(self, now: float) -> None:
        """A connection is broken by itself where the peer answers pings on others and not there."""
        slots = {slot: connection.liveness for slot, connection in self.connections.items()}
        for slot in self._silence.look(now, slots):
            connection = self.connections[slot]
            if connection.liveness.silent:
                # It is closed later, or answers again: then the peer drops what it has twice.
                self._give_again(connection)
            self.wake()

    def next_chunk(self, connection: Connection) -> bytes | None:
        """What to send next on this connection: the link's own frames, then streams by class."""
        pieces: list[bytes | memoryview] = []
        if connection.urgent:
            pieces.extend(connection.urgent)
            connection.urgent.clear()
        silent = connection.liveness.silent
        if not silent:
            pieces.extend(self._dues.take(with_owed=self._scheduler.highest() is not None))
            farewells = self._dues.take_farewells()
            pieces.extend(farewells)
            connection.liveness.told(time.monotonic_ns(), farewells)
        size = sum(map(len, pieces))
        self._counters.link.sent_wire_bytes += size
        if size:
            self._pacer.take(size)
        if connection.synced and not silent and self._scheduler.highest() is not None:
            size += self._add_frames(connection, pieces)
        if not pieces:
            return None
        self._sent_wire_bytes += size
        return b"".join(pieces)

    def _add_frames(self, connection: Connection, pieces: list[bytes | memoryview]) -> int:
        size, target = 0, self._size.chunk_bytes
        for_calls = self._connection_for_calls()
        only_calls = connection is for_calls
        highest = TrafficClass.CONTROL
        if for_calls is not None and not only_calls and not for_calls.busy:
            highest = TrafficClass.HANDOFF
        while size < target:
            # What is urgent does not wait for the rate; it is paid for by what comes after it.
            waits = only_calls or not self._pacer.may_send()
            lowest = TrafficClass.CONTROL if waits else TrafficClass.PRECACHE
            found = self._scheduler.next_frame(target, lowest, highest)
            if found is None:
                break
            stream, frame = found
            frame.connection = connection
            wire = HEADER.size + frame.length
            pieces.append(
                pack_header(
                    frame.kind,
                    frame.length,
                    flags=frame.flags,
                    traffic_class=frame.traffic_class,
                    stream=stream.identifier,
                    sequence=frame.sequence,
                )
            )
            pieces.extend(frame.views)
            self._pacer.take(wire)
            if frame.resent:
                self._counters.resent_wire_bytes += wire
            raw = frame.length if frame.kind is FrameType.DATA and not frame.resent else 0
            self._counters.sent(frame.traffic_class, stream.tally, raw, wire)
            size += wire
        return size

    # -- receiving

    def frame_arrived(self, connection: Connection, frame: Frame) -> None:
        """A whole frame. Raises ProtocolError, which ends the connection."""
        kind = frame.type
        if kind in SEQUENCED:
            self._sequenced_arrived(connection, frame)
            return
        self._counters.link.received_wire_bytes += frame.wire_bytes
        if kind is FrameType.ACKNOWLEDGE:
            stream = self.streams.get(frame.stream)
            if stream is not None:
                gone = bool(frame.flags & FrameFlag.GONE)
                stream.acknowledged(frame.sequence, unpack_u64(frame.payload), gone=gone)
        elif kind is FrameType.PING:
            connection.urgent.append(pack(FrameType.PONG, bytes(frame.payload)))
            if not connection.busy:
                connection.pump()
        elif kind is FrameType.PONG:
            now, asked = time.monotonic_ns(), unpack_u64(frame.payload)
            if connection.liveness.answered(asked):
                self.round_trip.sample((now - asked) / 1e9, now / 1e9)
        elif kind is FrameType.RESET:
            self._reset_arrived(connection, frame)
        elif kind is FrameType.RESET_DONE:
            self._dues.reset_confirmed(frame.stream)
        elif kind is FrameType.SYNC:
            connection.synced = True
            self.wake()
            self._owner.connection_synced(self)
        elif kind is FrameType.GOODBYE:
            self._owner.session_broken(self, from_dict(unpack_json(frame.payload, "GOODBYE frame")))

    def _sequenced_arrived(self, connection: Connection, frame: Frame) -> None:
        stream = self.streams.get(frame.stream)
        if stream is None:
            stream = self._table.meet(frame)
            if stream is None:
                if not self._dues.is_reset(frame.stream):
                    connection.urgent.append(pack_acknowledge(frame.stream, 0, 0, gone=True))
                    self.wake()
                return
        traffic_class = TrafficClass(frame.traffic_class)
        opened = False
        if frame.type is FrameType.OPEN and not stream.opened:
            self._table.introduce(stream, frame)
            opened = True
        if not self.dialed and frame.sequence >= stream.steered_sequence:
            stream.steered_sequence = frame.sequence
            if stream.traffic_class is not traffic_class:
                stream.traffic_class = traffic_class
        fresh = stream.arrived(frame) and frame.type is FrameType.DATA
        raw = len(frame.payload) if fresh else 0
        self._counters.received(traffic_class, stream.tally, raw, frame.wire_bytes)
        if opened:
            self._owner.stream_opened(stream)

    def _reset_arrived(self, connection: Connection, frame: Frame) -> None:
        error = from_dict(unpack_json(frame.payload, "RESET frame"))
        stream = self.streams.get(frame.stream)
        self._table.never_again(frame.stream)
        if stream is not None:
            self._drop(stream)
            stream.fail(error)
        connection.urgent.append(pack(FrameType.RESET_DONE, stream=frame.stream))
        self.wake()

    # -- time

    def tick(self, now: float, dead_seconds: float) -> None:
        """A few times a second: pings, dead connections, how large chunks may be."""
        for connection in list(self.connections.values()):
            silent = now - connection.received_at
            if silent > dead_seconds:
                connection.close(TimeoutError(f"nothing heard for {silent:.0f} s"))
            elif self.dialed and connection.carried_bytes > _RENEW_BYTES:
                connection.close(ConnectionResetError("renewed with fresh keys"))
            elif now - connection.pinged_at >= self._ping_seconds(dead_seconds):
                self._ping(connection)
                if not connection.busy:
                    connection.pump()
        self._find_silent(now)
        low_water = self._size.follow(
            now, self._sent_wire_bytes, len(self.connections), self._pacer.rate_bytes_per_second
        )
        if low_water is not None:
            for connection in self.connections.values():
                connection.set_low_water(low_water)

    def _ping_seconds(self, dead_seconds: float) -> float:
        return min(1.0 if self.streams else 2.5, dead_seconds / 4)

    def _ping(self, connection: Connection) -> None:
        at = time.monotonic_ns()
        connection.pinged_at = at / 1e9
        connection.liveness.pinged(at)
        connection.urgent.append(pack(FrameType.PING, pack_u64(at)))
