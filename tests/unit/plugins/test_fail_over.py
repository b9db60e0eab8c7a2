# SPDX-License-Identifier: GPL-3.0-or-later
"""fail_over, fail_over_info, and which VMs of a dead site run where in which order."""

from __future__ import annotations

from typing import Any

import pytest

from precache_proxy.errors import Finding
from small_parts.parts import DATABASE, KNOWN, WEB, Arrived

GIB = 2**30
NO_ROOM = Finding("VM web1", "2.1 GiB of memory needed, 1.0 GiB free", "end something there", "no-space")


@pytest.fixture
def replicas(parts: Any) -> Any:
    parts.evacuation.keep(parts.store, WEB, "home1")
    parts.evacuation.keep(parts.store, DATABASE, "home2")
    return parts


# -- modules


def test_fail_over_four_times(run: Any, replicas: Any) -> None:
    would = run("fail_over", check=True, vm="web1")
    told = would["fail_over"]
    assert (would["changed"], told["state"], told["generation"]) == (True, "would-start", 7)
    assert told["age_seconds"] == 14.0
    assert replicas.evacuation.arrived == []
    done = run("fail_over", vm="web1", source_is_dead=True)
    assert (done["changed"], done["fail_over"]["state"], done["fail_over"]["job"]) == (True, "here", "f0")
    assert done["diff"]["before"] != done["diff"]["after"]
    for check in (False, True):
        again = run("fail_over", check=check, vm=WEB, source_is_dead=True)
        assert (again["changed"], again["fail_over"]["state"]) == (False, "here")
        assert again["diff"]["before"] == again["diff"]["after"]
    assert [arrived.name for arrived in replicas.evacuation.arrived] == ["web1"]


def test_fail_over_wants_the_word_and_a_replica(run: Any, replicas: Any) -> None:
    silent = run("fail_over", vm="web1")
    assert (silent["failed"], silent["cause"]) == (True, "invalid")
    assert "it would run here from generation 7" in silent["msg"]
    unknown = run("fail_over", check=True, vm="nosuch", source_is_dead=True)
    assert "no replica of that VM here" in unknown["msg"]
    assert replicas.evacuation.arrived == []


def test_fail_over_says_what_stands_in_the_way(run: Any, replicas: Any) -> None:
    replicas.evacuation.outlooks[WEB]["findings"] = [NO_ROOM]
    would = run("fail_over", check=True, vm="web1")
    assert (would["failed"], would["cause"]) == (True, "preflight")
    assert "2.1 GiB of memory needed" in would["msg"]
    assert run("fail_over", vm="web1", source_is_dead=True)["failed"] is True


def test_info_tells_replicas_and_who_is_here(run: Any, replicas: Any) -> None:
    told = run("fail_over_info")
    assert {vm["name"]: vm["peer"] for vm in told["vms"]} == {"web1": "home1", KNOWN[DATABASE]: "home2"}
    assert told["memory_free_bytes"] > 0
    run("fail_over", vm="web1", source_is_dead=True)
    replicas.store.replicas[0]["state"] = "detached"
    [web] = run("fail_over_info", homes=["home1"])["vms"]
    assert (web["vm"], web["is_here"]) == (WEB, True)
    [web] = run("fail_over_info", homes=["home9"])["vms"]
    assert (web["vm"], web["is_here"]) == (WEB, True), "wherever it came from, it is here"
    # One that was here once, and has gone on.
    replicas.evacuation.arrived.append(Arrived("f9", "u9", "gone", "home1", 3))
    assert [vm["vm"] for vm in run("fail_over_info", homes=["home1"])["vms"]] == [WEB]


# -- the plan


def plan(asked: Any, homes: Any, *arguments: Any) -> Any:
    from ansible_collections.lifeboat.evacuation.plugins.filter.fail_over import fail_over_plan

    return fail_over_plan(asked, homes, *arguments)


def vm(name: str, peer: str = "home1", **told: Any) -> dict[str, Any]:
    return {
        "vm": f"u-{name}", "name": name, "peer": peer, "is_here": False, "epoch": 0, "generation": 7,
        "sealed_at": 1000.0, "age_seconds": 14.0, "memory_bytes": GIB, "priority": None,
        "home_answers": False, "findings": [], **told,
    }  # fmt: skip


def place(name: str, *vms: Any, free: float | None = 64 * GIB) -> dict[str, Any]:
    return {"item": name, "vms": list(vms), "memory_free_bytes": free}


SILENCE = {"unreachable": True, "msg": "Failed to connect to the host via ssh: Connection timed out"}


def home(tried: Any = SILENCE, **variables: Any) -> dict[str, Any]:
    return {"tried": tried, "variables": variables}


def started(told: Any) -> list[dict[str, list[str]]]:
    return [{at: [one["name"] for one in vms] for at, vms in wave.items()} for wave in told["waves"]]


def test_vms_go_by_priority_and_after_those_that_they_need() -> None:
    listed = [
        {"name": "web", "after": ["db"], "priority": 90},
        {"name": "db", "after": ["dns"]},
        {"name": "low", "priority": 1},
    ]
    asked = [place("backup1", vm("low"), vm("web"), vm("db"), vm("high", priority=100)), place("backup2")]
    told = plan(asked, {"home1": home(lifeboat_vms=listed)})
    assert told["findings"] == []
    # The priority of one that the inventory does not list is what its home was asked for.
    assert started(told) == [{"home1": ["high", "db", "web", "low"]}]
    assert told["waves"][0]["home1"][0]["place"] == "backup1"


def test_one_that_waits_for_another_home_is_of_a_later_wave() -> None:
    asked = [place("backup1", vm("web"), vm("cache")), place("backup2", vm("db", "home2"))]
    homes = {"home1": home(lifeboat_vms=[{"name": "web", "after": ["db"]}]), "home2": home()}
    told = plan(asked, homes)
    assert started(told) == [{"home2": ["db"], "home1": ["cache"]}, {"home1": ["web"]}]


def test_only_those_that_are_meant() -> None:
    asked = [place("backup1", vm("web"), vm("db"), vm("old"), vm("other", "home9"))]
    assert started(plan(asked, {"home1": home()}, ["u-web", "db"], ["db"])) == [{"home1": ["web"]}]
    told = plan(asked, {"home1": home()}, ["web", "nosuch", "other"])
    assert [line.split(":")[0] for line in told["findings"]] == ["VM nosuch", "VM other"]
    assert told["waves"] == []


@pytest.mark.parametrize(
    ("tried", "fact"),
    [
        ({"rc": 0}, "Ansible reaches it"),
        ({"failed": True, "msg": "non-zero return code"}, "Ansible reaches it"),
        ({"unreachable": True, "msg": "root@home1: Permission denied (publickey)."}, "its SSH answers"),
        ({"unreachable": True, "msg": "ssh: connect to host home1 port 22: Connection refused"}, "refused"),
        ({"failed": True, "timedout": {"period": 60}}, ""),
        ({"unreachable": True, "msg": "ssh: connect to host home1 port 22: No route to host"}, ""),
        ({"unreachable": True, "msg": "kex_exchange_identification: Connection closed by UNKNOWN"}, ""),
    ],
)
def test_a_home_that_answers_is_not_dead(tried: Any, fact: str) -> None:
    told = plan([place("backup1", vm("web"), vm("db", "home2"))], {"home1": home(tried), "home2": home()})
    if not fact:
        assert told["findings"] == []
        return
    [finding] = told["findings"]
    assert finding.startswith("home1: it is not dead: ")
    assert fact in finding
    assert told["waves"] == []


def test_a_home_whose_proxy_answers_is_not_dead() -> None:
    told = plan([place("backup1", vm("web", home_answers=True))], {"home1": home()})
    assert "home1: it is not dead: its proxy answers backup1; evacuate it" in told["findings"][0]
    # Nobody of it is to be started: then it may live.
    left = plan([place("backup1", vm("web", home_answers=True))], {"home1": home({})}, None, ["web"])
    assert (left["findings"], left["waves"]) == ([], [])


def test_every_finding_is_told_and_memory_is_added_up() -> None:
    undecided = {"subject": "VM db", "fact": "its arrival j1 is prepared here", "way_out": "settle it"}
    asked = [place("backup1", vm("web"), vm("db", findings=[undecided]), free=GIB)]
    told = plan(asked, {"home1": home()})
    assert told["findings"] == [
        "backup1: VM db: its arrival j1 is prepared here; settle it",
        "backup1: 2.0 GiB of memory needed for 2 VMs, 1.0 GiB free; end something there, or leave some out "
        "(fail_over_leave_behind)",
    ]
    assert plan([place("backup1", vm("web"), vm("db"), free=None)], {"home1": home()})["findings"] == []
    wrong = plan(asked, {"home1": home(lifeboat_vms=[{"name": "web", "priority": "high"}])})
    assert "VM web: priority 'high': is no number" in wrong["findings"][-1]
    others = {"home1": home(lifeboat_vms=[{"name": "web", "priority": "high"}])}
    assert started(plan([place("backup1", vm("web"), vm("mail"))], others, ["mail"])) == [{"home1": ["mail"]}]


def test_the_newest_replica_is_taken_and_none_where_the_vm_is_already() -> None:
    old, new = vm("web", sealed_at=900.0), vm("web", sealed_at=1000.0)
    told = plan([place("backup1", new), place("backup2", old)], {"home1": home()})
    assert told["waves"][0]["home1"][0]["place"] == "backup1"
    moved = plan(
        [place("backup1", old), place("backup2", vm("web", epoch=2, sealed_at=800.0))], {"home1": home()}
    )
    assert moved["waves"][0]["home1"][0]["place"] == "backup2"
    told = plan([place("backup1", vm("web", is_here=True)), place("backup2", old)], {"home1": home()})
    assert told["waves"] == []
    assert [(one["name"], one["verdict"]) for one in told["here"]] == [("web", "already-there")]


def test_a_replica_that_could_not_be_looked_at_may_be_the_newest() -> None:
    mute = {"subject": "VM web", "fact": "libvirt here does not say", "way_out": "ask again", "cause": "x"}
    unknown = {"vm": "u-web", "name": "web", "peer": "home1", "is_here": False, "findings": [mute]}
    told = plan([place("backup1", unknown), place("backup2", vm("web"))], {"home1": home()})
    assert told["findings"] == ["backup1: VM web: libvirt here does not say; ask again"]
    # Its record does not say its name: who asks for it by that means it all the same.
    damaged = {**unknown, "name": "u-web", "peer": None}
    told = plan([place("backup1", damaged), place("backup2", vm("web"))], {"home1": home()}, ["web"])
    assert len(told["findings"]) == 1
    assert not plan(
        [place("backup1", damaged), place("backup2", vm("web"))], {"home1": home()}, None, ["web"]
    )["findings"]


def test_no_old_replica_is_run_of_one_that_went_on_from_where_it_came() -> None:
    """home1 -> backup2 -> backup3: backup1 has a replica of its time at home1 with backup1 as its peer."""
    went_on = vm("web", "backup2", is_here=True, is_running=True, epoch=2)
    other = vm("other", "backup2", is_here=True, is_running=True)
    told = plan([place("backup1", vm("web")), place("backup3", went_on, other)], {"home1": home()})
    assert (told["waves"], told["findings"]) == ([], [])
    assert [(one["name"], one["home"], one["place"], one["verdict"]) for one in told["here"]] == [
        ("web", "home1", "backup3", "already-there")
    ]


def test_no_replica_is_run_of_one_that_runs_elsewhere_by_other_means() -> None:
    """Somebody moved it within the site, by hand, and that other host lives."""
    moved = place("home2") | {"running": [{"vm": "u-web", "name": "web"}]}
    told = plan([place("backup1", vm("web"), vm("db")), moved], {"home1": home()}, None, [], ["home2"])
    assert started(told) == [{"home1": ["db"]}]
    [outcome] = told["here"]
    assert (outcome["place"], outcome["verdict"], outcome["generation"]) == ("home2", "already-there", None)


def test_a_neighbour_may_be_silent_and_a_libvirt_that_says_nothing_is_told() -> None:
    silence = {"item": "home2", "unreachable": True, "msg": "timed out"}
    told = plan([place("backup1", vm("web")), silence], {"home1": home()}, None, [], ["home1", "home2"])
    assert (told["unreached"], started(told)) == ([], [{"home1": ["web"]}])
    mute = place("backup2") | {"running": None}
    told = plan([place("backup1", vm("web")), mute], {"home1": home(lifeboat_peer="backup1")})
    assert told["unreached"] == ["backup2: its libvirt does not say which VMs run there"]
    assert started(told) == [{"home1": ["web"]}]
    either = {"home1": home(lifeboat_peers=["backup1", "backup2"])}
    assert "may be an old one: backup2" in plan([place("backup1", vm("web")), mute], either)["findings"][0]


def test_one_that_is_there_and_off_does_not_run() -> None:
    off = vm("web", is_here=True, is_running=False)
    [outcome] = plan([place("backup1", off)], {"home1": home()})["here"]
    assert outcome["verdict"] == "failed"
    assert "it has come to backup1 and is off there; start it there" in outcome["sentence"]
    [outcome] = plan([place("backup1", off)], {"home1": home()}, None, ["web"])["here"]
    assert outcome["verdict"] == "already-there"


def test_hosts_may_be_named_by_their_addresses() -> None:
    gone = {"item": "2001:db8:2::b", "unreachable": True, "msg": "timed out"}
    told = plan([gone, place("2001:db8:2::c", vm("web"))], {"home1": home(lifeboat_peer="2001:db8:2::b")})
    assert "may be an old one: 2001:db8:2::b, where" in told["findings"][0]


def test_whoever_is_left_behind_must_be_somebody() -> None:
    """A name that was misspelt, or that is a number in YAML, would be started against the operator's word."""
    asked = [place("backup1", vm("web"), vm("101"))]
    told = plan(asked, {"home1": home(lifeboat_vms=[{"name": "shelved"}])}, None, [101, "wbe", "shelved"])
    assert [line.partition(": it is")[0] for line in told["findings"]] == ["VM wbe"]
    assert started(plan(asked, {"home1": home()}, [101])) == [{"home1": ["101"]}]
    silent = [*asked, {"item": "backup2", "unreachable": True, "msg": "timed out"}]
    assert started(plan(silent, {"home1": home(lifeboat_peer="backup1")}, None, [101, "wbe"])) == [
        {"home1": ["web"]}
    ]


def test_an_old_replica_is_not_run_while_the_newer_ones_place_is_silent() -> None:
    asked = [{"item": "backup1", "unreachable": True, "msg": "timed out"}, place("backup2", vm("web"))]
    told = plan(asked, {"home1": home(lifeboat_peer="backup1")})
    assert "its replica at backup2 may be an old one: backup1, where it is or may be" in told["findings"][0]
    assert "may be an old one: backup1, where" in plan(asked, {"home1": home()})["findings"][0]
    either = home(lifeboat_peers=["backup1", "backup2"])
    assert len(plan(asked, {"home1": either})["findings"]) == 1
    either["variables"]["lifeboat_vms"] = [{"name": "web", "peer": "backup2"}]
    assert plan(asked, {"home1": either})["findings"] == []
    told = plan(asked, {"home1": home(lifeboat_peer="backup2")})
    assert told["findings"] == []
    assert told["unreached"] == ["backup1: timed out"]
    named = plan(asked, {"home1": home(lifeboat_peer="backup2")}, ["web", "db"])
    assert [(one["name"], one["verdict"]) for one in named["here"]] == [("db", "failed")]
    assert "backup1 did not" in named["here"][0]["sentence"]


def test_one_that_is_listed_and_has_no_replica_is_told() -> None:
    listed = [{"name": "web"}, {"name": "lost"}]
    told = plan([place("backup1", vm("web"))], {"home1": home(lifeboat_vms=listed)})
    assert started(told) == [{"home1": ["web"]}]
    assert [(one["name"], one["home"], one["verdict"]) for one in told["here"]] == [
        ("lost", "home1", "failed")
    ]
    assert not plan([place("backup1", vm("web"))], {"home1": home(lifeboat_vms=listed)}, None, ["lost"])[
        "here"
    ]


def test_what_became_of_them() -> None:
    from ansible_collections.lifeboat.evacuation.plugins.filter.fail_over import fail_over_outcomes

    asked = [place("backup1", vm("web"), vm("db"), vm("dns", is_here=True), vm("mail"))]
    made = plan(asked, {"home1": home()})
    web, db, mail = sorted(made["waves"][0]["home1"], key=lambda one: "wdm".index(one["name"][0]))
    told = fail_over_outcomes(made, [
        {"item": web, "changed": True, "fail_over": {"state": "here", "generation": 8, "age_seconds": 250.0}},
        {"item": db, "failed": True, "msg": "VM db cannot arrive here"},
        {"item": mail, "changed": True, "fail_over": {"state": "would-start", "generation": 7}},
    ])  # fmt: skip
    assert {one["name"]: one["verdict"] for one in told["vms"]} == {
        "dns": "already-there", "web": "restarted-from-replica", "db": "failed", "mail": "would-start",
    }  # fmt: skip
    assert told["bad"] == ["db"]
    rows = {line.split()[0]: line.split() for line in told["table"] if line}
    assert rows["web"] == ["web", "home1", "backup1", "restarted-from-replica", "8", "4", "min"]
    assert told["table"][-1] == "db: VM db cannot arrive here"
