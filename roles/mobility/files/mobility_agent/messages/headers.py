# SPDX-License-Identifier: GPL-3.0-or-later
"""The five mobility headers that agents exchange, as values."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

from mobility_agent.errors import MalformedMessage
from mobility_agent.messages.options import Option

LIFETIME_UNIT_SECONDS = 4
MAX_LIFETIME_SECONDS = 0xFFFE * LIFETIME_UNIT_SECONDS


class Status(IntEnum):
    """Of an acknowledgement (RFC 6275 section 6.1.8, RFC 5213 section 8.9): from 128 on it is a refusal."""

    ACCEPTED = 0
    REASON_UNSPECIFIED = 128
    ADMINISTRATIVELY_PROHIBITED = 129
    INSUFFICIENT_RESOURCES = 130
    SEQUENCE_OUT_OF_WINDOW = 135
    PROXY_REGISTRATION_NOT_ENABLED = 152
    NOT_ANCHOR_FOR_THIS_NODE = 153
    GATEWAY_NOT_AUTHORIZED = 154
    NOT_AUTHORIZED_FOR_PREFIX = 155
    TIMESTAMP_MISMATCH = 156
    TIMESTAMP_TOO_LOW = 157
    MISSING_PREFIX = 158
    PREFIX_SET_DIFFERS = 159
    MISSING_NODE_IDENTIFIER = 160
    MISSING_HANDOFF_INDICATOR = 161
    MISSING_ACCESS_TECHNOLOGY = 162


class RevocationTrigger(IntEnum):
    """Why a binding is revoked (RFC 5846 section 5.1)."""

    UNSPECIFIED = 0
    ADMINISTRATIVE = 1
    HANDOVER_SAME_ACCESS = 2


def _lifetime_units(seconds: int) -> int:
    # Up, so that nothing ends before the time that was asked for; 0 alone means: withdraw.
    return min(-(-seconds // LIFETIME_UNIT_SECONDS), 0xFFFF)


@dataclass(frozen=True, slots=True)
class BindingUpdate:
    """A gateway registers a VM with an anchor (RFC 6275 section 6.1.7; P flag: RFC 5213 section 8.1).

    ``lifetime_seconds`` of 0 withdraws; the wire counts in units of 4 s.
    """

    sequence: int
    lifetime_seconds: int
    options: tuple[Option, ...]
    acknowledge: bool = True
    home: bool = True
    proxy: bool = True
    other_flags: int = 0
    kind: ClassVar[int] = 5
    _ACKNOWLEDGE: ClassVar[int] = 0x8000
    _HOME: ClassVar[int] = 0x4000
    _PROXY: ClassVar[int] = 0x0200

    def fixed(self) -> bytes:
        """The six octets before the options."""
        flags = self.other_flags & ~(self._ACKNOWLEDGE | self._HOME | self._PROXY)
        flags |= self._ACKNOWLEDGE * self.acknowledge | self._HOME * self.home | self._PROXY * self.proxy
        return struct.pack(">HHH", self.sequence, flags, _lifetime_units(self.lifetime_seconds))

    @classmethod
    def parse(cls, fixed: bytes, options: tuple[Option, ...]) -> BindingUpdate:
        """From the six octets and the options."""
        sequence, flags, units = struct.unpack(">HHH", fixed)
        known = cls._ACKNOWLEDGE | cls._HOME | cls._PROXY
        return cls(
            sequence,
            units * LIFETIME_UNIT_SECONDS,
            options,
            bool(flags & cls._ACKNOWLEDGE),
            bool(flags & cls._HOME),
            bool(flags & cls._PROXY),
            flags & ~known,
        )


@dataclass(frozen=True, slots=True)
class BindingAcknowledgement:
    """The anchor's answer (RFC 6275 section 6.1.8; P flag: RFC 5213 section 8.2)."""

    status: int
    sequence: int
    lifetime_seconds: int
    options: tuple[Option, ...]
    proxy: bool = True
    other_flags: int = 0
    kind: ClassVar[int] = 6
    _PROXY: ClassVar[int] = 0x20

    def fixed(self) -> bytes:
        """The six octets before the options."""
        flags = (self.other_flags & ~self._PROXY) | self._PROXY * self.proxy
        return struct.pack(">BBHH", self.status, flags, self.sequence, _lifetime_units(self.lifetime_seconds))

    @classmethod
    def parse(cls, fixed: bytes, options: tuple[Option, ...]) -> BindingAcknowledgement:
        """From the six octets and the options."""
        status, flags, sequence, units = struct.unpack(">BBHH", fixed)
        proxy = bool(flags & cls._PROXY)
        return cls(
            status, sequence, units * LIFETIME_UNIT_SECONDS, options, proxy, flags & ~cls._PROXY & 0xFF
        )


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Are you there, and are you the one I knew (RFC 5847 section 3.3)."""

    sequence: int
    response: bool
    options: tuple[Option, ...] = ()
    unsolicited: bool = False
    kind: ClassVar[int] = 13

    def fixed(self) -> bytes:
        """The six octets before the options."""
        return struct.pack(">HI", 2 * self.unsolicited + self.response, self.sequence)

    @classmethod
    def parse(cls, fixed: bytes, options: tuple[Option, ...]) -> Heartbeat:
        """From the six octets and the options."""
        flags, sequence = struct.unpack(">HI", fixed)
        return cls(sequence, bool(flags & 1), options, bool(flags & 2))


@dataclass(frozen=True, slots=True)
class Revocation:
    """The anchor tells a gateway that it no longer holds a binding (RFC 5846 section 5.1)."""

    trigger: int
    sequence: int
    options: tuple[Option, ...]
    proxy: bool = True
    kind: ClassVar[int] = 16
    type_octet: ClassVar[int] = 1

    def fixed(self) -> bytes:
        """The six octets before the options."""
        return struct.pack(">BBHH", self.type_octet, self.trigger, self.sequence, 0x8000 * self.proxy)

    @classmethod
    def parse(cls, fixed: bytes, options: tuple[Option, ...]) -> Revocation:
        """From the six octets and the options."""
        _unused, trigger, sequence, flags = struct.unpack(">BBHH", fixed)
        return cls(trigger, sequence, options, bool(flags & 0x8000))


@dataclass(frozen=True, slots=True)
class RevocationAcknowledgement:
    """The gateway has withdrawn (RFC 5846 section 5.2)."""

    status: int
    sequence: int
    options: tuple[Option, ...]
    proxy: bool = True
    kind: ClassVar[int] = 16
    type_octet: ClassVar[int] = 2

    def fixed(self) -> bytes:
        """The six octets before the options."""
        return struct.pack(">BBHH", self.type_octet, self.status, self.sequence, 0x8000 * self.proxy)

    @classmethod
    def parse(cls, fixed: bytes, options: tuple[Option, ...]) -> RevocationAcknowledgement:
        """From the six octets and the options."""
        _unused, status, sequence, flags = struct.unpack(">BBHH", fixed)
        return cls(status, sequence, options, bool(flags & 0x8000))


Message = BindingUpdate | BindingAcknowledgement | Heartbeat | Revocation | RevocationAcknowledgement


def parse_message(kind: int, fixed: bytes, options: tuple[Option, ...]) -> Message:
    """The message of type ``kind``. Raises MalformedMessage for a type that agents do not exchange."""
    match kind:
        case BindingUpdate.kind:
            return BindingUpdate.parse(fixed, options)
        case BindingAcknowledgement.kind:
            return BindingAcknowledgement.parse(fixed, options)
        case Heartbeat.kind:
            return Heartbeat.parse(fixed, options)
        case Revocation.kind if fixed[0] == Revocation.type_octet:
            return Revocation.parse(fixed, options)
        case RevocationAcknowledgement.kind if fixed[0] == RevocationAcknowledgement.type_octet:
            return RevocationAcknowledgement.parse(fixed, options)
        case _:
            raise MalformedMessage(
                f"mobility header type {kind}: not one that agents exchange; message dropped"
            )
