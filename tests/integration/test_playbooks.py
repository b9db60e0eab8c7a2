# SPDX-License-Identifier: GPL-3.0-or-later
"""The playbooks as an operator runs them, on both sites: protect, look, judge, evacuate, again, and back.

One story of three VMs, told in the order of the tests: each begins where the one before it ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from integration.lab_host import lab_host
from integration.playbook_runner import INSTALLED, ROOT, PlaybookResult
from integration.run_watch import none_twice
from integration.site_crowd import forget_all, wait_until
from lifeboat_lab.errors import LabError
from lifeboat_lab.guests.guests import Guest
from lifeboat_lab.guests.plan import GuestPlan
from lifeboat_lab.lab import Lab
from lifeboat_lab.proxy import Proxy

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

RunPlaybook = Callable[..., PlaybookResult]
WEB, DATABASE, FILES = "web one", "datenbank-ü", "files"
HOMES = {WEB: "home1", DATABASE: "home1", FILES: "home2"}
PEERS = {"home1": "backup1", "home2": "backup2"}
SCHEMA = json.loads((ROOT / "docs" / "evacuation-report.schema.json").read_text())


class Story:
    """The lab, its guests, and how to run playbooks and read what became of it."""

    def __init__(self, lab: Lab, playbook: RunPlaybook, guests: dict[str, Guest]) -> None:
        self.lab, self.guests = lab, guests
        self._playbook = playbook

    def play(
        self,
        name: str,
        *,
        check: bool = False,
        limit: str = "",
        options: tuple[str, ...] = (),
        **variables: Any,
    ) -> PlaybookResult:
        wanted = {
            host: [
                {"name": vm, "rpo": "5m", "priority": 90 if vm == DATABASE else 50}
                for vm, home in HOMES.items()
                if home == host
            ]
            for host in PEERS
        }
        variables = {
            "site_vms": wanted,
            "lifeboat_vms": "{{ site_vms[inventory_hostname] | default([]) }}",
            "evacuate_report": str(self.report_path),
            **variables,
        }
        options += ("--limit", limit) if limit else ()
        return self._playbook(name, variables=variables, check=check, options=options)

    @property
    def report_path(self) -> Path:
        return self.lab.settings.state / "evacuation-report.json"

    def report(self) -> dict[str, Any]:
        """The report of the last evacuation, as documented."""
        report: dict[str, Any] = json.loads(self.report_path.read_text())
        jsonschema.validate(report, SCHEMA)
        return report

    def verdicts(self) -> dict[str, str]:
        """Of our VMs; the hosts may remember others."""
        return {vm["name"]: vm["verdict"] for vm in self.report()["vms"] if vm["name"] in HOMES}

    def proxy(self, host: str) -> Proxy:
        return Proxy(self.lab.host(host))

    def begun(self, host: str) -> set[str]:
        """Names of the VMs whose evacuation a host has begun."""
        return HOMES.keys() & {job["name"] for job in self.proxy(host).get("/evacuations")["evacuations"]}

    def where(self) -> dict[str, list[str]]:
        """Where each VM runs now."""
        return {name: guest.running_on() for name, guest in self.guests.items()}


@pytest.fixture(scope="module")
def story(lab: Lab, lab_playbook: RunPlaybook, site_setup: PlaybookResult) -> Iterator[Story]:
    """Both sites set up, three VMs running at home; one of them starts with its host."""
    assert site_setup.return_code == 0
    if not {"home1", "home2", "backup1", "backup2"} <= set(lab.settings.hosts):
        pytest.skip("needs all four hosts of the lab")
    forget_all(lab)
    for left in lab.guests.all():
        left.remove()
    guests = {}
    for name, home in HOMES.items():
        plan = GuestPlan(name, workload="idle", disk_mib=32, content_mib=8)
        guests[name] = lab.guests.define(home, plan)
        guests[name].start()
    lab.exec("home2", "virsh", "autostart", FILES)
    for guest in guests.values():
        guest.wait_ready()
    yield Story(lab, lab_playbook, guests)
    forget_all(lab)
    for guest in guests.values():
        guest.remove()


@pytest.fixture(autouse=True)
def none_runs_twice(story: Story) -> Iterator[None]:
    """Whatever a test does, all hosts are asked all the time who runs its VMs."""
    with none_twice(story.lab, {guest.plan.uuid for guest in story.guests.values()}):
        yield


def test_protect_tells_does_and_does_nothing_twice(story: Story) -> None:
    dry = story.play("protect", check=True).require_success()
    assert dry.changed == 2
    assert all(story.proxy(host).get("/vms")["vms"] == [] for host in PEERS)
    assert "enable" in story.lab.exec("home2", "virsh", "dominfo", FILES).stdout.split("Autostart:")[1]
    done = story.play("protect", lifeboat_vms_wait=True).require_success()
    assert done.changed == 2
    again = story.play("protect").require_success()
    assert again.changed_tasks == []
    assert story.play("protect", check=True).require_success().changed_tasks == []
    # libvirt's own mark is ours while the VM is protected: a host that comes back starts nothing by itself.
    assert "disable" in story.lab.exec("home2", "virsh", "dominfo", FILES).stdout.split("Autostart:")[1]
    assert [vm["autostart"] for vm in story.proxy("home2").get("/vms")["vms"]] == [True]


@pytest.mark.parametrize(
    ("vms", "told"),
    [
        ([{"name": "nosuch"}], ["VM nosuch", "not defined on this host", "virsh list --all"]),
        ([{"name": WEB, "peer": "nowhere"}], ["peer 'nowhere'", "has no such peer", "it has: backup1"]),
        ([{"name": WEB, "peer": "home1"}], ["is this proxy itself", "name a peer at another site"]),
        ([{"name": WEB, "rpo": 0}], ["rpo_seconds", "1.0 s"]),
        ([{"name": WEB, "rpo": "soon"}], ["rpo_seconds", "soon"]),
        ([{"name": WEB, "disks": ["vdz"]}], ["disk vdz", "no such disk", "name some of: vda"]),
        ([{"name": WEB, "priority": 500}], ["priority", "500"]),
        ([{"name": WEB, "rpo": "5s"}, {"name": "nosuch"}], ["VM nosuch"]),
    ],
    ids=["vm", "peer", "self", "rpo-0", "rpo-text", "disk", "priority", "second-of-two"],
)
def test_protect_refuses_bad_input_with_a_sentence_and_changes_nothing(
    story: Story, vms: list[dict[str, Any]], told: list[str]
) -> None:
    before = story.proxy("home1").get("/vms")["vms"]
    result = story.play("protect", limit="home1", lifeboat_vms=vms)
    assert result.return_code != 0
    assert result.changed_tasks == []
    for words in told:
        assert words in result.output
    settings = ("name", "peer", "rpo_seconds", "priority", "disks")
    after = story.proxy("home1").get("/vms")["vms"]
    assert [[vm[key] for key in settings] for vm in after] == [[vm[key] for key in settings] for vm in before]


def test_status_and_validate_find_all_well_and_change_nothing(story: Story) -> None:
    for playbook in ("replication_status", "validate"):
        result = story.play(playbook).require_success()
        assert result.changed_tasks == []


def test_awx_runs_a_playbook_by_ansible_runner(story: Story, tmp_path: Path) -> None:
    """What AWX does: a private data directory, the collection by its path, events instead of text."""
    for name in ("project", "inventory", "env"):
        (tmp_path / name).mkdir()
    (tmp_path / "project" / "status.yml").write_text(
        "- import_playbook: lifeboat.evacuation.replication_status\n"
    )
    told = json.loads((story.lab.settings.runtime / "inventory.json").read_text())
    hosts = tmp_path / "inventory" / "hosts.py"
    hosts.write_text(f"#!/usr/bin/python3\nimport json\nprint(json.dumps({told!r}))\n")
    hosts.chmod(0o755)
    runner = ROOT / ".venv" / "bin" / "ansible-runner"
    done = subprocess.run(
        story.lab.command(
            "controller",
            [str(runner), "run", str(tmp_path), "-p", "status.yml", "--ident", "one", "--json"],
        ),
        env={
            **os.environ,
            "ANSIBLE_COLLECTIONS_PATH": str(INSTALLED),
            "ANSIBLE_HOME": str(tmp_path / "home"),
            "PATH": f"{runner.parent}:{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    artifacts = tmp_path / "artifacts" / "one"
    assert (artifacts / "status").read_text() == "successful"
    events = [json.loads(path.read_text()) for path in (artifacts / "job_events").glob("*.json")]
    statistics = next(event for event in events if event["event"] == "playbook_on_stats")["event_data"]
    assert set(statistics["ok"]) == {"home1", "home2", "backup1", "backup2"}
    assert statistics["changed"] == {}


def test_evacuate_wants_the_site_and_says_what_it_would_do(story: Story) -> None:
    refused = story.play("evacuate")
    assert refused.return_code != 0
    assert "evacuate_site: is not set; name the site to empty" in refused.messages
    unknown = story.play("evacuate", evacuate_site="home", evacuate_vms=[WEB, "nosuch"])
    assert unknown.return_code != 0
    assert "nosuch: neither protected on nor evacuated from" in unknown.messages
    would = story.play("evacuate", check=True, evacuate_site="home").require_success()
    assert len(would.changed_tasks) == 1, "it would begin"
    assert story.verdicts() == dict.fromkeys(HOMES, "would-start")
    assert story.where() == {name: [home] for name, home in HOMES.items()}
    assert all(story.begun(host) == set() for host in PEERS)


def test_a_list_of_vms_with_one_hypervisor_out_of_reach_is_a_verdict(story: Story) -> None:
    # Nobody has this address on the controller's network.
    lost = {"all": {"hosts": {"home2": {"ansible_host": "2001:db8:ff::dead"}}}}
    inventory = story.lab.settings.state / "lost.json"
    inventory.write_text(json.dumps(lost))
    options = ("-i", str(inventory))
    result = story.play("evacuate", options=options, evacuate_site="home", evacuate_vms=f"{WEB},{FILES}")
    judged = story.play("validate", options=options, evacuate_site="home")
    assert result.return_code != 0
    assert f"1 of 2 VMs are out; not out: {FILES}; not reached: home2" in result.messages
    report = story.report()
    assert story.verdicts() == {WEB: "evacuated", FILES: "failed"}
    assert next(vm["cause"] for vm in report["vms"] if vm["name"] == FILES) == "unreachable"
    assert report["hosts_failed"] == ["home2"]
    assert story.guests[WEB].running_on() == ["backup1"]
    assert story.guests[DATABASE].running_on() == ["home1"]
    assert judged.return_code != 0
    assert "home2: not reached" in judged.messages


def test_a_run_that_was_interrupted_is_carried_on_by_the_next(story: Story) -> None:
    """Ctrl-C takes the controller away, not the jobs."""
    canaries = {name: story.guests[name].canary() for name in HOMES}
    controller = story.lab.command(
        "controller",
        [
            str(ROOT / ".venv" / "bin" / "ansible-playbook"), "-i", str(ROOT / "inventories" / "lab"),
            "-e", "evacuate_site=home", "-e", "evacuate_report=", "lifeboat.evacuation.evacuate",
        ],
    )  # fmt: skip
    environment = {
        **os.environ,
        "ANSIBLE_COLLECTIONS_PATH": str(INSTALLED),
        "ANSIBLE_HOME": str(story.lab.settings.state / "ansible-home"),
        "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}",
    }
    process = subprocess.Popen(
        controller, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=story.lab.settings.state,
    )  # fmt: skip
    try:
        wait_until(
            lambda: any(
                job["name"] == DATABASE for job in story.proxy("home1").get("/evacuations")["evacuations"]
            ),
            "the evacuation has begun",
        )
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode != 0
    assert "Traceback" not in output, output[-3000:]

    result = story.play("evacuate", evacuate_site="home").require_success()
    assert story.verdicts()[WEB] == "already-there"
    assert set(story.verdicts().values()) <= {"evacuated", "already-there"}
    assert story.report()["totals"]["all_out"] is True
    assert result.return_code == 0
    for name, guest in story.guests.items():
        assert guest.running_on() == [PEERS[HOMES[name]]]
        assert guest.canary() == canaries[name], "memory"
        assert guest.told().doubled_beats <= 1


def test_a_second_run_changes_nothing_and_is_content(story: Story) -> None:
    again = story.play("evacuate", evacuate_site="home").require_success()
    assert again.changed_tasks == []
    assert story.verdicts() == dict.fromkeys(HOMES, "already-there")
    dry = story.play("evacuate", check=True, evacuate_site="home").require_success()
    assert dry.changed_tasks == []
    limited = story.play("evacuate", limit="home2", evacuate_site="home").require_success()
    assert limited.changed_tasks == []
    assert story.verdicts() == {FILES: "already-there"}


def test_a_home_host_that_comes_back_starts_nothing_that_runs_elsewhere(story: Story) -> None:
    """Not by its proxy, and not by libvirt either, should the old definition be there."""
    guest = story.guests[FILES]
    home = lab_host(story.lab, "home2")
    definition = story.lab.exec("backup2", "virsh", "dumpxml", "--inactive", guest.plan.uuid).stdout
    there = next(iter(guest.images("backup2").values()))[0]
    stale = definition.replace(there, guest.plan.disk_path("vda"))
    (story.lab.host("home2").root / "var/tmp/stale.xml").write_text(stale)
    home.check_output("virsh define /var/tmp/stale.xml")
    home.check_output("virsh autostart %s", guest.plan.uuid)
    refused = home.run("virsh start %s", guest.plan.uuid)
    assert refused.rc != 0
    assert "runs there" in refused.stderr

    story.lab.kill_host("home2")
    story.lab.start_host("home2")
    wait_until(lambda: home.run("precache-proxy status --json").rc == 0, "home2's proxy answers")
    wait_until(
        lambda: any(link["state"] == "up" for link in story.proxy("home2").get("/links")["links"]), "link up"
    )
    # libvirt's autostart has been tried by the time that libvirt answers.
    assert home.check_output("virsh list --name").strip() == ""
    assert guest.running_on() == ["backup2"]
    told = home.check_output("journalctl -b --no-pager -u libvirtd")
    assert "runs there" in told, "the hook has said why"
    home.check_output("virsh undefine %s", guest.plan.uuid)
    assert guest.verify("backup2").intact


def test_back_home_by_the_same_playbook_with_autostart_as_it_was(story: Story) -> None:
    peer = story.proxy("backup2")

    def protected() -> bool:
        try:
            told = peer.vm(story.guests[FILES].plan.uuid)
        except LabError:
            return False
        return bool(told["state"] == "protected" and told["generation"])

    wait_until(protected, "the way back is protected")
    assert peer.vm(story.guests[FILES].plan.uuid)["autostart"] is True
    story.play("evacuate", evacuate_site="backup", evacuate_vms=[FILES]).require_success()
    assert story.guests[FILES].running_on() == ["home2"]
    home = story.proxy("home2")
    uuid = story.guests[FILES].plan.uuid

    def landed() -> bool:
        arrivals = home.get("/arrivals")["arrivals"]
        return any((arrival["vm"], arrival["state"]) == (uuid, "landed") for arrival in arrivals)

    wait_until(landed, "it has landed")
    assert home.vm(uuid)["autostart"] is True
    home.unprotect(uuid, keep_replica=True)
    assert "enable" in story.lab.exec("home2", "virsh", "dominfo", uuid).stdout.split("Autostart:")[1]
