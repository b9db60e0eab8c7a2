# SPDX-License-Identifier: GPL-3.0-or-later
"""The playbooks as people run them: ansible-playbook against two hosts, each with a served control API."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from precache_proxy.control.client import Client
from precache_proxy.control.parts import Parts
from precache_proxy.errors import Finding, HypervisorError, StaleEpoch
from precache_proxy.evacuation.guard import TOMBSTONE, Forbidden
from precache_proxy.hypervisor.domain_xml import Definition, parse_definition
from small_parts.parts import DATABASE, KNOWN, WEB, serving, small_parts

ROOT = Path(__file__).resolve().parents[3]


@dataclass
class Site:
    """Two hosts of one site; ``play`` runs a playbook on them."""

    directory: Path
    first: Parts
    second: Parts

    def begin(self, name: str, *arguments: str, **variables: Any) -> subprocess.Popen[str]:
        """A playbook that runs on."""
        collections = self.directory / "collections"
        environment = {
            **os.environ,
            "ANSIBLE_COLLECTIONS_PATH": str(collections),
            "ANSIBLE_HOME": str(self.directory / "home"),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_LOCALHOST_WARNING": "0",
            "PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}",
        }
        return subprocess.Popen(
            [
                str(Path(sys.executable).with_name("ansible-playbook")),
                "-i",
                str(self.directory / "inventory.yml"),
                str(ROOT / "playbooks" / f"{name}.yml"),
                "-e",
                json.dumps(variables),
                *arguments,
            ],
            env=environment,
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def play(self, name: str, *arguments: str, **variables: Any) -> subprocess.CompletedProcess[str]:
        """A playbook that has ended."""
        process = self.begin(name, *arguments, **variables)
        try:
            out, errors = process.communicate(timeout=120)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    name = tmp_path / "collections" / "ansible_collections" / "lifeboat" / "evacuation"
    name.parent.mkdir(parents=True)
    name.symlink_to(ROOT)
    # The coordinator runs `precache-proxy connect` on a host.
    command = tmp_path / "bin" / "precache-proxy"
    command.parent.mkdir()
    package = ROOT / "roles" / "precache_proxy" / "files"
    command.write_text(f'#!/bin/sh\nPYTHONPATH="{package}" exec "{sys.executable}" -m precache_proxy "$@"\n')
    command.chmod(0o755)
    first, second = small_parts(tmp_path / "first"), small_parts(tmp_path / "second")
    with serving(first) as first_socket, serving(second) as second_socket:
        hosts = {
            host: {
                "ansible_connection": "local",
                "ansible_python_interpreter": sys.executable,
                "ansible_become": False,
                "evacuation_socket": str(socket),
                "protection_socket": str(socket),
                "lifeboat_vms": vms,
            }
            for host, socket, vms in (
                ("home1", first_socket, [{"name": "web1", "peer": "backup1", "rpo": "30s", "priority": 60}]),
                ("home2", second_socket, [{"name": KNOWN[DATABASE], "peer": "backup2"}]),
            )
        }
        inventory = {
            "hypervisors": {"children": {"home": {"hosts": hosts}}},
            "ungrouped": {"hosts": {"other1": {"ansible_connection": "local"}}},
        }
        (tmp_path / "inventory.yml").write_text(yaml.safe_dump(inventory))
        yield Site(tmp_path, first, second)


def recap(told: subprocess.CompletedProcess[str]) -> dict[str, dict[str, int]]:
    """The last lines of a run: counts per host."""
    lines = told.stdout.split("PLAY RECAP")[1].splitlines()[1:]
    return {
        line.split()[0]: {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", line)}
        for line in lines
        if ":" in line
    }


def good(told: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert told.returncode == 0, told.stdout + told.stderr
    return told


def protect(site: Site) -> None:
    """What protect.yml does, without the seconds that a playbook takes."""
    for parts, vm, body in (
        (site.first, "web1", {"peer": "backup1", "rpo_seconds": 30, "priority": 60}),
        (site.second, DATABASE, {"peer": "backup2"}),
    ):
        Client(parts.config.paths.control_socket).request("PUT", f"/v1/vms/{vm}", body)


def test_protect_check_real_repeat(site: Site) -> None:
    would = good(site.play("protect", "--check", "--diff"))
    assert recap(would)["home1"]["changed"] == 1
    assert '+    "rpo_seconds": 30.0' in would.stdout
    assert site.first.source.changes == []
    done = good(site.play("protect"))
    assert (recap(done)["home1"]["changed"], recap(done)["home2"]["changed"]) == (1, 1)
    assert site.first.source.protected[WEB].priority == 60
    again = good(site.play("protect"))
    assert (recap(again)["home1"]["changed"], recap(again)["home2"]["changed"]) == (0, 0)


@pytest.fixture
def backups(tmp_path: Path, site: Site) -> Iterator[dict[str, Parts]]:
    """Two hypervisors at another site, known to the inventory beside the two at home."""
    path = tmp_path / "inventory.yml"
    inventory = yaml.safe_load(path.read_text())
    home = inventory["hypervisors"]["children"]["home"]["hosts"]
    parts = {}
    with contextlib.ExitStack() as stack:
        for name in ("backup1", "backup2"):
            parts[name] = small_parts(tmp_path / name)
            parts[name].config = replace(parts[name].config, name=name, site="backup")
            socket = str(stack.enter_context(serving(parts[name])))
            common = {key: home["home1"][key] for key in home["home1"] if key.startswith("ansible_")}
            inventory["hypervisors"].setdefault("hosts", {})[name] = {**common, "protection_socket": socket}
        path.write_text(yaml.safe_dump(inventory))
        yield parts


def machine(uuid: str, memory_mib: int) -> Definition:
    return parse_definition(
        f"<domain type='qemu'><name>{KNOWN[uuid]}</name><uuid>{uuid}</uuid>"
        f"<memory unit='MiB'>{memory_mib}</memory><devices/></domain>"
    )


@pytest.mark.usefixtures("backups")
def test_protect_places_vms_that_name_no_peer_and_leaves_them_there(site: Site) -> None:
    site.first.hypervisor.domains = [(WEB, "web1", True)]
    site.first.hypervisor.definitions = {WEB: machine(WEB, 64)}
    site.second.hypervisor.domains = [(DATABASE, KNOWN[DATABASE], True)]
    site.second.hypervisor.definitions = {DATABASE: machine(DATABASE, 8192)}
    # What the database will take at backup1 counts, although its host is not in this run.
    Client(site.second.config.paths.control_socket).request("PUT", f"/v1/vms/{DATABASE}", {"peer": "backup1"})
    how: dict[str, Any] = {"lifeboat_vms": [{"name": "web1"}], "lifeboat_peers": ["backup1", "backup2"]}
    would = good(site.play("protect", "--check", "--limit", "home1", **how))
    # (Both backups are this machine: what is left there depends on who else uses it.)
    chosen = r"web1 of home1: to backup2 \((most-room|only-one-with-room)"
    assert re.search(chosen, would.stdout), would.stdout
    assert site.first.source.changes == []
    good(site.play("protect", "--limit", "home1", **how))
    assert site.first.source.protected[WEB].peer == "backup2"
    again = good(site.play("protect", "--limit", "home1", **how))
    assert recap(again)["home1"]["changed"] == 0


@pytest.mark.usefixtures("backups")
def test_protect_changes_nothing_where_one_vm_fits_nowhere(site: Site) -> None:
    site.first.hypervisor.domains = [(WEB, "web1", True)]
    site.first.hypervisor.definitions = {WEB: machine(WEB, 64 << 20)}
    path = site.directory / "inventory.yml"
    inventory = yaml.safe_load(path.read_text())
    inventory["hypervisors"]["children"]["home"]["hosts"]["home1"] |= {"lifeboat_vms": [{"name": "web1"}]}
    path.write_text(yaml.safe_dump(inventory))
    told = site.play("protect", "--limit", "home", lifeboat_peers=["backup1", "backup2"])
    assert told.returncode != 0
    text = " ".join(told.stdout.split())
    assert "VM web1 of home1: needs 65536.1 GiB of memory" in text
    assert "Nothing was changed" in text
    assert (site.first.source.changes, site.second.source.changes) == ([], [])


def test_protect_judges_all_before_it_changes_any(site: Site) -> None:
    vms = [{"name": "web1", "peer": "backup1"}, {"name": "nosuch", "peer": "backup1"}]
    told = site.play("protect", lifeboat_vms=vms)
    assert told.returncode != 0
    assert "libvirt knows none such" in told.stdout
    assert site.first.source.changes == []


def test_protect_exclusive_ends_what_is_not_listed(site: Site) -> None:
    protect(site)
    told = good(site.play("protect", "--limit", "home1", lifeboat_vms=[], lifeboat_vms_exclusive=True))
    assert recap(told)["home1"]["changed"] == 1
    assert site.first.source.changes[-1] == "unprotect web1 keep_replica=True"


def test_protect_exclusive_spares_the_way_home_of_what_another_host_lists(site: Site) -> None:
    protect(site)
    Client(site.second.config.paths.control_socket).request("PUT", f"/v1/vms/{WEB}", {"peer": "backup1"})
    told = good(site.play("protect", "--limit", "home2", lifeboat_vms_exclusive=True))
    assert recap(told)["home2"]["changed"] == 0
    assert WEB in site.second.source.protected


def test_protect_leaves_a_vm_alone_that_an_evacuation_took_away(site: Site) -> None:
    protect(site)
    client = Client(site.first.config.paths.control_socket)
    job = client.request("POST", "/v1/evacuations", {"vm": "web1"})
    while not job["ended"]:
        job = client.request("GET", f"/v1/evacuations/{job['id']}?wait_seconds=1")
    changes = list(site.first.source.changes)
    told = good(site.play("protect", "--limit", "home1"))
    assert "VM web1: it was evacuated to backup1, which protects it now" in told.stdout
    assert (recap(told)["home1"]["changed"], site.first.source.changes) == (0, changes)
    # back again, whichever way, and not protected: it is listed
    site.first.hypervisor.domains = [(WEB, "web1", True)]
    told = good(site.play("protect", "--limit", "home1"))
    assert (recap(told)["home1"]["changed"], WEB in site.first.source.protected) == (1, True)


@pytest.mark.parametrize("copy_is_defined", [False, True])
def test_protect_leaves_a_vm_alone_that_was_failed_over(
    site: Site, monkeypatch: pytest.MonkeyPatch, copy_is_defined: bool
) -> None:
    """No evacuation of it ever left from here: only the tombstone says where it runs."""
    sentence = "VM web1 was started at backup1 from generation 12 (epoch 3), and runs there."
    if copy_is_defined:

        async def refused(_spec: Any) -> list[str]:
            raise StaleEpoch("VM web1: it has arrived here with epoch 3, not 2")

        monkeypatch.setattr(site.first.source, "check", refused)
        site.first.hypervisor.domains = [(WEB, "web1", False)]
    else:
        monkeypatch.delitem(KNOWN, WEB)
    site.first.evacuation.tombstones = [
        Forbidden(WEB, TOMBSTONE, sentence, "f0", 3, name="web1", peer="backup1")
    ]
    for listed in ("web1", WEB):
        told = good(site.play("protect", "--limit", "home1", lifeboat_vms=[{"name": listed}]))
        assert sentence in told.stdout
        assert "Nothing is done for it here" in told.stdout
        assert (recap(told)["home1"]["changed"], site.first.source.changes) == (0, [])


def test_status_fails_with_a_list_and_changes_nothing(site: Site) -> None:
    protect(site)
    site.first.source.spoil(WEB, lag_seconds=95.0)
    site.second.channel.links["backup2"].state = "down"
    before = list(site.first.source.changes)
    told = site.play("replication_status")
    assert told.returncode != 0
    assert "home1: rpo web1: lag 95.0 s is over the RPO of 30.0 s" in told.stdout
    assert "home2: link backup2: down" in told.stdout
    assert site.first.source.changes == before


@pytest.mark.parametrize("playbook", ["replication_status", "validate"])
def test_no_host_is_not_all_well(site: Site, playbook: str) -> None:
    told = site.play(playbook, lifeboat_hosts="nowhere")
    assert told.returncode != 0
    assert "nowhere: no host of this inventory" in told.stdout


def test_validate_tells_all_findings_of_all_hosts(site: Site) -> None:
    protect(site)
    site.first.evacuation.findings = [Finding("VM web1/vda", "12 % covered", "wait", "coverage")]
    site.second.evacuation.findings = [Finding("peer backup2", "no room", "free some", "no-space")]
    told = site.play("validate", evacuate_site="home", evacuate_vms=["web1", KNOWN[DATABASE], "nosuch"])
    assert told.returncode != 0
    assert "home1: VM web1/vda: 12 % covered; wait" in told.stdout
    assert f"home2: VM {KNOWN[DATABASE]}: peer backup2: no room; free some" in told.stdout
    assert "VM nosuch: not protected on any of these hypervisors" in told.stdout


@pytest.fixture
def mobility(site: Site) -> dict[str, dict[str, Any]]:
    """Gateways at three sites and two anchors, one of them at home; no agent answers anywhere."""
    path = site.directory / "inventory.yml"
    inventory = yaml.safe_load(path.read_text())
    home = inventory["hypervisors"]["children"]["home"]["hosts"]
    common = {key: home["home1"][key] for key in home["home1"] if key.startswith("ansible_")}
    hosts: dict[str, dict[str, Any]] = {
        "home1": {"mobility_gateway": True},
        "home2": {"mobility_anchor": True},
        "backup1": {**common, "mobility_gateway": True},
        "third1": {**common, "mobility_gateway": True},
        "anchor1": {**common, "mobility_anchor": True},
    }
    variables = {"mobility_libvirt_uri": "none", "mobility_prefixes": [{"prefix": "2001:db8:100::/64"}]}
    inventory["mobility"] = {"hosts": hosts, "vars": variables}
    path.write_text(yaml.safe_dump(inventory))
    return inventory


@pytest.mark.usefixtures("mobility")
def test_validate_asks_the_agents_of_anchors_and_of_destinations(site: Site) -> None:
    protect(site)
    told = site.play("validate", evacuate_site="home", lifeboat_peer="backup1")
    assert told.returncode != 0
    for host in ("home1", "home2", "backup1", "anchor1"):
        assert f"{host}: control socket /run/lifeboat/mobility.sock: the mobility agent" in told.stdout
    assert "the anchors home2 stand there and fall with it; anchor1 alone will lead packets" in " ".join(
        told.stdout.split()
    )
    judged = told.stdout.partition("Judge all hypervisors together")[2]
    assert "backup1: control socket" in judged
    # Nobody's way leads there.
    assert "third1: control socket" not in judged
    limited = site.play("validate", "--limit", "home", evacuate_site="home", lifeboat_peer="backup1")
    assert "backup1: " not in limited.stdout


@pytest.mark.parametrize("playbook", ["validate", "replication_status"])
def test_a_dead_site_matters_only_where_it_is_asked_for(site: Site, playbook: str) -> None:
    protect(site)
    path = site.directory / "inventory.yml"
    inventory = yaml.safe_load(path.read_text())
    dead = {"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": 1}
    inventory["mobility"] = {"hosts": {"third1": {**dead, "mobility_gateway": True}}}
    path.write_text(yaml.safe_dump(inventory))
    told = site.play(playbook, evacuate_site="home")
    # What is told is a sentence among the findings; 4 would be Ansible's own word for it.
    assert told.returncode == 2
    if playbook == "validate":
        assert "third1: not reached" not in told.stdout
        inventory["mobility"]["hosts"]["third1"]["mobility_anchor"] = True
        path.write_text(yaml.safe_dump(inventory))
        told = site.play(playbook, evacuate_site="home")
    assert told.returncode == 2
    assert "third1: not reached" in told.stdout.partition("Judge all hypervisors together")[2]


@pytest.mark.usefixtures("mobility")
def test_a_site_with_every_anchor_in_it_is_evacuated_with_a_warning(site: Site) -> None:
    protect(site)
    told = good(site.play("evacuate", "--check", evacuate_site="home"))
    assert "the anchors home2 stand there and fall with it; anchor1 alone" in " ".join(told.stdout.split())
    path = site.directory / "inventory.yml"
    inventory = yaml.safe_load(path.read_text())
    del inventory["mobility"]["hosts"]["anchor1"]
    path.write_text(yaml.safe_dump(inventory))
    lone = good(site.play("evacuate", "--check", evacuate_site="home"))
    assert "there is no other, and VMs cannot be reached" in " ".join(lone.stdout.split())


def test_protect_gives_no_vm_the_address_of_one_that_the_limit_leaves_out(
    site: Site, mobility: dict[str, Any]
) -> None:
    home = mobility["hypervisors"]["children"]["home"]["hosts"]
    for host, name in (("home1", "web1"), ("home2", "other")):
        home[host]["lifeboat_vms"] = [{"name": name, "peer": "backup1", "addresses": ["2001:db8:100::5"]}]
    (site.directory / "inventory.yml").write_text(yaml.safe_dump(mobility))
    told = site.play("protect", "--limit", "home1")
    assert told.returncode != 0
    assert "VM other: 2001:db8:100::5 is VM web1's too" in told.stdout.replace("\\'", "'")
    assert site.first.source.changes == []


def test_evacuate_refuses_without_the_site(site: Site) -> None:
    protect(site)
    told = site.play("evacuate")
    assert told.returncode != 0
    assert "evacuate_site: is not set; name the site to empty" in " ".join(told.stdout.split())
    wrong = site.play("evacuate", evacuate_site="nowhere")
    assert wrong.returncode != 0
    assert "nowhere is no group of this inventory" in " ".join(wrong.stdout.split())
    elsewhere = site.play("evacuate", "--limit", "other1", evacuate_site="home")
    assert elsewhere.returncode != 0
    assert "home has no host under --limit other1" in " ".join(elsewhere.stdout.split())
    assert site.first.evacuation.begun == []


def test_evacuate_all_and_again(site: Site) -> None:
    protect(site)
    would = good(site.play("evacuate", "--check", evacuate_site="home"))
    assert "would-start" in would.stdout
    assert site.first.evacuation.begun == []
    told = good(site.play("evacuate", evacuate_site="home", evacuate_report="report.json"))
    assert re.search(
        r"^\d\d:\d\d:\d\d web1: EVACUATED in 4.5 s, guest stopped for 0.30 s$", told.stdout, re.M
    )
    report = json.loads((site.directory / "report.json").read_text())
    assert {vm["name"]: vm["verdict"] for vm in report["vms"]} == {
        "web1": "evacuated",
        KNOWN[DATABASE]: "evacuated",
    }
    assert report["totals"] == {"vms": 2, "out": 2, "all_out": True, "verdicts": {"evacuated": 2}}
    jsonschema.validate(report, json.loads((ROOT / "docs" / "evacuation-report.schema.json").read_text()))
    assert report["coordination"]["strategy"] == "feedback"
    assert "2 of 2" in (site.directory / "report.html").read_text()
    again = good(site.play("evacuate", evacuate_site="home"))
    assert recap(again)["home1"]["changed"] == 0
    assert "already-there" in again.stdout
    assert site.first.evacuation.begun == ["web1"]


def test_evacuate_ends_non_zero_when_a_vm_stays(site: Site) -> None:
    protect(site)
    site.second.evacuation.verdict = "stayed"
    told = site.play("evacuate", evacuate_site="home", evacuate_report="report.json")
    assert told.returncode != 0
    assert f"1 of 2 VMs are out; not out: {KNOWN[DATABASE]}" in told.stdout
    report = json.loads((site.directory / "report.json").read_text())
    assert report["totals"]["verdicts"] == {"evacuated": 1, "stayed": 1}


def test_evacuate_named_vms_only(site: Site) -> None:
    protect(site)
    unknown = site.play("evacuate", evacuate_site="home", evacuate_vms=["web1", "nosuch"])
    assert unknown.returncode != 0
    assert "nosuch: neither protected on nor evacuated from" in " ".join(unknown.stdout.split())
    assert "nothing was started" in unknown.stdout
    assert site.first.evacuation.begun == []
    good(site.play("evacuate", evacuate_site="home", evacuate_vms=["web1"]))
    assert (site.first.evacuation.begun, site.second.evacuation.begun) == (["web1"], [])
    as_text = good(site.play("evacuate", evacuate_site="home", evacuate_vms=f"web1, {KNOWN[DATABASE]}"))
    assert "2 of 2 VMs are out" in as_text.stdout


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"evacuate_vms": []}, "vms: is an empty list; name VMs, or leave it out"),
        ({"evacuate_vms": "web1,nosuch"}, "nosuch: neither protected on nor evacuated from"),
        ({"evacuate_report": "/nowhere/report.json"}, "/nowhere is no directory that this user can write to"),
        ({"evacuate_parallel": 0}, "parallel 0: is below 1; give 1 or more"),
        ({"evacuate_parallel": 2, "evacuate_strategy": "sequential"}, "and strategy 'sequential' are given"),
        ({"evacuate_bandwidth": "0"}, "bandwidth '0': nothing could be sent; give one above 0"),
        ({"evacuate_forecast": "none.json"}, "forecast none.json: cannot be read"),
        ({"evacuate_deadline": "00:00:00"}, "deadline '00:00:00': passed"),
        ({"evacuate_strategy": "luck", "evacuate_uplink": "fast"}, "'luck': is not known"),
    ],
    ids=[
        "no-vms",
        "unknown-vm",
        "report",
        "parallel",
        "parallel-and",
        "bandwidth",
        "forecast",
        "deadline",
        "strategy",
    ],
)
def test_evacuate_refuses_bad_input_before_anything_is_started(
    site: Site, variables: dict[str, Any], told: str
) -> None:
    protect(site)
    refused = site.play("evacuate", evacuate_site="home", **variables)
    assert refused.returncode != 0
    assert told in " ".join(refused.stdout.replace("\\'", "'").split())
    assert (site.first.evacuation.begun, site.second.evacuation.begun) == ([], [])


def test_a_vm_that_nobody_protects_is_told_and_is_not_out(site: Site) -> None:
    protect(site)
    web, off, stray = (WEB, "web1", True), ("u2", "switched off", False), ("u3", "stray", True)
    site.first.hypervisor.domains = [web, off, stray]
    judged = site.play("validate", evacuate_site="home")
    assert judged.returncode != 0
    assert "home1: VM stray: it runs and is not protected" in judged.stdout
    assert "switched off" not in judged.stdout
    would = site.play("evacuate", "--check", evacuate_site="home")
    assert would.returncode != 0
    told = site.play("evacuate", evacuate_site="home", evacuate_report="report.json")
    assert told.returncode != 0
    assert "2 of 3 VMs are out; not out: stray" in told.stdout
    report = json.loads((site.directory / "report.json").read_text())
    jsonschema.validate(report, json.loads((ROOT / "docs" / "evacuation-report.schema.json").read_text()))
    (stayed,) = [vm for vm in report["vms"] if vm["name"] == "stray"]
    assert (stayed["verdict"], stayed["cause"], stayed["host"]) == ("stayed", "not-protected", "home1")
    site.first.hypervisor.domains = [stray]
    known = {"evacuate_site": "home", "evacuate_leave_behind": "stray"}
    assert "2 of 2 VMs are out" in good(site.play("evacuate", **known)).stdout
    assert "VM stray" not in site.play("validate", **known).stdout
    good(site.play("evacuate", evacuate_site="home", evacuate_vms="web1"))


def test_one_hosts_evacuation_tells_that_libvirt_is_silent(site: Site) -> None:
    async def silence() -> list[tuple[str, str, bool]]:
        raise HypervisorError("libvirt does not answer")

    protect(site)
    site.first.hypervisor.list_domains = silence
    evacuate = {"lifeboat.evacuation.host_evacuation": {"socket": "{{ evacuation_socket }}"}}
    show = {"ansible.builtin.debug": {"msg": "{{ told.vms | lifeboat.evacuation.verdict_table }}"}}
    play = {"hosts": "home1", "gather_facts": False, "tasks": [{**evacuate, "register": "told"}, show]}
    (site.directory / "one.yml").write_text(yaml.safe_dump([play]))
    told = good(site.play(str(site.directory / "one")))
    assert re.search(r"unknown VMs of home1 +home1 +- +failed", told.stdout)
    assert "libvirt of home1 did not say which VMs are there" in told.stdout


def test_a_number_at_a_time_and_a_deadline_are_in_the_report(site: Site) -> None:
    protect(site)
    asked = {"evacuate_site": "home", "evacuate_report": "r.json"}
    good(
        site.play("evacuate", "--limit", "home1", evacuate_parallel=1, evacuate_bandwidth="8Mbit/s", **asked)
    )
    report = json.loads((site.directory / "r.json").read_text())
    assert (report["hosts"], report["coordination"]["strategy"]) == (["home1"], "static:1")
    assert site.first.evacuation.options[0].bandwidth_bytes_per_second == 1e6
    good(site.play("evacuate", evacuate_deadline="20m", evacuate_page="", **asked))
    report = json.loads((site.directory / "r.json").read_text())
    assert report["coordination"]["deadline"] == "20m"
    assert {vm["verdict"] for vm in report["vms"]} == {"evacuated", "already-there"}
    assert 1190 < report["coordination"]["samples"][0]["deadline_in_seconds"] <= 1200


def test_a_hypervisor_out_of_reach_is_a_verdict_for_its_vms(site: Site) -> None:
    protect(site)
    inventory = yaml.safe_load((site.directory / "inventory.yml").read_text())
    home = inventory["hypervisors"]["children"]["home"]["hosts"]
    home["home2"]["evacuation_socket"] = str(site.directory / "none.sock")
    (site.directory / "inventory.yml").write_text(yaml.safe_dump(inventory))
    told = site.play("evacuate", evacuate_site="home", evacuate_report="r.json")
    assert told.returncode != 0
    assert f"1 of 2 VMs are out; not out: {KNOWN[DATABASE]}; not reached: home2" in told.stdout
    report = json.loads((site.directory / "r.json").read_text())
    jsonschema.validate(report, json.loads((ROOT / "docs" / "evacuation-report.schema.json").read_text()))
    verdicts = {vm["name"]: (vm["verdict"], vm["cause"]) for vm in report["vms"]}
    assert verdicts[KNOWN[DATABASE]] == ("failed", "unreachable")
    assert report["hosts_failed"] == ["home2"]


def test_check_mode_says_what_stands_in_the_way(site: Site) -> None:
    protect(site)
    site.second.evacuation.findings = [Finding("peer backup2", "no room", "free some", "no-space")]
    told = site.play("evacuate", "--check", evacuate_site="home", evacuate_report="r.json")
    assert told.returncode != 0
    report = json.loads((site.directory / "r.json").read_text())
    jsonschema.validate(report, json.loads((ROOT / "docs" / "evacuation-report.schema.json").read_text()))
    assert report["check_mode"] is True
    assert {vm["name"]: vm["verdict"] for vm in report["vms"]} == {
        "web1": "would-start",
        KNOWN[DATABASE]: "would-fail",
    }
    assert site.first.evacuation.begun == []


def test_a_rehearsal_counts_those_that_nobody_protects_and_of_nothing_says_so(site: Site) -> None:
    asked = {"evacuate_site": "home", "evacuate_uplink": "50Mbit/s", "lifeboat_vms": []}
    nothing = site.play("rehearse", **asked)
    assert nothing.returncode != 0
    assert "home: no VM is protected there, listed for it or runs there" in " ".join(nothing.stdout.split())
    good(site.play("rehearse", rehearse_demand="0", **asked))
    protect(site)
    site.first.hypervisor.domains = [(WEB, "web1", True), ("u-stray", "stray", True)]
    told = site.play("rehearse", **asked)
    assert told.returncode != 0
    assert "2 of 3 VMs would make it, 3 are demanded; would stay: stray" in " ".join(told.stdout.split())
    good(site.play("rehearse", evacuate_leave_behind="stray", **asked))


def test_a_rehearsal_counts_who_would_make_it_and_changes_nothing(site: Site) -> None:
    protect(site)
    asked = {"evacuate_site": "home", "rehearse_forecast": "f.json", "evacuate_uplink": "50Mbit/s"}
    told = good(site.play("rehearse", evacuate_deadline="20m", **asked))
    assert "2 of 2 VMs would make it" in told.stdout
    assert recap(told)["home1"]["changed"] == 0
    forecast = json.loads((site.directory / "f.json").read_text())
    assert (forecast["leaving"], forecast["uplinks"]) == (2, {"home": 6.25e6})
    site.second.evacuation.findings = [Finding("peer backup2", "no room", "free some", "no-space")]
    short = site.play("rehearse", evacuate_deadline="20m", **asked)
    assert short.returncode != 0
    assert f"1 of 2 VMs would make it, 2 are demanded; would stay: {KNOWN[DATABASE]}" in short.stdout
    good(site.play("rehearse", rehearse_demand="50%", **asked))
    forecast = json.loads((site.directory / "f.json").read_text())
    good(
        site.play(
            "evacuate",
            evacuate_site="home",
            evacuate_vms="web1",
            evacuate_forecast="f.json",
            evacuate_report="r.json",
        )
    )
    assert json.loads((site.directory / "r.json").read_text())["coordination"]["forecast"] == forecast
    assert (site.first.evacuation.begun, site.second.evacuation.begun) == (["web1"], [])


def test_a_controller_that_is_killed_leaves_nobody_behind_who_starts_more(site: Site) -> None:
    Client(site.first.config.paths.control_socket).request("PUT", f"/v1/vms/{DATABASE}", {"peer": "backup1"})
    Client(site.first.config.paths.control_socket).request("PUT", "/v1/vms/web1", {"peer": "backup1"})
    evacuation = site.first.evacuation
    evacuation.step_seconds = 0.3
    asked = {"evacuate_site": "home", "evacuate_parallel": 1}
    process = site.begin("evacuate", "--limit", "home1", **asked)
    until = time.monotonic() + 60
    while not evacuation.begun and time.monotonic() < until:
        time.sleep(0.05)
    # Not the group: Ansible's worker lives on, without a parent.
    process.kill()
    process.wait()
    (first,) = evacuation.begun
    time.sleep(6)
    assert evacuation.begun == [first], "the second would have had its turn by now"
    assert [job.verdict for job in evacuation.jobs()] == ["evacuated"], "the proxy went on with the first"
    told = good(site.play("evacuate", "--limit", "home1", **asked))
    assert "2 of 2 VMs are out" in told.stdout
    assert len(evacuation.begun) == 2


def test_of_two_controllers_at_once_one_moves_all_and_the_other_says_who(site: Site) -> None:
    protect(site)
    for parts in (site.first, site.second):
        parts.evacuation.step_seconds = 1.5
    runs = [
        site.begin("evacuate", evacuate_site="home", evacuate_report=f"r{number}.json") for number in (0, 1)
    ]
    told = [run.communicate(timeout=90)[0] for run in runs]
    first, second = (0, 1) if runs[0].returncode == 0 else (1, 0)
    assert [runs[first].returncode, runs[second].returncode] == [0, 2], told
    assert "2 of 2 VMs are out" in told[first]
    assert "nothing was started; site home: is being evacuated by " in told[second]
    assert "evacuate_take_over=true" in told[second]
    assert [(site.directory / f"r{number}.json").exists() for number in (first, second)] == [True, False]
    assert (site.first.evacuation.begun, site.second.evacuation.begun) == (["web1"], [KNOWN[DATABASE]])
    assert site.first.lease.told() is site.second.lease.told() is None


def test_ctrl_c_ends_at_once_and_the_jobs_go_on(site: Site) -> None:
    protect(site)
    site.first.evacuation.step_seconds = 0.5
    process = site.begin("evacuate", evacuate_site="home")
    until = time.monotonic() + 60
    while not site.first.evacuation.begun and time.monotonic() < until:
        time.sleep(0.05)
    # As a terminal does it: to everybody in the foreground.
    os.killpg(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=20)
    assert process.returncode != 0
    assert "Traceback" not in out + errors, out + errors
    assert "2 of 2 VMs are out" in good(site.play("evacuate", evacuate_site="home")).stdout
    assert site.first.evacuation.begun == ["web1"]


@dataclass
class DeadSite:
    """The hosts of ``site`` are at another site and have replicas; the dead ones answer as ``ssh`` says."""

    site: Site

    def answer(self, sentence: str) -> None:
        """What ssh says of the dead hosts."""
        ssh = self.site.directory / "bin" / "ssh"
        note = f'echo "$*" >> {self.site.directory}/ssh.told'
        ssh.write_text(f'#!/bin/sh\n[ "$1" = -V ] && exit 0\n{note}\necho "ssh: {sentence}" >&2\nexit 255\n')
        ssh.chmod(0o755)

    def play(self, *arguments: str, **variables: Any) -> subprocess.CompletedProcess[str]:
        return self.site.play("fail_over", *arguments, fail_over_site="away", **variables)


@pytest.fixture
def dead(site: Site) -> DeadSite:
    inventory = yaml.safe_load((site.directory / "inventory.yml").read_text())
    gone = {
        host: {
            "ansible_connection": "ssh",
            "ansible_ssh_executable": str(site.directory / "bin" / "ssh"),
            "ansible_ssh_retries": 0,
            "ansible_ssh_extra_args": "-J gate",
            "lifeboat_peer": "home1",
        }
        for host in ("away1", "away2")
    }
    gone["away1"]["lifeboat_vms"] = [{"name": "web1", "after": [KNOWN[DATABASE]]}]
    inventory["hypervisors"]["children"]["away"] = {"hosts": gone}
    (site.directory / "inventory.yml").write_text(yaml.safe_dump(inventory))
    site.first.evacuation.keep(site.first.store, WEB, "away1")
    site.second.evacuation.keep(site.second.store, DATABASE, "away2")
    told = DeadSite(site)
    told.answer("connect to host away1 port 22: Connection timed out")
    return told


def test_fail_over_wants_the_site_and_the_word(dead: DeadSite) -> None:
    told = dead.site.play("fail_over")
    assert told.returncode != 0
    said = " ".join(told.stdout.split())
    assert "fail_over_site: is not set; name the site that is dead" in said
    assert "fail_over_site_is_dead: is not true; say" in said
    unsaid = dead.play(fail_over_vms=[])
    assert unsaid.returncode != 0
    said = " ".join(unsaid.stdout.split())
    assert "fail_over_site_is_dead: is not true" in said
    assert "fail_over_vms: is an empty list" in said
    assert dead.site.first.evacuation.arrived == []


def test_fail_over_check_real_repeat(dead: DeadSite) -> None:
    would = good(dead.play("--check"))
    assert re.search(r"web1 +away1 +home1 +would-start +7 +14 s", would.stdout)
    assert recap(would)["away1"]["changed"] == 1
    assert dead.site.first.evacuation.arrived == []
    told = good(dead.play(fail_over_site_is_dead=True))
    assert "2 of 2 VMs run" in told.stdout
    assert re.search(r"web1 +away1 +home1 +restarted-from-replica +7 +14 s", told.stdout)
    # It waits for one that has another home.
    lines = [line for line in told.stdout.splitlines() if line.startswith("changed:")]
    assert [line.split("item=")[1].split(" at ")[0] for line in lines] == [KNOWN[DATABASE], "web1"]
    assert [one.name for one in dead.site.first.evacuation.arrived] == ["web1"]
    again = good(dead.play(fail_over_site_is_dead=True))
    assert {count["changed"] for count in recap(again).values()} == {0}
    assert "already-there" in again.stdout
    assert len(dead.site.first.evacuation.arrived + dead.site.second.evacuation.arrived) == 2


def test_fail_over_refuses_with_every_finding_and_changes_nothing(dead: DeadSite) -> None:
    dead.answer("root@away1: Permission denied (publickey).")
    undecided = Finding("VM web1", "its arrival j1 is prepared here", "settle it", "conflict")
    dead.site.first.evacuation.outlooks[WEB]["findings"] = [undecided]
    dead.site.second.evacuation.outlooks[DATABASE]["home_answers"] = True
    told = dead.play(fail_over_site_is_dead=True)
    assert told.returncode != 0
    said = " ".join(told.stdout.split())
    assert "home1: VM web1: its arrival j1 is prepared here; settle it" in said
    assert "away1: it is not dead: its SSH answers (Permission denied); evacuate it" in said
    assert "away2: it is not dead: its SSH answers (Permission denied) and its proxy answers home2" in said
    assert "Nothing was started." in said
    assert dead.site.first.evacuation.arrived + dead.site.second.evacuation.arrived == []


def test_fail_over_where_something_else_answers_at_the_address_of_a_dead_host(dead: DeadSite) -> None:
    dead.answer("connect to host away1 port 22: Connection refused")
    word = {"fail_over_site_is_dead": True}
    told = dead.play(fail_over_disregard_ssh="away1", **word)
    tries = (dead.site.directory / "ssh.told").read_text()
    assert "-J gate -o ControlPath=none" in tries, "the way there is not to be left out"
    said = " ".join(told.stdout.split())
    assert "away1: it is not dead" not in said
    assert "away2: it is not dead: its SSH answers (Connection refused)" in said
    assert "say so (fail_over_disregard_ssh=away2)" in said
    assert dead.site.first.evacuation.arrived == []
    assert "2 of 2 VMs run" in good(dead.play(fail_over_disregard_ssh="away1, away2", **word)).stdout


def test_fail_over_wants_a_group_for_a_site(dead: DeadSite) -> None:
    told = dead.site.play("fail_over", fail_over_site="away1", fail_over_site_is_dead=True)
    assert told.returncode != 0
    assert "fail_over_site: away1 is no group of this inventory" in " ".join(told.stdout.split())
    assert dead.site.first.evacuation.arrived == []


def test_fail_over_of_some_and_of_none(dead: DeadSite) -> None:
    word = {"fail_over_site_is_dead": True}
    told = good(dead.play("--limit", "away2", **word))
    assert "1 of 1 VMs run" in told.stdout
    assert dead.site.first.evacuation.arrived == []
    unknown = dead.play(fail_over_vms="web1, nosuch", **word)
    assert unknown.returncode != 0
    assert "VM nosuch: no hypervisor of another site has a replica" in " ".join(unknown.stdout.split())
    assert dead.site.first.evacuation.arrived == []
    none = dead.play("--limit", "away1", fail_over_leave_behind="web1", **word)
    assert none.returncode != 0
    assert "0 of 0 VMs run" in " ".join(none.stdout.split())


def test_fail_over_goes_on_where_one_fails_or_a_place_is_silent(dead: DeadSite) -> None:
    inventory = yaml.safe_load((dead.site.directory / "inventory.yml").read_text())
    inventory["hypervisors"]["children"]["home"]["hosts"]["home2"]["evacuation_socket"] = "/none.sock"
    (dead.site.directory / "inventory.yml").write_text(yaml.safe_dump(inventory))
    told = dead.play(fail_over_site_is_dead=True)
    assert told.returncode != 0
    said = " ".join(told.stdout.split())
    assert "1 of 1 VMs run; not reached: home2: control socket /none.sock" in said
    assert [one.name for one in dead.site.first.evacuation.arrived] == ["web1"]
