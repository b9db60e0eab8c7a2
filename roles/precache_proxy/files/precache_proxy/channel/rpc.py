# SPDX-License-Identifier: GPL-3.0-or-later
"""Request and response: a stream of the control class, one message each way. Errors cross as their class."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from precache_proxy.channel.frames import pack_json, unpack_json
from precache_proxy.channel.reset import StreamReset
from precache_proxy.channel.stream import Stream
from precache_proxy.errors import LifeboatError, NotFound, ProtocolError, Stalled, from_dict

log = logging.getLogger(__name__)

KIND = "rpc"
CallHandler = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]


async def ask(
    stream: Stream, method: str, parameters: dict[str, Any], timeout_seconds: float
) -> dict[str, Any]:
    """The asking side. Raises the remote error, Stalled when no answer comes in time."""
    try:
        async with asyncio.timeout(timeout_seconds):
            await stream.send(pack_json(parameters))
            await stream.close()
            answer = await stream.receive()
    except StreamReset as reset:
        raise reset.error from None
    except TimeoutError:
        error = Stalled(f"call {method} to {stream.peer}: no answer within {timeout_seconds:g} s")
        stream.reset(error)
        raise error from None
    except BaseException:
        stream.reset(LifeboatError(f"call {method}: the caller has gone"))
        raise
    if answer is None:
        raise ProtocolError(f"call {method} to {stream.peer}: ended without an answer")
    content = unpack_json(answer, f"answer to {method}")
    if "error" in content:
        raise from_dict(content["error"])
    result = content.get("result")
    if not isinstance(result, dict):
        raise ProtocolError(f"answer of {stream.peer} to {method}: no result in it")
    return result


async def serve(stream: Stream, handlers: dict[str, CallHandler]) -> None:
    """The answering side."""
    request = await stream.receive()
    method = str(stream.header.get("method", ""))
    try:
        handler = handlers.get(method)
        if handler is None:
            raise NotFound(
                f"call {method!r}: not known to this proxy; install the same release on both hosts"
            )
        parameters = unpack_json(request if request is not None else b"", f"parameters of {method}")
        answer = pack_json({"result": await handler(stream.peer, parameters)})
    except LifeboatError as error:
        answer = pack_json({"error": error.as_dict()})
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        log.exception("call %s of %s failed", method, stream.peer)
        failure = LifeboatError(
            f"call {method}: internal error ({type(error).__name__}: {error}); see the log there"
        )
        answer = json.dumps({"error": failure.as_dict()}).encode()
    await stream.send(answer)
    await stream.close()
