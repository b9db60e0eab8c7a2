# SPDX-License-Identifier: GPL-3.0-or-later
"""The journal: what was committed is there again, whatever ended the process."""

from __future__ import annotations

import asyncio
import os
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
