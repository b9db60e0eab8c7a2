# SPDX-License-Identifier: GPL-3.0-or-later
"""What is told of VMs while an evacuation goes on, and of those that it does not move itself."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from ansible_collections.lifeboat.evacuation.plugins.module_utils._controller import Controller
from ansible_collections.lifeboat.evacuation.plugins.module_utils._coordination_report import (
    Recorder,
    progress_line,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fallback import Move, Phase
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fleet import Eyes, HostState
from ansible_collections.lifeboat.evacuation.plugins.module_utils._forecast_report import (
    count_others,
    forecast_of,
    mark_preflights,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._interval import (
    Observation,
    Orders,
    PairView,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._outcomes import missing, others, silent
from ansible_collections.lifeboat.evacuation.plugins.module_utils._plan import make_plan
from ansible_collections.lifeboat.evacuation.plugins.module_utils._plan_findings import read_rate
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import (
    PairSummary,
    SiteSummary,
    VmSummary,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._verdicts import table


def job(name: str, verdict: str | None = None, **more: Any) -> dict[str, Any]:
    return {"id": f"j-{name}", "vm": f"u-{name}", "name": name, "peer": "backup1", "step": "migrate",
            "verdict": verdict, "ended": verdict is not None, "epoch": 1, **more}  # fmt: skip


def host(name: str, *jobs: dict[str, Any], error: str = "", vms: tuple[str, ...] = ()) -> HostState:
    told = {"evacuations": list(jobs), "vms": [{"uuid": f"u-{vm}", "name": vm} for vm in vms]}
    return HostState(name, {} if error else told, error=error)


def arrived(state: str, epoch: int = 2) -> dict[str, Any]:
    return {"vm": "u-web1", "name": "web1", "state": state, "epoch": epoch}


def test_a_line_tells_who_moves_how_far_how_fast_and_until_when() -> None:
    vm = VmSummary("u-web1", "web1", "home1", "backup1")
    site = SiteSummary("home", (vm,), (PairSummary("home1", "backup1", "home"),))
    seen = Observation(
        100.0,
        {"u-web1": Move("u-web1", Phase.BULK, remaining_bytes=12e6, bytes_per_second=4e6)},
        {("home1", "backup1"): PairView(goodput_bytes_per_second=5e6)},
        deadline_at=160.0,
    )
    controller = Controller(site)
    controller.step(seen)
    hosts = {"home1": host("home1", job("web1", outlook={"share": 0.43, "lag_bytes": 2e6}))}
    line = progress_line(site, seen, controller, 100.0, hosts, again="; run the same command again")
    assert "0 of 1 out, 1 under way, 0 waiting; 40.0 Mbit/s; deadline in 1:00" in line
    assert "web1 bulk 43 %, 12 MB at 32.0 Mbit/s, 3 s left" in line
    assert line.endswith("run the same command again")


def test_of_those_that_stay_a_line_and_the_table_tell_the_lag() -> None:
    vm = VmSummary("u-web1", "web1", "home1", "backup1")
    site = SiteSummary("home", (vm,), (PairSummary("home1", "backup1", "home"),))
    controller = Controller(site)
    seen = Observation(100.0)
    controller._over["u-web1"] = "too-late"
    hosts = {"home1": host("home1", vms=("web1",))}
    assert "; stay: web1" in progress_line(site, seen, controller, 100.0, hosts)
    hosts["home1"].status["vms"][0] |= {"lag_bytes": 12.34e6, "lag_seconds": 34.0}
    line = progress_line(site, seen, controller, 100.0, hosts)
    assert "; stay: web1 (its replica lacks 12.3 MB, 34 s old)" in line
    outcome = {"name": "web1", "verdict": "stayed", "sentence": "VM web1 stays", "lag_bytes": 12.34e6}
    assert table([outcome])[-1] == "web1: VM web1 stays (its replica lacks 12.3 MB)"
    assert table([{**outcome, "verdict": "evacuated"}])[-1].startswith("web1  -")


def test_what_is_to_be_known_of_one_that_is_out_stands_below_the_table() -> None:
    outcome = {
        "name": "web1", "verdict": "evacuated", "cause": "warning", "sentence": "its memory was lost",
        "lag_bytes": 12.34e6,
    }  # fmt: skip
    assert table([outcome])[-1] == "web1: its memory was lost"


def test_steps_of_many_vms_share_a_line_and_a_verdict_has_its_own() -> None:
    site = SiteSummary("home", (), ())
    recorder = Recorder(site, 0.0, make_plan(site, None), None)
    jobs = [job(f"v{number:02}") | {"step": "catch-up"} for number in range(30)]
    begun = {one["id"] for one in jobs}
    (line,) = recorder.news({"home1": host("home1", *jobs)}, begun)
    assert line.startswith("v00: catch-up; v01: catch-up; ")
    assert line.endswith("v07: catch-up; and 22 more")
    assert recorder.news({"home1": host("home1", *jobs)}, begun) == []
    jobs[3] |= {"verdict": "evacuated"}
    jobs[4] |= {"step": "freeze"}
    assert recorder.news({"home1": host("home1", *jobs)}, begun) == ["v03: EVACUATED", "v04: freeze"]


@pytest.mark.parametrize(
    ("arrivals", "left", "verdict"),
    [
        ([arrived("landed")], [], "already-there"),
        ([arrived("prepared")], [], "failed"),
        ([arrived("landed")], [job("web1", "evacuated", epoch=3)], "failed"),
        ([], [], "failed"),
    ],
    ids=["runs-there", "half-there", "gone-on", "unknown"],
)
def test_a_silent_hosts_vm_is_out_only_where_its_peer_says_so(
    arrivals: list[dict[str, Any]], left: list[dict[str, Any]], verdict: str
) -> None:
    hosts = {"home1": host("home1", error="not reached")}
    there = HostState("backup1", {"arrivals": arrivals, "evacuations": left})
    (told,) = others(hosts, {"backup1": there}, [], None, {"home1": ["web1"]}, [])
    assert (told["verdict"], told["host"], silent(hosts)) == (verdict, "home1", ["home1"])


def test_everybody_who_was_asked_for_has_an_outcome() -> None:
    hosts = {
        "home1": host("home1", job("out", "evacuated"), job("stayed", "stayed")),
        "home2": host("home2", vms=("here",)),
    }
    hosts["home2"].unprotected = [{"name": "stray", "uuid": "u-stray"}]
    told = others(hosts, {}, [{"name": "here", "vm": "u-here"}], ("out", "here", "nosuch"), {}, [])
    assert {outcome["name"]: outcome["verdict"] for outcome in told} == {
        "out": "already-there",
        "nosuch": "failed",
    }
    assert missing(told) == ["nosuch"]
    everything = others(hosts, {}, [{"name": "here", "vm": "u-here"}], None, {}, [])
    assert {outcome["name"]: outcome["verdict"] for outcome in everything} == {
        "out": "already-there",
        "stray": "stayed",
    }
    assert [one["name"] for one in others(hosts, {}, everything, None, {}, ["stray"])] == []


def test_a_silent_hosts_vm_is_not_forgotten_for_one_of_its_name_elsewhere() -> None:
    hosts = {"home1": host("home1", vms=("web1",)), "home2": host("home2", error="not reached")}
    told = [{"name": "web1", "vm": "u-web1", "host": "home1"}]
    both = {"home1": ["web1"], "home2": ["web1"]}
    assert [one["host"] for one in others(hosts, {}, told, None, both, [])] == ["home2"]
    # Listed there alone it is the same one, moved since.
    assert others(hosts, {}, told, None, {"home2": ["web1"]}, []) == []
    assert others(hosts, {}, told, None, {"home2": ["u-web1"]}, []) == []


def test_one_that_is_listed_and_shut_off_and_not_protected_is_told() -> None:
    home = host("home1")
    home.domains = [
        {"uuid": "u-off", "name": "off", "running": False, "peer": None},
        {"uuid": "u-strange", "name": "strange", "running": False, "peer": None},
        {"uuid": "u-safe", "name": "safe", "running": False, "peer": "backup1"},
    ]
    listed = {"home1": ["off", "safe"]}
    (told,) = others({"home1": home}, {}, [], None, listed, [])
    assert (told["name"], told["verdict"], told["cause"]) == ("off", "stayed", "not-protected")
    assert others({"home1": home}, {}, [], None, listed, [], check_mode=True)[0]["verdict"] == "would-fail"
    assert others({"home1": home}, {}, [], None, listed, ["off"]) == []
    assert others({"home1": home}, {}, [], None, {"home1": ["u-off"]}, [])[0]["name"] == "off"


def test_one_that_left_once_and_stands_at_home_unprotected_again_is_not_out() -> None:
    home = host("home1", job("web1", "evacuated"))
    home.domains = [{"uuid": "u-web1", "name": "web1", "running": False, "peer": None}]
    listed = {"home1": ["web1"]}
    (told,) = others({"home1": home}, {}, [], None, listed, [])
    assert (told["verdict"], told["cause"]) == ("stayed", "not-protected")
    home.domains, home.unprotected = [], [{"uuid": "u-web1", "name": "web1"}]
    (told,) = others({"home1": home}, {}, [], None, listed, [])
    assert (told["verdict"], told["cause"]) == ("stayed", "not-protected")
    home.unprotected = []
    (told,) = others({"home1": home}, {}, [], None, listed, [])
    assert told["verdict"] == "already-there"


def test_who_may_stand_where_libvirt_is_silent_is_no_silence() -> None:
    home = host("home1", vms=("safe",))
    home.unprotected = home.domains = None
    listed, safe = {"home1": ["safe", "archive", "stays"]}, [{"name": "safe", "vm": "u-safe"}]
    told = others({"home1": home}, {}, safe, None, listed, ["stays"])
    assert {one["name"]: (one["verdict"], one["cause"]) for one in told} == {
        "archive": ("failed", "hypervisor"),
        "unknown VMs of home1": ("failed", "hypervisor"),
    }
    # Asked for one alone nobody asks who runs there beside.
    home.unprotected = []
    assert [one["name"] for one in others({"home1": home}, {}, safe, ("archive",), listed, [])] == ["archive"]
    assert others({"home1": home}, {}, safe, ("safe",), listed, []) == []


def test_a_forecast_counts_those_whom_no_plan_moves() -> None:
    told: dict[str, Any] = {"vms": [{"end_seconds": 5.0}], "expected_share": 0.8, "site": "home",
                            "deadline_seconds": 25.0}  # fmt: skip
    count_others(told, [{"name": "gone", "verdict": "already-there"},
                        {"name": "stray", "verdict": "would-fail", "cause": "not-protected"}])  # fmt: skip
    assert (told["already_out"], told["expected_share"]) == (1, 0.4)
    assert [(one["name"], one["end_seconds"]) for one in told["vms"][1:]] == [("stray", None)]


def test_a_forecast_is_figured_again_without_those_that_a_preflight_refuses() -> None:
    vms = (VmSummary("u-a", "a", "home1", "backup1", memory_used_bytes=1e8),
           VmSummary("u-b", "b", "home1", "backup1", memory_used_bytes=9e8))  # fmt: skip
    site = SiteSummary("home", vms, (PairSummary("home1", "backup1", "home"),), (), {"home": 1e7})
    told = forecast_of(site, make_plan(site, 100.0), 0.0)
    ends = {vm["name"]: vm["end_seconds"] for vm in told["vms"]}
    whole = told["expected_share"]
    assert mark_preflights(told, {"u-b": "its disk is no file"}) == ["b"]
    assert (told["leaving"], told["makespan_seconds"]) == (1, ends["a"])
    assert told["expected_share"] == pytest.approx((100.0 - ends["a"]) / 200.0, abs=1e-4)
    assert told["expected_share"] < whole


def recorded(looks: int, pairs: int = 1, deadline_at: float | None = None) -> Recorder:
    """What is kept of so many looks, 2 s apart; the one VM is out after 10 s."""
    vm = VmSummary("u-web1", "web1", "home1", "backup1")
    keys = [("home1", f"backup{number + 1}") for number in range(pairs)]
    site = SiteSummary("home", (vm,), tuple(PairSummary(*key, "home") for key in keys))
    recorder, controller = Recorder(site, 0.0, make_plan(site, None), None), Controller(site)
    views = {key: PairView(goodput_bytes_per_second=5e6) for key in keys}
    for look in range(looks):
        out = {"u-web1"} if look >= 5 else set()
        seen = Observation(2.0 * look, pairs=views, out=out, deadline_at=deadline_at)
        recorder.observe(seen, Orders(), {"home1": host("home1")}, controller)
    return recorder


def test_a_long_evacuation_has_no_longer_report() -> None:
    told = recorded(9000)
    times = [sample["at_seconds"] for sample in told.samples]
    assert 500 < len(times) <= 1202
    assert (times[0], times[-1], times) == (0.0, 2.0 * 8999, sorted(set(times)))
    steps = {later - earlier for earlier, later in itertools.pairwise(times[:-1])}
    assert len(steps) == 1, "at even steps, and the last one"
    assert len(recorded(900, pairs=500).samples) <= 122
    assert len(recorded(100).samples) == 100


def test_those_whom_no_plan_moves_count_in_the_report_and_what_was_safe_at_the_deadline_is_told() -> None:
    told = recorded(20, deadline_at=40.0)
    told.outcomes = [
        {"name": "web1", "verdict": "evacuated"},
        {"name": "stray", "verdict": "stayed"},
        {"name": "gone", "verdict": "already-there"},
    ]
    report = told.report("feedback", "40", {})["coordination"]
    assert report["expected_share"] == pytest.approx((40.0 - 10.0) / 40.0 / 2, abs=1e-3)
    assert report["share_at_deadline"] == 0.5
    assert recorded(20).report("feedback", "", {})["coordination"]["share_at_deadline"] is None
    early = recorded(20, deadline_at=4.0)
    early.outcomes = [{"name": "web1", "verdict": "evacuated"}]
    assert early.report("feedback", "4", {})["coordination"]["share_at_deadline"] == 0.0


def test_one_that_came_home_to_another_host_is_not_out() -> None:
    hosts = {"home1": host("home1", job("web1", "evacuated")), "home2": host("home2", vms=("web1",))}
    assert Eyes().look(hosts, 0.0, (), None).out == set()


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("400Mbit/s", 50e6),
        ("50MB/s", 50e6),
        ("1MiB", 2.0**20),
        ("1000", 1000.0),
        ("8 kbit/s", 1e3),
        ("", None),
    ],
)
def test_rates_are_what_proxies_understand(text: str, rate: float | None) -> None:
    assert read_rate("uplink", text) == (rate, [])


@pytest.mark.parametrize("text", ["fast", "-1", "0", "5 furlongs", "Mbit/s", "400Mbps", "400 Mb/s", "5mb"])
def test_what_is_no_rate_is_told(text: str) -> None:
    rate, (finding,) = read_rate("uplink", text)
    assert rate is None
    assert finding.subject == f"uplink {text!r}"
