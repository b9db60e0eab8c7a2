#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Speed of the channel alone: ``serve`` on one side, ``send`` on the other; JSON on standard output.

Profiling by hand: ``--profile FILE`` writes cProfile data. Bounded in time by ``--seconds``.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import os
import sys
import time
from pathlib import Path

from precache_proxy.channel import Channel, ChannelConfig, PeerAddress, Stream, TrafficClass


def config(arguments: argparse.Namespace, name: str, peer: str) -> ChannelConfig:
    """Both ends read their certificates from one directory."""
    pki = Path(arguments.pki)
    return ChannelConfig(
        name=name,
        ca_path=pki / "ca.crt",
        certificate_path=pki / f"{name}.crt",
        key_path=pki / f"{name}.key",
        peers={peer: PeerAddress(arguments.host, arguments.peer_port, arguments.connections)},
        listen_port=arguments.port,
    )


async def serve(arguments: argparse.Namespace) -> None:
    """Take what comes; answer ``noop`` calls; report processor time per megabyte."""
    channel = Channel(config(arguments, "backup", "home"))
    done = asyncio.Event()

    async def sink(stream: Stream) -> None:
        before = time.process_time()
        while await stream.receive() is not None:
            pass
        spent = time.process_time() - before
        await stream.send(
            json.dumps(
                {"milliseconds_per_megabyte": spent * 1e9 / max(stream.received_raw_bytes, 1)}
            ).encode()
        )
        await stream.close()
        await stream.drained()
        done.set()

    async def noop(_peer: str, _parameters: dict[str, object]) -> dict[str, object]:
        return {}

    channel.handle_stream("sink", sink)
    channel.handle_call("noop", noop)
    await channel.start()
    try:
        async with asyncio.timeout(arguments.seconds + 60):
            await done.wait()
            await asyncio.sleep(0.2)
    finally:
        await channel.stop()


async def send(arguments: argparse.Namespace) -> None:
    """Send incompressible messages for so many seconds, with calls beside them."""
    channel = Channel(config(arguments, "home", "backup"))
    await channel.start()
    link = channel.links["backup"]
    await link.wait_up(20)
    await asyncio.sleep(1)
    message = os.urandom(arguments.message_bytes)
    quiet, loaded, samples = [], [], []
    for _ in range(3):
        at = time.monotonic()
        await link.call("noop", {})
        quiet.append(time.monotonic() - at)

    async def probe() -> None:
        while True:
            await asyncio.sleep(0.1)
            at = time.monotonic()
            await link.call("noop", {})
            loaded.append(time.monotonic() - at)

    async def watch() -> None:
        last = 0
        while True:
            await asyncio.sleep(1)
            now = link.counters()["acknowledged_raw_bytes"]
            samples.append(now - last)
            last = now

    stream = await link.open_stream("sink", TrafficClass[arguments.traffic_class], {}, label="vm")
    tasks = [asyncio.create_task(probe()), asyncio.create_task(watch())]
    begin, spent = time.monotonic(), time.process_time()
    while time.monotonic() - begin < arguments.seconds:
        await stream.send(message)
    sending = time.process_time() - spent
    for task in tasks:
        task.cancel()
    await stream.close()
    far = json.loads(await stream.receive() or b"{}")
    taken = time.monotonic() - begin
    steady = sorted(samples[len(samples) // 3 :])
    loaded.sort()
    print(
        json.dumps(
            {
                "bytes": stream.sent_raw_bytes,
                "megabytes_per_second": round(stream.sent_raw_bytes / taken / 1e6, 2),
                "steady_megabytes_per_second": round(steady[len(steady) // 2] / 1e6, 2) if steady else None,
                "samples": [round(sample / 1e6, 1) for sample in samples],
                "sender_milliseconds_per_megabyte": round(sending * 1e9 / stream.sent_raw_bytes, 2),
                "receiver_milliseconds_per_megabyte": round(far["milliseconds_per_megabyte"], 2),
                "call_quiet_seconds": round(min(quiet), 4),
                "call_loaded_median_seconds": round(loaded[len(loaded) // 2], 4) if loaded else None,
                "call_loaded_p95_seconds": round(loaded[int(len(loaded) * 0.95)], 4) if loaded else None,
                "call_loaded_most_seconds": round(loaded[-1], 4) if loaded else None,
                "congestion_control": link.status()["congestion_control"],
                "least_round_trip_seconds": link.least_round_trip_seconds,
                "resent_wire_bytes": link.counters()["resent_wire_bytes"],
            }
        )
    )
    await channel.stop()


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=["serve", "send"])
    parser.add_argument("--pki", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--peer-port", type=int, required=True)
    parser.add_argument("--connections", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--message-bytes", type=int, default=1 << 20)
    parser.add_argument("--traffic-class", default="PRECACHE")
    parser.add_argument("--profile")
    arguments = parser.parse_args()
    work = serve(arguments) if arguments.role == "serve" else send(arguments)
    if arguments.profile:
        profile = cProfile.Profile()
        profile.runcall(asyncio.run, work)
        profile.dump_stats(arguments.profile)
    else:
        asyncio.run(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
