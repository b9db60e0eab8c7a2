# SPDX-License-Identifier: GPL-3.0-or-later
"""Records: the messages of the streams ``generation`` and ``seed``; see docs/wire-protocol-blocks.md.

A record is 28 bytes of header and a payload, all integers big-endian::

    type u8 | flags u8 | disk index u16 | offset u64 | length u64 (raw) | payload length u32 | payload
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any

import zstandard

from precache_proxy.errors import IntegrityError, InvalidInput, ProtocolError
from precache_proxy.units import MIB

HEADER = struct.Struct(">BBHQQI")
MAX_RAW_BYTES = MIB
MAX_ATTACHMENT_BYTES = 64 * MIB
_MAX_NAME_BYTES = 255
_LARGEST_END = 2**63 - 1
Payload = bytes | bytearray | memoryview


class RecordType(IntEnum):
    """What a record says. SEALED and MARKED go from the store to the source, all others to the store."""

    DATA = 1
    ZERO = 2
    ATTACHMENT = 3
    SLICE = 4
    SEAL = 5
    SEALED = 6
    MARK = 7
    MARKED = 8


class Flag(IntFlag):
    """How the payload is packed."""

    NONE = 0
    ZSTD = 1


_WITH_JSON = frozenset({RecordType.SEAL, RecordType.SEALED, RecordType.MARK, RecordType.MARKED})
DIGESTED = frozenset({RecordType.DATA, RecordType.ZERO, RecordType.ATTACHMENT})


@dataclass(frozen=True, slots=True)
class Record:
    """``payload`` is the raw one, never compressed; ``length`` its length, or for ZERO that of the range."""

    type: RecordType
    disk: int = 0
    offset: int = 0
    length: int = 0
    payload: Payload = b""

    def digest_header(self) -> bytes:
        """The header as a generation's digest has it: the same however the payload travelled."""
        return HEADER.pack(self.type, 0, self.disk, self.offset, self.length, 0)

    def pack(self, packed: Payload | None = None, flags: Flag = Flag.NONE) -> tuple[bytes, Payload]:
        """Header and payload of the message; ``packed`` is the compressed payload where there is one."""
        payload = self.payload if packed is None else packed
        header = HEADER.pack(self.type, flags, self.disk, self.offset, self.length, len(payload))
        return header, payload

    @classmethod
    def unpack(cls, message: Payload) -> Record:
        """The record in a message, decompressed; every length is checked before memory is taken for it.

        Raises ProtocolError on anything that no sender of this protocol writes.
        """
        view = memoryview(message)
        if len(view) < HEADER.size:
            raise ProtocolError(f"record of {len(view)} bytes: shorter than its header of {HEADER.size}")
        number, flags, disk, offset, length, payload_length = HEADER.unpack_from(view)
        try:
            kind = RecordType(number)
        except ValueError:
            raise ProtocolError(
                f"record type {number}: not known; is the same release on both hosts?"
            ) from None
        payload = view[HEADER.size :]
        if len(payload) != payload_length:
            raise ProtocolError(f"{kind.name} record: {len(payload)} bytes instead of {payload_length}")
        if flags not in {Flag.NONE, Flag.ZSTD}:
            raise ProtocolError(f"{kind.name} record: unknown flags {flags:#x}")
        if offset + length > _LARGEST_END:
            raise ProtocolError(f"{kind.name} record: its range ends at {offset + length}, past any disk")
        if kind is RecordType.ZERO:
            if payload_length or flags or not length:
                raise ProtocolError("ZERO record: must have a length and neither payload nor flags")
            return cls(kind, disk, offset, length)
        if length > MAX_RAW_BYTES:
            raise ProtocolError(f"{kind.name} record: {length} bytes, more than {MAX_RAW_BYTES}")
        if flags & Flag.ZSTD:
            return cls(kind, disk, offset, length, _decompress(kind, payload, length))
        if payload_length != length:
            raise ProtocolError(f"{kind.name} record: {payload_length} bytes for a length of {length}")
        if kind is RecordType.DATA and not length:
            raise ProtocolError("DATA record: it holds nothing")
        return cls(kind, disk, offset, length, payload)

    def json(self) -> dict[str, Any]:
        """The content of a SEAL, SEALED, MARK or MARKED record. Raises ProtocolError."""
        try:
            value = json.loads(bytes(self.payload))
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"{self.type.name} record: not JSON ({error})") from error
        if self.type not in _WITH_JSON or not isinstance(value, dict):
            raise ProtocolError(f"{self.type.name} record: a JSON object was expected")
        return value


def _decompress(kind: RecordType, payload: memoryview, length: int) -> bytes:
    try:
        # The frame's own idea of its size is checked first: it is what zstandard would allocate.
        announced = zstandard.frame_content_size(payload)
        if announced not in {length, -1}:
            raise ProtocolError(f"{kind.name} record: zstd announces {announced} bytes instead of {length}")
        raw = zstandard.ZstdDecompressor().decompress(payload, max_output_size=length)
    except zstandard.ZstdError as error:
        raise ProtocolError(f"{kind.name} record: its payload cannot be decompressed ({error})") from error
    if len(raw) != length:
        raise ProtocolError(f"{kind.name} record: {len(raw)} bytes unpacked instead of {length}")
    return raw


def json_record(kind: RecordType, value: dict[str, Any]) -> Record:
    """A SEAL, SEALED, MARK or MARKED record."""
    payload = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return Record(kind, length=len(payload), payload=payload)


def attachment_records(name: str, content: bytes) -> Iterator[Record]:
    """A small file as ATTACHMENT records, each with the offset of its piece.

    Payload: length of the whole u64, length of the name u8, name, piece.
    """
    encoded = name.encode()
    if not 0 < len(encoded) <= _MAX_NAME_BYTES or len(content) > MAX_ATTACHMENT_BYTES:
        raise InvalidInput(
            f"attachment {name!r} of {len(content)} bytes: at most {MAX_ATTACHMENT_BYTES} bytes"
            f" under a name of 1 to {_MAX_NAME_BYTES} bytes can go along"
        )
    prefix = struct.pack(">QB", len(content), len(encoded)) + encoded
    room = MAX_RAW_BYTES - len(prefix)
    for offset in range(0, max(1, len(content)), room):
        payload = prefix + content[offset : offset + room]
        yield Record(RecordType.ATTACHMENT, 0, offset, len(payload), payload)


class AttachmentCollector:
    """Puts the pieces of attachments together again, within :data:`MAX_ATTACHMENT_BYTES` for all of them."""

    def __init__(self) -> None:
        self._pieces: dict[str, bytearray] = {}
        self._totals: dict[str, int] = {}

    def add(self, record: Record) -> None:
        """Take one ATTACHMENT record; pieces of one file come in order. Raises ProtocolError."""
        payload = memoryview(record.payload)
        try:
            total, name_length = struct.unpack_from(">QB", payload)
            name = str(payload[9 : 9 + name_length], "utf-8")
        except (struct.error, UnicodeDecodeError) as error:
            raise ProtocolError(f"ATTACHMENT record: no whole name ({error})") from error
        piece = payload[9 + name_length :]
        if record.offset == 0:
            self._pieces[name] = bytearray()
            self._totals[name] = total
        held = self._pieces.get(name)
        if not name or held is None or len(held) != record.offset or self._totals[name] != total:
            raise ProtocolError(f"attachment {name!r}: the piece at {record.offset} is not the next one")
        if sum(self._totals.values()) > MAX_ATTACHMENT_BYTES or len(held) + len(piece) > total:
            raise ProtocolError(f"attachment {name!r}: more than the {total} bytes announced, or too large")
        held += piece

    def finished(self) -> dict[str, bytes]:
        """All attachments. Raises ProtocolError when a piece is missing."""
        for name, held in self._pieces.items():
            if len(held) != self._totals[name]:
                raise ProtocolError(f"attachment {name!r}: {len(held)} of {self._totals[name]} bytes came")
        return {name: bytes(held) for name, held in self._pieces.items()}


class GenerationDigest:
    """SHA-256 over a generation's DATA, ZERO and ATTACHMENT records, in the order in which they were sent."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, record: Record) -> None:
        """Include a record; others than those three are left out."""
        if record.type in DIGESTED:
            self._hash.update(record.digest_header())
            self._hash.update(record.payload)

    def hexdigest(self) -> str:
        """64 hexadecimal digits."""
        return self._hash.hexdigest()

    def compare(self, expected: object, subject: str) -> None:
        """Raises IntegrityError, naming ``subject``, where the sender's digest is another one."""
        if expected != self.hexdigest():
            raise IntegrityError(
                f"{subject}: its digest is {self.hexdigest()}, the source says {expected};"
                " nothing of it was kept"
            )
