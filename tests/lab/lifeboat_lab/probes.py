# SPDX-License-Identifier: GPL-3.0-or-later
"""What a client of a guest notices of a move: a ping every 10 ms, and one TCP connection to an echo, at once.

Runs in the client's namespace, `python3 -m lifeboat_lab.probes ADDRESS PORT`, until its input is closed; then
it prints what it saw. Times are of CLOCK_MONOTONIC, which every host of a lab shares.
"""

import itertools
import json
import os
import selectors
import socket
import struct
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lifeboat_lab.client_process import ClientProcess

if TYPE_CHECKING:
    from lifeboat_lab.lab import Lab

INTERVAL_SECONDS = 0.01
ECHO_PORT = 7777
# A busybox guest echoes what it gets; -ll serves one connection after the other.
ECHO_COMMAND = f"run (nc -ll -p {ECHO_PORT} -e cat >/dev/null 2>&1 &)"
RECORD_OCTETS = 256
# Ten minutes; then it says what it has.
_LONGEST_SECONDS = 600.0
_LAST_ANSWERS_SECONDS = 2.0
_ECHO_REQUEST, _ECHO_REPLY = 128, 129
_FILTER = 1


@dataclass(frozen=True)
class Gap:
    """A time without answers: from the last one (``began``) to the next (``ended``), monotonic seconds.

    ``first_round_trip_seconds``: how long that next answer itself had been under way.
    ``longest_silence_seconds``: longest time in which the probe did not even ask.
    """

    began: float
    ended: float
    first_round_trip_seconds: float
    longest_silence_seconds: float

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.ended - self.began


@dataclass(frozen=True)
class Seen:
    """What a probe saw. ``probes``: (sent, answered or None); ``arrivals``: when echoed records were whole.

    ``failure``: what became of the connection, empty while all is well.
    """

    probes: tuple[tuple[float, float | None], ...]
    arrivals: tuple[float, ...]
    failure: str

    def longest_gap_seconds(self) -> float:
        """Longest time without an answer to a probe."""
        gap = self.longest_gap()
        return 0.0 if gap is None else gap.seconds

    def longest_gap(self) -> "Gap | None":
        """That time, with what tells where it went; None when fewer than two answers came."""
        answered = sorted((at, sent) for sent, at in self.probes if at is not None)
        pairs = itertools.pairwise(answered)
        earlier, later = max(pairs, key=lambda pair: pair[1][0] - pair[0][0], default=((0.0, 0.0),) * 2)
        if later == earlier:
            return None
        sent = [at for at, _ in self.probes if earlier[0] <= at <= later[0]]
        return Gap(
            began=earlier[0],
            ended=later[0],
            first_round_trip_seconds=later[0] - later[1],
            longest_silence_seconds=max((b - a for a, b in itertools.pairwise(sent)), default=0.0),
        )

    def longest_stall_seconds(self) -> float:
        """Longest time without anything from the connection's other end."""
        return max((later - earlier for earlier, later in itertools.pairwise(self.arrivals)), default=0.0)

    @property
    def goes_on(self) -> bool:
        """Whether anything was answered that was asked in the last second."""
        until = max((sent for sent, _ in self.probes), default=0.0)
        return any(sent > until - 1 and at is not None for sent, at in self.probes)

    def lost_since(self, instant: float) -> int:
        """Probes sent after ``instant`` (monotonic) and never answered."""
        return sum(sent >= instant and at is None for sent, at in self.probes)


class Probe(ClientProcess):
    """Probes under way: `probe = Probe(lab, address); ...; probe.end()`."""

    def __init__(self, lab: "Lab", address: str, port: int = ECHO_PORT) -> None:
        super().__init__(lab, "probes", address, str(port))

    def end(self) -> Seen:
        """Stop, and tell."""
        told = self.told()
        probes = tuple((sent, answered) for sent, answered in told["probes"])
        return Seen(probes, tuple(told["arrivals"]), told["failure"])


class Pings:
    """Pings of one address and their answers; the raw socket is the caller's to wait for."""

    def __init__(self, address: str) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK
        self.socket = socket.socket(socket.AF_INET6, kind, socket.IPPROTO_ICMPV6)
        mask = [0xFFFFFFFF] * 8
        mask[_ECHO_REPLY >> 5] &= ~(1 << (_ECHO_REPLY & 31)) & 0xFFFFFFFF
        self.socket.setsockopt(socket.IPPROTO_ICMPV6, _FILTER, struct.pack("=8I", *mask))
        self.socket.connect((address, 0))
        self._identifier = os.getpid() & 0xFFFF
        self.probes: list[list[float | None]] = []

    def send(self) -> None:
        """Ask once more."""
        number = len(self.probes)
        message = struct.pack(">BBHHHI", _ECHO_REQUEST, 0, 0, self._identifier, number & 0xFFFF, number)
        self.probes.append([time.monotonic(), None])
        try:
            self.socket.send(message)
        except OSError:
            # An unreachable network is an unanswered probe.
            pass

    def receive(self) -> None:
        """Take an answer that has come."""
        try:
            answer = self.socket.recv(1500)
        except OSError:
            return
        if len(answer) >= 12 and int.from_bytes(answer[4:6], "big") == self._identifier:
            probe = self.probes[int.from_bytes(answer[8:12], "big")]
            if probe[1] is None:
                probe[1] = time.monotonic()


class _Connection:
    """Sends numbered records; what comes back must be the same octets in the same order."""

    def __init__(self, address: str, port: int) -> None:
        self.socket = socket.create_connection((address, port), timeout=20)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self._number = 0
        self._expected = bytearray()
        self._outgoing = bytearray()
        self._whole = 0
        self.arrivals: list[float] = []
        self.failure = ""

    def send(self) -> None:
        if self.failure:
            return
        if len(self._outgoing) < 1 << 16:
            head = struct.pack(">Q", self._number)
            record = head + bytes((self._number * 7 + place) & 0xFF for place in range(RECORD_OCTETS - 8))
            self._number += 1
            self._outgoing += record
            self._expected += record
        try:
            sent = self.socket.send(self._outgoing)
            del self._outgoing[:sent]
        except BlockingIOError:
            pass
        except OSError as error:
            self.failure = f"sending: {error}"

    def receive(self) -> None:
        try:
            got = self.socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError as error:
            self.failure = self.failure or f"receiving: {error}"
            return
        if not got:
            self.failure = self.failure or "closed by the guest"
        elif self._expected[: len(got)] != got:
            self.failure = self.failure or "other octets came back than were sent"
        else:
            del self._expected[: len(got)]
            self._whole += len(got)
            self.arrivals.append(time.monotonic())


def _run(address: str, port: int) -> dict[str, Any]:
    pings, connection = Pings(address), _Connection(address, port)
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    for one in (pings, connection):
        selector.register(one.socket, selectors.EVENT_READ, one)
    began = tick = time.monotonic()
    end = began + _LONGEST_SECONDS
    ready = ending = False
    while (now := time.monotonic()) < end:
        if now >= tick:
            # What the machine kept us from sending in time is not sent in a burst.
            tick = max(tick + INTERVAL_SECONDS, now)
            if not ending:
                pings.send()
                connection.send()
        for key, _ in selector.select(max(tick - time.monotonic(), 0)):
            if key.data is not None:
                key.data.receive()
                if connection.failure and key.data is connection:
                    selector.unregister(connection.socket)
            else:
                selector.unregister(sys.stdin)
                ending, end = True, time.monotonic() + _LAST_ANSWERS_SECONDS
        if not ready and connection.arrivals and any(at is not None for _, at in pings.probes):
            ready = True
            print("ready", flush=True)
        if not ready and now - began > 30:
            raise SystemExit(f"no answer from {address} within 30 s")
    return {"probes": pings.probes, "arrivals": connection.arrivals, "failure": connection.failure}


if __name__ == "__main__":
    print(json.dumps(_run(sys.argv[1], int(sys.argv[2]))))
