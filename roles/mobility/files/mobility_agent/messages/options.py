# SPDX-License-Identifier: GPL-3.0-or-later
"""Mobility options (RFC 6275 section 6.2 and the RFCs named at each class).

An option is a type, a length and a body. ``alignment`` is (x, y): its type stands at x*n + y octets from the
start of the mobility header; the codec pads. An option of an unknown type is kept as it is (RFC 6275 says:
skip it), so that decoding and encoding again changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv6Address, IPv6Network
from typing import ClassVar, Protocol, TypeVar

from mobility_agent.errors import MalformedMessage

PAD1 = 0
PADN = 1
#: IANA's enterprise number for documentation (RFC 5612): the project has none of its own.
VENDOR_ID = 32473


class VendorSubtype(IntEnum):
    """Our sub-types of the vendor-specific option."""

    EPOCH = 1
    HOLDER = 2


class HandoffIndicator(IntEnum):
    """Why a registration is sent (RFC 5213 section 8.4)."""

    RESERVED = 0
    NEW_INTERFACE = 1
    BETWEEN_INTERFACES = 2
    BETWEEN_GATEWAYS = 3
    UNKNOWN = 4
    UNCHANGED = 5


class AccessTechnology(IntEnum):
    """What the VM is attached by (RFC 5213 section 8.5)."""

    VIRTUAL = 1
    PPP = 2
    ETHERNET = 3


class Option(Protocol):
    """What the codec asks of an option."""

    alignment: ClassVar[tuple[int, int]]

    @property
    def kind(self) -> int:
        """The option's type octet."""

    def body(self) -> bytes:
        """What follows the length octet."""


def _exactly(body: bytes, length: int, name: str) -> None:
    if len(body) != length:
        raise MalformedMessage(f"option {name}: {len(body)} octets, must be {length}; message dropped")


@dataclass(frozen=True, slots=True)
class UnknownOption:
    """An option that this version does not know."""

    kind: int
    content: bytes
    alignment: ClassVar[tuple[int, int]] = (1, 0)

    def body(self) -> bytes:
        return self.content


@dataclass(frozen=True, slots=True)
class AlternateCareOf:
    """The tunnel's end, where it is not the address that the message came from (RFC 6275 section 6.2.5)."""

    address: IPv6Address
    kind: ClassVar[int] = 3
    alignment: ClassVar[tuple[int, int]] = (8, 6)

    def body(self) -> bytes:
        return self.address.packed

    @classmethod
    def parse(cls, body: bytes) -> AlternateCareOf:
        """From the option's body. Raises MalformedMessage."""
        _exactly(body, 16, "alternate care-of address")
        return cls(IPv6Address(body))


@dataclass(frozen=True, slots=True)
class NodeIdentifier:
    """Whose binding it is (RFC 4283): the VM's UUID as a network access identifier."""

    identifier: str
    subtype: int = 1
    kind: ClassVar[int] = 8
    alignment: ClassVar[tuple[int, int]] = (1, 0)

    def body(self) -> bytes:
        return bytes([self.subtype]) + self.identifier.encode()

    @classmethod
    def parse(cls, body: bytes) -> NodeIdentifier:
        """From the option's body. Raises MalformedMessage."""
        if len(body) < 2:
            raise MalformedMessage("option mobile node identifier: empty; message dropped")
        try:
            return cls(body[1:].decode(), body[0])
        except UnicodeDecodeError:
            raise MalformedMessage("option mobile node identifier: not UTF-8; message dropped") from None


@dataclass(frozen=True, slots=True)
class MessageAuthentication:
    """The authenticator (RFC 4285 section 5): always the last option."""

    security_parameter_index: int
    authenticator: bytes
    subtype: int = 1
    kind: ClassVar[int] = 9
    alignment: ClassVar[tuple[int, int]] = (4, 1)

    def body(self) -> bytes:
        index = self.security_parameter_index.to_bytes(4, "big")
        return bytes([self.subtype]) + index + self.authenticator

    @classmethod
    def parse(cls, body: bytes) -> MessageAuthentication:
        """From the option's body. Raises MalformedMessage."""
        if len(body) < 6:
            raise MalformedMessage("option message authentication: too short; message dropped")
        return cls(int.from_bytes(body[1:5], "big"), body[5:], body[0])


@dataclass(frozen=True, slots=True)
class VendorSpecific:
    """What no RFC has (RFC 5094): for us the hand-off epoch and who holds a binding."""

    subtype: int
    content: bytes
    vendor: int = VENDOR_ID
    kind: ClassVar[int] = 19
    alignment: ClassVar[tuple[int, int]] = (4, 2)

    def body(self) -> bytes:
        return self.vendor.to_bytes(4, "big") + bytes([self.subtype]) + self.content

    @classmethod
    def parse(cls, body: bytes) -> VendorSpecific:
        """From the option's body. Raises MalformedMessage."""
        if len(body) < 5:
            raise MalformedMessage("option vendor-specific: too short; message dropped")
        return cls(body[4], body[5:], int.from_bytes(body[:4], "big"))


@dataclass(frozen=True, slots=True)
class HomeNetworkPrefix:
    """A home address (/128) or home prefix (RFC 5213 section 8.3). A VM may have several."""

    network: IPv6Network
    kind: ClassVar[int] = 22
    alignment: ClassVar[tuple[int, int]] = (8, 4)

    def body(self) -> bytes:
        return bytes([0, self.network.prefixlen]) + self.network.network_address.packed

    @classmethod
    def parse(cls, body: bytes) -> HomeNetworkPrefix:
        """From the option's body. Raises MalformedMessage."""
        _exactly(body, 18, "home network prefix")
        try:
            return cls(IPv6Network((body[2:], body[1])))
        except ValueError:
            raise MalformedMessage(
                f"option home network prefix: {IPv6Address(body[2:])}/{body[1]} is no prefix; message dropped"
            ) from None


@dataclass(frozen=True, slots=True)
class Handoff:
    """The handoff indicator (RFC 5213 section 8.4)."""

    indicator: int
    kind: ClassVar[int] = 23
    alignment: ClassVar[tuple[int, int]] = (1, 0)

    def body(self) -> bytes:
        return bytes([0, self.indicator])

    @classmethod
    def parse(cls, body: bytes) -> Handoff:
        """From the option's body. Raises MalformedMessage."""
        _exactly(body, 2, "handoff indicator")
        return cls(body[1])


@dataclass(frozen=True, slots=True)
class AccessTechnologyType:
    """How the VM is attached (RFC 5213 section 8.5)."""

    technology: int
    kind: ClassVar[int] = 24
    alignment: ClassVar[tuple[int, int]] = (1, 0)

    def body(self) -> bytes:
        return bytes([0, self.technology])

    @classmethod
    def parse(cls, body: bytes) -> AccessTechnologyType:
        """From the option's body. Raises MalformedMessage."""
        _exactly(body, 2, "access technology type")
        return cls(body[1])


@dataclass(frozen=True, slots=True)
class LinkLocalAddress:
    """The gateway's link-local address on the VM's link, the same at every site (RFC 5213 section 8.7)."""

    address: IPv6Address
    kind: ClassVar[int] = 26
    alignment: ClassVar[tuple[int, int]] = (8, 6)

    def body(self) -> bytes:
        return self.address.packed

    @classmethod
    def parse(cls, body: bytes) -> LinkLocalAddress:
        """From the option's body. Raises MalformedMessage."""
        _exactly(body, 16, "link-local address")
        return cls(IPv6Address(body))


@dataclass(frozen=True, slots=True)
class Timestamp:
    """When the update was made (RFC 5213 section 8.8): 48 bits of seconds, 16 bits of 1/65536 s.

    ``ticks`` counts 1/65536 s since 1970: whole numbers, so that two updates compare as they were made.
    """

    ticks: int
    kind: ClassVar[int] = 27
    alignment: ClassVar[tuple[int, int]] = (8, 2)
    TICKS_PER_SECOND: ClassVar[int] = 65536

    def body(self) -> bytes:
        return self.ticks.to_bytes(8, "big")

    @classmethod
    def parse(cls, body: bytes) -> Timestamp:
        """From the option's body. Raises MalformedMessage."""
        _exactly(body, 8, "timestamp")
        return cls(int.from_bytes(body, "big"))

    @classmethod
    def of_seconds(cls, seconds: float) -> Timestamp:
        """The time ``seconds`` since 1970."""
        return cls(int(seconds * cls.TICKS_PER_SECOND))


@dataclass(frozen=True, slots=True)
class RestartCounter:
    """How often the sender has started (RFC 5847 section 4): a new number: it may have forgotten."""

    count: int
    kind: ClassVar[int] = 28
    alignment: ClassVar[tuple[int, int]] = (4, 2)

    def body(self) -> bytes:
        return self.count.to_bytes(4, "big")

    @classmethod
    def parse(cls, body: bytes) -> RestartCounter:
        """From the option's body. Raises MalformedMessage."""
        _exactly(body, 4, "restart counter")
        return cls(int.from_bytes(body, "big"))


_KNOWN = {
    known.kind: known
    for known in (
        AlternateCareOf,
        NodeIdentifier,
        MessageAuthentication,
        VendorSpecific,
        HomeNetworkPrefix,
        Handoff,
        AccessTechnologyType,
        LinkLocalAddress,
        Timestamp,
        RestartCounter,
    )
}


def parse_option(kind: int, body: bytes) -> Option:
    """One option from its type and body. Raises MalformedMessage."""
    known = _KNOWN.get(kind)
    return UnknownOption(kind, body) if known is None else known.parse(body)


T = TypeVar("T")


def find(options: Iterable[Option], wanted: type[T]) -> T | None:
    """The first option of class ``wanted``."""
    return next((option for option in options if isinstance(option, wanted)), None)


def find_vendor(options: Iterable[Option], subtype: VendorSubtype) -> bytes | None:
    """What our vendor-specific option of ``subtype`` carries."""
    for option in options:
        if isinstance(option, VendorSpecific) and (option.vendor, option.subtype) == (VENDOR_ID, subtype):
            return option.content
    return None
