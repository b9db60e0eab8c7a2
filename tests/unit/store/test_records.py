# SPDX-License-Identifier: GPL-3.0-or-later
"""The codec of records: what is packed comes back, and nothing else gets in."""

from __future__ import annotations

import hashlib
import struct

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from precache_proxy.errors import IntegrityError, InvalidInput, ProtocolError
from precache_proxy.store.records import (
    HEADER,
    MAX_ATTACHMENT_BYTES,
    MAX_RAW_BYTES,
    AttachmentCollector,
    Flag,
    GenerationDigest,
    Record,
    RecordType,
    attachment_records,
    json_record,
)

DISKS = st.integers(0, 65535)
OFFSETS = st.integers(0, 2**62)


def message(record: Record) -> bytes:
    return b"".join(record.pack())


@given(DISKS, OFFSETS, st.binary(min_size=1, max_size=5000), st.booleans())
def test_data_comes_back_raw_or_compressed(disk: int, offset: int, payload: bytes, compressed: bool) -> None:
    record = Record(RecordType.DATA, disk, offset, len(payload), payload)
    packed = zstandard.ZstdCompressor().compress(payload) if compressed else None
    header, body = record.pack(packed, Flag.ZSTD if compressed else Flag.NONE)
    back = Record.unpack(header + bytes(body))
    assert (back.type, back.disk, back.offset, back.length) == (RecordType.DATA, disk, offset, len(payload))
    assert bytes(back.payload) == payload
    assert back.digest_header() == record.digest_header(), (
        "the digest does not depend on how a record travelled"
    )


@given(DISKS, OFFSETS, st.integers(1, 2**62 - 1))
def test_zero_comes_back(disk: int, offset: int, length: int) -> None:
    record = Record(RecordType.ZERO, disk, offset, length)
    assert Record.unpack(message(record)) == record


@given(st.dictionaries(st.text(), st.integers() | st.text()), st.sampled_from([5, 6, 7, 8]))
def test_json_comes_back(value: dict[str, int | str], kind: int) -> None:
    assert Record.unpack(message(json_record(RecordType(kind), value))).json() == value


@given(st.binary(max_size=200))
def test_garbage_is_a_protocol_error_or_a_record(content: bytes) -> None:
    try:
        record = Record.unpack(content)
    except ProtocolError:
        return
    assert message(record)[: HEADER.size] == content[: HEADER.size] or content[1] == Flag.ZSTD


@given(st.binary(min_size=1, max_size=300), st.integers(0, 400), st.integers(0, 255))
def test_a_changed_byte_or_length_never_escapes_the_checks(payload: bytes, position: int, value: int) -> None:
    packed = zstandard.ZstdCompressor().compress(payload)
    whole = bytearray(b"".join(Record(RecordType.DATA, 1, 0, len(payload), payload).pack(packed, Flag.ZSTD)))
    whole[position % len(whole)] = value
    try:
        record = Record.unpack(bytes(whole))
    except ProtocolError:
        return
    assert len(record.payload) == (0 if record.type is RecordType.ZERO else record.length) <= MAX_RAW_BYTES


@pytest.mark.parametrize(("fields", "payload", "said"), [
    ((1, 0, 0, 0, 5, 4), b"xxxxx", "instead of"),
    ((1, 0, 0, 0, 4, 5), b"xxxxx", "for a length of"),
    ((1, 0, 0, 0, 0, 0), b"", "holds nothing"),
    ((1, 4, 0, 0, 1, 1), b"x", "unknown flags"),
    ((99, 0, 0, 0, 1, 1), b"x", "type 99"),
    ((2, 0, 0, 0, 8, 1), b"x", "ZERO"),
    ((2, 0, 0, 0, 0, 0), b"", "ZERO"),
    ((2, 0, 0, 2**63, 2**63, 0), b"", "past any disk"),
    ((1, 0, 0, 0, MAX_RAW_BYTES + 1, 1), b"x", "more than"),
    ((1, 1, 0, 0, 10, 4), b"nope", "decompressed"),
])  # fmt: skip
def test_wrong_fields_are_named(fields: tuple[int, ...], payload: bytes, said: str) -> None:
    with pytest.raises(ProtocolError, match=said):
        Record.unpack(HEADER.pack(*fields) + payload)


def test_a_small_message_cannot_become_large() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(64 * 1024 * 1024))
    for length in (100, MAX_RAW_BYTES):
        with pytest.raises(ProtocolError, match="announces"):
            Record.unpack(HEADER.pack(1, 1, 0, 0, length, len(bomb)) + bomb)
    streamed = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    bomb = streamed.compress(bytes(64 * 1024 * 1024)) + streamed.flush()
    with pytest.raises(ProtocolError):
        Record.unpack(HEADER.pack(1, 1, 0, 0, 100, len(bomb)) + bomb)


def test_header_layout_is_the_documented_one() -> None:
    record = Record(RecordType.DATA, 0x0102, 0x030405060708090A, 3, b"abc")
    assert message(record).hex() == "01000102030405060708090a0000000000000003" + "00000003" + b"abc".hex()


@given(st.dictionaries(st.text(min_size=1, max_size=20), st.binary(max_size=3000), max_size=4))
def test_attachments_come_back(attachments: dict[str, bytes]) -> None:
    collector = AttachmentCollector()
    for name, content in attachments.items():
        for record in attachment_records(name, content):
            collector.add(Record.unpack(message(record)))
    assert collector.finished() == attachments


def test_large_attachments_come_in_pieces_and_gaps_are_seen() -> None:
    content = bytes(range(256)) * 10000
    pieces = list(attachment_records("tpm", content))
    assert len(pieces) == 3
    collector = AttachmentCollector()
    for record in pieces:
        collector.add(record)
    assert collector.finished() == {"tpm": content}
    collector = AttachmentCollector()
    collector.add(pieces[0])
    with pytest.raises(ProtocolError, match="not the next one"):
        collector.add(pieces[2])
    with pytest.raises(ProtocolError, match="bytes came"):
        collector.finished()
    with pytest.raises(InvalidInput, match="at most"):
        list(attachment_records("tpm", bytes(MAX_ATTACHMENT_BYTES + 1)))
    with pytest.raises(ProtocolError, match="too large"):
        AttachmentCollector().add(Record(RecordType.ATTACHMENT, payload=struct.pack(">QB", 2**40, 1) + b"x"))


def test_digest_counts_what_the_protocol_says() -> None:
    digest = GenerationDigest()
    data, zero = Record(RecordType.DATA, 0, 4096, 3, b"abc"), Record(RecordType.ZERO, 1, 0, 512)
    for record in (data, Record(RecordType.SLICE), zero, json_record(RecordType.SEAL, {})):
        digest.update(record)
    expected = hashlib.sha256(
        struct.pack(">BBHQQI", 1, 0, 0, 4096, 3, 0) + b"abc" + struct.pack(">BBHQQI", 2, 0, 1, 0, 512, 0)
    ).hexdigest()
    assert digest.hexdigest() == expected
    digest.compare(expected, "x")
    with pytest.raises(IntegrityError, match="web1"):
        digest.compare(None, "web1")
