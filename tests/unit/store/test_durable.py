# SPDX-License-Identifier: GPL-3.0-or-later
"""Records are replaced as a whole, also by two writers at once."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from precache_proxy import durable
from precache_proxy.errors import IntegrityError


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
