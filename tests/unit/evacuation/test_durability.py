# SPDX-License-Identifier: GPL-3.0-or-later
"""What a side of an evacuation answers, and what it then does, is on disk before: told by the system calls.

SIGKILL keeps the page cache, so that no crash test can see a missing sync; a power cut would.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from unit.store.store_driver import VM
from unit.store.test_crashes import finished_calls, first, last

CHILD = Path(__file__).with_name("hand_off_child.py")
DEFINITIONS = r"fsync\(\d+<[^>]*/definitions>\)"
pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


class Trace:
    """The system calls of a story, in the order in which they returned."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def told(self, what: str, since: int = 0) -> int:
        """Where a line was written to stdout."""
        return since + first(self.calls[since:], rf'write\(1[^,]*, "{re.escape(what)}')

    def record(self, directory: str, name: str, pattern: str, since: int, before: int) -> int:
        """Where the first record ``directory/name`` whose content fits is durable, name and all."""
        span = self.calls[:before]
        beside = re.escape(f"/{directory}/.{name}.new")
        written = since + first(span[since:], rf"write\(\d+<[^>]*{beside}>.*{pattern}")
        synced = written + first(span[written:], rf"fsync\(\d+<[^>]*{beside}>\)")
        renamed = synced + first(span[synced:], rf"rename\(.*{beside}")
        again = [call for call in span[synced + 1 : renamed] if re.search(rf"write\(\d+<[^>]*{beside}", call)]
        assert again == [], "written after it was synced"
        return renamed + first(span[renamed:], rf"fsync\(\d+<[^>]*/{re.escape(directory)}>\)")

    def file(self, path: str, since: int, before: int) -> int:
        """Where a file's content and, after that or before, its name were last synced; nothing was written
        after."""
        span, end = self.calls[since:before], re.escape(path)
        content = last(span, rf"f(data)?sync\(\d+<[^>]*{end}>\)")
        late = [call for call in span[content + 1 :] if re.search(rf"p?write\w*\(\d+<[^>]*{end}>", call)]
        assert late == [], "written after it was synced"
        made = last(self.calls[:before], rf"open(at)?\(.*{end}.*O_CREAT")
        directory = re.escape(str(Path(path).parent))
        name = made + first(self.calls[made:before], rf"fsync\(\d+<[^>]*{directory}>\)")
        return max(since + content, name)

    def directory(self, path: Path, before: int) -> None:
        """A directory was made, and its own name is durable."""
        made = first(self.calls[:before], rf'mkdir\("{re.escape(str(path))}"')
        first(self.calls[made:before], rf"fsync\(\d+<{re.escape(str(path.parent))}>\)")


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trace, Path]:
    """What the child did, and where."""
    directory = tmp_path_factory.mktemp("hand-off")
    trace = directory / "trace"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [
        "strace", "-f", "-y", "-s", "20000", "-o", str(trace),
        "-e", "trace=fsync,fdatasync,rename,mkdir,write,pwrite64,pwritev,unlink,open,openat",
        sys.executable, str(CHILD), str(directory / "sides"),
    ]  # fmt: skip
    (directory / "sides").mkdir()
    done = subprocess.run(command, check=False, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert done.stdout.decode().splitlines()[-1].strip() == "ended done", done.stdout.decode()
    return Trace(finished_calls(trace.read_text(errors="replace"))), directory / "sides"


def state(word: str) -> str:
    return rf'\\"state\\": \\"{word}\\"'


def step(word: str) -> str:
    return rf'\\"step\\": \\"{word}\\",'


def test_prepare_is_asked_and_answered_on_what_is_durable(story: tuple[Trace, Path]) -> None:
    trace, sides = story
    asked, answered = trace.told("asked prepare"), trace.told("answered prepare")
    assert trace.record("home/jobs", "first.json", step("prepare"), 0, asked) < asked
    recorded = trace.record("backup/arrivals", "first.json", state("prepared"), asked, answered)
    forbidden = trace.record("backup/guard", f"{VM}.json", r'\\"cause\\": \\"arrival\\"', asked, answered)
    overlay = trace.file(f"backup/disks/{VM}/vda-e2-first-arrival.qcow2", asked, answered)
    assert asked < recorded < forbidden < overlay < answered, "before anything stands there it must not start"
    for path in (sides / "backup/disks", sides / f"backup/disks/{VM}", sides / "backup/arrivals"):
        trace.directory(path, answered)


def test_what_is_taken_back_is_gone_before_that_is_said(story: tuple[Trace, Path]) -> None:
    trace, _sides = story
    asked, answered, stayed = (trace.told(what) for what in ("asked abort", "answered abort", "stayed"))
    trace.record("home/jobs", "first.json", step("rollback"), 0, asked)
    aborting = trace.record("backup/arrivals", "first.json", state("aborting"), asked, answered)
    undefined = trace.told("undefined at backup")
    assert aborting < trace.told("ended at backup") < undefined
    forgotten = undefined + first(trace.calls[undefined:answered], DEFINITIONS)
    for path in (f"backup/disks/{VM}/vda-e2-first-arrival.qcow2", f"backup/guard/{VM}.json"):
        gone = aborting + first(trace.calls[aborting:answered], rf'unlink\(".*{re.escape(path)}"\) += 0')
        directory = re.escape(str(Path(path).parent))
        assert first(trace.calls[gone:answered], rf"fsync\(\d+<[^>]*{directory}>\)")
        assert forgotten < gone, "a definition that came back would name what is gone, and be in the way"
        assert gone < trace.record("backup/arrivals", "first.json", state("aborted"), gone, answered)
    paid = trace.record("home/jobs", "first.json", r'\\"owes_abort\\": false', answered, stayed)
    assert paid < trace.record("home/jobs", "first.json", step("stayed"), paid, stayed) < stayed


def test_the_source_gives_up_durably_before_it_releases(story: tuple[Trace, Path]) -> None:
    trace, _sides = story
    crossed = trace.told("answered prepare", trace.told("stayed"))
    asked = trace.told("asked release")
    confirms = trace.record("home/jobs", "second.json", step("confirm"), crossed, asked)
    tombstone = trace.record("home/guard", f"{VM}.json", r'\\"cause\\": \\"moved-away\\"', crossed, asked)
    assert confirms < tombstone < trace.record("home/jobs", "second.json", step("released"), tombstone, asked)


def test_a_released_vm_runs_on_durable_images_and_is_durably_activated(story: tuple[Trace, Path]) -> None:
    trace, _sides = story
    asked, resumed, answered = (
        trace.told(what) for what in ("asked release", "resumed at backup", "answered release")
    )
    crossed = trace.told("answered prepare", trace.told("stayed"))
    released = trace.record("backup/arrivals", "second.json", state("released"), asked, resumed)
    # what the migration wrote, which takes the guest's writes for now, and the definition that names it
    assert trace.file(f"backup/disks/{VM}/vda-e2-second-arrival.qcow2", crossed, released) < released
    assert first(trace.calls[asked:released], DEFINITIONS)
    activated = trace.record("backup/arrivals", "second.json", state("activated"), resumed, answered)
    gone = activated + first(trace.calls[activated:answered], rf'unlink\(".*backup/guard/{VM}\.json"\) += 0')
    assert first(trace.calls[gone:answered], r"fsync\(\d+<[^>]*backup/guard>\)")


def test_a_running_vm_changes_over_to_a_layer_that_its_next_start_finds(story: tuple[Trace, Path]) -> None:
    trace, _sides = story
    resumed, changed, tracked = (
        trace.told(what) for what in ("resumed at backup", "layers changed at backup", "tracked from")
    )
    counted = trace.told("counted at backup", resumed)
    named = trace.told("defined at backup", resumed)
    top = trace.file(f"backup/disks/{VM}/vda-e2-second.qcow2", resumed, named)
    durably = named + first(trace.calls[named:changed], DEFINITIONS)
    assert resumed < counted < top < named < durably < changed, "a start finds what it syncs"
    checkpoint = r'\\"checkpoint\\": \\"lifeboat-e2-g2'
    assert trace.record("backup/arrivals", "second.json", checkpoint, changed, tracked) < tracked


def test_the_source_forgets_nothing_before_it_has_noted_that_it_runs_there(story: tuple[Trace, Path]) -> None:
    trace, _sides = story
    answered, undefined = trace.told("answered release"), trace.told("undefined at home")
    assert trace.record("home/jobs", "second.json", step("finish"), answered, undefined) < undefined
    ended = trace.told("ended done")
    forgotten = undefined + first(trace.calls[undefined:ended], DEFINITIONS)
    done = trace.record("home/jobs", "second.json", step("done"), forgotten, ended)
    base = trace.record(f"home/store/{VM}", "replica.json", r"web1\.qcow2", undefined, done)
    first(trace.calls[:done], r"fsync\(\d+<[^>]*home/store>\)")
    assert base < trace.told("protection forgotten") < done, "the way back has its base"
