# SPDX-License-Identifier: GPL-3.0-or-later
"""Mobility headers to octets and back: padding, length, checksum, authenticator.

Everything is judged before anything is believed: length, checksum, each option's bounds; the authenticator is
compared by the caller through :meth:`Packet.authenticate`, because only it knows which key the peer may use.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from ipaddress import IPv6Address

from mobility_agent.errors import MalformedMessage, NotAuthentic
from mobility_agent.messages.headers import BindingUpdate, Message, parse_message
from mobility_agent.messages.options import (
    PAD1,
    PADN,
    Handoff,
    HandoffIndicator,
    MessageAuthentication,
    Option,
    find,
    parse_option,
)

MOBILITY_PROTOCOL = 135
NO_NEXT_HEADER = 59
UNSPECIFIED = IPv6Address(0)
_FIXED_OCTETS = 12
# Of a Binding Update, among these.
_LIFETIME = slice(10, 12)
_MAX_OCTETS = 8 * 256

# name -> (hash, octets of its authenticator). RFC 4285 has the first; the second is for agents of our own.
ALGORITHMS = {"hmac-sha1-96": ("sha1", 12), "hmac-sha256-128": ("sha256", 16)}


@dataclass(frozen=True, slots=True)
class Key:
    """One shared secret, under the number by which messages refer to it."""

    security_parameter_index: int
    secret: bytes = field(repr=False)
    algorithm: str = "hmac-sha256-128"

    @property
    def authenticator_octets(self) -> int:
        """How long this key's authenticators are."""
        return ALGORITHMS[self.algorithm][1]

    def authenticator(self, care_of: IPv6Address, home: IPv6Address, covered: bytes) -> bytes:
        """RFC 4285 section 5.1: the first octets of HMAC(care-of | home address | header up to the index)."""
        digest_name, octets = ALGORITHMS[self.algorithm]
        return hmac.digest(self.secret, care_of.packed + home.packed + covered, digest_name)[:octets]


def checksum(source: IPv6Address, destination: IPv6Address, data: bytes) -> int:
    """RFC 6275 section 6.1.1: over the IPv6 pseudo header and ``data`` with its checksum field as it is."""
    pseudo = (
        source.packed
        + destination.packed
        + len(data).to_bytes(4, "big")
        + bytes([0, 0, 0, MOBILITY_PROTOCOL])
    )
    # The number base 65536 modulo 65535 is the ones' complement sum: one operation for any length.
    total = int.from_bytes(pseudo + data, "big") % 0xFFFF
    return (0xFFFF - total) % 0xFFFF


def _padding(octets: int) -> bytes:
    if octets == 0:
        return b""
    return bytes([PAD1]) if octets == 1 else bytes([PADN, octets - 2]) + bytes(octets - 2)


def _encode_options(options: tuple[Option, ...], reserved: int) -> bytes:
    """Options with padding, ended so that ``reserved`` more octets fill a multiple of eight."""
    encoded = bytearray()
    for option in options:
        multiple, offset = option.alignment
        body = option.body()
        encoded += _padding((offset - _FIXED_OCTETS - len(encoded)) % multiple)
        encoded += bytes([option.kind, len(body)]) + body
    encoded += _padding(-(_FIXED_OCTETS + len(encoded) + reserved) % 8)
    return bytes(encoded)


def encode(
    message: Message,
    source: IPv6Address,
    destination: IPv6Address,
    key: Key | None = None,
    *,
    care_of: IPv6Address = UNSPECIFIED,
    home: IPv6Address = UNSPECIFIED,
) -> bytes:
    """The message as the payload of an IPv6 packet of protocol 135.

    With ``key``, an authenticator over ``care_of`` and ``home`` is put last. Raises ValueError when the
    options do not fit one header.
    """
    reserved = 7 + key.authenticator_octets if key else 0
    options = _encode_options(message.options, reserved)
    octets = _FIXED_OCTETS + len(options) + reserved
    if octets > _MAX_OCTETS:
        raise ValueError(
            f"mobility message of {octets} octets: at most {_MAX_OCTETS} fit; register fewer addresses"
        )
    head = bytes([NO_NEXT_HEADER, octets // 8 - 1, message.kind, 0])
    data = bytearray(head + b"\0\0" + message.fixed() + options)
    if key:
        index = MessageAuthentication(key.security_parameter_index, bytes(key.authenticator_octets))
        data += bytes([index.kind, len(index.body())]) + index.body()[:5]
        data += key.authenticator(care_of, home, bytes(data))
    data[4:6] = checksum(source, destination, bytes(data)).to_bytes(2, "big")
    return bytes(data)


@dataclass(frozen=True, slots=True)
class Packet:
    """A message as it came: what it says, and what its authenticator covers."""

    message: Message
    authentication: MessageAuthentication | None
    covered: bytes

    def authenticate(self, key: Key, care_of: IPv6Address, home: IPv6Address) -> None:
        """Raises NotAuthentic unless the message carries this key's authenticator."""
        found = self.authentication
        if found is None:
            raise NotAuthentic("no authenticator; message dropped")
        if found.security_parameter_index != key.security_parameter_index:
            raise NotAuthentic(f"key {found.security_parameter_index} is not known here; message dropped")
        if not hmac.compare_digest(key.authenticator(care_of, home, self.covered), found.authenticator):
            raise NotAuthentic(f"wrong authenticator for key {key.security_parameter_index}; message dropped")


def _split_options(data: bytes) -> tuple[tuple[Option, ...], int | None]:
    """The options in ``data``, and where the authentication option starts."""
    options: list[Option] = []
    authentication_at: int | None = None
    at = _FIXED_OCTETS
    while at < len(data):
        if authentication_at is not None:
            raise MalformedMessage("something stands behind the authenticator; message dropped")
        if data[at] == PAD1:
            at += 1
            continue
        if at + 1 >= len(data) or at + 2 + data[at + 1] > len(data):
            raise MalformedMessage(f"option {data[at]} at octet {at} runs over the end; message dropped")
        end = at + 2 + data[at + 1]
        if data[at] != PADN:
            option = parse_option(data[at], data[at + 2 : end])
            if isinstance(option, MessageAuthentication):
                authentication_at = at
            options.append(option)
        at = end
    return tuple(options), authentication_at


def only_confirms(data: bytes) -> bool:
    """Whether octets that nobody has judged yet look like an update that changes nothing: a refresh.

    A withdrawal, whose lifetime is 0, makes room for a claim that may come behind it.
    """
    if len(data) < _FIXED_OCTETS or data[2] != BindingUpdate.kind or data[_LIFETIME] == b"\0\0":
        return False
    at = _FIXED_OCTETS
    while at + 3 < len(data):
        if data[at] == Handoff.kind:
            return data[at + 3] == HandoffIndicator.UNCHANGED
        at += 1 if data[at] == PAD1 else 2 + data[at + 1]
    return False


def decode(data: bytes, source: IPv6Address, destination: IPv6Address) -> Packet:
    """The message in the payload of an IPv6 packet of protocol 135. Raises MalformedMessage."""
    if len(data) < _FIXED_OCTETS + 4:
        raise MalformedMessage(f"mobility header of {len(data)} octets: too short; message dropped")
    if len(data) != 8 * (data[1] + 1):
        raise MalformedMessage(
            f"mobility header of {len(data)} octets says {8 * (data[1] + 1)}; message dropped"
        )
    if data[0] != NO_NEXT_HEADER:
        raise MalformedMessage(f"mobility header followed by protocol {data[0]}; message dropped")
    unsummed = data[:4] + b"\0\0" + data[6:]
    # In ones' complement 0xffff and 0 are the same number.
    if checksum(source, destination, unsummed) != int.from_bytes(data[4:6], "big") % 0xFFFF:
        raise MalformedMessage("mobility header with a wrong checksum; message dropped")
    options, authentication_at = _split_options(data)
    authentication = find(options, MessageAuthentication)
    plain = tuple(option for option in options if not isinstance(option, MessageAuthentication))
    message = parse_message(data[2], data[6:_FIXED_OCTETS], plain)
    # Type, length, sub-type and index of the option are covered, its authenticator is not.
    covered = unsummed[: authentication_at + 7] if authentication_at is not None else b""
    return Packet(message, authentication, covered)
