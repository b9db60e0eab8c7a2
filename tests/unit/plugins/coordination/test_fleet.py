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
    wish_for,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._interval import Observation
from ansible_collections.lifeboat.evacuation.plugins.module_utils._plan import make_plan
from ansible_collections.lifeboat.evacuation.plugins.module_utils._plan_findings import (
    placement_findings,
    site_findings,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import QEMU_OVERHEAD_BYTES, Rung

from unit.plugins.coordination.sites import site, vm


def host(progress: dict[str, Any]) -> dict[str, HostState]:
    job = {"id": "j1", "vm": "uuid-a", "name": "a", "peer": "backup1", "step": "migrate", "ended": False,
           "verdict": None, "progress": progress}  # fmt: skip
    return {"home1": HostState("home1", {"vms": [], "links": [], "evacuations": [job]})}


def test_a_guest_that_outruns_the_mirror_of_its_disk_is_stopped_and_holds_up_nobody() -> None:
    """Seen at 180 ms: 20 synced writes a second, 0.2 MB left for minutes, the memory not begun."""
    eyes = Eyes()
    controller = Controller(site(vm("a"), vm("b")))
    chasing = host({"disk_total_bytes": 138e6, "disk_remaining_bytes": 196608, "memory_total_bytes": 0})
    first = eyes.look(chasing, 100.0, {"j1"}, None)
    assert first.moves["uuid-a"].phase is Phase.LEAD_IN
    controller.step(first)
    later = eyes.look(chasing, 121.0, {"j1"}, None)
    assert later.moves["uuid-a"].hopeless
    orders = [controller.step(eyes.look(chasing, 121.0 + 2 * n, {"j1"}, None)) for n in range(3)]
    assert any(told.starts for told in orders), "its place is another's"
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
        wishes = {} if fallback is None else {"home1": {"a": {"name": "a", "fallback": fallback}}}
        return site_summary("home", [state], {}, wishes, None, 1e6).vms[0].rungs

    assert rungs(running=False, fallback=None) == (Rung.RESTART, Rung.STAY)
    assert rungs(running=False, fallback=["live"]) == (Rung.RESTART, Rung.STAY)
    assert rungs(running=False, fallback=["stay"]) == (Rung.STAY,)
    assert rungs(running=True, fallback=None) == (Rung.LIVE, Rung.PAUSED, Rung.STAY)
    assert rungs(running=True, fallback=["restart"]) == (Rung.RESTART, Rung.STAY)


def test_a_vm_that_was_handed_over_is_found_by_its_uuid_too() -> None:
    handed = host({})
    handed["home1"].status["evacuations"][0].update(step="finish")
    for names in (("a",), ("uuid-a",), None):
        assert [one.uuid for one in site_summary("home", [handed["home1"]], {}, {}, names, 1e6).vms] == [
            "uuid-a"
        ]
    assert site_summary("home", [handed["home1"]], {}, {}, ("b",), 1e6).vms == ()


def test_a_wish_is_that_of_its_host_where_names_are_the_same() -> None:
    wishes = {"home1": {"web": {"priority": 90}}, "home2": {"web": {"priority": 10}, "db": {"priority": 70}}}
    web, db = {"name": "web", "uuid": "u1"}, {"name": "db", "uuid": "u2"}
    assert wish_for("home1", web, wishes) == {"priority": 90}
    assert wish_for("home2", web, wishes) == {"priority": 10}
    # Moved within the site since it was listed; of two nobody knows which is meant.
    assert wish_for("home1", db, wishes) == {"priority": 70}
    assert wish_for("home3", web, wishes) == {}
    assert wish_for("home1", db, {"home1": {"u2": {"priority": 5}}}) == {"priority": 5}


def test_a_host_that_owes_its_answer_is_seen_as_it_was_and_then_holds_up_nobody() -> None:
    sending = host({"memory_total_bytes": 100e6, "memory_remaining_bytes": 50e6})
    state = sending["home1"]
    eyes = Eyes()
    for sent, now in ((1e6, 100.0), (11e6, 102.0)):
        counters = {"sent_wire_bytes": sent, "labels": {"uuid-a": {"sent_wire_bytes": sent}}}
        state.status["links"] = [{"peer": "backup1", "state": "up", "counters": counters}]
        eyes.look(sending, now, {"j1"}, None)
    state.late_since = 104.0
    late = eyes.look(sending, 104.0, {"j1"}, None)
    pair = late.pairs["home1", "backup1"]
    assert (pair.heard, pair.up, pair.goodput_bytes_per_second) == (False, True, 5e6)
    assert (late.moves["uuid-a"].bytes_per_second, late.moves["uuid-a"].silent) == (5e6, False)
    # Nobody is started there, and others may be elsewhere.
    orders = Controller(site(vm("b"), vm("c", host=2))).step(late)
    assert [uuid for uuid, _rung in orders.starts] == ["uuid-c"]
    long = eyes.look(sending, 115.0, {"j1"}, None)
    assert long.moves["uuid-a"].silent
    assert long.pairs["home1", "backup1"].goodput_bytes_per_second == 0.0
    # It answers: what it sent meanwhile is a rate over all of that time.
    state.late_since = None
    counters["labels"]["uuid-a"]["sent_wire_bytes"] = 41e6  # type: ignore[index]
    assert eyes.look(sending, 117.0, {"j1"}, None).moves["uuid-a"].bytes_per_second == 2e6


def leaving(step: str = "", **progress: Any) -> tuple[dict[str, HostState], dict[str, HostState]]:
    """Two VMs of a group with 1 GiB each, ``a`` under way at that step, and what is free at their peer."""
    gib, names = 2**30, ("a", "b")
    vms = [{"uuid": f"uuid-{name}", "name": name, "peer": "backup1"} for name in names]
    job = {"id": "j1", "vm": "uuid-a", "name": "a", "peer": "backup1", "step": step, "ended": False,
           "progress": progress}  # fmt: skip
    workload = {"vms": [{"uuid": f"uuid-{name}", "memory_bytes": gib, "running": True} for name in names]}
    source = HostState("home1", {"vms": vms, "links": [], "evacuations": [job] if step else []}, workload)
    return {"home1": source}, {"backup1": HostState("backup1", {"site": "backup"}, {})}


def found(
    hosts: tuple[dict[str, HostState], dict[str, HostState]], free_bytes: float
) -> tuple[list[Any], list[Any], int]:
    """Findings of groups and of placement, and how many the plan lets leave."""
    sources, there = hosts
    there["backup1"].workload["memory_free_bytes"] = free_bytes
    wishes = {"home1": {name: {"name": name, "group": "shop"} for name in ("a", "b")}}
    told = site_summary("home", list(sources.values()), there, wishes, None, 1e8)
    return site_findings(told), placement_findings(told), len(make_plan(told, None).leaving)


def test_what_qemu_needs_beside_the_guest_is_counted_wherever_memory_is() -> None:
    gib = 2**30
    short, enough = 2 * gib + 2**20, 2 * gib + 2 * QEMU_OVERHEAD_BYTES
    groups, placement, count = found(leaving(), short)
    assert (len(groups), len(placement), count) == (1, 1, 1)
    assert found(leaving(), enough) == ([], [], 2)
    sources, there = leaving()
    there["backup1"].workload["memory_free_bytes"] = gib + 2**20
    controller = Controller(site_summary("home", list(sources.values()), there, {}, None, 1e8))
    assert not controller.step(Observation(0.0)).starts


def test_what_arrived_at_the_destination_is_not_asked_of_it_again() -> None:
    """The second run: what is free there has those that are under way taken off already."""
    gib, one = 2**30, 2**30 + QEMU_OVERHEAD_BYTES
    assert len(found(leaving("catch-up"), one)[0]) == 1, "nothing of it is there"
    half = {"memory_total_bytes": gib, "memory_remaining_bytes": gib / 2, "memory_iteration": 1}
    assert len(found(leaving("migrate", **half), one)[0]) == 1
    assert found(leaving("migrate", **half), one + gib / 2) == ([], [], 2)
    again = {**half, "memory_iteration": 3}
    for hosts in (leaving("migrate", **again), leaving("confirm")):
        assert found(hosts, one) == ([], [], 2)
