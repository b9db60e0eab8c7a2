# SPDX-License-Identifier: GPL-3.0-or-later
"""Answers a mirror's flush here where the destination has nothing left to flush.

QEMU flushes a mirror when it begins and three times one after the other when it ends, while the guest
stands still; over a WAN each costs a round trip. A flush promises that writes that were answered before it
are on disk. So one that follows another, with no write between them and nothing under way, promises nothing
new: the answer to that other one is its answer, too.

What the guest has written since the last flush would cost the first of the three its round trip. So a flush
of ours goes out while the guest still runs, once all that was written is answered; its answer is kept here.

Source: NetworkBlockDevice/nbd, doc/proto.md (extended headers, NBD_CMD_FLUSH); QEMU, block/nbd.c
(nbd_client_co_flush) and block/mirror.c.
"""

from __future__ import annotations

import struct
from typing import Final

# Of a request and of a reply: magic, flags, kind, cookie, offset and length.
_HEADER: Final = struct.Struct(">IHHQQQ")
_REQUEST_MAGIC: Final = 0x21E41C71
_REPLY_MAGIC: Final = 0x6E8A278C
_READ: Final = 0
_WRITE: Final = 1
_FLUSH: Final = 3
_BLOCK_STATUS: Final = 7
_CHANGES_NOTHING: Final = frozenset({_READ, _FLUSH, _BLOCK_STATUS})
_HAS_PAYLOAD: Final = 1 << 5
_DONE: Final = 1
# Of our own flushes. QEMU counts its cookies from 1 up to the 16 requests that it has under way.
_OWN_COOKIE: Final = 1 << 63
_NOTHING: Final = 0


class _Packets:
    """One direction, by its headers, however it is cut."""

    def __init__(self, magic: int) -> None:
        self._magic = magic
        # of a header that is not whole, and how much of a packet's payload is still to come
        self.rest = b""
        self.payload_bytes = 0
        self.lost = False

    @property
    def between(self) -> bool:
        """Nothing of a packet is under way."""
        return not self.rest and not self.payload_bytes

    def next(self, data: bytes) -> tuple[bytes, tuple[int, ...] | None, bytes]:
        """The rest of the last packet's payload, the next header if it is whole, and what follows that.
        ``lost`` where it is none: then nothing here is understood any more."""
        payload, data = data[: self.payload_bytes], data[self.payload_bytes :]
        self.payload_bytes -= len(payload)
        if self.payload_bytes or len(data) < _HEADER.size:
            return payload, None, data
        fields = _HEADER.unpack_from(data)
        if fields[0] != self._magic:
            self.lost = True
            return payload, None, data
        return payload, fields, data[_HEADER.size :]


class Flushes:
    """Follows both directions of one client's connection after its handshake with extended headers.

    What it does not understand passes as it is, and so does all that follows.
    """

    def __init__(self) -> None:
        self.answered = 0
        self._requests = _Packets(_REQUEST_MAGIC)
        self._replies = _Packets(_REPLY_MAGIC)
        # cookies of requests that were not answered in full
        self._open: set[int] = set()
        # whether anything may have been written since all was flushed
        self._written = False
        # the flush under way that will have flushed all that was written, and whether it was refused
        self._flush: int | None = None
        self._refused = False
        # a flush of ours is under way; one was refused, so that no other is tried
        self._own = False
        self._own_refused = False
        # the payload that comes is of the answer to ours
        self._dropping = False

    def answer_none(self) -> None:
        """From now on all passes as it is: another connection may write what this one's flushes promise."""
        self._requests.lost = True

    @property
    def wants_flush(self) -> bool:
        """Whether a flush of our own, sent now, would spare the client one: something was written, all of it
        is answered, and nothing is under way in either direction."""
        return (
            self._written
            and not self._lost
            and not self._open
            and not self._own_refused
            and self._requests.between
            and self._replies.between
        )

    def flush(self) -> bytes:
        """A flush of our own, to be sent before what the client says next; nothing where none is wanted."""
        if not self.wants_flush:
            return b""
        self._own = True
        self._goes_out(_FLUSH, _OWN_COOKIE)
        return _HEADER.pack(_REQUEST_MAGIC, 0, _FLUSH, _OWN_COOKIE, 0, 0)

    @property
    def _lost(self) -> bool:
        return self._requests.lost or self._replies.lost

    def outward(self, piece: bytes) -> tuple[bytes, bytes]:
        """What of the client's piece (empty: its end) goes to the server, and what the client is told at
        once."""
        data, self._requests.rest = self._requests.rest + piece, b""
        onward, told = bytearray(), bytearray()
        while not self._lost and piece:
            payload, fields, after = self._requests.next(data)
            onward += payload
            if fields is None:
                data = after
                if not self._requests.lost:
                    data, self._requests.rest = b"", after
                break
            _magic, flags, kind, cookie, offset, length = fields
            if kind == _WRITE or flags & _HAS_PAYLOAD:
                self._requests.payload_bytes = length
            if self._says_nothing_new(kind, flags):
                told += _HEADER.pack(_REPLY_MAGIC, _DONE, _NOTHING, cookie, offset, 0)
                self.answered += 1
            else:
                self._goes_out(kind, cookie)
                onward += _HEADER.pack(*fields)
            data = after
        return bytes(onward) + data, bytes(told)

    def inward(self, piece: bytes) -> bytes:
        """What of the server's piece (empty: its end) goes to the client: all but the answer to ours."""
        data, self._replies.rest = self._replies.rest + piece, b""
        onward = bytearray()
        # Also where the client's side is understood no more: it has not asked what is answered to us.
        while not self._replies.lost and piece:
            payload, fields, after = self._replies.next(data)
            if not self._dropping:
                onward += payload
            if fields is None:
                data = after
                if not self._replies.lost:
                    data, self._replies.rest = b"", after
                break
            _magic, flags, kind, cookie, _offset, length = fields
            self._replies.payload_bytes = length
            self._dropping = self._own and cookie == _OWN_COOKIE
            if not self._dropping:
                onward += _HEADER.pack(*fields)
            self._comes_in(cookie, good=kind == _NOTHING, done=bool(flags & _DONE))
            data = after
        return bytes(onward) + data

    def _says_nothing_new(self, kind: int, flags: int) -> bool:
        return kind == _FLUSH and not flags and not self._written and not self._open and self._replies.between

    def _goes_out(self, kind: int, cookie: int) -> None:
        if kind not in _CHANGES_NOTHING:
            self._written, self._flush = True, None
        elif kind == _FLUSH and not self._open:
            self._flush, self._refused = cookie, False
        self._open.add(cookie)

    def _comes_in(self, cookie: int, *, good: bool, done: bool) -> None:
        if cookie == self._flush:
            self._refused |= not good
        if cookie == _OWN_COOKIE:
            self._own_refused |= not good
            self._own = self._own and not done
        if not done:
            return
        self._open.discard(cookie)
        if cookie == self._flush:
            self._written = self._written and self._refused
            self._flush = None


class MirrorFlushes:
    """Which connections of one job are followed: a flush is one connection's promise for its whole export,
    so an export that is connected to a second time is followed on none of them any more."""

    def __init__(self) -> None:
        self._by_export: dict[str, Flushes | None] = {}
        self._unknown = False

    def connected(self, export: str | None, *, understood: bool) -> Flushes | None:
        """A connection to an export (None: nobody knows to which) begins; who follows it, None: nobody.

        ``understood``: its handshake agreed on what :class:`Flushes` reads.
        """
        if export is None:
            # It may be any one's second.
            self._unknown = True
            for flushes in self._by_export.values():
                if flushes is not None:
                    flushes.answer_none()
            return None
        if self._unknown or export in self._by_export:
            before = self._by_export.get(export)
            if before is not None:
                before.answer_none()
            self._by_export[export] = None
            return None
        self._by_export[export] = Flushes() if understood else None
        return self._by_export[export]
