# SPDX-License-Identifier: GPL-3.0-or-later
"""evacuation, evacuation_info, preflight_info and precache_proxy_info."""

from __future__ import annotations

from typing import Any

import pytest

from precache_proxy.errors import Conflict, Finding
from precache_proxy.evacuation.arrival import Arrival, ArrivalState
from small_parts.parts import WEB

FINDING = Finding("VM web1/vda", "12 % covered", "wait for the first copy", "coverage")


@pytest.fixture(autouse=True)
def protected(run: Any) -> None:
    run("protected_vm", vm="web1", peer="backup1")


def test_evacuate_four_times(run: Any, parts: Any) -> None:
    would = run("evacuation", check=True, vm="web1")
    assert (would["changed"], parts.evacuation.begun) == (True, [])
    done = run("evacuation", vm="web1", wait_sleep=0.05)
    assert (done["changed"], done["evacuation"]["verdict"]) == (True, "evacuated")
    assert done["evacuation"]["eviction_seconds"] == 4.5
    again = run("evacuation", vm="web1")
    assert (again["changed"], again["evacuation"]["id"]) == (False, done["evacuation"]["id"])
    assert run("evacuation", check=True, vm=WEB)["changed"] is False
    assert parts.evacuation.begun == ["web1"]


def test_check_mode_fails_on_what_stands_in_the_way(run: Any, parts: Any) -> None:
    parts.evacuation.findings = [FINDING]
    told = run("evacuation", check=True, vm="web1")
    assert (told["failed"], told["cause"]) == (True, "preflight")
    assert told["findings"][0]["fact"] == "12 % covered"


def test_an_evacuation_goes_on_without_addresses(run: Any, parts: Any) -> None:
    way_out = "see `mobility-agent check`"
    parts.evacuation.findings = [Finding("VM web1", "its addresses would not follow it", way_out, "network")]
    assert run("evacuation", check=True, vm="web1")["changed"] is True
    [found] = run("preflight_info")["findings"]
    assert (found["cause"], found["stops"]) == ("network", False)
    parts.evacuation.findings.append(FINDING)
    told = run("evacuation", check=True, vm="web1")
    assert [finding["cause"] for finding in told["findings"]] == ["coverage"]


def test_started_and_left_alone(run: Any) -> None:
    begun = run("evacuation", vm="web1", wait=False)
    assert begun["evacuation"]["ended"] is False
    told = run("evacuation_info", vm="web1", wait=True, wait_timeout=10, wait_sleep=0.05)
    assert (told["settled"], told["evacuations"][0]["verdict"]) == (True, "evacuated")
    assert run("evacuation_info", id="nosuch")["evacuations"] == []


def test_a_vm_that_stays_fails_the_task_with_the_reason(run: Any, parts: Any) -> None:
    parts.evacuation.verdict = "stayed"
    told = run("evacuation", vm="web1", wait_sleep=0.05)
    assert told["failed"] is True
    assert "VM web1: stayed" in told["msg"]


def test_too_short_a_wait_says_that_it_goes_on(run: Any, parts: Any) -> None:
    parts.evacuation.step_seconds = 30
    told = run("evacuation", vm="web1", wait_timeout=0)
    assert told["cause"] == "timeout"
    assert "the proxy goes on by itself" in told["msg"]


def test_cancel_four_times(run: Any, parts: Any) -> None:
    parts.evacuation.step_seconds = 30
    run("evacuation", vm="web1", wait=False)
    asked = {"vm": "web1", "state": "cancelled"}
    assert run("evacuation", check=True, **asked)["changed"] is True
    done = run("evacuation", **asked)
    assert (done["changed"], done["evacuation"]["verdict"]) == (True, "stayed")
    assert run("evacuation", **asked)["changed"] is False
    assert run("evacuation", check=True, **asked)["changed"] is False


def test_settle_needs_a_decision_and_an_undecided_job(run: Any, parts: Any) -> None:
    assert "decision" in run("evacuation", vm="web1", state="settled")["msg"]
    assert run("evacuation", vm="web1", state="settled", decision="keep-at-source")["cause"] == "not-found"
    parts.evacuation.step_seconds = 30
    job = run("evacuation", vm="web1", wait=False)["evacuation"]
    asked = {"vm": "web1", "state": "settled", "decision": "keep-at-source"}
    assert run("evacuation", **asked)["changed"] is False, "a job that runs needs no settling"
    parts.evacuation.undecide(job["id"])
    assert run("evacuation", check=True, **asked)["changed"] is True
    done = run("evacuation", **asked)
    assert (done["changed"], done["evacuation"]["sentence"]) == (True, "settled: keep-at-source")
    assert run("evacuation", **asked)["changed"] is False


@pytest.mark.parametrize("state", [ArrivalState.PREPARED, ArrivalState.RELEASED])
def test_an_arrival_that_waits_is_told_that_its_source_is_dead(
    run: Any, parts: Any, state: ArrivalState
) -> None:
    """As the example says it, by the VM's name; an arrival has a state, and neither step nor verdict."""
    earlier = Arrival("j1", WEB, "web1", "home1", 1, 7, ArrivalState.LANDED)
    waits = Arrival("j2", WEB, "web1", "home1", 3, 9, state, cause="no-contact", sentence="wait, or settle")
    called_off = Arrival("j3", WEB, "web1", "home1", 3, 9, ArrivalState.ABORTED)
    parts.evacuation.arrived = [waits, called_off, earlier]
    asked = {"vm": "web1", "state": "settled", "decision": "source-dead"}
    would = run("evacuation", check=True, **asked)
    assert (would["changed"], would["diff"]["after"]["state"], waits.state) == (True, "settled", state)
    done = run("evacuation", **asked)
    assert (done["changed"], done["evacuation"]["id"]) == (True, "j2")
    assert (done["evacuation"]["state"], done["diff"]["after"]["state"]) == ("activated", "activated")
    assert run("evacuation", **asked)["changed"] is False
    assert run("evacuation", check=True, **asked)["changed"] is False


def test_an_arrival_that_is_still_coming_waits_for_no_word(run: Any, parts: Any) -> None:
    """A task that stands in a play must not start a VM whose source is heard and may resume it."""
    comes = Arrival("j2", WEB, "web1", "home1", 3, 9, ArrivalState.PREPARED)
    parts.evacuation.arrived = [comes]
    told = run("evacuation", vm="web1", state="settled", decision="source-dead")
    assert told["failed"] is True
    assert "VM web1: it still comes from home1, which is heard" in told["msg"]
    assert comes.state is ArrivalState.PREPARED


def test_undecided_ends_the_wait(run: Any, parts: Any) -> None:
    parts.evacuation.step_seconds = 30
    job = run("evacuation", vm="web1", wait=False)["evacuation"]
    parts.evacuation.undecide(job["id"])
    told = run("evacuation", vm="web1")
    assert told["failed"] is True
    assert "VM web1: undecided: no contact" in told["msg"]


def test_bandwidth_is_steered(run: Any, parts: Any) -> None:
    parts.evacuation.step_seconds = 30
    run("evacuation", vm="web1", wait=False)
    run("evacuation", vm="web1", wait=False, bandwidth="80Mbit/s")
    assert parts.evacuation.rate == 10_000_000


def test_one_that_has_sent_everything_is_not_failed_over_its_bandwidth(
    run: Any, parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts.evacuation.step_seconds = 30
    began = run("evacuation", vm="web1", wait=False)["evacuation"]

    async def too_late(_job: str, _rate: float) -> None:
        raise Conflict("at step confirm nothing is sent any more")

    monkeypatch.setattr(parts.evacuation, "steer", too_late)
    told = run("evacuation", vm="web1", wait=False, bandwidth="80Mbit/s")
    assert (told.get("failed", False), told["evacuation"]["id"]) == (False, began["id"])


def test_by_restart_with_what_the_guest_is_allowed(run: Any, parts: Any) -> None:
    run("evacuation", check=True, vm="web1", mode="restart")
    assert parts.evacuation.checked == [("web1", True)]
    run("evacuation", vm="web1", mode="restart", shutdown_seconds=90, power_off=False, wait_sleep=0.05)
    [options] = parts.evacuation.options
    assert (options.mode, options.shutdown_seconds, options.power_off) == ("restart", 90.0, False)


def test_preflight_tells_all_findings(run: Any, parts: Any) -> None:
    parts.evacuation.findings = [FINDING, Finding("peer backup1", "no space", "free some", "no-space")]
    told = run("preflight_info")
    assert told["vms"] == ["web1"]
    assert [finding["vm"] for finding in told["findings"]] == ["web1", "web1"]
    unknown = run("preflight_info", vms=["nosuch"])
    assert (unknown["failed"], unknown["findings"][0]["cause"]) == (False, "not-found")


def test_proxy_info_has_status_and_checks(run: Any) -> None:
    told = run("precache_proxy_info", check=True)
    assert told["changed"] is False
    assert told["status"]["name"] == "home1"
    assert {"libvirt", "link", "rpo", "hook"} <= {result["check"] for result in told["checks"]}
