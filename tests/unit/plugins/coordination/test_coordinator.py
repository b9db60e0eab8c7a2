# SPDX-License-Identifier: GPL-3.0-or-later
"""The coordinator against served control APIs: everyone gets an outcome, and nobody is moved twice."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import ProxyError
from ansible_collections.lifeboat.evacuation.plugins.module_utils._controller import Controller
from ansible_collections.lifeboat.evacuation.plugins.module_utils._deadline import Deadline, Watch
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fallback import Fall, Move, Phase
from ansible_collections.lifeboat.evacuation.plugins.module_utils._interval import Observation, Orders
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import Rung
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._bridge import Bridge, Unreachable
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._coordinator import Coordinator, Refused
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._lookout import Lookout
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._reach import Reach

from precache_proxy.errors import LifeboatError
from small_parts.parts import WEB
from unit.plugins.coordination.world import World

ROOT = Path(__file__).resolve().parents[4]


def report_of(world: World, **how: Any) -> dict[str, Any]:
    coordinator = world.coordinator(**how)
    try:
        recorder = coordinator.run(coordinator.survey())
        report: dict[str, Any] = recorder.report("feedback", "", coordinator.hosts)
    finally:
        coordinator.close()
    schema = json.loads((ROOT / "docs" / "evacuation-report.schema.json").read_text())
    jsonschema.validate(report, schema)
    return report


def verdicts(report: Mapping[str, Any]) -> dict[str, str]:
    return {vm["name"]: vm["verdict"] for vm in report["vms"]}


@pytest.mark.parametrize("strategy", ["feedback", "sequential", "parallel", "static:1"])
def test_everyone_gets_out_by_each_strategy(world: World, strategy: str) -> None:
    world.protect("home1", "web1")
    world.protect("home2", "22222222-2222-4222-8222-222222222222")
    report = report_of(world, strategy=strategy)
    assert verdicts(report) == {"web1": "evacuated", "Datenbank für Köln": "evacuated"}
    assert report["totals"]["all_out"]
    assert report["coordination"]["samples"]
    assert any("EVACUATED" in line for line in world.said)
    known = report["coordination"]["forecast"]["line_known"]
    assert known == ("a guess: nobody knows yet what the line carries" not in world.said[0])


def test_asked_again_nothing_is_moved_twice_and_none_forgotten(world: World) -> None:
    world.protect("home1", "web1")
    first = report_of(world)
    assert verdicts(first) == {"web1": "evacuated"}
    second = report_of(world)
    assert verdicts(second) == {"web1": "already-there"}
    assert world.parts["home1"].evacuation.begun == ["web1"]


def test_a_job_under_way_is_carried_on_with(world: World) -> None:
    world.protect("home1", "web1")
    world.parts["home1"].evacuation.step_seconds = 0.4
    begun = world.proxies["home1"].request("POST", "/v1/evacuations", {"vm": "web1"})
    report = report_of(world)
    assert [(vm["verdict"], vm["id"]) for vm in report["vms"]] == [("evacuated", begun["id"])]
    assert world.parts["home1"].evacuation.begun == ["web1"]


def test_a_host_that_is_not_reached_is_a_verdict_for_its_vms(world: World) -> None:
    world.protect("home1", "web1")
    world.proxies["home2"].dead = True
    report = report_of(world, expected={"home2": ["archive"], "home1": ["web1"]})
    assert verdicts(report) == {"web1": "evacuated", "archive": "failed"}
    assert report["hosts_failed"] == ["home2"]
    assert next(vm for vm in report["vms"] if vm["name"] == "archive")["cause"] == "unreachable"


def test_a_link_that_is_down_is_waited_for_and_said(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.protect("home1", "web1")
    world.protect("home2", "22222222-2222-4222-8222-222222222222")
    link = world.parts["home1"].channel.links["backup1"]
    link.state = "down"
    monkeypatch.setattr(f"{Coordinator.__module__}._LINK_PATIENCE_SECONDS", 1.0)
    report = report_of(world)
    assert verdicts(report) == {"web1": "stayed", "Datenbank für Köln": "evacuated"}
    (stayed,) = [vm for vm in report["vms"] if vm["name"] == "web1"]
    assert (stayed["cause"], "no link to its destination" in stayed["sentence"]) == ("link-down", True)
    monkeypatch.setattr(f"{Coordinator.__module__}._LINK_PATIENCE_SECONDS", 60.0)
    timer = threading.Timer(3.0, setattr, (link, "state", "up"))
    timer.start()
    assert verdicts(report_of(world))["web1"] == "evacuated", "it came back in time"


def test_a_host_that_hangs_slows_down_nobody_and_its_vm_is_told_of(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.protect("home1", "web1")
    world.protect("home2", "22222222-2222-4222-8222-222222222222")
    for patience in ("_UNREACHED_PATIENCE_SECONDS", "_LINK_PATIENCE_SECONDS"):
        monkeypatch.setattr(f"{Coordinator.__module__}.{patience}", 2.0)
    coordinator = world.coordinator()
    site = coordinator.survey()
    world.proxies["home2"].hangs_seconds = 7.0
    began = time.monotonic()
    out_after: list[float] = []

    def say(line: str) -> None:
        world.said.append(line)
        if line.startswith("web1: EVACUATED"):
            out_after.append(time.monotonic() - began)

    coordinator._say = say
    try:
        recorder = coordinator.run(site)
        report = recorder.report("feedback", "", coordinator.hosts)
    finally:
        coordinator.close()
    assert verdicts(report)["web1"] == "evacuated"
    assert out_after[0] < 6.9, "before the other host was given up even once"
    # It was late before it was asked to start: it was asked for nothing.
    other = next(vm for vm in report["vms"] if vm["name"] != "web1")
    assert (other["verdict"], other["cause"]) == ("stayed", "unreachable")


def test_one_that_a_host_was_asked_to_move_and_owes_every_answer_since_is_undecided(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.protect("home1", "web1")
    monkeypatch.setattr(f"{Lookout.__module__}._PATIENT_SECONDS", 1.0)
    proxy = world.proxies["home1"]
    proxy.hangs_at_start = True
    watch = Watch(Deadline("x", at=time.time() + 6), lambda _ups: 0.0)
    coordinator = world.coordinator(watch=watch)
    try:
        recorder = coordinator.run(coordinator.survey())
        host = coordinator.hosts["home1"]
        assert (host.error, host.late_since is None) == ("", False)
    finally:
        proxy.let_go.set()
        coordinator.close()
    (told,) = recorder.outcomes
    assert (told["verdict"], told["cause"]) == ("undecided", "unreachable")


def refuses(world: World, cause: str, times: float, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """home1 refuses so many starts of that cause; when it was asked."""
    proxy, request, asked = world.proxies["home1"], world.proxies["home1"].request, list[float]()

    def answer(method: str, path: str, *more: Any) -> Any:
        if (method, path) == ("POST", "/v1/evacuations"):
            asked.append(time.monotonic())
            if len(asked) <= times:
                raise ProxyError(cause, "VM web1: libvirt does not answer")
        return request(method, path, *more)

    monkeypatch.setattr(f"{Controller.__module__}._RETRY_SECONDS", 0.5)
    proxy.request = answer  # type: ignore[method-assign]
    return asked


def test_a_start_that_is_refused_for_a_moment_is_asked_for_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its libvirt restarts just then; more often than a move that fails is tried."""
    world.protect("home1", "web1")
    asked = refuses(world, "hypervisor", 4, monkeypatch)
    assert verdicts(report_of(world)) == {"web1": "evacuated"}
    assert len(asked) == 5
    assert sum("it is asked for again: VM web1: libvirt" in line for line in world.said) == 1


@pytest.mark.parametrize(("cause", "asked_once"), [("hypervisor", False), ("conflict", True)])
def test_one_whose_start_was_refused_stayed(
    world: World, cause: str, asked_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.protect("home1", "web1")
    monkeypatch.setattr(f"{Coordinator.__module__}._REFUSED_PATIENCE_SECONDS", 2.0)
    asked = refuses(world, cause, float("inf"), monkeypatch)
    (told,) = report_of(world)["vms"]
    assert (told["verdict"], told["cause"]) == ("stayed", cause)
    assert told["sentence"] == "VM web1: libvirt does not answer"
    assert (len(asked) == 1) == asked_once


def test_a_start_whose_answer_is_lost_is_found_under_way(world: World) -> None:
    world.protect("home1", "web1")
    world.proxies["home1"].loses_answers_to = "/v1/evacuations"
    report = report_of(world)
    assert verdicts(report) == {"web1": "evacuated"}
    assert world.parts["home1"].evacuation.begun == ["web1"]


def test_a_start_whose_answer_is_lost_is_found_when_it_has_ended_meanwhile(world: World) -> None:
    world.protect("home1", "web1")
    evacuation, proxy = world.parts["home1"].evacuation, world.proxies["home1"]
    # It stayed once: that job is not what this start began.
    evacuation.verdict = "stayed"
    old = proxy.request("POST", "/v1/evacuations", {"vm": "web1"})
    while not evacuation.job(old["id"]).ended:
        time.sleep(0.05)
    evacuation.verdict = "evacuated"
    proxy.loses_answers_to, proxy.dies_with_that = "/v1/evacuations", True
    # By then its job is over, and no other try is due yet.
    timer = threading.Timer(2.0, setattr, (proxy, "dead", False))
    timer.start()
    coordinator = world.coordinator(watch=Watch(Deadline("x", at=time.time() + 4), lambda _ups: 0.0))
    try:
        (told,) = coordinator.run(coordinator.survey()).outcomes
    finally:
        coordinator.close()
    assert (told["verdict"], coordinator.changed) == ("evacuated", True)
    assert told["id"] != old["id"]
    assert evacuation.begun == ["web1", "web1"]


def test_a_try_on_its_way_has_not_failed_of_the_one_before(world: World) -> None:
    coordinator = world.coordinator()
    seen = Observation(0.0, failed={"u-web1": True, "u-other": True})
    coordinator._starting.add("u-web1")
    try:
        assert coordinator._with_refusals(seen).failed == {"u-other": True}
    finally:
        coordinator.close()


def test_after_the_deadline_a_silent_host_is_waited_for_a_minute_and_not_five(world: World) -> None:
    """Its power is gone as was said, and people wait for the verdicts."""
    world.protect("home1", "web1")
    coordinator = world.coordinator()
    try:
        site = coordinator.survey()
        now = coordinator._clock()
        coordinator._lost_at["home1"] = now - 100.0

        def given_up(deadline_at: float | None) -> bool:
            told = coordinator._with_refusals(Observation(now, deadline_at=deadline_at))
            return told.failed == {vm.uuid: False for vm in site.vms}

        assert given_up(now - 61.0)
        assert not given_up(now - 59.0), "it may be out a moment after its end"
        assert not given_up(now + 600.0)
        assert not given_up(None)
        coordinator._lost_at["home1"] = now - 301.0
        assert given_up(None)
    finally:
        coordinator.close()


def test_a_start_that_a_dying_host_may_have_obeyed_is_undecided(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.protect("home1", "web1")
    for patience in ("_UNREACHED_PATIENCE_SECONDS", "_LINK_PATIENCE_SECONDS"):
        monkeypatch.setattr(f"{Coordinator.__module__}.{patience}", 1.0)
    proxy = world.proxies["home1"]
    proxy.loses_answers_to, proxy.dies_with_that = "/v1/evacuations", True
    (vm,) = report_of(world)["vms"]
    assert (vm["verdict"], vm["cause"]) == ("undecided", "unreachable")
    assert "may be on its way; run the same command again" in vm["sentence"]


def test_passes_of_those_whose_turn_is_near_wait(world: World) -> None:
    world.protect("home1", "web1")
    world.protect("home1", "22222222-2222-4222-8222-222222222222")
    world.parts["home1"].evacuation.step_seconds = 0.4
    report = report_of(world, wishes={"home1": {"web1": {"name": "web1", "after": ["Datenbank für Köln"]}}})
    assert set(verdicts(report).values()) == {"evacuated"}
    postponed = world.parts["home1"].source.postponed
    assert ("web1", 30.0) in postponed
    assert [decision["vm"] for decision in report["coordination"]["decisions"]
            if decision["what"] == "precaching-waits"] == ["web1"]  # fmt: skip


def test_a_stayed_vm_says_why(world: World) -> None:
    world.protect("home1", "web1")
    world.parts["home1"].evacuation.verdict = "stayed"
    report = report_of(world)
    assert verdicts(report) == {"web1": "stayed"}
    assert not report["totals"]["all_out"]


def test_check_mode_tells_of_one_that_waits_for_a_decision(world: World) -> None:
    world.protect("home1", "web1")
    world.parts["home1"].evacuation.step_seconds = 5.0
    begun = world.proxies["home1"].request("POST", "/v1/evacuations", {"vm": "web1"})

    def would() -> list[dict[str, Any]]:
        coordinator = world.coordinator()
        try:
            report: dict[str, Any] = coordinator.would(coordinator.forecast(coordinator.survey())[0], {})
        finally:
            coordinator.close()
        vms: list[dict[str, Any]] = report["vms"]
        return vms

    assert [vm["verdict"] for vm in would()] == ["under-way"]
    world.parts["home1"].evacuation.undecide(begun["id"])
    (told,) = would()
    assert (told["verdict"], told["cause"], told["id"]) == ("would-fail", "undecided", begun["id"])
    assert "no contact with backup1" in told["sentence"]


def test_where_only_a_restart_is_allowed_that_is_asked_for(world: World) -> None:
    world.protect("home1", "web1")
    report = report_of(world, wishes={"home1": {"web1": {"name": "web1", "fallback": ["restart"]}}})
    assert verdicts(report) == {"web1": "evacuated"}
    assert report["vms"][0]["rung"] == "restart"
    [options] = world.parts["home1"].evacuation.options
    assert options.mode == "restart"
    assert "web1: starts, to backup1, by restart" in " | ".join(world.said)


def test_a_restart_is_told_what_time_there_is_and_what_the_operator_chose(world: World) -> None:
    world.protect("home1", "web1")
    world.parts["home1"].evacuation.step_seconds = 0.01
    proxy, request = world.proxies["home1"], world.proxies["home1"].request

    def asked(method: str, path: str, *more: Any) -> Any:
        running = {"vms": [{"uuid": WEB, "running": True, "memory_bytes": 1 << 27}]}
        return running if path == "/v1/workload" else request(method, path, *more)

    proxy.request = asked  # type: ignore[method-assign]
    usual = {"home1": {"fallback": ["restart"], "power_off": False}}
    watch = Watch(Deadline("x", at=time.time() + 58), lambda _ups: 0.0)
    report = report_of(world, watch=watch, usual=usual, uplink_bytes_per_second=1e8)
    assert verdicts(report) == {"web1": "evacuated"}
    [options] = world.parts["home1"].evacuation.options
    assert options.mode == "restart"
    assert 25 < options.shutdown_seconds < 58
    assert not options.power_off


def test_one_that_is_listed_shut_off_and_unprotected_is_told(world: World) -> None:
    world.protect("home1", "web1")
    world.parts["home1"].hypervisor.domains = [("u-off", "archive", False)]
    report = report_of(world, expected={"home1": ["web1", "archive"]})
    assert verdicts(report) == {"web1": "evacuated", "archive": "stayed"}
    assert not report["totals"]["all_out"]


def test_one_whose_last_move_ended_is_looked_for_all_the_same(world: World) -> None:
    world.protect("home1", "web1")
    world.parts["home1"].evacuation.verdict = "stayed"
    listed = {"expected": {"home1": ["web1"]}}
    assert verdicts(report_of(world, **listed)) == {"web1": "stayed"}
    del world.parts["home1"].source.protected[WEB]
    world.parts["home1"].hypervisor.domains = [(WEB, "web1", False)]
    report = report_of(world, **listed)
    assert [(vm["name"], vm["verdict"], vm["cause"]) for vm in report["vms"]] == [
        ("web1", "stayed", "not-protected")
    ]
    assert not report["totals"]["all_out"]


def test_what_stands_where_libvirt_is_silent_is_not_taken_for_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.protect("home1", "web1")

    async def silent() -> list[tuple[str, str, bool]]:
        raise LifeboatError("libvirt does not answer")

    monkeypatch.setattr(world.parts["home2"].hypervisor, "list_domains", silent)
    report = report_of(world, expected={"home1": ["web1"], "home2": ["archive"]})
    assert verdicts(report) == {
        "web1": "evacuated", "archive": "failed", "unknown VMs of home2": "failed",
    }  # fmt: skip
    assert {vm["cause"] for vm in report["vms"] if vm["host"] == "home2"} == {"hypervisor"}
    assert not report["totals"]["all_out"]


@pytest.mark.parametrize(("cause", "told"), [("unreachable", {"archive": "failed"}), ("not-found", {})])
def test_only_a_proxy_of_an_older_version_may_not_say_what_it_has(
    world: World, cause: str, told: dict[str, str]
) -> None:
    proxy, request = world.proxies["home2"], world.proxies["home2"].request

    def asked(method: str, path: str, *more: Any) -> Any:
        if path == "/v1/hypervisor":
            raise ProxyError(cause, "no answer")
        return request(method, path, *more)

    proxy.request = asked  # type: ignore[method-assign]
    assert verdicts(report_of(world, expected={"home2": ["archive"]})) == told


def test_nothing_is_started_on_findings(world: World) -> None:
    world.protect("home1", "web1")
    world.protect("home2", "web1")
    passed = Watch(Deadline("x", at=time.time() - 5), lambda _ups: 0.0)
    wishes = {"home1": {"web1": {"name": "web1", "after": ["web1"]}}}
    coordinator = world.coordinator(watch=passed, wishes=wishes)
    with pytest.raises(Refused) as refused:
        coordinator.survey()
    coordinator.close()
    told = " | ".join(str(finding) for finding in refused.value.findings)
    assert "passed 5 s ago" in told
    assert "several hosts: home1, home2" in told
    assert "waits for itself" in told
    assert world.parts["home1"].evacuation.begun == []


def test_a_second_coordinator_is_noticed(world: World) -> None:
    world.protect("home1", "web1")
    world.protect("home2", "22222222-2222-4222-8222-222222222222")
    for parts in world.parts.values():
        parts.evacuation.step_seconds = 0.5
    request = world.proxies["home2"].request
    asked = threading.Timer(
        2.0, request, ("POST", "/v1/evacuations", {"vm": "22222222-2222-4222-8222-222222222222"})
    )
    asked.start()
    report = report_of(world, strategy="sequential")
    assert set(verdicts(report).values()) == {"evacuated"}
    (line,) = [line for line in world.said if "begun by somebody else" in line]
    assert line.startswith("Datenbank für Köln: ")
    world.said.clear()


def test_who_is_to_wait_for_a_vm_that_nobody_knows_is_told(world: World) -> None:
    world.protect("home1", "web1")
    named = "22222222-2222-4222-8222-222222222222"
    world.protect("home2", named)

    def after(*names: str, **how: Any) -> str:
        wishes = {"home1": {"web1": {"name": "web1", "after": list(names)}}}
        coordinator = world.coordinator(wishes=wishes, **how)
        try:
            coordinator.survey()
        except Refused as refused:
            return str(refused)
        finally:
            coordinator.close()
        return ""

    assert "VM web1: after databse: is a VM that no host has" in after("databse", named)
    assert after("Datenbank für Köln") == after("elsewhere", listed=lambda: {"elsewhere"}) == ""
    # One that is out already is still known.
    world.proxies["home2"].request("POST", "/v1/evacuations", {"vm": named})
    while named in world.parts["home2"].source.protected:
        time.sleep(0.05)
    assert after("Datenbank für Köln", named) == ""
    world.proxies["home2"].dead = True
    assert after("databse") == "", "it may be of a host that is out of reach"


def test_progress_is_told_at_a_steady_pace_whatever_else_is_told(world: World) -> None:
    """Steps change at every look: that is no reason not to say how all stands, and how to go on."""
    world.protect("home1", "web1")
    world.protect("home1", "22222222-2222-4222-8222-222222222222")
    world.parts["home1"].evacuation.step_seconds = 0.6
    world.parts["home1"].evacuation.steps = tuple(f"step{number}" for number in range(12))
    began = time.monotonic()
    report_of(world, strategy="parallel")
    lines = [line for line in world.said if " out, " in line and " under way, " in line]
    # Every second: one is asked for, a look takes 0.2 s here.
    assert len(lines) >= 0.6 * (time.monotonic() - began - 2)
    assert len(lines) >= 3
    assert all("if this ends, jobs go on: run the same command again" in line for line in lines)


def test_after_the_deadline_what_is_under_way_is_picked_up_and_told(world: World) -> None:
    world.protect("home1", "web1")
    world.protect("home2", "22222222-2222-4222-8222-222222222222")
    evacuation = world.parts["home1"].evacuation
    evacuation.step_seconds = 0.4
    world.proxies["home1"].request("POST", "/v1/evacuations", {"vm": "web1"})
    passed = Watch(Deadline("20m", at=time.time() - 5), lambda _ups: 0.0)
    coordinator = world.coordinator(watch=passed)
    try:
        told = coordinator.run(coordinator.survey(pick_up=True)).outcomes
        with pytest.raises(Refused, match=r"passed \d+ s ago"):
            coordinator.survey(pick_up=True)
    finally:
        coordinator.close()
    assert {vm["name"]: vm["verdict"] for vm in told} == {"web1": "evacuated", "Datenbank für Köln": "stayed"}
    assert world.parts["home2"].evacuation.begun == []
    assert not any(line.startswith("web1: would stay") for line in world.said)
    instant = passed.deadline.instant if passed.deadline else ""
    assert f"run the same command again with evacuate_deadline={instant}" in world.said[0]


def test_the_bridge_speaks_http_through_a_process(world: World, tmp_path: Path) -> None:
    """The same bridge as over SSH, with the stdio command run here."""
    command = tmp_path / "precache-proxy"
    package = ROOT / "roles" / "precache_proxy" / "files"
    python = ROOT / ".venv" / "bin" / "python"
    command.write_text(f'#!/bin/sh\nPYTHONPATH="{package}" exec "{python}" -m precache_proxy "$@"\n')
    command.chmod(0o755)
    bridge = Bridge(Reach("home1", local=True), str(world.paths["home1"]), str(command))
    try:
        assert bridge.get("/v1/status")["name"] == "home1"
        world.protect("home1", "web1")
        # The same process serves again: no new bridge for each question.
        before = bridge._process
        assert [vm["name"] for vm in bridge.get("/v1/status")["vms"]] == ["web1"]
        assert bridge._process is before
        with pytest.raises(ProxyError, match="not protected"):
            bridge.request("POST", "/v1/evacuations", {"vm": "22222222-2222-4222-8222-222222222222"})
        assert before is not None
        before.kill()
        before.wait()
        assert bridge.get("/v1/status")["name"] == "home1", "a bridge that died is built again"
    finally:
        bridge.close()


def test_a_bridge_that_cannot_be_ended_is_hung_up_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "precache-proxy"
    command.write_text("#!/bin/sh\nexec cat >/dev/null\n")
    command.chmod(0o755)
    bridge = Bridge(Reach("home1", local=True), "none", str(command))
    bridge._open()
    process = bridge._process
    assert process is not None
    monkeypatch.setattr(process, "terminate", lambda: (_ for _ in ()).throw(PermissionError(1, "sudo's")))
    bridge.close()
    assert process.wait(5) == 0, "it ended by itself"


@pytest.mark.parametrize("surveyed", [False, True], ids=["at-the-survey", "at-a-look"])
def test_what_nobody_thought_of_is_one_hosts_trouble(world: World, surveyed: bool) -> None:
    def broken(*_request: Any) -> Any:
        raise PermissionError(1, "not yours")

    world.protect("home1", "web1")
    coordinator = world.coordinator(expected={"home2": ["archive"]} if not surveyed else {})
    try:
        site = coordinator.survey() if surveyed else None
        world.proxies["home2"].request = broken  # type: ignore[method-assign]
        recorder = coordinator.run(site or coordinator.survey())
    finally:
        coordinator.close()
    told = {vm["name"]: vm["verdict"] for vm in recorder.outcomes}
    assert told == {"web1": "evacuated", **({} if surveyed else {"archive": "failed"})}
    assert "PermissionError" in coordinator.hosts["home2"].error


def test_no_proxy_is_one_sentence(tmp_path: Path) -> None:
    bridge = Bridge(
        Reach("home1", local=True), str(tmp_path / "none.sock"), "precache-proxy-that-is-not-there"
    )
    with pytest.raises(Unreachable, match="cannot be run here"):
        bridge.get("/v1/status")


def test_a_share_whose_answer_is_lost_is_asked_for_again_a_lift_too(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = world.coordinator()
    asked: list[tuple[float | None, float]] = []
    lost = ProxyError("unreachable", "home1: SSH lost")
    outcomes: list[ProxyError | None] = [None, lost, lost, None]

    def ask(_controller: Any, _uuid: str, _what: str, body: dict[str, Any], told: Any, *, key: str) -> None:
        asked.append((body["share_bytes_per_second"], body["for_seconds"]))
        assert key == "share"
        told(None, outcomes.pop(0))

    monkeypatch.setattr(coordinator, "_ask", ask)
    monkeypatch.setattr(coordinator, "_begun", {"u": "j1"})
    nobody: Any = None
    try:
        for share in (1e6, 1e6, None, None, None, None):
            coordinator._share(nobody, "u", share, None, 100.0)
    finally:
        coordinator.close()
    # Set once; lifted until that is answered, and not once more.
    assert asked == [(1e6, 20.0), (None, 20.0), (None, 20.0), (None, 20.0)]


@pytest.mark.parametrize("cause", ["unreachable", "taken-over"])
def test_a_cancel_that_does_not_get_there_is_asked_for_again_where_it_is_decided_once(
    world: World, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    coordinator = world.coordinator()
    asked: list[str] = []
    lost = ProxyError(cause, "home1: no")
    outcomes: list[ProxyError | None] = [lost, lost, lost, lost, None]

    def ask(_controller: Any, uuid: str, what: str, _body: None, told: Any) -> None:
        assert what == "cancel"
        asked.append(uuid)
        told(None, outcomes.pop(0))

    monkeypatch.setattr(coordinator, "_ask", ask)
    monkeypatch.setattr(coordinator, "_begun", {"far": "j1", "gives-way": "j2", "anew": "j3"})
    nobody: Any = None

    def look(phase: Phase = Phase.BULK, *, falls: tuple[tuple[str, Rung], ...] = ()) -> None:
        moves = {uuid: Move(uuid, phase) for uuid in ("far", "gives-way", "anew")}
        orders = Orders(falls={uuid: Fall(rung, "too-late", "no") for uuid, rung in falls})
        coordinator._obey(orders, Observation(0.0, moves), nobody, nobody, ())

    try:
        look(falls=(("far", Rung.RESTART), ("gives-way", Rung.STAY), ("anew", Rung.RESTART)))
        # Its cancel got there after all, and it has begun by restart.
        coordinator._begun["anew"] = "j4"
        # One that is nearly over is left in peace.
        look(Phase.CLOSING)
        assert asked == ["far", "gives-way", "anew"]
        look()
        look()
        look()
    finally:
        coordinator.close()
    assert asked == ["far", "gives-way", "anew", "far", "far"]
