# SPDX-License-Identifier: GPL-3.0-or-later
"""The source's side of openings that are made ahead: asked for early, told from memory, then the real thing.

What libvirt and QEMU here hear is what libvirt and QEMU at the destination said, on the very connection
that they go on with. Where an answer is not there, or another question is asked than was expected, the
connection is opened over the WAN as ever: what was asked so far is asked again there, and answered as here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence

from precache_proxy.errors import LifeboatError, ProtocolError, Stalled
from precache_proxy.evacuation import libvirt_frames, nbd_frames
from precache_proxy.evacuation.held_opening import unpack_replies
from precache_proxy.evacuation.nbd_flushes import Flushes
from precache_proxy.evacuation.openings import LANGUAGES, LIBVIRT_LANGUAGE, Language
from precache_proxy.evacuation.packing import PIECE_BYTES, RAW, Unpacker
from precache_proxy.evacuation.relay import LIBVIRT, Begun, RelayStream

logger = logging.getLogger(__name__)

# What is left to wait for when libvirt or QEMU connects: less than an opening over a WAN.
READY_SECONDS = 1.5
_LARGEST_REQUEST_BYTES = libvirt_frames.LARGEST_OPENING_BYTES
OpenAhead = Callable[[str, Sequence[bytes]], Awaitable[RelayStream]]
OpenPlain = Callable[[str], Awaitable[RelayStream]]


class KnownOpenings:
    """What this host's libvirtd asks when it opens a connection, by the peer that it asks."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[bytes, ...]] = {}

    def of(self, peer: str) -> tuple[bytes, ...]:
        """What it asked last, or what the versions that we know ask."""
        return self._seen.get(peer, libvirt_frames.OPENING)

    def saw(self, peer: str, requests: Sequence[bytes]) -> None:
        """Remember for the next time. What may not be asked ahead is left out with all that follows it."""
        kept: list[bytes] = []
        for raw in requests:
            if not libvirt_frames.is_opening_call(raw):
                break
            kept.append(libvirt_frames.with_serial(raw, 0))
        if kept:
            self._seen[peer] = tuple(kept)


class _Ahead:
    """One opening: its stream, and the answers once they are there."""

    def __init__(self, socket: str, requests: Sequence[bytes], open_ahead: OpenAhead) -> None:
        self.socket = socket
        self.requests = tuple(requests)
        self.replies: list[bytes] = []
        self.answered = asyncio.Event()
        self.stream: RelayStream | None = None
        self._taken = False
        self._open_ahead = open_ahead
        self._task = asyncio.create_task(self._run())

    @property
    def usable(self) -> bool:
        """The answers are there, and so is the connection that gave them, for all we know."""
        return bool(self.replies) and not self._taken and not self._task.done()

    async def _run(self) -> None:
        try:
            self.stream = await self._open_ahead(self.socket, self.requests)
            message = await self.stream.receive()
            if message is None:
                raise ProtocolError("relay: the peer does not open ahead")
            self.replies = unpack_replies(message, self.requests)
            self.answered.set()
            # Nothing more comes before we speak; this ends when the connection there does.
            await self.stream.receive()
            raise ProtocolError("relay: the connection that was opened ahead has ended")
        except LifeboatError as error:
            logger.info("relay of the %s socket: it is opened over the WAN (%s)", self.socket, error)
            self._reset(error)
        finally:
            self.answered.set()

    async def take(self) -> RelayStream:
        """The stream, for the relay that goes on with it; nobody else gets it from now on."""
        assert self.stream is not None
        self._taken = True
        try:
            await self._stop()
        except asyncio.CancelledError:
            # It is on no list any more: nobody else would end it.
            self._reset(LifeboatError(f"relay of the {self.socket} socket: it was closed as it was begun"))
            raise
        return self.stream

    async def close(self) -> None:
        """Nobody wants it any more; the destination closes its end."""
        await self._stop()
        self._reset(LifeboatError(f"relay of the {self.socket} socket: its job does not need it any more"))

    async def _stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _reset(self, error: LifeboatError) -> None:
        self.replies = []
        if self.stream is not None:
            self.stream.reset(error)


class _Unpacked:
    """What comes on a stream, by bytes."""

    def __init__(self, stream: RelayStream) -> None:
        self.unpacker = Unpacker()
        self.rest = b""
        self._stream = stream

    async def readexactly(self, n: int) -> bytes:
        """So many bytes. Raises ProtocolError when the stream ends before."""
        while len(self.rest) < n:
            message = await self._stream.receive()
            if message is None:
                raise ProtocolError("relay: the peer closed a connection while it was opened")
            self.rest += self.unpacker.unpack(message)
        piece, self.rest = self.rest[:n], self.rest[n:]
        return piece


class OpeningsAhead:
    """All of one job."""

    def __init__(
        self,
        peer: str,
        known: KnownOpenings,
        open_ahead: OpenAhead,
        *,
        stall_seconds: float,
        ready_seconds: float = READY_SECONDS,
    ) -> None:
        self._peer = peer
        self._known = known
        self._open_ahead = open_ahead
        self._stall_seconds = stall_seconds
        self._ready_seconds = ready_seconds
        self._ahead: list[_Ahead] = []

    def begin_libvirt(self) -> None:
        """Ask for libvirt's opening."""
        self.begin(LIBVIRT, self._known.of(self._peer))

    def begin(self, socket: str, requests: Sequence[bytes]) -> None:
        """Ask for one opening; it comes to pass in the background."""
        self._ahead.append(_Ahead(socket, requests, self._open_ahead))

    async def close(self, *sockets: str) -> None:
        """End those (of these sockets; all) that nobody took."""
        for one in [one for one in self._ahead if not sockets or one.socket in sockets]:
            self._drop(one)
            await one.close()

    def _drop(self, one: _Ahead) -> None:
        """Off the list; another connection that waited for it as well may have been quicker."""
        if one in self._ahead:
            self._ahead.remove(one)

    async def meet(
        self, socket: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, open_plain: OpenPlain
    ) -> tuple[RelayStream, Begun]:
        """Answer whoever has connected here as far as is known, and give the stream that carries the rest.

        Raises what ``open_plain`` raises, Stalled, and ProtocolError when either side ends meanwhile.
        """
        language = LANGUAGES.get(socket)
        candidates = await self._ready(socket)
        if language is None or not candidates:
            return await open_plain(socket), Begun(Unpacker())
        asked: list[tuple[bytes, bytes]] = []
        data = b""
        while candidates := [one for one in candidates if one.usable]:
            step = len(asked)
            if step == len(candidates[0].requests) and data:
                # Opened in full, and there is something to send: only now is it worth to give up the watch.
                self._saw(socket, [request for request, _reply in asked], data)
                self._drop(candidates[0])
                logger.info("relay of the %s socket: the connection that was opened ahead is in use", socket)
                follows = nbd_frames.has_extended_headers([request for request, _reply in asked])
                begun = Begun(Unpacker(), piece=data, flushes=Flushes() if follows else None)
                return await candidates[0].take(), begun
            length = language.request_bytes(data, step)
            if length is not None and length <= len(data) and step < len(candidates[0].requests):
                request = data[:length]
                candidates = [one for one in candidates if language.same(request, one.requests[step])]
                if not candidates:
                    break
                # Several may begin alike; those that were answered alike go on together.
                reply = candidates[0].replies[step]
                candidates = [one for one in candidates if one.replies[step] == reply]
                asked.append((request, reply))
                data = data[length:]
                writer.write(language.told(reply, request))
                await writer.drain()
                continue
            if length is not None and length > _LARGEST_REQUEST_BYTES:
                break
            piece = await reader.read(PIECE_BYTES)
            if not piece:
                raise ProtocolError(f"relay of the {socket} socket: it was closed while it was opened")
            data += piece
        self._saw(socket, [request for request, _reply in asked], data)
        logger.info("relay of the %s socket: it goes another way after %d questions", socket, len(asked))
        if socket == LIBVIRT:
            # It has one connection, and this is it; a connection of a disk may be another disk's.
            await self.close(LIBVIRT)
        return await self._repeat(socket, language, asked, data, writer, open_plain)

    async def _ready(self, socket: str) -> list[_Ahead]:
        """Those of a socket that were answered; nobody waits for the others any longer."""
        ours = [one for one in self._ahead if one.socket == socket]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._ready_seconds):
                for one in ours:
                    await one.answered.wait()
        ready = [one for one in ours if one.usable and len(one.requests) == len(ours[0].requests)]
        for one in ours:
            if one not in ready:
                self._drop(one)
                await one.close()
        return ready

    def _saw(self, socket: str, asked: list[bytes], data: bytes) -> None:
        """Libvirt's opening as it was, with one question more where that was not known."""
        if socket == LIBVIRT:
            length = LIBVIRT_LANGUAGE.request_bytes(data, len(asked))
            further = [data[:length]] if length is not None and length <= len(data) else []
            self._known.saw(self._peer, [*asked, *further])

    async def _repeat(
        self,
        socket: str,
        language: Language,
        asked: Sequence[tuple[bytes, bytes]],
        data: bytes,
        writer: asyncio.StreamWriter,
        open_plain: OpenPlain,
    ) -> tuple[RelayStream, Begun]:
        """Bring a new connection to where this one was brought from memory."""
        stream = await open_plain(socket)
        source = _Unpacked(stream)
        try:
            for request, told in asked:
                async with asyncio.timeout(self._stall_seconds):
                    if request:
                        await stream.send(RAW, request)
                    reply = await language.read_reply(source, request, writer.write)
                    if reply != language.told(told, request):
                        raise ProtocolError(
                            f"relay of the {socket} socket: the peer answers otherwise than before"
                        )
            writer.write(source.rest)
            await writer.drain()
        except TimeoutError as error:
            stalled = Stalled(f"relay of the {socket} socket: not opened within {self._stall_seconds:.0f} s")
            stream.reset(stalled)
            raise stalled from error
        except BaseException:
            # Whatever it was (the local side may have broken off): the peer's end is root there.
            stream.reset(LifeboatError(f"relay of the {socket} socket: its opening was given up"))
            raise
        return stream, Begun(source.unpacker, piece=data)
