# SPDX-License-Identifier: GPL-3.0-or-later
"""Records are replaced as a whole, also by two writers at once."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from precache_proxy import durable
from precache_proxy.errors import IntegrityError
from precache_proxy.store.record import ReplicaRecord
from precache_proxy.store.replica import Replica
from precache_proxy.store.settings import StoreSettings
from unit.store.test_crashes import finished_calls, first, last


def test_two_writers_at_once_leave_one_whole_record_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    failures: list[Exception] = []
    # of very different length: a mix of two would not be JSON
    values = [{"writer": number, "filling": "x" * 40_000 * number} for number in range(4)]
    ready = threading.Barrier(len(values))

    def write(value: dict[str, object]) -> None:
        ready.wait()
        try:
            for _ in range(25):
                durable.write_json(path, value)
                assert durable.read_json(path) in values
        except (OSError, AssertionError, IntegrityError) as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(value,)) for value in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert durable.read_json(path) in values
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


def test_what_a_killed_writer_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".record.json.new").write_text(json.dumps(["half"] * 1000)[:500])
    durable.write_json(tmp_path / "record.json", {"a": 1})
    assert durable.read_json(tmp_path / "record.json") == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


WRITERS = """
import sys
from pathlib import Path
from precache_proxy.evacuation.guard import TOMBSTONE, Forbidden, Guard
from precache_proxy.evacuation.job import Job, Journal
from precache_proxy.source.record import ProtectionRecord
from precache_proxy import durable
state = Path(sys.argv[1])
def told(what): print(what, flush=True)
durable.make_directory(state / "source", 0o750)
ProtectionRecord("vm", "web1", "backup1", 15.0).write(state / "source"); told("protection")
Journal(state / "jobs").save(Job(id="job", vm="vm", name="web1", peer="backup1", epoch=1, commanded_at=1.0))
told("job")
guard = Guard(state, state / "run"); guard.prepare_directories()
guard.forbid(Forbidden("vm", TOMBSTONE, "it runs there", "job", 1)); told("tombstone")
guard.allow("vm", job="job"); told("lifted")
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_what_a_record_says_is_synced_before_anybody_acts_on_it(tmp_path: Path) -> None:
    """Content, name, directory and the directory's own name, as the system calls tell."""
    trace, state = tmp_path / "trace", tmp_path / "state"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [
        "strace", "-f", "-y", "-s", "200", "-e", "trace=fsync,fdatasync,rename,mkdir,write,unlink",
        "-o", str(trace), sys.executable, "-c", WRITERS, str(state),
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    calls = finished_calls(trace.read_text(errors="replace"))
    for told, directory, name in (
        ("protection", "source", "vm"), ("job", "jobs", "job"), ("tombstone", "guard", "vm"),
    ):  # fmt: skip
        acted = first(calls, rf'write\(1[^,]*, "{told}')
        span = calls[:acted]
        made = first(span, rf'mkdir\("{re.escape(str(state))}/{directory}"')
        above = first(span[made:], rf"fsync\(\d+<{re.escape(str(state))}>\)") + made
        content = last(span, rf"fsync\(\d+<[^>]*/{directory}/\.{name}\.json\.new>\)")
        renamed = last(span, rf"rename\(.*/{directory}/\.{name}\.json\.new")
        entry = last(span, rf"fsync\(\d+<[^>]*/{directory}>\)")
        assert made < above < content < renamed < entry, told
        between = [
            call for call in calls[content + 1 : renamed] if f".{name}.json.new" in call and "write" in call
        ]
        assert between == [], "written after it was synced"
    gone = first(calls, r'unlink\(".*/guard/vm\.json"\)')
    assert first(calls[gone:], r"fsync\(\d+<[^>]*/guard>\)") + gone < first(calls, r'write\(1[^,]*, "lifted')


async def test_a_blob_that_a_killed_process_left_is_synced_before_a_record_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kill came after it had its name, and before that was durable; a power cut may come at any time."""
    record = ReplicaRecord(vm="vm", name="web1", peer="home1", epoch=1, disks={})
    content = b"<domain/>"
    await Replica(tmp_path, tmp_path, StoreSettings(1, 0), record).keep_blob(content)
    synced: list[Path] = []
    sync = durable.sync_directory

    def note(directory: Path) -> None:
        synced.append(directory)
        sync(directory)

    monkeypatch.setattr(durable, "sync_directory", note)
    after = Replica(tmp_path, tmp_path, StoreSettings(1, 0), record)
    digest = await after.keep_blob(content)
    assert synced == [tmp_path / "blobs", tmp_path]
    await after.keep_blob(content)
    assert len(synced) == 2, "each pass keeps its definition: not synced each time"
    (tmp_path / "blobs" / digest).unlink()
    await after.keep_blob(content)
    assert (tmp_path / "blobs" / digest).read_bytes() == content
    assert synced[2:] == [tmp_path / "blobs", tmp_path]


async def test_who_is_cancelled_in_a_write_goes_when_it_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    begun, may_end = threading.Event(), threading.Event()

    def write() -> None:
        begun.set()
        assert may_end.wait(10)
        durable.write_json(path, {"last": "word"})

    async def unprotect() -> None:
        saving = asyncio.create_task(durable.to_its_end(write))
        await asyncio.to_thread(begun.wait, 10)
        for _ in range(2):
            saving.cancel()
            await asyncio.sleep(0.05)
        assert not saving.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await saving
        durable.remove(path)

    await unprotect()
    await asyncio.sleep(0.1)
    assert list(tmp_path.iterdir()) == [], "nothing is written behind it"


async def test_an_error_of_a_write_goes_before_the_cancellation(tmp_path: Path) -> None:
    may_end = threading.Event()

    def write() -> None:
        assert may_end.wait(10)
        durable.write_json(tmp_path / "nowhere" / "record.json", {})

    saving = asyncio.create_task(durable.to_its_end(write))
    await asyncio.sleep(0.05)
    saving.cancel()
    may_end.set()
    with pytest.raises(FileNotFoundError):
        await saving
