# SPDX-License-Identifier: GPL-3.0-or-later
"""What is on disk before it is acted on in a restart, a landing and a fail-over: told by the system calls."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from unit.evacuation.test_durability import DEFINITIONS, Trace, state, step
from unit.store.store_driver import VM
from unit.store.test_crashes import finished_calls, first

CHILD = Path(__file__).with_name("other_ways_child.py")
pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


def story(way: str, directory: Path, last: str) -> Trace:
    """What the child did."""
    trace = directory / "trace"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [
        "strace", "-f", "-y", "-s", "20000", "-o", str(trace),
        "-e", "trace=fsync,fdatasync,rename,mkdir,write,pwrite64,pwritev,unlink,open,openat",
        sys.executable, str(CHILD), way, str(directory / "sides"),
    ]  # fmt: skip
    (directory / "sides").mkdir()
    done = subprocess.run(command, check=False, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert done.stdout.decode().splitlines()[-1].startswith(last), done.stdout.decode()
    return Trace(finished_calls(trace.read_text(errors="replace")))


@pytest.fixture(scope="module")
def restart(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """A VM with UEFI variables leaves by restart, and lands."""
    return story("restart", tmp_path_factory.mktemp("restart"), "landed landed")


@pytest.fixture(scope="module")
def fail_over(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """A VM that is off at its home runs from its last generation."""
    return story("fail-over", tmp_path_factory.mktemp("fail-over"), "runs activated")


def test_a_guest_is_asked_to_end_when_that_is_on_record(restart: Trace) -> None:
    """A power cut in the midst of it: what ran is known, only a rollback starts it, and why it ended."""
    asked = restart.told("asked to shut down at home")
    stops = restart.record("home/jobs", "third.json", step("stop") + r'.*\\"was_running\\": true', 0, asked)
    forbidden = restart.record("home/guard", f"{VM}.json", r'\\"cause\\": \\"leaving\\"', stops, asked)
    request = restart.record("home/jobs", "third.json", r'\\"domain_number\\": 7', forbidden, asked)
    assert stops < forbidden < request < asked


def test_images_and_step_are_on_record_before_the_destination_is_asked(restart: Trace) -> None:
    sealed, asked = restart.told("residual sealed"), restart.told("asked prepare")
    image = r'\\"image\\": \\"[^"]*web1\.qcow2'
    residual = restart.record("home/jobs", "third.json", image + ".*" + step("residual"), 0, sealed)
    prepares = r'\\"owes_abort\\": true.*' + step("prepare")
    assert residual < sealed < restart.record("home/jobs", "third.json", prepares, sealed, asked) < asked


def test_it_boots_on_what_is_durable(restart: Trace) -> None:
    asked, defined, started, answered = (
        restart.told(what)
        for what in ("asked prepare", "defined at backup", "started at backup", "answered prepare")
    )
    recorded = restart.record("backup/arrivals", "third.json", state("prepared"), asked, answered)
    forbidden = restart.record("backup/guard", f"{VM}.json", r'\\"cause\\": \\"arrival\\"', recorded, defined)
    overlay = restart.file(f"backup/disks/{VM}/vda-e2-third-arrival.qcow2", asked, defined)
    variables = restart.record("nvram", "web1.fd", "variablesvariables", overlay, defined)
    assert asked < recorded < forbidden < overlay < variables < defined < started < answered


def test_it_is_released_with_its_definition_durable(restart: Trace) -> None:
    started, asked, resumed = (
        restart.told(what) for what in ("started at backup", "asked release", "resumed at backup")
    )
    tombstone = restart.record("home/guard", f"{VM}.json", r'\\"cause\\": \\"moved-away\\"', 0, asked)
    assert tombstone < restart.record("home/jobs", "third.json", step("released"), tombstone, asked) < asked
    released = restart.record("backup/arrivals", "third.json", state("released"), asked, resumed)
    top = restart.file(f"backup/disks/{VM}/vda-e2-third.qcow2", started, released)
    # libvirt has renamed it into its place before: when it made the VM, and when the layer came on top
    named = top + first(restart.calls[top:released], DEFINITIONS)
    assert named < released < resumed


def test_what_is_merged_is_on_record_and_named_by_nothing_before_it_goes(restart: Trace) -> None:
    protected, merging, told, landed = (
        restart.told(what)
        for what in ("way back protected", "merging", "asked allow_commit", "landed landed")
    )
    ended = restart.told("ended done")
    detached = restart.record(f"backup/store/{VM}", "replica.json", r'\\"detached\\": true', ended, protected)
    bases = restart.record(
        "backup/arrivals", "third.json", r'\\"base\\": \\"[^"]*base\.qcow2', detached, protected
    )
    back = r'\\"landing\\": \\"way-back-protected\\"'
    goes_on = restart.record("backup/arrivals", "third.json", back, protected, merging)
    merged = restart.record(
        "backup/arrivals", "third.json", r'\\"merged\\": \[.*g1-1\.qcow2', goes_on, merging
    )
    assert detached < bases < protected < goes_on < merged < merging
    synced = merging + first(restart.calls[merging:told], r"fsync\(\d+<[^>]*/vda/base\.qcow2>\)")
    named = synced + first(restart.calls[synced:told], DEFINITIONS)
    for directory, file in (
        (f"backup/disks/{VM}", "vda-e2-third.qcow2"),
        (f"backup/disks/{VM}", "vda-e2-third-arrival.qcow2"),
        (f"backup/store/{VM}/vda", "g1-1.qcow2"),
    ):
        gone = first(restart.calls, rf'unlink\(".*{re.escape(directory)}/{re.escape(file)}"\) += 0')
        entry = gone + first(restart.calls[gone:told], rf"fsync\(\d+<[^>]*{re.escape(directory)}>\)")
        assert named < gone < entry < told, "a name that came back after a power cut would be merged again"
    assert told < restart.record("backup/arrivals", "third.json", state("landed"), told, landed) < landed


def test_a_home_is_asked_to_give_up_when_who_asks_cannot_forget_it(fail_over: Trace) -> None:
    calls = fail_over.calls
    asked = fail_over.told("asked supersede")
    [job] = {
        found.group(1)
        for call in calls[:asked]
        if (found := re.search(r'rename\(.*backup/arrivals/([0-9a-f]{12})\.json"\) += 0', call))
    }
    started = fail_over.told("started at backup")
    prepared = fail_over.record("backup/arrivals", f"{job}.json", state("prepared"), 0, started)
    word = fail_over.record(
        "backup/arrivals", f"{job}.json", r'\\"activated_by\\": \\"operator\\"', started, asked
    )
    assert prepared < started < word < asked


def test_a_home_gives_up_durably_before_it_ends_anything_and_before_it_says_so(fail_over: Trace) -> None:
    asked, undefined, answered = (
        fail_over.told(what) for what in ("asked supersede", "undefined at home", "answered supersede")
    )
    tombstone = r'\\"cause\\": \\"moved-away\\"'
    given_up = fail_over.record("home/guard", f"{VM}.json", tombstone, asked, undefined)
    assert asked < given_up < undefined
    assert first(fail_over.calls[undefined:answered], DEFINITIONS), "it does not come back with the power"


def test_it_runs_from_a_generation_on_durable_layers_after_its_home_was_told(fail_over: Trace) -> None:
    answered, resumed = fail_over.told("answered supersede"), fail_over.told("resumed at backup")
    name = fail_over.calls[fail_over.told("runs activated")]
    job = re.search(r"runs activated ([0-9a-f]{12})", name)
    assert job is not None
    record = f"{job.group(1)}.json"
    told = fail_over.record("backup/arrivals", record, r'\\"home_told\\": true', answered, resumed)
    released = fail_over.record("backup/arrivals", record, state("released"), told, resumed)
    top = fail_over.file(f"backup/disks/{VM}/vda-e2-{job.group(1)}.qcow2", 0, released)
    named = top + first(fail_over.calls[top:released], DEFINITIONS)
    assert named < released < resumed
    done = fail_over.told("runs activated")
    activated = fail_over.record("backup/arrivals", record, state("activated"), resumed, done)
    gone = activated + first(fail_over.calls[activated:done], rf'unlink\(".*backup/guard/{VM}\.json"\) += 0')
    assert first(fail_over.calls[gone:done], r"fsync\(\d+<[^>]*backup/guard>\)")
