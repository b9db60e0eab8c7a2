# SPDX-License-Identifier: GPL-3.0-or-later
"""The control API over its real socket."""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from precache_proxy.control.client import Client, ProxyDown, segment
from precache_proxy.errors import Conflict, InvalidInput, LifeboatError, NotFound
from precache_proxy.evacuation.guard import TOMBSTONE, Forbidden
from precache_proxy.hypervisor.domain_xml import parse_definition
from small_parts.parts import DATABASE, KNOWN, WEB

LONG_NAME = KNOWN[DATABASE]


def protect(client: Client, vm: str = "web1", **body: Any) -> Any:
    return client.request("PUT", f"/v1/vms/{segment(vm)}", {"peer": "backup1", **body})


def test_socket_is_not_open_to_others(served: Any) -> None:
    assert stat.S_IMODE(served.socket.stat().st_mode) == 0o660


def test_socket_goes_when_the_server_ends(served: Any) -> None:
    assert served.socket.exists()
    # The fixture's end is covered by test_daemon; here: a second server replaces a leftover socket.
    leftover = served.socket.with_name("other.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(leftover))
    with pytest.raises(ProxyDown, match="does not answer"):
        Client(leftover).request("GET", "/v1/status")


def test_vm_is_protected_changed_and_unprotected(served: Any) -> None:
    told = protect(served.client, rpo_seconds="30s", priority=70)
    assert (told["uuid"], told["peer"], told["rpo_seconds"], told["priority"]) == (WEB, "backup1", 30.0, 70)
    assert told["rpo_kept"] is True
    again = served.client.request("PUT", f"/v1/vms/{WEB}", {"priority": 10})
    assert (again["rpo_seconds"], again["priority"]) == (30.0, 10), "what is not named stays as it was"
    assert [vm["priority"] for vm in served.client.request("GET", "/v1/vms")["vms"]] == [10]
    gone = served.client.request("DELETE", "/v1/vms/web1?keep_replica=false")
    assert gone == {"uuid": WEB, "name": "web1", "state": "unprotected", "replica_kept": False}
    assert served.client.request("GET", "/v1/vms")["vms"] == []


def test_names_with_spaces_and_letters_beyond_ascii(served: Any) -> None:
    protect(served.client, LONG_NAME)
    assert served.client.request("GET", f"/v1/vms/{segment(LONG_NAME)}")["uuid"] == DATABASE
    assert served.client.request("POST", f"/v1/vms/{segment(LONG_NAME)}/pass")["generation"] == 8


def test_replica_is_kept_unless_told_otherwise(served: Any) -> None:
    protect(served.client)
    served.client.request("DELETE", "/v1/vms/web1")
    assert served.parts.source.changes[-1] == "unprotect web1 keep_replica=True"


def test_check_only_changes_nothing(served: Any) -> None:
    told = served.client.request("PUT", "/v1/vms/web1?check_only=true", {"peer": "backup1"})
    assert (told["present"], told["notes"]) == (None, [])
    assert (told["wanted"]["peer"], told["wanted"]["rpo_seconds"]) == ("backup1", 15.0)
    with pytest.raises(NotFound, match="libvirt knows none such"):
        served.client.request("PUT", "/v1/vms/nosuch?check_only=true", {"peer": "backup1"})
    assert served.parts.source.changes == []


@pytest.mark.parametrize(
    ("body", "error", "words"),
    [
        ({"peer": "home1"}, InvalidInput, "is this proxy itself"),
        ({"peer": "nowhere"}, NotFound, "it has: backup1, backup2"),
        ({}, InvalidInput, "no peer was named; name one of: backup1, backup2"),
        ({"peer": "backup1", "rpo_seconds": 0}, InvalidInput, "give 1.0 s to"),
        ({"peer": "backup1", "rpo": 5, "priority": 500}, InvalidInput, "did you mean"),
        ({"peer": "backup1", "disks": []}, InvalidInput, "write a list of texts"),
    ],
)
def test_bad_protection_is_told_and_changes_nothing(
    served: Any, body: dict[str, Any], error: type[LifeboatError], words: str
) -> None:
    with pytest.raises(error, match="nothing was changed") as caught:
        served.client.request("PUT", "/v1/vms/web1", body)
    assert words in caught.value.message
    assert served.parts.source.changes == []


def test_all_faults_of_a_request_are_told_at_once(served: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        served.client.request(
            "PUT", "/v1/vms/web1", {"rpo": 5, "priority": 500, "raw_overlay_consent": "yes"}
        )
    assert [finding.subject for finding in caught.value.findings] == [
        "request: priority",
        "request: raw_overlay_consent",
        "VM web1",
        "request: rpo",
    ]


def test_vm_already_protected_to_another_peer(served: Any) -> None:
    protect(served.client)
    with pytest.raises(Conflict, match="protected at backup1 already"):
        protect(served.client, peer="backup2")


def test_running_vms_that_nobody_protects_are_told(served: Any) -> None:
    protect(served.client)
    served.parts.hypervisor.domains = [(WEB, "web1", True), ("u2", "off", False), ("u3", "stray", True)]
    told = served.client.request("GET", "/v1/vms")
    assert told["unprotected"] == [{"name": "stray", "uuid": "u3"}]


def test_what_a_hypervisor_has_and_has_room_for(served: Any, tmp_path: Path) -> None:
    protect(served.client)
    image = tmp_path / "web1.qcow2"
    image.write_bytes(b"x" * 65536)
    served.parts.hypervisor.domains = [(WEB, "web1", True), ("u2", "off", False)]
    xml = f"""<domain type='qemu'><name>web1</name><uuid>{WEB}</uuid><memory unit='MiB'>256</memory><devices>
      <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{image}'/>
      <target dev='vda' bus='virtio'/></disk></devices></domain>"""
    served.parts.hypervisor.definitions = {WEB: parse_definition(xml)}
    told = served.client.request("GET", "/v1/hypervisor")
    off, web = told["domains"]
    assert off == {"uuid": "u2", "name": "off", "running": False, "peer": None, "coverage": None,
                   "memory_bytes": None, "disk_bytes": None}  # fmt: skip
    assert (web["peer"], web["coverage"], web["memory_bytes"]) == ("backup1", 1.0, 256 << 20)
    assert 65536 <= web["disk_bytes"] <= 2 * 65536
    assert 0 < told["memory_free_bytes"] < told["memory_total_bytes"]
    assert told["store"]["free_bytes"] > 0
    assert told["store"]["minimum_free_bytes"] > 0
    assert told["peers"] == [{"name": "backup1", "state": "up"}, {"name": "backup2", "state": "up"}]
    assert told["moved_away"] == []
    served.parts.evacuation.tombstones = [
        Forbidden(WEB, TOMBSTONE, "It runs there.", "job1", 1, name="web1", peer="backup1")
    ]
    assert served.client.request("GET", "/v1/hypervisor")["moved_away"] == [
        {"uuid": WEB, "name": "web1", "peer": "backup1", "sentence": "It runs there."}
    ]


def test_passes_are_postponed_for_a_time(served: Any) -> None:
    protect(served.client)
    assert served.client.request("POST", "/v1/vms/web1/postpone", {"for_seconds": 30})["uuid"] == WEB
    served.client.request("POST", "/v1/vms/web1/postpone", {"for_seconds": 0})
    assert served.parts.source.postponed == [("web1", 30.0), ("web1", 0.0)]
    for body, told in (
        ({}, "for_seconds is missing"),
        ({"for_seconds": 3600}, "give 0"),
        ({"for": 1}, "for"),
    ):
        with pytest.raises(InvalidInput, match=told):
            served.client.request("POST", "/v1/vms/web1/postpone", body)
    with pytest.raises(NotFound):
        served.client.request("POST", "/v1/vms/nosuch/postpone", {"for_seconds": 30})


def test_unknown_vm_names_those_that_there_are(served: Any) -> None:
    protect(served.client)
    with pytest.raises(NotFound, match="protected here: web1"):
        served.client.request("GET", "/v1/vms/nosuch")


def test_job_is_begun_once_and_waited_for(served: Any) -> None:
    protect(served.client)
    job = served.client.request("POST", "/v1/evacuations", {"vm": "web1"})
    assert job["verdict"] is None
    assert served.client.request("POST", "/v1/evacuations", {"vm": WEB})["id"] == job["id"]
    moved = served.client.request("GET", f"/v1/evacuations/{job['id']}?wait_seconds=5&step={job['step']}")
    assert moved["step"] != job["step"]
    ended = served.client.request("GET", f"/v1/evacuations/{job['id']}?wait_seconds=10")
    assert (ended["verdict"], ended["eviction_seconds"]) == ("evacuated", 4.5)
    assert served.parts.evacuation.begun == ["web1"]
    listed = served.client.request("GET", "/v1/evacuations?vm=web1")["evacuations"]
    assert [told["id"] for told in listed] == [job["id"]]


def test_how_a_vm_is_to_leave_is_read_with_every_fault_told(served: Any) -> None:
    protect(served.client)
    wrong = {"vm": "web1", "mode": "sideways", "shutdown_seconds": 4000, "power_off": "perhaps"}
    with pytest.raises(InvalidInput, match="write one of live, restart") as refused:
        served.client.request("POST", "/v1/evacuations", wrong)
    assert len(refused.value.findings) == 3
    asked = {"vm": "web1", "mode": "restart", "shutdown_seconds": "2m", "power_off": False}
    served.client.request("POST", "/v1/evacuations/check", {"vm": "web1", "mode": "restart"})
    assert served.parts.evacuation.checked == [("web1", True)]
    served.client.request("POST", "/v1/evacuations", asked)
    [options] = served.parts.evacuation.options
    assert (options.mode, options.shutdown_seconds, options.power_off) == ("restart", 120.0, False)


def test_wait_is_bounded(served: Any) -> None:
    with pytest.raises(InvalidInput, match="give 0 to 300"):
        served.client.request("GET", "/v1/evacuations/x?wait_seconds=9999")


def test_shares_are_lent_and_guests_paused(served: Any) -> None:
    protect(served.client)
    job = served.client.request("POST", "/v1/evacuations", {"vm": "web1"})["id"]
    steer = f"/v1/evacuations/{job}/steer"
    served.client.request("POST", steer, {"share_bytes_per_second": "8Mbit/s", "for_seconds": 10})
    served.client.request("POST", steer, {"share_bytes_per_second": None, "for_seconds": 10})
    served.client.request("POST", steer, {"pause_guest": True})
    assert served.parts.evacuation.shares == [(job, 1e6, 10.0), (job, None, 10.0)]
    assert served.parts.evacuation.paused == [job]
    with pytest.raises(LifeboatError, match="is missing"):
        served.client.request("POST", steer, {"pause_guest": False})


def test_job_is_steered_cancelled_and_settled(served: Any) -> None:
    served.parts.evacuation.step_seconds = 30
    protect(served.client)
    job = served.client.request("POST", "/v1/evacuations", {"vm": "web1"})["id"]
    served.client.request("POST", f"/v1/evacuations/{job}/steer", {"bandwidth_bytes_per_second": "80Mbit/s"})
    assert served.parts.evacuation.rate == 10_000_000
    assert served.client.request("POST", f"/v1/evacuations/{job}/cancel")["verdict"] == "stayed"
    with pytest.raises(Conflict, match="nothing to cancel"):
        served.client.request("POST", f"/v1/evacuations/{job}/cancel")
    with pytest.raises(InvalidInput, match="source-dead, keep-at-source"):
        served.client.request("POST", f"/v1/evacuations/{job}/settle", {"decision": "maybe"})
    settled = served.client.request("POST", f"/v1/evacuations/{job}/settle", {"decision": "keep-at-source"})
    assert settled["sentence"] == "settled: keep-at-source"


def test_links_are_told_and_throttled(served: Any) -> None:
    told = served.client.request("PATCH", "/v1/links/backup1", {"rate_bytes_per_second": "8Mbit/s"})
    assert told["rate_bytes_per_second"] == 1_000_000
    lifted = served.client.request("PATCH", "/v1/links/backup1", {"rate_bytes_per_second": None})
    assert lifted["rate_bytes_per_second"] is None
    with pytest.raises(InvalidInput, match="nothing could be sent"):
        served.client.request("PATCH", "/v1/links/backup1", {"rate_bytes_per_second": 0})
    with pytest.raises(NotFound, match="has no such peer"):
        served.client.request("PATCH", "/v1/links/nosuch", {"rate_bytes_per_second": 1})
    listed = served.client.request("GET", "/v1/links")
    assert [link["peer"] for link in listed["links"]] == ["backup1", "backup2"]
    assert listed["processor_wait"] is None or listed["processor_wait"].keys() == {
        "total_seconds",
        "recent_share",
    }


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v2/status", None, 404),
        ("POST", "/v1/status", None, 405),
        ("PUT", "/v1/vms/web1", b"{", 400),
        ("PUT", "/v1/vms/web1", b"[1]", 400),
        ("PUT", "/v1/vms/web1", b"\xff\xfe", 400),
        ("PUT", "/v1/vms/web1", b" " * (2 << 20), 413),
    ],
)
def test_every_refusal_is_json_with_a_cause(
    served: Any, method: str, path: str, body: bytes | None, status: int
) -> None:
    connection = http.client.HTTPConnection("localhost", timeout=10)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(served.socket))
    connection.request(method, path, body)
    response = connection.getresponse()
    told = json.loads(response.read())
    connection.close()
    assert response.status == status
    assert set(told) == {"cause", "message", "findings"}
    assert told["cause"]
    assert "Traceback" not in told["message"]


def test_a_fault_inside_is_one_sentence(served: Any) -> None:
    served.parts.source.statuses = None
    with pytest.raises(LifeboatError, match="failed inside the proxy; see journalctl"):
        served.client.request("GET", "/v1/vms")


def test_status_has_every_part(served: Any) -> None:
    protect(served.client)
    told = served.client.request("GET", "/v1/status")
    assert (told["name"], told["site"], told["state"]) == ("home1", "home", "running")
    assert told["certificate"]["seconds_left"] is None, "there is no certificate in this test"
    assert "cannot be read" in told["certificate"]["sentence"]
    assert told["store"]["free_bytes"] > 0
    assert [vm["name"] for vm in told["vms"]] == ["web1"]
    assert told["scratch"]["files"] == 0
    assert os.path.isabs(told["scratch"]["directory"])
