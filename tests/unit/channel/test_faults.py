# SPDX-License-Identifier: GPL-3.0-or-later
"""Broken connections, restarted peers, silence, and nonsense at the port."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import ssl
import struct

import pytest

from precache_proxy.channel import Channel, ChannelConfig, PeerAddress, Stream, StreamReset, TrafficClass
from precache_proxy.channel.frames import MAGIC, FrameType, pack, pack_hello
from precache_proxy.errors import PeerUnreachable
from small_parts.ports import free_port

from .conftest import Authority, PairFactory, Start, WiredFactory, make_config, until


async def numbered(stream: Stream, count: int, size: int) -> None:
    """Send ``count`` messages that say which one they are."""
    body = os.urandom(size)
    for number in range(count):
        await stream.send(struct.pack(">Q", number), body)
    await stream.close()


async def test_nothing_is_lost_or_doubled_when_connections_break(wired: WiredFactory) -> None:
    home, backup, cable = await wired()
    got: list[int] = []
    back: list[int] = []

    async def both_ways(stream: Stream) -> None:
        sender = asyncio.create_task(numbered(stream, 300, 30_000))
        while (message := await stream.receive()) is not None:
            got.append(struct.unpack_from(">Q", message)[0])
            await asyncio.sleep(0.002)
        await sender

    backup.handle_stream("both", both_ways)
    stream = await home.links["backup"].open_stream("both", TrafficClass.PRECACHE, {})

    async def read() -> None:
        while (message := await stream.receive()) is not None:
            back.append(struct.unpack_from(">Q", message)[0])

    tasks = [asyncio.create_task(numbered(stream, 300, 100_000)), asyncio.create_task(read())]
    cuts = 0
    for round_number in range(6):
        await until(lambda: len(got) > 40 * round_number + 20, 30)  # noqa: B023
        cuts += cable.cut(1 if round_number % 2 else None)
    await asyncio.gather(*tasks)
    await stream.drained()
    await until(lambda: len(got) >= 300)  # drained is about the queue, not about the reader
    assert cuts >= 6
    assert got == list(range(300))
    assert back == list(range(300))
    counters = home.links["backup"].counters()
    assert counters["acknowledged_raw_bytes"] >= 300 * 100_008
    assert counters["classes"]["precache"]["sent_raw_bytes"] == 300 * 100_008


async def test_only_what_is_unacknowledged_goes_again(wired: WiredFactory) -> None:
    home, backup, cable = await wired()

    async def take(stream: Stream) -> None:
        while await stream.receive() is not None:
            pass

    backup.handle_stream("take", take)
    link = home.links["backup"]
    stream = await link.open_stream("take", TrafficClass.PRECACHE, {})
    for _ in range(20):
        await stream.send(bytes(100_000))
    await stream.drained()
    await cable.refuse()
    cable.cut()
    await until(lambda: link.state == "down")
    await cable.start()
    await link.wait_up(10)
    await stream.send(b"last")
    await stream.close()
    await stream.drained()
    assert link.counters()["resent_wire_bytes"] == 0


async def test_streams_outlive_a_silence_shorter_than_the_grace(wired: WiredFactory) -> None:
    home, backup, cable = await wired(dead_peer_seconds=1.0, session_grace_seconds=20)
    got: list[int] = []

    async def take(stream: Stream) -> None:
        while (message := await stream.receive()) is not None:
            got.append(struct.unpack_from(">Q", message)[0])

    backup.handle_stream("take", take)
    link = home.links["backup"]
    stream = await link.open_stream("take", TrafficClass.PRECACHE, {})
    sender = asyncio.create_task(numbered(stream, 100, 200_000))
    await until(lambda: len(got) > 5)
    cable.freeze()
    await until(lambda: link.state == "down")
    assert "nothing heard" in link.sentence or "no answer" in link.sentence
    assert stream.idle_seconds > 0.5
    with pytest.raises(PeerUnreachable):
        await link.open_stream("take", TrafficClass.PRECACHE, {})
    cable.thaw()
    await sender
    await stream.drained()
    await until(lambda: len(got) >= 100)
    assert got == list(range(100))


async def test_streams_end_with_link_lost_after_the_grace(wired: WiredFactory) -> None:
    home, backup, cable = await wired(session_grace_seconds=0.6)
    ended: list[str] = []

    async def take(stream: Stream) -> None:
        try:
            while await stream.receive() is not None:
                pass
        except StreamReset as reset:
            ended.append(reset.cause)
            raise

    backup.handle_stream("take", take)
    stream = await home.links["backup"].open_stream("take", TrafficClass.PRECACHE, {})
    await stream.send(b"hello")
    await stream.drained()
    await cable.refuse()
    cable.cut()
    with pytest.raises(StreamReset) as caught:
        await stream.receive()
    assert caught.value.cause == "link-lost"
    await until(lambda: ended == ["link-lost"])
    await cable.start()
    await home.links["backup"].wait_up(10)


async def test_a_restarted_peer_is_recognised(
    authority: Authority, start: Start, wired: WiredFactory
) -> None:
    home, backup, cable = await wired()

    async def take(stream: Stream) -> None:
        while await stream.receive() is not None:
            pass

    backup.handle_stream("take", take)
    stream = await home.links["backup"].open_stream("take", TrafficClass.PRECACHE, {})
    await stream.send(b"hello")
    await stream.drained()
    # As after a power cut: the old process says nothing, the new one knows nothing.
    await cable.refuse()
    cable.cut()
    await until(lambda: home.links["backup"].state == "down")
    listener = backup._listener
    assert listener is not None
    await listener.stop()
    second = await start(Channel(backup.config))
    second.handle_stream("take", take)
    await cable.start()
    with pytest.raises(StreamReset) as caught:
        await stream.receive()
    assert caught.value.cause == "peer-restarted"
    await home.links["backup"].wait_up(10)
    again = await home.links["backup"].open_stream("take", TrafficClass.PRECACHE, {})
    await again.send(b"hello")
    await again.close()
    await again.drained()


async def test_an_orderly_stop_ends_streams_at_once(pair: PairFactory) -> None:
    home, backup = await pair()
    seen: list[str] = []

    async def take(stream: Stream) -> None:
        try:
            await stream.receive()
        except StreamReset as reset:
            seen.append(reset.cause)
            raise

    backup.handle_stream("take", take)
    home.handle_stream("take", take)
    stream = await home.links["backup"].open_stream("take", TrafficClass.CONTROL, {})
    await backup.links["home"].open_stream("take", TrafficClass.CONTROL, {})
    await asyncio.sleep(0.1)
    await backup.stop()
    with pytest.raises(StreamReset) as caught:
        await stream.receive()
    assert caught.value.cause == "peer-restarted"
    assert "stopped" in home.links["backup"].sentence or "refused" in home.links["backup"].sentence
    with pytest.raises(PeerUnreachable):
        await home.links["backup"].call("anything", {})


def client_context(config: ChannelConfig) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(config.ca_path)
    context.load_cert_chain(config.certificate_path, config.key_path)
    return context


def hello(**changes: object) -> bytes:
    content = {"name": "home", "peer": "backup", "instance": "i", "session": os.urandom(4).hex(), "slot": 0}
    return pack_hello({**content, **changes})


async def exchange(port: int, context: ssl.SSLContext | None, data: bytes) -> bytes:
    """Send bytes, read until the other side closes (or 5 s)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        writer.write(data)
        async with asyncio.timeout(5):
            return await reader.read(-1)
    except (OSError, TimeoutError):
        return b""
    finally:
        writer.transport.abort()


async def test_nonsense_at_the_port_is_turned_away_and_harms_nobody(
    authority: Authority, start: Start, pair: PairFactory
) -> None:
    _, backup = await pair(handshake_seconds=1.0, listen_address="127.0.0.1")
    second_port = free_port()
    config = make_config(authority, "home", second_port, {"backup": PeerAddress("127.0.0.1", backup.port)})
    context = client_context(config)
    source = random.Random(7)
    large = struct.pack(">BBBxIIQ", FrameType.DATA, 0, 3, 2**32 - 1, 1, 0)
    unopened = pack(FrameType.DATA, b"x", stream=0, sequence=0)
    greedy = b"".join(
        pack(FrameType.DATA, bytes(1 << 19), stream=1, sequence=number, traffic_class=3)
        for number in range(1, 4)
    )
    cases: list[tuple[ssl.SSLContext | None, bytes]] = [
        (None, b"GET / HTTP/1.0\r\n\r\n"),
        (None, source.randbytes(5000)),
        (context, b"GET / HTTP/1.0\r\n\r\n"),
        (context, source.randbytes(3000)),
        (context, struct.pack(">4sHH", MAGIC, 1, 5) + b"{{{{{"),
        (context, struct.pack(">4sHH", MAGIC, 1, 65535)),
        (context, struct.pack(">4sHH", MAGIC, 9, 2) + b"{}"),
        (context, hello(slot=99)),
        (context, hello(slot="x")),
        (context, hello(name="backup")),
        (context, hello(peer="elsewhere")),
        (context, hello(session="")),
        (context, hello() + large),
        (context, hello() + unopened),
        (context, hello() + greedy),
        (context, hello() + pack(FrameType.OPEN, b"[]", stream=1)),
        (context, hello() + pack(FrameType.OPEN, b"{}", stream=1)),
        (context, hello() + pack(FrameType.RESET, b"\xff\xff", stream=1)),
        (context, hello() + pack(FrameType.CLOSE, stream=1, sequence=0)),
        (context, hello() + pack(FrameType.GOODBYE, b'{"cause":3,"findings":[{}]}')),
        (context, hello() + source.randbytes(100_000)),
        (context, hello()[:9]),
    ]
    for tls, data in cases:
        reply = await exchange(backup.port, tls, data)
        assert b"Traceback" not in reply
    with socket.create_connection(("127.0.0.1", backup.port)):
        await asyncio.sleep(1.2)  # says nothing: dropped after handshake_seconds

    async def answer(_peer: str, parameters: dict[str, object]) -> dict[str, object]:
        return parameters

    backup.handle_call("echo", answer)
    third = await start(Channel(config))
    await third.links["backup"].wait_up(10)
    assert await third.links["backup"].call("echo", {"fine": True}) == {"fine": True}


async def test_fuzzed_sessions_end_without_harm(authority: Authority, pair: PairFactory) -> None:
    home, backup = await pair()
    context = client_context(home.config)
    source = random.Random(11)
    for _ in range(60):
        frames = bytearray()
        for _ in range(source.randrange(1, 12)):
            kind = source.choice(list(FrameType))
            size = {FrameType.ACKNOWLEDGE: 8, FrameType.PING: 8, FrameType.PONG: 8}.get(kind, 0)
            if kind in (FrameType.DATA, FrameType.OPEN, FrameType.RESET, FrameType.GOODBYE):
                size = source.randrange(2, 400)
            payload = source.choice(
                [
                    source.randbytes(size),
                    b'{"kind":"rpc","header":{},"label":""}' if size > 8 else bytes(size),
                ]
            )
            frames += pack(
                kind,
                payload,
                flags=source.randrange(4),
                traffic_class=source.randrange(4),
                stream=source.choice([0, 1, 2, 3, 2**32 - 1]),
                sequence=source.choice([0, 1, 2, 3, 2**63]),
            )
        if source.random() < 0.5:
            frames[source.randrange(len(frames))] ^= 1 << source.randrange(8)
        reader, writer = await asyncio.open_connection("127.0.0.1", backup.port, ssl=context)
        writer.write(hello() + bytes(frames))
        try:
            async with asyncio.timeout(0.05):
                await reader.read(-1)
        except (OSError, TimeoutError):
            pass
        writer.transport.abort()

    async def answer(_peer: str, parameters: dict[str, object]) -> dict[str, object]:
        return parameters

    backup.handle_call("echo", answer)
    home.handle_call("echo", answer)
    await home.links["backup"].wait_up(10)
    assert await backup.links["home"].call("echo", {"n": 1}) == {"n": 1}
    await asyncio.sleep(0.5)
    await home.links["backup"].wait_up(10)
    assert await home.links["backup"].call("echo", {"n": 2}) == {"n": 2}


async def test_a_peer_that_sends_nonsense_in_a_session_ends_its_streams_and_starts_anew(
    pair: PairFactory,
) -> None:
    home, backup = await pair()
    seen: list[str] = []

    async def wait(stream: Stream) -> None:
        try:
            await stream.receive()
        except StreamReset as reset:
            seen.append(reset.cause)
            raise

    backup.handle_stream("wait", wait)
    link = home.links["backup"]
    stream = await link.open_stream("wait", TrafficClass.PRECACHE, {})
    await stream.drained()
    connection = next(iter(link._session.connections.values()))
    connection.urgent.append(pack(FrameType.DATA, bytes(1 << 20), stream=stream.identifier, sequence=1))
    connection.pump()
    with pytest.raises(StreamReset) as caught:
        await stream.receive()
    assert caught.value.cause == "protocol"
    await until(lambda: seen == ["protocol"])
    await link.wait_up(10)
    again = await link.open_stream("wait", TrafficClass.PRECACHE, {})
    await again.drained()
