# SPDX-License-Identifier: GPL-3.0-or-later
"""Run by test_silence.py in a network namespace of its own: flows of a copy are cut in one direction."""

from __future__ import annotations

import asyncio
import struct
import subprocess
import sys
from pathlib import Path

from precache_proxy.channel import Channel, PeerAddress, Stream, TrafficClass
from precache_proxy.channel.connection import Connection
from small_parts.ports import free_port
from unit.channel.conftest import Authority, make_config, until

MESSAGES = 400


def firewall(rule: str) -> None:
    """Lose what fits ``rule``; empty: lose nothing."""
    chain = f"chain input {{ type filter hook input priority 0; {rule} }}"
    table = f"table inet cut\ndelete table inet cut\ntable inet cut {{\n{chain}\n}}\n"
    subprocess.run(["nft", "-f", "-"], input=table, text=True, check=True)


async def story(lost: str, authority: Authority) -> None:
    """Say how it went."""
    ports = free_port(), free_port()
    peers = [PeerAddress("127.0.0.1", port, 4) for port in ports]
    home = Channel(make_config(authority, "home", ports[0], {"backup": peers[1]}))
    backup = Channel(make_config(authority, "backup", ports[1], {"home": peers[0]}))
    got: list[int] = []

    async def take(stream: Stream) -> None:
        while (message := await stream.receive()) is not None:
            got.append(struct.unpack_from(">Q", message)[0])

    backup.handle_stream("take", take)
    await home.start()
    await backup.start()
    link = home.links["backup"]
    await link.wait_up(10)
    await until(lambda: sum(each.synced for each in link._session.connections.values()) == 4)
    link.set_rate(4_000_000)
    stream = await link.open_stream("take", TrafficClass.PRECACHE, {})

    async def push() -> None:
        for number in range(MESSAGES):
            await stream.send(struct.pack(">Q", number), bytes(50_000))
        await stream.close()

    pusher = asyncio.create_task(push())
    await until(lambda: len(got) > 20)
    # All that carry data; the one for calls is left.
    flows = {slot: link._session.connections[slot] for slot in (1, 2, 3)}
    local = ", ".join(str(each._tls.getsockname()[1]) for each in flows.values())
    near, far = ("sport", "dport") if lost == "to-peer" else ("dport", "sport")
    firewall(f"tcp {near} {{ {local} }} tcp {far} {ports[1]} drop;")
    await until(lambda: all(each.liveness.silent for each in flows.values()), 30)
    # What waited for a lost frame, in order behind it, comes; the broken flows are closed later (10 s).
    before = len(got)
    await until(lambda: len(got) > before + 10, 30)
    told = "before-their-end" if flows.items() <= link._session.connections.items() else "after-their-end"
    firewall("")
    await until(lambda: len(got) == MESSAGES, 30)
    assert got == list(range(MESSAGES))
    await pusher
    await stream.drained()
    connections = link._session.connections
    await until(lambda: carried(connections) == 4, 30)
    sys.stdout.write(f"whole {told} and-healed\n")
    await home.stop()
    await backup.stop()


def carried(connections: dict[int, Connection]) -> int:
    """How many of them carry streams."""
    return sum(each.synced and not each.liveness.silent for each in connections.values())


def main() -> None:
    """``one_way_child.py to-peer|from-peer DIRECTORY``."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    asyncio.run(story(sys.argv[1], Authority(Path(sys.argv[2]))))


main()
