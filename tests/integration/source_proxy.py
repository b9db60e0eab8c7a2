#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Channel, store and source without the rest of the proxy, on a lab host: driven by JSON lines on a socket.

    source_proxy.py PACKAGE_DIRECTORY CONFIGURATION_JSON

One request a line: {"method": ..., "arguments": {...}}; one answer a line: {"result": ...} or {"error": ...}.
"""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import json
import logging
import signal
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])

from precache_proxy.blocks.images import ImageReference
from precache_proxy.channel import Channel, ChannelConfig, PeerAddress
from precache_proxy.errors import LifeboatError
from precache_proxy.hypervisor.connection import Hypervisor
from precache_proxy.source.request import Protect
from precache_proxy.source.service import Source
from precache_proxy.source.settings import SourceSettings
from precache_proxy.store.service import Store
from precache_proxy.store.settings import StoreSettings


def _images(arguments: dict[str, Any], key: str) -> dict[str, ImageReference]:
    return {
        target: ImageReference(Path(image[0]), image[1], image[2])
        for target, image in arguments.pop(key).items()
    }


class SourceProxy:
    """The rooms put together as the daemon does, with what a test needs to look inside."""

    def __init__(self, configuration: dict[str, Any]) -> None:
        state, run, keys = (Path(configuration[key]) for key in ("state", "run", "keys"))
        self.run_directory = run
        self.hypervisor = Hypervisor(turns_directory=run / "turns")
        port = configuration["port"]
        peers = {name: PeerAddress(host=name, port=port) for name in configuration["peers"]}
        self.channel = Channel(
            ChannelConfig(
                name=configuration["name"],
                ca_path=keys / "ca.crt",
                certificate_path=keys / "host.crt",
                key_path=keys / "host.key",
                peers=peers,
                listen_port=port,
                reconnect_maximum_seconds=1.0,
            )
        )
        self.store = Store(state / "store", run, StoreSettings(minimum_free_bytes=1 << 20))
        settings = SourceSettings(
            name=configuration["name"],
            peers=tuple(peers),
            scratch_directory=state / "scratch",
            **configuration.get("source", {}),
        )
        self.source = Source(state / "source", run, self.hypervisor, self.channel, settings)

    async def start(self) -> None:
        """Everything up."""
        await self.hypervisor.start()
        await self.store.start()
        self.store.register(self.channel)
        await self.channel.start()
        await self.source.start()

    async def stop(self) -> None:
        """Everything down, in order."""
        await self.source.stop()
        await self.channel.stop()
        await self.store.stop()
        await self.hypervisor.stop()

    async def call(self, method: str, arguments: dict[str, Any]) -> object:
        """One request."""
        if method == "protect":
            return await self.source.protect(Protect(**arguments))
        if method == "check":
            return await self.source.check(Protect(**arguments))
        if method == "send_residual":
            return await self.source.send_residual(frozen=_images(arguments, "frozen"), **arguments)
        if method == "replica_tops":
            chain = await self.store.freeze_for_arrival(**arguments)
            await self.store.thaw(arguments["vm"])
            return {disk: str(chain[disk].path) for disk in chain}
        if method == "replica":
            return await self.store.status(**arguments)
        if method == "counters":
            return {name: link.counters() for name, link in self.channel.links.items()}
        outcome = getattr(self.source, method)(**arguments)
        return await outcome if asyncio.iscoroutine(outcome) else outcome

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection's requests, one after the other."""
        while line := await reader.readline():
            try:
                request = json.loads(line)
                answer: dict[str, Any] = {"result": await self.call(request["method"], request["arguments"])}
            except LifeboatError as error:
                answer = {"error": {**error.as_dict(), "cause": error.cause}}
            writer.write(json.dumps(answer, default=_plain).encode() + b"\n")
            await writer.drain()
        writer.close()


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)


async def main() -> None:
    """Serve until SIGTERM."""
    configuration = json.loads(sys.argv[2])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    run = Path(configuration["run"])
    run.mkdir(mode=0o711, parents=True, exist_ok=True)
    with (run / "proxy.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        proxy = SourceProxy(configuration)
        await proxy.start()
        socket = run / "control.sock"
        socket.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(proxy.serve, str(socket), limit=1 << 24)
        ended = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
        await ended.wait()
        server.close()
        await proxy.stop()


if __name__ == "__main__":
    asyncio.run(main())
