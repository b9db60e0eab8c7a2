# SPDX-License-Identifier: GPL-3.0-or-later
"""What the command line prints and ends with, against a served control API."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from precache_proxy.__main__ import main
from precache_proxy.control import tables
from precache_proxy.evacuation.arrival import Arrival
from small_parts.parts import DATABASE, KNOWN, WEB

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def command(served: Any, capsys: pytest.CaptureFixture[str]) -> Any:
    def execute(name: str, *arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([name, "--socket", str(served.socket), *arguments])
        told = capsys.readouterr()
        return code, told.out, told.err

    return execute


@pytest.fixture
def protected(served: Any) -> None:
    for vm, peer in (("web1", "backup1"), (DATABASE, "backup2")):
        served.client.request("PUT", f"/v1/vms/{vm}", {"peer": peer})


@pytest.mark.usefixtures("protected")
def test_status_fits_80_columns(served: Any, command: Any) -> None:
    served.parts.source.spoil(WEB, lag_seconds=5000.0, state="unreachable", sentence="no link " * 20)
    served.client.request("POST", "/v1/evacuations", {"vm": "web1"})
    code, out, _ = command("status")
    assert code == 0
    assert all(tables.cells(line) <= 80 for line in out.splitlines()), out
    row = next(line for line in out.splitlines() if line.startswith("web1"))
    assert "unreachable" in row
    assert row.split("  ")[-1].strip() == "15.0 s"
    assert "1 h 23 min !" in row, "a lag over the RPO is marked"
    assert "no link" in out


@pytest.mark.usefixtures("protected")
def test_status_of_one_vm_and_as_json(command: Any) -> None:
    code, out, _ = command("status", "--json", KNOWN[DATABASE])
    assert (code, json.loads(out)["uuid"]) == (0, DATABASE)
    whole = json.loads(command("status", "--json")[1])
    assert {"name", "links", "vms", "replicas", "evacuations", "arrivals", "store", "scratch"} <= set(whole)


def test_coverage_is_never_rounded_up_to_all() -> None:
    vm = {"name": "a", "peer": "b", "state": "seeding", "coverage": 0.99999, "rpo_seconds": 15.0}
    assert "99.9 %" in tables.vms([vm], 80)[1]


def test_wide_letters_keep_columns_straight() -> None:
    lines = tables.table(("VM", "X"), [("東京", "1"), ("e\u0301", "2"), ("abcd", "3")], 80)
    assert [tables.cells(line) for line in lines] == [7, 7, 7, 7]


def test_unknown_vm_is_one_sentence_and_a_code(command: Any) -> None:
    code, out, err = command("status", "nosuch")
    assert (code, out) == (3, "")
    assert err == "precache-proxy: VM 'nosuch': not protected on home1; protected here: none\n"


@pytest.mark.usefixtures("protected")
def test_verify_tells_equal_or_not(served: Any, command: Any) -> None:
    code, out, _ = command("verify", "web1")
    assert (code, out.splitlines()[0]) == (0, "web1: replica equals the source at generation 7")
    assert "compared bytes: 1.0 GiB" in out
    served.parts.source.equal = False
    code, out, _ = command("verify", "web1")
    assert code == 1
    assert "REPLICA DIFFERS" in out


@pytest.mark.usefixtures("protected")
def test_settle_tells_what_holds_now(served: Any, command: Any) -> None:
    served.parts.evacuation.step_seconds = 30
    job = served.client.request("POST", "/v1/evacuations", {"vm": "web1"})["id"]
    served.parts.evacuation.undecide(job)
    code, out, _ = command("settle", job, "keep-at-source")
    assert (code, out) == (0, "web1: stayed: settled: keep-at-source\n")


def test_settle_tells_where_an_arrival_stands(served: Any, command: Any) -> None:
    served.parts.evacuation.arrived = [Arrival("j2", "u2", "web2", "home2", 1, 7)]
    assert command("settle", "web2", "source-dead")[:2] == (0, "web2: activated: settled\n")


def test_no_proxy_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["status", "--socket", str(tmp_path / "none.sock")])
    assert code == 14
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "the precache proxy does not answer (No such file or directory)" in err


def test_check_without_a_proxy_is_critical(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["check", "--nagios", "--socket", str(tmp_path / "none.sock")])
    assert code == 2
    assert capsys.readouterr().out.startswith("LIFEBOAT CRITICAL - ")


def test_connect_carries_http_both_ways(served: Any) -> None:
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-m", "precache_proxy", "connect", "--socket", str(served.socket)],
        stdin=theirs.fileno(),
        stdout=theirs.fileno(),
        env={**os.environ, "PYTHONPATH": str(ROOT / "roles/precache_proxy/files")},
    )
    theirs.close()
    connection = http.client.HTTPConnection("localhost", timeout=20)
    connection.sock = ours
    for _turn in range(2):
        connection.request("GET", "/v1/links")
        told = json.loads(connection.getresponse().read())
        assert [link["peer"] for link in told["links"]] == ["backup1", "backup2"]
    connection.close()
    assert process.wait(20) == 0


def test_connect_without_a_proxy_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["connect", "--socket", str(tmp_path / "none.sock")]) == 14
    assert "does not answer" in capsys.readouterr().err


def test_configuration_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "precache_proxy.toml"
    path.write_text('name = "home1"\nsite = "home"\nnmae = 3\n')
    assert main(["run", "--check-config", "--config", str(path)]) == 2
    assert "nmae: no such setting; did you mean name?" in capsys.readouterr().err
    path.write_text('name = "home1"\nsite = "home"\n')
    assert main(["run", "--check-config", "--config", str(path)]) == 0
