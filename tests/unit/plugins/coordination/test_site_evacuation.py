# SPDX-License-Identifier: GPL-3.0-or-later
"""The action plugin and the rehearsal, run by ansible-playbook over a bridge on this machine."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from precache_proxy.control.parts import Parts
from small_parts.parts import serving, small_parts
from unit.plugins.coordination.conftest import ROOT


class Stage:
    """One hypervisor, reached locally, with VM web1 protected."""

    def __init__(self, directory: Path, parts: Parts, socket: Path) -> None:
        self.directory = directory
        self.parts = parts
        self.socket = socket
        command = directory / "bin" / "precache-proxy"
        command.parent.mkdir()
        package = ROOT / "roles" / "precache_proxy" / "files"
        command.write_text(
            f'#!/bin/sh\nPYTHONPATH="{package}" exec "{ROOT}/.venv/bin/python" -m precache_proxy "$@"\n'
        )
        command.chmod(0o755)
        self.variables: dict[str, Any] = {"ansible_connection": "local", "lifeboat_peer": "backup1"}
        self.others: dict[str, dict[str, Any]] = {}

    def play(
        self, playbook: str | list[dict[str, Any]], **variables: Any
    ) -> subprocess.CompletedProcess[str]:
        inventory = self.directory / "inventory.yml"
        groups = {"home": {"hosts": {"home1": self.variables}}, "other": {"hosts": self.others}}
        inventory.write_text(yaml.safe_dump({"all": {"children": groups}}))
        if isinstance(playbook, list):
            path = self.directory / "play.yml"
            path.write_text(yaml.safe_dump(playbook))
            playbook = str(path)
        binaries = f"{self.directory}/bin:{ROOT}/.venv/bin"
        return subprocess.run(
            ["ansible-playbook", "-i", str(inventory), "-e", json.dumps(variables), playbook],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=self.directory,
            env={
                **os.environ,
                "PATH": f"{binaries}:{os.environ['PATH']}",
                "ANSIBLE_COLLECTIONS_PATH": str(ROOT / "build" / "checkout"),
                "ANSIBLE_HOME": str(self.directory / "ansible"),
                "ANSIBLE_NOCOLOR": "1",
                "ANSIBLE_LOCALHOST_WARNING": "false",
            },
        )

    def evacuate(self, **options: Any) -> subprocess.CompletedProcess[str]:
        arguments = {"site": "home", "socket": str(self.socket), **options}
        if arguments["socket"] is None:
            # Of each host its own.
            del arguments["socket"]
            self.variables["evacuation_socket"] = str(self.socket)
        task = {"lifeboat.evacuation.site_evacuation": arguments, "run_once": True}
        return self.play([{"hosts": "home", "gather_facts": False, "tasks": [task]}])


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    (tmp_path / "proxy").mkdir()
    parts = small_parts(tmp_path / "proxy")
    with serving(parts) as socket:
        yield Stage(tmp_path, parts, socket)


def protect(stage: Stage) -> None:
    from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import ProxyClient

    ProxyClient(str(stage.socket)).request("PUT", "/v1/vms/web1", {"peer": "backup1"})


def test_it_evacuates_tells_and_reports(stage: Stage) -> None:
    protect(stage)
    done = stage.evacuate(
        deadline="10m", report=str(stage.directory / "r.json"), page=str(stage.directory / "r.html")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "deadline 10m: 600 s (10 min) from now, at " in done.stdout
    assert "web1: starts, to backup1" in done.stdout
    assert "web1: EVACUATED" in done.stdout
    report = json.loads((stage.directory / "r.json").read_text())
    assert report["totals"] == {"vms": 1, "out": 1, "all_out": True, "verdicts": {"evacuated": 1}}
    assert report["coordination"]["deadline"] == "10m"
    assert "1 of 1" in (stage.directory / "r.html").read_text()
    # As YAML gives it where 14:30 is not in quotes.
    again = stage.evacuate(deadline=870)
    assert again.returncode == 0
    assert "if 14:30 was meant, put it in quotes: YAML makes 870 of it" in again.stdout
    assert "changed=0" in again.stdout
    assert stage.parts.evacuation.begun == ["web1"]


def test_everything_that_is_wrong_is_told_at_once_and_nothing_started(stage: Stage) -> None:
    protect(stage)
    stage.variables |= {
        "ansible_ssh_common_args": "-o ProxyCommand=nc",
        "lifeboat_vms": [{"name": "web1", "priority": "high"}],
    }
    done = stage.evacuate(deadline="yesterday", strategy="luck", uplink="fast")
    assert done.returncode != 0
    for part in (
        "'yesterday': is not understood",
        "'luck'",
        "'fast': is no rate",
        "priority 'high'",
        "proxycommand",
    ):
        assert part in done.stdout.replace("\\'", "'"), part
    # What the proxies know is told with the rest, where they can be asked.
    stage.variables["ansible_ssh_common_args"] = ""
    done = stage.evacuate(strategy="luck", vms=["web1", "nosuch"])
    assert done.returncode != 0
    for part in ("'luck'", "priority 'high'", "nosuch: neither protected on nor evacuated from"):
        assert part in done.stdout.replace("\\'", "'"), part
    two = stage.evacuate(site="home,other")
    assert "names more than one site" in two.stdout
    assert stage.parts.evacuation.begun == []


def test_check_mode_and_rehearsal_change_nothing(stage: Stage) -> None:
    protect(stage)
    options = {"site": "home", "socket": str(stage.socket), "uplink": "50Mbit/s", "state": "forecast"}
    task = {"lifeboat.evacuation.site_evacuation": options, "run_once": True}
    done = stage.play([{"hosts": "home", "gather_facts": False, "tasks": [task]}])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 VMs would be out" in done.stdout
    assert "the link carries 50.0 Mbit/s" in done.stdout
    assert stage.parts.evacuation.begun == []


@pytest.mark.parametrize("peers", [{"lifeboat_peers": ["backup1"]}, {}], ids=["named", "only-by-the-source"])
@pytest.mark.parametrize("state", ["evacuated", "forecast"])
def test_the_peers_that_protect_places_by_are_asked(
    stage: Stage, tmp_path: Path, peers: dict[str, Any], state: str
) -> None:
    """Nobody says lifeboat_peer: the destination's answer is seen by what it is refused for."""
    protect(stage)
    (tmp_path / "peer").mkdir()
    parts = small_parts(tmp_path / "peer")
    parts.config = replace(parts.config, site="home")
    with serving(parts) as socket:
        stage.variables = {"ansible_connection": "local", **peers}
        stage.others["backup1"] = {"ansible_connection": "local", "evacuation_socket": str(socket)}
        told = stage.evacuate(state=state, socket=None, uplink="50Mbit/s")
    assert told.returncode != 0
    assert "destination backup1: stands at home, the site to be emptied" in " ".join(told.stdout.split())
    assert stage.parts.evacuation.begun == []


def test_a_hosts_variables_say_how_its_vms_may_leave(stage: Stage) -> None:
    protect(stage)
    stage.variables |= {"evacuate_fallback": "restart, stay", "evacuate_power_off": False}
    done = stage.evacuate()
    assert done.returncode == 0, done.stdout + done.stderr
    [options] = stage.parts.evacuation.options
    assert (options.mode, options.power_off) == ("restart", False)
    stage.variables |= {"evacuate_fallback": "teleport", "evacuate_shutdown_seconds": "long"}
    told = " ".join(stage.evacuate().stdout.split())
    assert "home1: evacuate_fallback teleport: is not known" in told
    assert "evacuate_shutdown_seconds" in told


def test_a_vm_that_is_elsewhere_keeps_what_is_said_of_it_where_it_is_listed(stage: Stage) -> None:
    """On the way home, for one; and what is wrong with that host's variables is in nobody's way."""
    protect(stage)
    stage.others["its-home"] = {
        "lifeboat_vms": [{"name": "web1", "fallback": ["restart"], "power_off": False}]
    }
    stage.others["broken"] = {"lifeboat_vms": "{{ nowhere.to_be_found }}"}
    stage.others["wrong"] = {"lifeboat_vms": [{"name": "web1", "fallback": ["teleport"]}, 7]}
    done = stage.evacuate()
    assert done.returncode == 0, done.stdout + done.stderr
    [options] = stage.parts.evacuation.options
    assert (options.mode, options.power_off) == ("restart", False)


def test_where_another_is_at_work_this_is_told_with_all_else_and_nothing_started(stage: Stage) -> None:
    protect(stage)
    stage.parts.lease.ask("x", "anna on ctl1", 300)
    done = stage.evacuate(vms=["web1", "nosuch"])
    told = " ".join(done.stdout.split())
    assert done.returncode != 0
    assert "nosuch: neither protected on nor evacuated from" in told
    assert "site home: is being evacuated by anna on ctl1 since " in told
    rehearsed = stage.evacuate(state="forecast", uplink="50Mbit/s")
    assert rehearsed.returncode == 0, rehearsed.stdout + rehearsed.stderr
    assert "site home is being evacuated by anna on ctl1 since " in rehearsed.stdout
    assert stage.parts.evacuation.begun == []
    # One of whom nothing is heard any more holds up nobody for longer than its lease.
    stage.parts.lease.ask("x", "anna on ctl1", 4)
    done = stage.evacuate()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "home: evacuated by anna on ctl1 since " in done.stdout
    assert stage.parts.evacuation.begun == ["web1"]
    assert stage.parts.lease.told() is None
    stage.parts.lease.ask("x", "anna on ctl1", 300)
    assert stage.evacuate(take_over=True).returncode == 0


def test_a_group_says_how_its_vms_may_leave(stage: Stage) -> None:
    """More than the host's variables do, less than the VM itself."""
    protect(stage)
    stage.variables |= {
        "lifeboat_vms": [{"name": "web1", "group": "shop", "power_off": True}],
        "lifeboat_vm_groups": {"shop": {"fallback": ["restart"], "power_off": False}},
        "evacuate_fallback": "live",
    }
    stage.others["elsewhere"] = {"lifeboat_vms": [{"name": "db", "group": "data"}]}
    done = stage.evacuate()
    assert done.returncode == 0, done.stdout + done.stderr
    [options] = stage.parts.evacuation.options
    assert (options.mode, options.power_off) == ("restart", True)
    # Of a group elsewhere it may be said for all; of one that is nowhere it is a slip.
    stage.variables["lifeboat_vm_groups"] = {"data": {"fallback": ["live"]}, "shopp": {"fallbck": ["live"]}}
    told = " ".join(stage.evacuate().stdout.split())
    assert "lifeboat_vm_groups: shopp: fallbck: is nothing that a group can say; write fallback" in told
    assert "lifeboat_vm_groups: data" not in told
