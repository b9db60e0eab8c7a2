# SPDX-License-Identifier: GPL-3.0-or-later
"""Pieces of a relayed byte stream as messages: compressed where that pays, bounded on both sides."""

from __future__ import annotations

import io
from typing import IO, Any, Final, cast

import zstandard

from precache_proxy.errors import ProtocolError
from precache_proxy.units import GIB, KIB

# Large enough for a good ratio, small enough that QEMU's estimate of the bandwidth follows the link.
PIECE_BYTES: Final = 128 * KIB
RAW: Final = b"\x00"
_ZSTD: Final = b"\x01"
# What zstd adds to a piece that does not shrink: three bytes a block, and the frame's header.
_PACKING_BYTES: Final = 1 * KIB
# Memory repeats itself over its whole length: 95 MB of an idle guest's RAM stream came to 46.4 MB with a
# window of 16 MiB and to 34.7 MB with one of 128 MiB, which is what its distinct pages alone come to.
# All five are given, for the binding divides by those that are left out.
_LONG_DISTANCE_MATCHING: Final = {
    "enable_ldm": True,
    "ldm_min_match": 64,
    "ldm_hash_rate_log": 7,
    "ldm_hash_log": 20,
    "ldm_bucket_size_log": 3,
}
LARGEST_WINDOW_LOG: Final = 27
_SMALLEST_WINDOW_LOG: Final = 20
_WINDOWS_BYTES: Final = 1 * GIB
# What a level costs and brings on that stream: 1: 352 MB/s of one core; 3: 243 MB/s, -4 %; 9: 93 MB/s, -8 %.
_LEVELS: Final = ((12.5e6, 9), (125e6, 3))
_FASTEST_LEVEL: Final = 1
_PRESSED: Final = 0.6
# A run of pieces that shrank by less than this is followed by some that are not tried.
_WORTHWHILE_RATIO: Final = 0.95
_GIVE_UP_AFTER_PIECES: Final = 8
_NOT_TRIED_PIECES: Final = 64


def level_for(channel_bytes_per_second: float | None, processors_waited: float = 0.0) -> int:
    """The strongest compression that keeps ahead of the channel with a part of one core.

    ``processors_waited``: in what share of the time this host's processors are waited for. Where that is most
    of it, a channel that seems slow may be one that nobody had time to fill.
    """
    rate = _LEVELS[0][0] if channel_bytes_per_second is None else channel_bytes_per_second
    if processors_waited >= _PRESSED:
        rate = max(rate, _LEVELS[0][0])
    return next((level for most, level in _LEVELS if rate < most), _FASTEST_LEVEL)


class WindowBudget:
    """How much memory all packers of this process may use for their windows, in bytes."""

    def __init__(self, limit_bytes: int = _WINDOWS_BYTES) -> None:
        self._left_bytes = limit_bytes

    def take(self) -> int:
        """The binary logarithm of the largest window that there is room for; the smallest always has."""
        log = max(min(LARGEST_WINDOW_LOG, max(self._left_bytes, 0).bit_length() - 1), _SMALLEST_WINDOW_LOG)
        self._left_bytes -= 1 << log
        return log

    def give_back(self, window_log: int) -> None:
        """What :meth:`take` gave is not used any more."""
        self._left_bytes += 1 << window_log


class Packer:
    """Pieces of a byte stream as messages, compressed where that pays."""

    def __init__(self, *, window_log: int = _SMALLEST_WINDOW_LOG, level: int = _FASTEST_LEVEL) -> None:
        parameters = zstandard.ZstdCompressionParameters.from_level(
            level, window_log=window_log, **_LONG_DISTANCE_MATCHING
        )
        self._compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        self._poor = 0
        self._skip = 0

    def pack(self, piece: bytes, *, waited: bool = False) -> tuple[bytes, bytes]:
        """The message for ``piece`` in two parts (marker, payload).

        ``waited``: the channel is what is slow, so trying costs nothing even where it brings little.
        """
        if self._skip and not waited:
            self._skip -= 1
            return RAW, piece
        self._skip = 0
        packed = self._compressor.compress(piece) + self._compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        # Short pieces say nothing about the content.
        if len(piece) >= PIECE_BYTES // 4:
            self._poor = self._poor + 1 if len(packed) > len(piece) * _WORTHWHILE_RATIO else 0
            if self._poor >= _GIVE_UP_AFTER_PIECES:
                self._poor, self._skip = 0, _NOT_TRIED_PIECES
        return _ZSTD, packed


class _Piece(io.RawIOBase):
    """Takes what is unpacked, up to the size of a piece: a few bytes may stand for gigabytes of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[bytes] = []
        self._bytes = 0

    def write(self, part: Any) -> int:
        """Take a part, or drop it: zstandard does not hear what is raised here."""
        self._bytes += len(part)
        if self._bytes <= PIECE_BYTES:
            self._parts.append(bytes(part))
        return len(part)

    def take(self) -> bytes:
        """The piece; the next one begins. Raises ProtocolError when it was too long."""
        piece, unpacked_bytes = b"".join(self._parts), self._bytes
        self._parts.clear()
        self._bytes = 0
        if unpacked_bytes > PIECE_BYTES:
            raise ProtocolError(
                f"relay: a message unpacks to {unpacked_bytes} bytes; a piece has {PIECE_BYTES} at most"
            )
        return piece


class Unpacker:
    """The other end of :class:`Packer`."""

    def __init__(self) -> None:
        # A window beyond the packer's is refused before memory is taken for it.
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << LARGEST_WINDOW_LOG)
        self._piece = _Piece()
        self._decompressor = decompressor.stream_writer(cast(IO[bytes], self._piece), write_size=PIECE_BYTES)

    def unpack(self, message: bytes) -> bytes:
        """The piece that a message carries, PIECE_BYTES at most. Raises ProtocolError."""
        marker, payload = message[:1], message[1:]
        if len(payload) > PIECE_BYTES + _PACKING_BYTES:
            raise ProtocolError(
                f"relay: a message of {len(payload)} bytes; a piece has {PIECE_BYTES} at most"
            )
        if marker == RAW:
            return payload
        if marker != _ZSTD:
            raise ProtocolError(
                f"relay: a message of unknown form {marker!r}; are both proxies of one version?"
            )
        try:
            self._decompressor.write(payload)
            return self._piece.take()
        except zstandard.ZstdError as error:
            raise ProtocolError(f"relay: a message that does not decompress ({error})") from error
