# SPDX-License-Identifier: GPL-3.0-or-later
"""What proxies say, as the controller sees it."""

from __future__ import annotations

from typing import Any

from ansible_collections.lifeboat.evacuation.plugins.module_utils._controller import Controller
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fallback import Phase
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fleet import (
    Eyes,
    HostState,
    site_summary,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import Rung

from unit.plugins.coordination.sites import MB, site, vm


def host(progress: dict[str, Any]) -> dict[str, HostState]:
    job = {"id": "j1", "vm": "uuid-a", "name": "a", "peer": "backup1", "step": "migrate", "ended": False,
           "verdict": None, "progress": progress}  # fmt: skip
    return {"home1": HostState("home1", {"vms": [], "links": [], "evacuations": [job]})}


def test_a_guest_that_outruns_the_mirror_of_its_disk_is_stopped_and_holds_up_nobody() -> None:
    """Seen at 180 ms: 20 synced writes a second, 0.2 MB left for minutes, the memory not begun."""
    eyes = Eyes()
    controller = Controller(site(vm("a"), vm("b"), vm("c", memory=900 * MB)))
    chasing = host({"disk_total_bytes": 138e6, "disk_remaining_bytes": 196608, "memory_total_bytes": 0})
    first = eyes.look(chasing, 100.0, {"j1"}, None)
    assert first.moves["uuid-a"].phase is Phase.LEAD_IN
    controller.step(first)
    later = eyes.look(chasing, 121.0, {"j1"}, None)
    assert later.moves["uuid-a"].hopeless
    orders = [controller.step(eyes.look(chasing, 121.0 + 2 * n, {"j1"}, None)) for n in range(3)]
    assert any("uuid-c" in dict(told.starts) for told in orders)
    fall = orders[0].falls["uuid-a"]
    assert (fall.rung, fall.sentence) == (Rung.PAUSED, "writes to its disk as fast as the mirror follows")


def test_a_mirror_that_has_much_to_do_is_let_work() -> None:
    eyes = Eyes()
    working = host({"disk_total_bytes": 900e6, "disk_remaining_bytes": 400e6, "memory_total_bytes": 0})
    eyes.look(working, 100.0, {"j1"}, None)
    assert eyes.look(working, 160.0, {"j1"}, None).moves["uuid-a"].phase is Phase.LEAD_IN


def test_a_paused_guest_is_seen_as_such() -> None:
    paused = host({"memory_total_bytes": 100e6, "memory_remaining_bytes": 50e6})
    paused["home1"].status["evacuations"][0]["guest_paused"] = True
    assert Eyes().look(paused, 100.0, {"j1"}, None).moves["uuid-a"].rung is Rung.PAUSED


def test_a_restart_is_seen_as_such_from_its_first_step() -> None:
    leaving = host({})
    leaving["home1"].status["evacuations"][0].update(rung="restart", step="stop")
    move = Eyes().look(leaving, 100.0, {"j1"}, None).moves["uuid-a"]
    assert (move.rung, move.phase) == (Rung.RESTART, Phase.LEAD_IN)


def test_a_vm_that_is_shut_off_goes_by_restart_whatever_its_fallback_says() -> None:
    def rungs(*, running: bool, fallback: list[str] | None) -> tuple[Rung, ...]:
        state = HostState("home1", {"vms": [{"uuid": "uuid-a", "name": "a", "peer": "backup1"}]})
        state.workload = {"vms": [{"uuid": "uuid-a", "running": running}]}
        wishes = {} if fallback is None else {"a": {"name": "a", "fallback": fallback}}
        return site_summary("home", [state], {}, wishes, None, 1e6).vms[0].rungs

    assert rungs(running=False, fallback=None) == (Rung.RESTART, Rung.STAY)
    assert rungs(running=False, fallback=["live"]) == (Rung.RESTART, Rung.STAY)
    assert rungs(running=False, fallback=["stay"]) == (Rung.STAY,)
    assert rungs(running=True, fallback=None) == (Rung.LIVE, Rung.PAUSED, Rung.STAY)
    assert rungs(running=True, fallback=["restart"]) == (Rung.RESTART, Rung.STAY)
