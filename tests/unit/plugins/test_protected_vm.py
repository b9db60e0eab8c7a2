# SPDX-License-Identifier: GPL-3.0-or-later
"""protected_vm and its twin: check, real, repeat, repeat-check; and that nothing bad changes anything."""

from __future__ import annotations

from typing import Any

import pytest

from small_parts.parts import DATABASE, KNOWN, WEB


def test_protect_four_times(run: Any, parts: Any) -> None:
    asked = {"vm": "web1", "peer": "backup1", "rpo": "30s", "priority": 60, "disks": ["vda"]}
    would = run("protected_vm", check=True, **asked)
    assert (would["changed"], parts.source.changes) == (True, [])
    assert would["diff"]["before"] == {"state": "unprotected"}
    done = run("protected_vm", **asked)
    assert (done["changed"], done["vm"]["uuid"], done["vm"]["rpo_seconds"]) == (True, WEB, 30.0)
    assert done["diff"] == would["diff"], "what check mode foretold is what was done"
    again = run("protected_vm", **asked)
    assert (again["changed"], again["vm"]["uuid"]) == (False, WEB)
    assert run("protected_vm", check=True, **asked)["changed"] is False
    assert parts.source.changes == ["protect web1"]


def test_only_what_is_named_changes(run: Any, parts: Any) -> None:
    run("protected_vm", vm="web1", peer="backup1", rpo="30s", disks=["vda"], raw_overlay_consent=True)
    changed = run("protected_vm", vm="web1", priority=90)
    assert changed["diff"]["before"]["priority"] == 50
    assert changed["diff"]["after"] == {**changed["diff"]["before"], "priority": 90}
    assert parts.source.protected[WEB].rpo_seconds == 30.0
    assert run("protected_vm", vm=WEB, rpo=30)["changed"] is False, "a UUID and a bare number mean the same"


def test_unprotect_four_times(run: Any, parts: Any) -> None:
    name = KNOWN[DATABASE]
    run("protected_vm", vm=name, peer="backup2")
    asked = {"vm": name, "state": "unprotected", "keep_replica": False}
    assert run("protected_vm", check=True, **asked)["changed"] is True
    assert DATABASE in parts.source.protected
    done = run("protected_vm", **asked)
    assert (done["changed"], done["vm"]["state"], done["vm"]["replica_kept"]) == (True, "unprotected", False)
    assert run("protected_vm", **asked)["changed"] is False
    assert run("protected_vm", check=True, **asked)["changed"] is False
    assert parts.source.changes[1:] == [f"unprotect {name} keep_replica=False"]


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("asked", "cause", "words"),
    [
        ({"vm": "nosuch", "peer": "backup1"}, "not-found", "libvirt knows none such"),
        ({"vm": "web1", "peer": "nowhere"}, "not-found", "has no such peer"),
        ({"vm": "web1", "peer": "home1"}, "invalid", "is this proxy itself"),
        ({"vm": "web1", "peer": "backup1", "rpo": "0"}, "invalid", "give 1.0 s to"),
        ({"vm": "web1", "peer": "backup1", "rpo": "soon"}, "invalid", "not an amount"),
        ({"vm": "web1"}, "invalid", "no peer was named"),
    ],
)
def test_refusals_are_the_same_in_check_mode(
    run: Any, parts: Any, asked: dict[str, Any], cause: str, words: str, check: bool
) -> None:
    told = run("protected_vm", check=check, **asked)
    assert (told["failed"], told["cause"]) == (True, cause)
    assert words in told["msg"]
    assert parts.source.changes == []


def test_second_peer_is_refused(run: Any) -> None:
    run("protected_vm", vm="web1", peer="backup1")
    told = run("protected_vm", vm="web1", peer="backup2")
    assert told["cause"] == "conflict"
    assert "protected at backup1 already, and one peer holds its replica" in told["msg"]


def test_what_could_not_be_found_out_is_a_warning(run: Any, parts: Any) -> None:
    parts.source.notes = ["peer backup1 could not be asked whether it takes the replica: no answer"]
    for check in (True, False):
        told = run("protected_vm", check=check, vm="web1", peer="backup1")
        assert (told["failed"], told["changed"]) == (False, True)
        assert parts.source.notes[0] in str(told["warnings"])


def test_info_tells_all_or_one(run: Any) -> None:
    assert run("protected_vm_info")["vms"] == []
    run("protected_vm", vm="web1", peer="backup1")
    run("protected_vm", vm=DATABASE, peer="backup2")
    assert [vm["name"] for vm in run("protected_vm_info")["vms"]] == [KNOWN[DATABASE], "web1"]
    assert [vm["uuid"] for vm in run("protected_vm_info", vm="web1")["vms"]] == [WEB]
    assert run("protected_vm_info", vm="nosuch")["cause"] == "not-found"


def test_info_waits_until_it_is_good_or_says_what_is_not(run: Any) -> None:
    run("protected_vm", vm="web1", peer="backup1")
    good = run("protected_vm_info", wait=True, wait_timeout=5, lag_bytes=65536, lag_seconds=5, coverage=1.0)
    assert good["failed"] is False
    late = run("protected_vm_info", wait=True, wait_timeout=0, lag_bytes=1000)
    assert (late["failed"], late["cause"]) == (True, "timeout")
    assert "web1: protected, 100% covered, lag 65536 bytes" in late["msg"]


def test_no_proxy_is_one_sentence(run: Any, tmp_path: Any) -> None:
    told = run("protected_vm_info", socket=str(tmp_path / "none.sock"))
    assert told["cause"] == "proxy-down"
    assert "the precache proxy does not answer" in told["msg"]
