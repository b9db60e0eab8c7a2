# SPDX-License-Identifier: GPL-3.0-or-later
"""The destination's side of an opening that is made ahead: asked here, told to the source, held for it.

A stream of kind ``relay-ahead`` carries it. Its header names the job, the socket and what will be asked; the
first message is ours, with the answers; the source's first message says that its libvirt or QEMU uses the
connection, and from then on the stream is a relay like any other. The stream's end, of whatever kind, ends
the connection, so nothing that is held outlives its job or either proxy.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from precache_proxy.errors import InvalidInput, NotUsed, ProtocolError, Stalled
from precache_proxy.evacuation.known_openings import QUESTIONS_LIMIT
from precache_proxy.evacuation.openings import LANGUAGES, Language
from precache_proxy.evacuation.packing import PIECE_BYTES, Unpacker
from precache_proxy.evacuation.relay import Begun, RelayStream
from precache_proxy.units import KIB

AHEAD_KIND: Final = "relay-ahead"
# It is made on this host, without the WAN.
OPENING_SECONDS: Final = 5.0
LARGEST_REPLIES_BYTES: Final = 64 * KIB


def header(job_id: str, socket: str, requests: Sequence[bytes]) -> dict[str, Any]:
    """The header of a stream that asks for an opening."""
    return {"job": job_id, "socket": socket, "requests": [_text(raw) for raw in requests]}


def requests_of(told: Mapping[str, Any]) -> tuple[bytes, ...]:
    """What a stream's header asks for. Raises InvalidInput where it is more than an opening."""
    socket, texts = told.get("socket"), told.get("requests")
    language = LANGUAGES.get(str(socket))
    if language is None or not isinstance(texts, list) or len(texts) > QUESTIONS_LIMIT:
        raise InvalidInput(f"relay {socket!r}: nothing of it is opened ahead")
    requests = tuple(_raw(text) for text in texts)
    if not language.may_be_asked(requests):
        raise InvalidInput(f"relay {socket!r}: more was asked for ahead than the opening of a connection")
    return requests


def pack_replies(replies: Sequence[bytes]) -> bytes:
    """The first message of such a stream."""
    return json.dumps({"replies": [_text(raw) for raw in replies]}).encode()


def unpack_replies(message: bytes, requests: Sequence[bytes]) -> list[bytes]:
    """What :func:`pack_replies` gave. Raises ProtocolError."""
    try:
        if len(message) > LARGEST_REPLIES_BYTES:
            raise ValueError(f"{len(message)} bytes")
        replies = [_raw(text) for text in json.loads(message)["replies"]]
        if len(replies) != len(requests):
            raise ValueError(f"{len(replies)} to {len(requests)} questions")
    except (ValueError, KeyError, TypeError, InvalidInput) as error:
        raise ProtocolError(f"relay: answers to an opening that make no sense ({error})") from error
    return replies


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _raw(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise InvalidInput(f"relay: not a packet ({error})") from error


async def ask(
    language: Language,
    requests: Sequence[bytes],
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> list[bytes]:
    """Make the opening on a fresh connection. Raises ProtocolError when anything is not as it should be."""

    def aside(raw: bytes) -> None:
        answer, rest = language.answer_unasked(raw)
        if rest:
            raise ProtocolError("relay: a packet that ends too early")
        writer.write(answer)

    replies = []
    try:
        async with asyncio.timeout(OPENING_SECONDS):
            for request in requests:
                writer.write(request)
                await writer.drain()
                reply = await language.read_reply(reader, request, aside)
                if not language.is_good(reply, request):
                    raise ProtocolError("relay: a question of the opening was refused")
                replies.append(reply)
    except (OSError, EOFError, TimeoutError) as error:
        raise ProtocolError(f"relay: the opening was not answered ({error!r})") from error
    return replies


async def hold(
    language: Language,
    stream: RelayStream,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    *,
    stall_seconds: float,
    link_up: Callable[[], bool],
) -> Begun:
    """Keep the connection alive until the source's side speaks on it; then the relay goes on from there.

    Raises NotUsed when it ends here before (what the source may have sent for it is dropped and has changed
    nothing), ProtocolError when the source ends it, Stalled when the link is down for too long, and what the
    stream was reset with.
    """
    early = b""
    clock = asyncio.get_running_loop().time

    async def keep_alive() -> None:
        nonlocal early
        try:
            while piece := await reader.read(PIECE_BYTES):
                answer, early = language.answer_unasked(early + piece)
                writer.write(answer)
                await writer.drain()
        except (OSError, ProtocolError) as error:
            raise NotUsed(f"relay: the connection that was held has ended ({error})") from error
        raise NotUsed("relay: the connection that was held has ended")

    local, remote = asyncio.create_task(keep_alive()), asyncio.create_task(stream.receive())
    try:
        up_at = clock()
        while not local.done() and not remote.done():
            await asyncio.wait({local, remote}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            up_at = clock() if link_up() else up_at
            if clock() - up_at > stall_seconds:
                raise Stalled(f"relay: the link was down for {stall_seconds:.0f} s; nothing is held any more")
        if local.done():
            local.result()
        message = remote.result()
    finally:
        local.cancel()
        remote.cancel()
        await asyncio.gather(local, remote, return_exceptions=True)
    if message is None:
        raise ProtocolError("relay: the connection that was held was not used")
    return Begun(Unpacker(), piece=early, message=message)


async def until(event: asyncio.Event, stream: RelayStream, seconds: float) -> None:
    """Wait for an event while nothing comes on the stream. Raises ProtocolError when something does, or its
    end, or after so long a time; and what the stream was reset with."""
    waiting, ended = asyncio.create_task(event.wait()), asyncio.create_task(stream.receive())
    try:
        done, _pending = await asyncio.wait(
            {waiting, ended}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if ended in done:
            ended.result()
        if waiting not in done:
            raise ProtocolError("relay: what was to be opened ahead is not wanted any more")
    finally:
        waiting.cancel()
        ended.cancel()
        await asyncio.gather(waiting, ended, return_exceptions=True)
