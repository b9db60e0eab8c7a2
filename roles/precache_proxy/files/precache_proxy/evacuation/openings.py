# SPDX-License-Identifier: GPL-3.0-or-later
"""How libvirt and QEMU open a connection for a migration: questions that are known before they are asked.

Each waits for its answer, so over a WAN an opening costs as many round trips as it has questions. What is
asked here changes nothing but the connection itself, and may therefore be asked ahead (opening_ahead.py,
held_opening.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from precache_proxy.errors import ProtocolError
from precache_proxy.evacuation import libvirt_frames, nbd_frames


class Bytes(Protocol):
    """Where answers are read from."""

    async def readexactly(self, n: int, /) -> bytes:
        """So many bytes; raises what tells that they will not come."""


class Language(Protocol):
    """What the two sides of an opening must know of its protocol."""

    def may_be_asked(self, requests: tuple[bytes, ...]) -> bool:
        """Whether this is an opening and nothing more."""

    def request_bytes(self, data: bytes, step: int) -> int | None:
        """Length of the request that ``data`` begins with; None while that is not known."""

    def same(self, heard: bytes, known: bytes) -> bool:
        """Whether it is the same question."""

    def told(self, reply: bytes, request: bytes) -> bytes:
        """The reply as it answers this very request."""

    async def read_reply(self, source: Bytes, request: bytes, aside: Callable[[bytes], None]) -> bytes:
        """The reply to a request, good or bad; what else comes goes ``aside``. Raises ProtocolError."""

    def is_good(self, reply: bytes, request: bytes) -> bool:
        """Whether it is one that the opening goes on after."""

    def answer_unasked(self, data: bytes) -> tuple[bytes, bytes]:
        """What to say to what came while nothing was asked, and what of it is not whole yet.
        Raises ProtocolError where only who opened the connection could answer."""


class LibvirtLanguage:
    """Calls of libvirt's remote program. A reply carries the serial of its call."""

    def may_be_asked(self, requests: tuple[bytes, ...]) -> bool:
        """Whether all are calls that change nothing but their connection."""
        return bool(requests) and all(libvirt_frames.is_opening_call(raw) for raw in requests)

    def request_bytes(self, data: bytes, _step: int) -> int | None:
        """The packet's length."""
        return libvirt_frames.length_of(data)

    def same(self, heard: bytes, known: bytes) -> bool:
        """Whether they differ in their serials at most."""
        return libvirt_frames.with_serial(heard, 0) == libvirt_frames.with_serial(known, 0)

    def told(self, reply: bytes, request: bytes) -> bytes:
        """With the serial of the call."""
        return libvirt_frames.with_serial(reply, libvirt_frames.serial_of(request))

    async def read_reply(self, source: Bytes, request: bytes, aside: Callable[[bytes], None]) -> bytes:
        """The reply with the call's serial."""
        while True:
            header = await source.readexactly(libvirt_frames.HEADER.size)
            length = libvirt_frames.length_of(header) or len(header)
            if length > libvirt_frames.LARGEST_OPENING_BYTES:
                raise ProtocolError(f"libvirt: a packet of {length} bytes while its connection is opened")
            raw = header + await source.readexactly(length - len(header))
            if libvirt_frames.answers(raw, request):
                return raw
            aside(raw)

    def is_good(self, reply: bytes, _request: bytes) -> bool:
        """Whether its status is OK."""
        return libvirt_frames.is_good(reply)

    def answer_unasked(self, data: bytes) -> tuple[bytes, bytes]:
        """Keepalive is answered; any other packet is not ours to take."""
        answer = b""
        while (length := libvirt_frames.length_of(data)) is not None:
            if not libvirt_frames.is_ping(data):
                raise ProtocolError("libvirt: it spoke before it was asked")
            if len(data) < length:
                break
            answer, data = answer + libvirt_frames.PONG, data[length:]
        return answer, data


class NbdLanguage:
    """The handshake of an NBD client that was greeted."""

    def may_be_asked(self, requests: tuple[bytes, ...]) -> bool:
        """Whether it is the handshake to the first GO."""
        return nbd_frames.is_opening(requests)

    def request_bytes(self, data: bytes, step: int) -> int | None:
        """Nothing for the greeting, then the client's flags, then options."""
        if step < 2:
            return nbd_frames.CLIENT_FLAGS_BYTES * step
        if len(data) < nbd_frames.OPTION.size:
            return None
        return nbd_frames.OPTION.size + int(nbd_frames.OPTION.unpack_from(data)[2])

    def same(self, heard: bytes, known: bytes) -> bool:
        """Whether they are equal."""
        return heard == known

    def told(self, reply: bytes, _request: bytes) -> bytes:
        """As it is."""
        return reply

    async def read_reply(self, source: Bytes, request: bytes, _aside: Callable[[bytes], None]) -> bytes:
        """The greeting; nothing to flags; to an option all until it is acknowledged or refused."""
        if not request:
            greeting = await source.readexactly(nbd_frames.GREETING_BYTES)
            if not greeting.startswith(nbd_frames.GREETING):
                raise ProtocolError("NBD: no newstyle greeting")
            return greeting
        if len(request) == nbd_frames.CLIENT_FLAGS_BYTES:
            return b""
        reply = b""
        while True:
            header = await source.readexactly(nbd_frames.OPTION_REPLY.size)
            magic, number, kind, length = nbd_frames.OPTION_REPLY.unpack(header)
            asked = nbd_frames.OPTION.unpack_from(request)[1]
            if (magic, number) != (nbd_frames.REPLY_MAGIC, asked) or length > nbd_frames.LARGEST_OPTION_BYTES:
                raise ProtocolError("NBD: no reply to the option that was asked")
            reply += header + await source.readexactly(length)
            if kind == nbd_frames.ACKNOWLEDGED or kind & nbd_frames.IS_ERROR:
                return reply

    def is_good(self, reply: bytes, request: bytes) -> bool:
        """Whether an option was acknowledged."""
        if len(request) <= nbd_frames.CLIENT_FLAGS_BYTES:
            return True
        # Acknowledgements carry no data, so the last header ends the reply; an error may carry a text.
        last = len(reply) - nbd_frames.OPTION_REPLY.size
        return last >= 0 and nbd_frames.OPTION_REPLY.unpack_from(reply, last)[1:] == (
            nbd_frames.OPTION.unpack_from(request)[1],
            nbd_frames.ACKNOWLEDGED,
            0,
        )

    def answer_unasked(self, data: bytes) -> tuple[bytes, bytes]:
        """A server says nothing unasked."""
        if data:
            raise ProtocolError("NBD: the server spoke before it was asked")
        return b"", b""


LIBVIRT_LANGUAGE: Final = LibvirtLanguage()
NBD_LANGUAGE: Final = NbdLanguage()
# By the job's socket, as relay.py names it.
LANGUAGES: Final[dict[str, Language]] = {"libvirt": LIBVIRT_LANGUAGE, "disk": NBD_LANGUAGE}
