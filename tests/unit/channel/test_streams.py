# SPDX-License-Identifier: GPL-3.0-or-later
"""Messages over real sockets and real TLS."""

from __future__ import annotations

import asyncio
import os

import pytest

from precache_proxy.channel import MAX_MESSAGE_BYTES, Stream, TrafficClass
from precache_proxy.errors import NotFound

from .conftest import PairFactory


async def echo(stream: Stream) -> None:
    while (message := await stream.receive()) is not None:
        await stream.send(message)


async def test_messages_come_back_whole_and_in_order(pair: PairFactory) -> None:
    home, backup = await pair()
    backup.handle_stream("echo", echo)
    stream = await home.links["backup"].open_stream(
        "echo", TrafficClass.PRECACHE, {"vm": "näme"}, label="vm1"
    )
    sizes = [0, 1, 17, 4096, 65536, 65537, 1 << 20, MAX_MESSAGE_BYTES, 0, 3]
    messages = [os.urandom(size) for size in sizes]

    async def send() -> None:
        for message in messages:
            half = len(message) // 2
            await stream.send(message[:half], memoryview(message)[half:])
        await stream.close()

    sender = asyncio.create_task(send())
    got = []
    while (message := await stream.receive()) is not None:
        got.append(message)
    await sender
    assert got == messages
    await stream.drained()
    assert stream.sent_raw_bytes == stream.received_raw_bytes == sum(sizes)


async def test_calls_answer(pair: PairFactory) -> None:
    home, backup = await pair()

    async def add(peer: str, parameters: dict[str, int]) -> dict[str, object]:
        return {"sum": parameters["a"] + parameters["b"], "peer": peer}

    backup.handle_call("add", add)
    assert await home.links["backup"].call("add", {"a": 2, "b": 3}) == {"sum": 5, "peer": "home"}
    with pytest.raises(NotFound, match="subtract"):
        await home.links["backup"].call("subtract", {})
