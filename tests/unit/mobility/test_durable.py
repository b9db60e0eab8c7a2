# SPDX-License-Identifier: GPL-3.0-or-later
"""The journal: what was committed is there again, whatever ended the process."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from mobility_agent import durable
from mobility_agent.durable import Journal, raise_counter


async def test_what_was_committed_is_there_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    assert journal.open() == {}
    journal.put("a", {"epoch": 1})
    journal.put("b", {"epoch": 2})
    journal.put("a", {"epoch": 3})
    journal.remove("b")
    await journal.commit()
    # No close: as after a kill.
    assert Journal(tmp_path / "journal").open() == {"a": {"epoch": 3}}


async def test_a_torn_last_line_and_a_damaged_one_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.open()
    for key in ("a", "b", "c"):
        journal.put(key, {"of": key})
    journal.close()
    content = path.read_bytes()
    damaged = content.replace(b'"b"', b'"x"', 1)
    path.write_bytes(damaged[:-5])
    assert Journal(path).open() == {"a": {"of": "a"}}
    assert "line 2 is damaged" in caplog.text
    assert "the last line is damaged" in caplog.text


async def test_many_callers_share_few_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs: list[int] = []
    real = os.fdatasync

    def counted(descriptor: int) -> None:
        syncs.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(durable.os, "fdatasync", counted)
    journal = Journal(tmp_path / "journal")
    journal.open()

    async def change(number: int) -> None:
        journal.put(str(number), {"n": number})
        await journal.commit()

    await asyncio.gather(*(change(number) for number in range(1000)))
    assert len(syncs) < 10
    assert len(Journal(tmp_path / "journal").open()) == 1000


async def test_a_caller_returns_only_after_its_own_change_is_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.open()
    for number in range(50):
        journal.put("key", {"n": number})
        first = asyncio.create_task(journal.commit())
        await asyncio.sleep(0)
        journal.put("other", {"n": number})
        await journal.commit()
        assert f'["other",{{"n":{number}}}]' in (tmp_path / "journal").read_text()
        await first


async def test_the_file_does_not_grow_for_ever(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.open()
    for round_number in range(30):
        for number in range(500):
            journal.put(str(number % 5), {"n": number, "round": round_number})
        await journal.commit()
    assert (tmp_path / "journal").read_bytes().count(b"\n") < 6000
    journal.put("last", {})
    await journal.commit()
    records = Journal(tmp_path / "journal").open()
    assert len(records) == 6
    assert records["4"] == {"n": 499, "round": 29}


def test_the_restart_counter_rises(tmp_path: Path) -> None:
    path = tmp_path / "restarts"
    assert [raise_counter(path) for _ in range(3)] == [1, 2, 3]
    path.write_text("garbage")
    assert raise_counter(path) == 1


async def test_a_full_disk_is_told_and_later_changes_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "journal")
    journal.open()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "fdatasync", full)
        journal.put("a", {})
        with pytest.raises(OSError, match="No space"):
            await journal.commit()
    journal.put("b", {})
    await journal.commit()
    assert set(Journal(tmp_path / "journal").open()) == {"a", "b"}


async def test_a_write_that_the_disk_took_half_of_is_no_success_and_harms_nothing_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "journal")
    journal.open()
    whole = durable.os.write
    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "write", lambda file, data: whole(file, data[: len(data) // 2]))
        journal.put("a", {"n": 1})
        with pytest.raises(OSError, match="octets fitted"):
            await journal.commit()
    journal.put("b", {})
    await journal.commit()
    assert Journal(tmp_path / "journal").open() == {"a": {"n": 1}, "b": {}}


@contextmanager
def held_replacement(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """(a whole file's replacement has begun, let it go on): a disk that takes its time."""
    begun, go_on = threading.Event(), threading.Event()
    whole = durable.write_whole

    def held(path: Path, content: bytes) -> None:
        begun.set()
        assert go_on.wait(20)
        whole(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "write_whole", held)
        try:
            yield begun, go_on
        finally:
            go_on.set()


def long_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Journal:
    """One whose next write replaces its file."""
    monkeypatch.setattr(durable, "_SPARE_LINES", 4)
    journal = Journal(tmp_path / "journal")
    journal.open()
    for number in range(20):
        journal.put("a", {"n": number})
    return journal


async def test_the_loop_goes_on_while_the_file_is_replaced_and_what_is_put_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = long_journal(tmp_path, monkeypatch)
    with held_replacement(monkeypatch) as (begun, go_on):
        first = asyncio.create_task(journal.commit())
        assert await asyncio.to_thread(begun.wait, 20)
        # As a heartbeat would: had the replacement the loop's thread, none of this would be reached.
        journal.put("a", {"n": "newer"})
        journal.put("b", {})
        second = asyncio.create_task(journal.commit())
        await asyncio.sleep(0.05)
        assert (first.done(), second.done()) == (False, False), "nothing of it is durable yet"
        go_on.set()
        await asyncio.gather(first, second)
    assert (tmp_path / "journal").read_bytes().count(b"\n") == 3
    assert Journal(tmp_path / "journal").open() == {"a": {"n": "newer"}, "b": {}}


async def test_closing_waits_for_a_replacement_and_loses_nothing_of_what_came_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = long_journal(tmp_path, monkeypatch)
    with held_replacement(monkeypatch) as (begun, go_on):
        commit = asyncio.create_task(journal.commit())
        assert await asyncio.to_thread(begun.wait, 20)
        journal.put("b", {})
        threading.Timer(0.1, go_on.set).start()
        journal.close()
    assert Journal(tmp_path / "journal").open() == {"a": {"n": 19}, "b": {}}
    await commit


async def test_closing_writes_what_no_thread_has_taken_up_yet(tmp_path: Path) -> None:
    busy = threading.Event()
    pool = ThreadPoolExecutor(1)
    asyncio.get_running_loop().set_default_executor(pool)
    occupied = asyncio.create_task(asyncio.to_thread(busy.wait, 20))
    journal = Journal(tmp_path / "journal")
    journal.open()
    await asyncio.sleep(0.01)
    journal.put("a", {})
    commit = asyncio.create_task(journal.commit())
    await asyncio.sleep(0.01)
    journal.close()
    assert Journal(tmp_path / "journal").open() == {"a": {}}
    busy.set()
    await commit
    await occupied
    assert Journal(tmp_path / "journal").open() == {"a": {}}


async def test_closing_tells_those_whose_turn_had_not_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = long_journal(tmp_path, monkeypatch)
    not_begun = asyncio.create_task(journal.commit())
    # No more than the call: the task that would write has not had a turn of the loop.
    await asyncio.sleep(0)
    journal.close()
    await asyncio.wait_for(not_begun, 5)

    journal.open()
    with held_replacement(monkeypatch) as (begun, go_on):
        for number in range(20):
            journal.put("a", {"n": number})
        first = asyncio.create_task(journal.commit())
        assert await asyncio.to_thread(begun.wait, 20)
        journal.put("b", {})
        behind_it = asyncio.create_task(journal.commit())
        await asyncio.sleep(0.01)
        threading.Timer(0.1, go_on.set).start()
        journal.close()
        await asyncio.wait_for(asyncio.gather(first, behind_it), 5)
    assert Journal(tmp_path / "journal").open() == {"a": {"n": 19}, "b": {}}


async def test_closing_on_a_full_disk_is_no_success_for_those_who_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "journal")
    journal.open()
    journal.put("a", {})
    waits = asyncio.create_task(journal.commit())
    await asyncio.sleep(0)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "fdatasync", full)
        journal.close()
    with pytest.raises(OSError, match="No space"):
        await asyncio.wait_for(waits, 5)
    with pytest.raises(OSError, match="No space"):
        await asyncio.wait_for(journal.commit(), 5)


async def test_a_write_that_no_thread_has_begun_is_no_success(tmp_path: Path) -> None:
    busy = threading.Event()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    occupied = asyncio.create_task(asyncio.to_thread(busy.wait, 20))
    journal = Journal(tmp_path / "journal")
    journal.open()
    await asyncio.sleep(0.01)
    journal.put("a", {})
    first = asyncio.create_task(journal.commit())
    await asyncio.sleep(0.01)
    journal.put("b", {})
    behind_it = asyncio.create_task(journal.commit())
    await asyncio.sleep(0.01)
    assert journal._task is not None
    journal._task.cancel()
    for waits in (first, behind_it):
        with pytest.raises(OSError, match="ended before it was written"):
            await asyncio.wait_for(waits, 5)
    assert not (tmp_path / "journal").read_bytes(), "it was true"
    busy.set()
    await occupied
    # Nothing of it is forgotten by that.
    await asyncio.wait_for(journal.commit(), 5)
    assert set(Journal(tmp_path / "journal").open()) == {"a", "b"}


WRITER = """
import asyncio, sys
from pathlib import Path
from mobility_agent import durable

durable._SPARE_LINES = 8

async def main():
    journal = durable.Journal(Path(sys.argv[1]))
    number = max((record["n"] for record in journal.open().values()), default=0)
    while True:
        number += 1
        journal.put(f"vm{number % 5}", {"n": number})
        await journal.commit()
        sys.stdout.write(f"{number}\\n")
        sys.stdout.flush()

asyncio.run(main())
"""


def test_what_was_committed_survives_a_kill_at_any_moment_of_a_replacement(tmp_path: Path) -> None:
    chance = random.Random(4)
    path, acknowledged = tmp_path / "journal", 0
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(6):
        words = [sys.executable, "-c", WRITER, str(path)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline()]
            time.sleep(chance.uniform(0, 0.1))
            writer.send_signal(signal.SIGKILL)
            lines += writer.stdout.readlines()
        last = int([line for line in lines if line.endswith(b"\n")][-1])
        assert last > acknowledged
        acknowledged = last
        content = path.read_bytes()
        found = [
            json.loads(line.partition(b" ")[2]) for line in content.splitlines(True) if line[-1:] == b"\n"
        ]
        kept = {record["n"] for _key, record in found}
        # The one of five keys before these may have been given anew, and kept, without a word of it yet.
        assert {acknowledged - back for back in range(min(4, acknowledged))} <= kept
        assert content.count(b"\n") < 40, "it was replaced meanwhile"
