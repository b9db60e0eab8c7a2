# SPDX-License-Identifier: GPL-3.0-or-later
"""Five thousand VMs: registered, refreshed, and one of them handed over among the others.

The figures asked for hold on an idle machine; they are printed, and kept in docs/mobility.md.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from integration.mobility_agents import ANCHORS, Agent, Agents, agents_running, probe_gap
from integration.mobility_net import BRIDGE, HOME_PREFIX, eventually
from mobility_agent.durable import Journal

pytestmark = [pytest.mark.soak, pytest.mark.timeout(300)]

VMS = 5000
REGISTERED_SECONDS, RESTARTED_SECONDS, ANCHOR_MIB = 10.0, 5.0, 150.0
# "As quick as alone": what a hand-over may take more than alone while all others are confirmed, on two cores
# that four busy processes share with it. Seen: 0.004 to 0.012. Of at least so many the median.
MORE_AMONG_THEM_SECONDS, MEASURED = 0.03, 3


def _keep(state: Path) -> None:
    """What a gateway with so many VMs has on its disk."""

    async def write() -> None:
        journal = Journal(state / "attachments.journal")
        journal.open()
        for number in range(VMS):
            record = {
                "homes": [f"{HOME_PREFIX.network_address + 0x10000 + number}/128"],
                "mac": f"52:54:01:00:{number >> 8:02x}:{number & 0xFF:02x}",
                "bridge": BRIDGE,
                "epoch": 1,
                "since_seconds": 0.0,
                "state": "here",
                "to": None,
                "handoff": 1,
                "evident": False,
            }
            journal.put(f"{number:08x}-aaaa-bbbb-cccc-dddddddddddd", record)
        await journal.commit()
        journal.close()

    state.mkdir(parents=True, exist_ok=True)
    asyncio.run(write())


def _bindings(agent: Agent) -> int:
    return int(agent.ask("GET", "/v1/status")["anchor"]["bindings"])


def _resident_mib(agent: Agent) -> float:
    assert agent.process is not None
    text = Path(f"/proc/{agent.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    assert found is not None
    return int(found.group(1)) / 1024


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Agents]:
    with agents_running(tmp_path) as agents:
        yield agents


def _status(agent: Agent) -> dict[str, Any]:
    return dict(agent.ask("GET", "/v1/status")["gateway"])


def test_five_thousand_vms(agents: Agents, tmp_path: Path) -> None:
    figures: dict[str, float] = {}
    gateway = agents["gateway1"]
    guest, still = agents.net.guest("one", at="gateway1"), agents.net.guest("still", at="gateway1")
    for one in (guest, still):
        gateway.arrive(one, 1, wait_seconds=10)
    epoch = 1

    def hand_over() -> float:
        """Away and back; how long until both anchors had acknowledged that it is back, in seconds."""
        nonlocal epoch
        agents["gateway2"].arrive(guest, epoch + 1, wait_seconds=10)
        epoch += 2
        begun = time.monotonic()
        answer = gateway.arrive(guest, epoch, wait_seconds=10)
        assert sorted(answer["acknowledged"]) == sorted(ANCHORS)
        return time.monotonic() - begun

    # One is handed over: by itself, among thousands that are bound, and while all of them are confirmed anew.
    figures["one_by_itself_seconds"] = statistics.median([hand_over() for _ in range(9)])
    gateway.stop()
    _keep(tmp_path / "gateway1" / "state")
    began = time.monotonic()
    gateway.start()
    for name in ANCHORS:
        eventually(lambda name=name: _bindings(agents[name]) == VMS + 2, 60)
    figures["registered_seconds"] = time.monotonic() - began
    figures["anchor_mib"] = max(_resident_mib(agents[name]) for name in ANCHORS)
    figures["one_alone_seconds"] = statistics.median([hand_over() for _ in range(9)])
    # What is asked of a restart: that no packet of a VM which is here and stays here is lost.
    with ThreadPoolExecutor(1) as threads:
        probes = threads.submit(probe_gap, agents.net["client"], still.home, 10)
        time.sleep(1)
        gateway.kill()
        began = time.monotonic()
        gateway.start(wait=False)
        eventually(gateway.answers, 60, 0.02)
        among: list[float] = []
        while _status(gateway)["registrations_pending"]:
            taken = hand_over()
            if _status(gateway)["registrations_pending"]:
                among.append(taken)
        figures["restarted_seconds"] = time.monotonic() - began
        figures["longest_gap_seconds"], figures["lost"] = probes.result()
    assert len(among) >= MEASURED
    figures["one_among_them_seconds"] = statistics.median(among)
    figures["slowest_among_them_seconds"] = max(among)
    print(json.dumps(figures))
    assert figures["registered_seconds"] < REGISTERED_SECONDS
    assert figures["restarted_seconds"] < RESTARTED_SECONDS
    assert figures["anchor_mib"] < ANCHOR_MIB
    assert figures["lost"] == 0
    assert figures["one_among_them_seconds"] < figures["one_alone_seconds"] + MORE_AMONG_THEM_SECONDS
