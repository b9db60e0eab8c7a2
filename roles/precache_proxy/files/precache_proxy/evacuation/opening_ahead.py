# SPDX-License-Identifier: GPL-3.0-or-later
"""The source's side of openings that are made ahead: asked for early, told from memory, then the real thing.

What libvirt and QEMU here hear is what libvirt and QEMU at the destination said, on the very connection
that they go on with. Where an answer is not there, or another question is asked than was expected, the
connection is opened over the WAN as ever: what was asked so far is asked again there, and answered as here.
The same where that connection turns out to have ended before anything reached it (replaceable_stream.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from precache_proxy.errors import LifeboatError, ProtocolError, Stalled
from precache_proxy.evacuation import libvirt_frames, nbd_frames
from precache_proxy.evacuation.held_opening import unpack_replies
from precache_proxy.evacuation.known_openings import KnownOpenings, OpeningHeard
from precache_proxy.evacuation.nbd_flushes import Flushes, MirrorFlushes
from precache_proxy.evacuation.openings import LANGUAGES, Language
from precache_proxy.evacuation.packing import PIECE_BYTES, RAW, Unpacker
from precache_proxy.evacuation.relay import DISK, LIBVIRT, Begun, RelayStream
from precache_proxy.evacuation.replaceable_stream import ReplaceableStream

logger = logging.getLogger(__name__)

# What is waited for when libvirt or QEMU connects: no longer than its opening takes over the WAN, for that is
# all that can be saved, and no longer than this; a part of it is what a host takes to answer at all.
READY_SECONDS = 1.5
_ANSWER_SECONDS = 0.05
# So many times as long as a stream may stand still may it take to ask all that was asked once more.
_REPEAT_STALLS = 3
_LARGEST_REQUEST_BYTES = libvirt_frames.LARGEST_OPENING_BYTES
OpenAhead = Callable[[str, Sequence[bytes]], Awaitable[RelayStream]]
OpenPlain = Callable[[str], Awaitable[RelayStream]]


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


@dataclass(slots=True)
class _Told:
    """How far a connection here was answered from memory: questions with what was told, and what of the next
    one is here."""

    asked: list[tuple[bytes, bytes]] = field(default_factory=list)
    data: bytes = b""
    # by which all was answered, with nothing to send yet
    through: _Ahead | None = None

    @property
    def requests(self) -> list[bytes]:
        """What was asked and answered."""
        return [request for request, _reply in self.asked]


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
        round_trip: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._peer = peer
        self._known = known
        self._open_ahead = open_ahead
        self._stall_seconds = stall_seconds
        self._ready_seconds = ready_seconds
        self._round_trip = round_trip
        self._ahead: list[_Ahead] = []
        self._mirrors = MirrorFlushes()

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

        Who says nothing for so long as a stream may stand still has a relay from then on, as ever: on the
        connection that was opened ahead if it is opened in full. Raises what ``open_plain`` raises, Stalled,
        and ProtocolError when either side ends meanwhile.
        """
        language = LANGUAGES.get(socket)
        candidates = await self._ready(socket)
        if language is None or not candidates:
            self._followed(socket, [])
            return await open_plain(socket), Begun(Unpacker())
        told = _Told()
        found: _Ahead | None = None
        try:
            async with asyncio.timeout(self._stall_seconds):
                found = await self._tell(socket, language, candidates, told, reader, writer)
        except TimeoutError:
            found = told.through if told.through is not None and told.through.usable else None
        heard = OpeningHeard(self._known, self._peer, told.requests).hear if socket == LIBVIRT else None
        if found is not None:
            self._drop(found)
            logger.info("relay of the %s socket: the connection that was opened ahead is in use", socket)
            flushes = self._followed(socket, told.requests)
            stream = await found.take()

            async def another() -> tuple[RelayStream, Unpacker, bytes]:
                aside: list[bytes] = []
                fresh, source = await self._repeat(socket, language, told, aside.append, open_plain)
                return fresh, source.unpacker, b"".join(aside) + source.rest

            begun = Begun(Unpacker(), piece=told.data, flushes=flushes, on_piece=heard)
            return ReplaceableStream(stream, another), begun
        logger.info("relay of the %s socket: it goes another way after %d questions", socket, len(told.asked))
        if socket == LIBVIRT:
            # It has one connection, and this is it; a connection of a disk may be another disk's.
            await self.close(LIBVIRT)
        self._followed(socket, told.requests, understood=False)
        plain, source = await self._repeat(socket, language, told, writer.write, open_plain)
        writer.write(source.rest)
        return plain, Begun(source.unpacker, piece=told.data, on_piece=heard)

    async def _tell(
        self,
        socket: str,
        language: Language,
        candidates: list[_Ahead],
        told: _Told,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> _Ahead | None:
        """Answer question by question. The connection that goes on with it once there is something to send;
        None: another way is to be gone. ``told`` holds how far this came, also where it is cut off."""
        while candidates := [one for one in candidates if one.usable]:
            step = len(told.asked)
            if step == len(candidates[0].requests):
                told.through = candidates[0]
                if told.data:
                    # There is something to send: only now is it worth to give up the watch.
                    return told.through
            length = language.request_bytes(told.data, step)
            if length is not None and length <= len(told.data) and step < len(candidates[0].requests):
                request = told.data[:length]
                candidates = [one for one in candidates if language.same(request, one.requests[step])]
                if not candidates:
                    break
                # Several may begin alike; those that were answered alike go on together.
                reply = candidates[0].replies[step]
                candidates = [one for one in candidates if one.replies[step] == reply]
                told.asked.append((request, reply))
                told.data = told.data[length:]
                writer.write(language.told(reply, request))
                await writer.drain()
                continue
            if length is not None and length > _LARGEST_REQUEST_BYTES:
                break
            piece = await reader.read(PIECE_BYTES)
            if not piece:
                raise ProtocolError(f"relay of the {socket} socket: it was closed while it was opened")
            told.data += piece
        return None

    def _followed(self, socket: str, requests: Sequence[bytes], *, understood: bool = True) -> Flushes | None:
        """Who follows a mirror's connection that begins so; it may be a second one of its export."""
        if socket != DISK:
            return None
        understood = understood and nbd_frames.has_extended_headers(requests)
        return self._mirrors.connected(nbd_frames.export_of(requests), understood=understood)

    async def _ready(self, socket: str) -> list[_Ahead]:
        """Those of a socket that were answered; nobody waits for the others any longer."""
        ours = [one for one in self._ahead if one.socket == socket]
        round_trip = self._round_trip()
        patience = self._ready_seconds
        if round_trip is not None and ours:
            patience = min(patience, len(ours[0].requests) * round_trip + _ANSWER_SECONDS)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                for one in ours:
                    await one.answered.wait()
        ready = [one for one in ours if one.usable and len(one.requests) == len(ours[0].requests)]
        for one in ours:
            if one not in ready:
                self._drop(one)
                await one.close()
        return ready

    async def _repeat(
        self,
        socket: str,
        language: Language,
        told: _Told,
        aside: Callable[[bytes], None],
        open_plain: OpenPlain,
    ) -> tuple[RelayStream, _Unpacked]:
        """Bring a new connection to where this one was brought from memory; what else comes goes aside."""
        stream = await open_plain(socket)
        source = _Unpacked(stream)
        limit = _REPEAT_STALLS * self._stall_seconds
        try:
            async with asyncio.timeout(limit):
                for request, reply in told.asked:
                    if request:
                        await stream.send(RAW, request)
                    if await language.read_reply(source, request, aside) != language.told(reply, request):
                        raise ProtocolError(
                            f"relay of the {socket} socket: the peer answers otherwise than before"
                        )
        except TimeoutError as error:
            stalled = Stalled(f"relay of the {socket} socket: not opened within {limit:.0f} s")
            stream.reset(stalled)
            raise stalled from error
        except BaseException:
            # Whatever it was (the local side may have broken off): the peer's end is root there.
            stream.reset(LifeboatError(f"relay of the {socket} socket: its opening was given up"))
            raise
        return stream, source
