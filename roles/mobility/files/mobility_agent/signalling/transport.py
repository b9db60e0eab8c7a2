# SPDX-License-Identifier: GPL-3.0-or-later
"""Mobility headers on a raw socket of protocol 135, from and to known peers only, all authenticated.

Between a gateway and an anchor the gateway's key holds both ways: so a gateway needs no key but its own.
Up to 8192 messages are taken from the kernel as they come; what is more waits there, in order of arrival,
and is dropped when the kernel's buffer is full. Of those taken, what only confirms gives way to the rest: a
hand-over does not wait behind what hundreds of gateways refresh, or tell a restarted anchor. But not for
ever: nothing is authenticated yet then, and who merely sends much in a peer's name must not stop all
refreshes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from ipaddress import IPv6Address

from mobility_agent.config import Peer
from mobility_agent.errors import KernelRefused, MalformedMessage, MobilityError, NotAuthentic
from mobility_agent.messages.codec import (
    MOBILITY_PROTOCOL,
    UNSPECIFIED,
    Key,
    Packet,
    decode,
    encode,
    only_confirms,
)
from mobility_agent.messages.headers import (
    BindingAcknowledgement,
    BindingUpdate,
    Heartbeat,
    Message,
    Revocation,
    RevocationAcknowledgement,
)
from mobility_agent.messages.registration import home_address

logger = logging.getLogger(__name__)

_BUFFER_OCTETS = 4 << 20
_RECEIVE_BUFFER_FORCE, _SEND_BUFFER_FORCE = 33, 32
_QUIET_SECONDS = 10.0
# Taken from the kernel in one turn, kept here at most, and dealt with in one turn: timers and the control
# interface get their turn in a flood, too.
_TAKEN, _MOST_KEPT, _DEALT_WITH = 256, 8192, 8
# After so many that went before it, one that only confirms is dealt with.
_MOST_BEFORE = 7

Receiver = Callable[[Peer, Message], None]


def _from_gateway(message: Message) -> bool:
    match message:
        case BindingUpdate() | RevocationAcknowledgement():
            return True
        case Heartbeat():
            return not message.response
        case BindingAcknowledgement() | Revocation():
            return False


class Transport:
    """The socket. Messages that pass every check go to ``receive``; the others are counted and told of.

    ``key``: this host's as a gateway; ``keys``: those by which anchors may answer it.
    """

    def __init__(
        self, address: IPv6Address, key: Key, keys: Iterable[Key], peers: Iterable[Peer], receive: Receiver
    ) -> None:
        self._address = address
        self._key = key
        self._keys = tuple(keys)
        #: By which key each gateway spoke last, while its keys are changed: it certainly knows that one.
        self._spoken: dict[IPv6Address, Key] = {}
        self._peers = {peer.address: peer for peer in peers}
        self._receive = receive
        self._socket: socket.socket | None = None
        self._first: deque[tuple[bytes, Peer]] = deque()
        self._then: deque[tuple[bytes, Peer]] = deque()
        #: Dealt with since one of ``_then`` was, while there were any.
        self._went_before = 0
        self._working = False
        self.counters: Counter[str] = Counter()
        self._told: dict[tuple[str, str], tuple[float, int]] = {}

    def start(self) -> None:
        """Listen. Raises KernelRefused."""
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        try:
            own = socket.socket(socket.AF_INET6, kind, MOBILITY_PROTOCOL)
        except PermissionError as error:
            raise KernelRefused("signalling: no raw socket; the agent needs CAP_NET_RAW") from error
        # Thousands of registrations may come at once, after an anchor's restart.
        for option in (_RECEIVE_BUFFER_FORCE, _SEND_BUFFER_FORCE):
            with contextlib.suppress(PermissionError):
                own.setsockopt(socket.SOL_SOCKET, option, _BUFFER_OCTETS)
        try:
            own.bind((str(self._address), 0))
        except OSError as error:
            own.close()
            raise KernelRefused(
                f"signalling: {self._address} is not on this host ({error}); correct address"
            ) from error
        self._socket = own
        asyncio.get_running_loop().add_reader(own.fileno(), self._read)

    def stop(self) -> None:
        """Listen no more."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
            self._first.clear()
            self._then.clear()

    def _covered(self, message: Message, gateway: IPv6Address) -> tuple[IPv6Address, IPv6Address]:
        """The two addresses that the authenticator covers: the gateway's, and the VM's first home address."""
        return gateway, UNSPECIFIED if isinstance(message, Heartbeat) else home_address(message)

    def send(self, peer: Peer, message: Message) -> None:
        """Send; what the kernel cannot take now is lost, as it might be on the way."""
        if self._socket is None:
            return
        if _from_gateway(message):
            gateway, key = self._address, self._key
        else:
            gateway, key = peer.address, self._spoken.get(peer.address, peer.key)
        care_of, home = self._covered(message, gateway)
        data = encode(message, self._address, peer.address, key, care_of=care_of, home=home)
        try:
            self._socket.sendto(data, (str(peer.address), 0))
        except OSError as error:
            self.counters["unsent"] += 1
            self._tell(peer.name, "unsent", f"message to {peer.name} not sent: {error}")
            return
        self.counters["sent"] += 1

    def _read(self) -> None:
        for _unused in range(_TAKEN):
            # What is more stays with the kernel, which drops what is too much.
            if self._socket is None or len(self._first) + len(self._then) >= _MOST_KEPT:
                break
            try:
                data, origin = self._socket.recvfrom(4096)
            except BlockingIOError:
                break
            except OSError as error:
                # An ICMP error of an earlier message: the retransmission deals with it.
                logger.debug("signalling: %s", error)
                continue
            self._keep(data, IPv6Address(origin[0].partition("%")[0]))
        if not self._working:
            self._work()

    def _keep(self, data: bytes, origin: IPv6Address) -> None:
        peer = self._peers.get(origin)
        if peer is None:
            self.counters["unknown_peer"] += 1
            fact = (
                f"message from {origin}, which is no peer, dropped; add it to mobility_peers if it should be"
            )
            self._tell(str(origin), "unknown", fact)
            return
        # Not believed yet, only put in order.
        (self._then if only_confirms(data) else self._first).append((data, peer))

    def _work(self) -> None:
        try:
            for _unused in range(_DEALT_WITH):
                if self._socket is None or not (self._first or self._then):
                    break
                self._take(*self._following())
        finally:
            # Whatever became of one, the next ones are dealt with.
            self._working = self._socket is not None and bool(self._first or self._then)
            if self._working:
                asyncio.get_running_loop().call_soon(self._work)

    def _following(self) -> tuple[bytes, Peer]:
        if not self._first or (self._then and self._went_before >= _MOST_BEFORE):
            self._went_before = 0
            return self._then.popleft()
        self._went_before = self._went_before + 1 if self._then else 0
        return self._first.popleft()

    def _take(self, data: bytes, peer: Peer) -> None:
        try:
            packet = decode(data, peer.address, self._address)
            self._authenticate(packet, peer)
        except (MalformedMessage, NotAuthentic) as error:
            self.counters[error.cause.replace("-", "_")] += 1
            self._tell(peer.name, error.cause, f"from {peer.name} ({peer.address}): {error}")
            return
        self.counters["received"] += 1
        try:
            self._receive(peer, packet.message)
        except MobilityError as error:
            logger.error("message from %s not acted upon: %s", peer.name, error)

    def _authenticate(self, packet: Packet, peer: Peer) -> None:
        from_gateway = _from_gateway(packet.message)
        gateway = peer.address if from_gateway else self._address
        care_of, home = self._covered(packet.message, gateway)
        found = packet.authentication
        index = found.security_parameter_index if found is not None else -1
        accepted = peer.accepted_keys if from_gateway else self._keys
        known = next((key for key in accepted if key.security_parameter_index == index), None)
        if known is None and found is not None:
            raise NotAuthentic(f"key {index} is not one that is known of it; message dropped")
        key = known or (peer.key if from_gateway else self._key)
        packet.authenticate(key, care_of, home)
        if from_gateway:
            self._spoken[peer.address] = key

    def _tell(self, whose: str, cause: str, sentence: str) -> None:
        """Log, but not more than one line for one cause and peer in ten seconds."""
        now = time.monotonic()
        at, unsaid = self._told.get((whose, cause), (float("-inf"), 0))
        if now - at < _QUIET_SECONDS:
            self._told[whose, cause] = (at, unsaid + 1)
            return
        if len(self._told) > 1024:
            self._told.clear()
        self._told[whose, cause] = (now, 0)
        logger.warning("%s%s", sentence, f" ({unsaid} more since then)" if unsaid else "")
