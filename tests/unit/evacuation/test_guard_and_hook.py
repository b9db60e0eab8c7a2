# SPDX-License-Identifier: GPL-3.0-or-later
"""What forbids a start, and the libvirt hook that reads it: run as libvirt runs it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from precache_proxy.errors import IntegrityError
from precache_proxy.evacuation.guard import ARRIVAL, TOMBSTONE, Forbidden, Guard, hook_findings

HOOK = Path(__file__).parents[3] / "roles/precache_proxy/files/libvirt_hook/lifeboat"
VM = "11111111-2222-4333-8444-555555555501"
XML = f"<domain type='qemu'><name>web ä1</name><uuid>{VM.upper()}</uuid><memory>1</memory></domain>"


class Host:
    """A state and a run directory, and the hook on them."""

    def __init__(self, directory: Path) -> None:
        self.state, self.run = directory / "state", directory / "run"
        self.guard = Guard(self.state, self.run)
        self.state.mkdir()
        self.guard.prepare_directories()
        self.configuration = directory / "precache_proxy.toml"
        self.configuration.write_text(
            f'name = "home1"\n[paths]\nstate = "{self.state}"\nrun = "{self.run}"\n', encoding="utf-8"
        )

    def hook(self, *operation: str, xml: str = XML) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-IS", HOOK, "web ä1", *operation],
            input=xml,
            env={"LIFEBOAT_CONFIGURATION": str(self.configuration)},
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )

    def start(self) -> subprocess.CompletedProcess[str]:
        return self.hook("prepare", "begin", "-")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def forbidden(cause: str = TOMBSTONE, job: str = "job1") -> Forbidden:
    return Forbidden(VM, cause, "VM web ä1 runs at backup1; do not start it here.", job, 1)


def test_a_vm_that_nothing_forbids_starts(host: Host) -> None:
    assert host.start().returncode == 0


def test_a_configuration_that_names_paths_and_cannot_be_read_is_no_permission(host: Host) -> None:
    host.configuration.write_text("[paths]\nstate = \n")
    refused = host.start()
    assert refused.returncode == 1
    assert f"{host.configuration} cannot be read" in refused.stderr
    host.configuration.unlink()
    assert host.start().returncode == 0


def test_a_tombstone_refuses_the_start_with_its_sentence(host: Host) -> None:
    host.guard.forbid(forbidden())
    refused = host.start()
    assert refused.returncode == 1
    assert refused.stderr == "VM web ä1 runs at backup1; do not start it here.\n"
    assert refused.stdout == ""


@pytest.mark.parametrize(
    "operation", [("start", "begin", "-"), ("stopped", "end", "-"), ("migrate", "begin", "-")]
)
def test_other_operations_pass_and_change_nothing(host: Host, operation: tuple[str, ...]) -> None:
    host.guard.forbid(forbidden())
    passed = host.hook(*operation)
    # what the hook prints for `migrate` would replace the definition
    assert (passed.returncode, passed.stdout) == (0, "")


def test_the_incoming_migration_passes_until_it_has_arrived(host: Host) -> None:
    host.guard.forbid(forbidden(ARRIVAL))
    host.guard.let_arrive(VM)
    assert host.start().returncode == 0
    host.guard.arrived(VM)
    assert host.start().returncode == 1


def test_our_own_start_passes_once(host: Host) -> None:
    host.guard.forbid(forbidden(ARRIVAL))
    host.guard.let_start(VM, 60)
    assert host.start().returncode == 0
    assert host.start().returncode == 1, "whoever comes after us"
    host.guard.let_start(VM, 60)
    host.guard.arrived(VM)
    assert host.start().returncode == 1, "our start failed before it came to the hook"


def test_a_start_that_was_let_through_too_long_ago_or_by_a_dead_process_is_refused(host: Host) -> None:
    host.guard.forbid(forbidden(ARRIVAL))
    host.guard.let_start(VM, 0)
    assert host.start().returncode == 1
    host.guard.let_start(VM, 60)
    path = host.run / "arriving" / VM
    gone = subprocess.Popen(["true"])
    gone.wait()
    path.write_text(path.read_text().replace(path.read_text().split()[0], str(gone.pid), 1))
    assert host.start().returncode == 1
    path.write_text("neither a process nor a time")
    assert host.start().returncode == 1


def test_a_reboot_ends_the_exception_but_not_the_guard(host: Host) -> None:
    host.guard.forbid(forbidden(ARRIVAL))
    host.guard.let_arrive(VM)
    for path in (host.run / "arriving").iterdir():
        path.unlink()  # tmpfs
    assert host.start().returncode == 1


def test_a_broken_guard_file_forbids(host: Host) -> None:
    (host.state / "guard" / f"{VM}.json").write_text('{"sent')
    refused = host.start()
    assert refused.returncode == 1
    assert "cannot be read" in refused.stderr
    with pytest.raises(IntegrityError):
        host.guard.forbidden(VM)


def test_a_guard_directory_that_cannot_be_searched_forbids(host: Host) -> None:
    (host.state / "guard").rmdir()
    (host.state / "guard").write_text("not a directory")
    refused = host.start()
    assert refused.returncode == 1
    assert "cannot be read" in refused.stderr


def test_only_the_job_that_forbade_allows_again(host: Host) -> None:
    host.guard.forbid(forbidden(job="job2"))
    host.guard.allow(VM, job="job1")
    assert host.start().returncode == 1
    host.guard.allow(VM, job="job2")
    assert host.start().returncode == 0


def test_another_vm_is_not_concerned(host: Host) -> None:
    host.guard.forbid(forbidden())
    assert host.hook("prepare", "begin", "-", xml=XML.replace("01</uuid>", "02</uuid>")).returncode == 0


def ticks(pid: int) -> int:
    """When a process began, in clock ticks since boot."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def test_readers_of_the_images_are_ended_and_waited_for(host: Host) -> None:
    process, other = subprocess.Popen(["sleep", "60"]), subprocess.Popen(["sleep", "60"])
    gone = subprocess.Popen(["true"])
    gone.wait()
    try:
        (host.run / "readers").mkdir()
        # `other` has a number that was reused: it began at another time, and is not ours to end
        noted = {
            "pids": [gone.pid, process.pid, other.pid],
            "ticks": [1, ticks(process.pid), ticks(other.pid) - 1],
        }
        (host.run / "readers" / f"{VM}.json").write_text(json.dumps(noted))
        assert host.start().returncode == 0
        assert process.wait(timeout=5) == -9
        assert other.poll() is None
    finally:
        for one in (process, other):
            one.kill()
            one.wait()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"pids": 7, "ticks": []}', '{"pids": [0, -1, 99999999], "ticks": [1, 2, 3]}']
)
def test_a_note_of_readers_that_cannot_be_read_keeps_no_vm_from_starting(host: Host, text: str) -> None:
    for kind in ("readers", "changing"):
        (host.run / kind).mkdir()
        (host.run / kind / f"{VM}.json").write_text(text)
    passed = host.start()
    assert (passed.returncode, passed.stderr) == (0, "")


def test_the_hook_is_quick(host: Host) -> None:
    host.guard.forbid(forbidden())
    host.start()
    took = []
    for _ in range(5):
        began = time.process_time_ns(), time.monotonic()
        host.start()
        took.append(time.monotonic() - began[1])
    print(f"hook: {min(took) * 1000:.0f} ms at best of {len(took)}")
    # a bound against blunders (a heavy import), not a benchmark
    assert min(took) < 1.0


def test_a_host_without_the_hook_is_told(tmp_path: Path) -> None:
    assert "nothing refuses" in hook_findings("source", tmp_path)[0].fact
    hook = tmp_path / "lifeboat"
    hook.write_text("#!/bin/sh\n")
    assert hook_findings("source", tmp_path), "not executable: libvirt would not run it"
    hook.chmod(0o755)
    assert hook_findings("source", tmp_path) == []


def test_only_what_left_for_good_is_told_as_moved_away(host: Host) -> None:
    assert host.guard.tombstones() == []
    host.guard.forbid(forbidden(ARRIVAL))
    assert host.guard.tombstones() == []
    gone = replace(forbidden(), name="web ä1", peer="backup1")
    host.guard.forbid(gone)
    assert host.guard.tombstones() == [gone]
    # One that nobody can read forbids its start, and does not hide the others.
    (host.guard.directory / f"{VM[:-1]}2.json").write_text("{")
    (host.guard.directory / f"{VM[:-1]}3.json").write_text("{}")
    assert host.guard.tombstones() == [gone]
    # written by a release that did not name it
    record = json.loads((host.guard.directory / f"{VM}.json").read_text())
    del record["name"], record["peer"]
    (host.guard.directory / f"{VM}.json").write_text(json.dumps(record))
    assert host.guard.tombstones() == [replace(gone, name="", peer="")]
