# SPDX-License-Identifier: GPL-3.0-or-later
"""Requests that nobody stands and waits for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import ProxyError
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._errands import Errands


class Heard:
    """Outcomes by name, in the order in which they were told."""

    def __init__(self) -> None:
        self.all: list[tuple[str, Any, str]] = []
        self.thread = threading.get_ident()

    def of(self, name: str) -> Any:
        def done(result: Any, error: ProxyError | None) -> None:
            assert threading.get_ident() == self.thread, "told in the loop's own thread"
            self.all.append((name, result, "" if error is None else error.cause))

        return done


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as made:
        yield made


def test_a_host_that_hangs_holds_up_no_other(pool: ThreadPoolExecutor) -> None:
    errands, heard, hangs = Errands(pool), Heard(), threading.Event()
    for number in range(20):
        errands.send("dead", f"{number}", lambda: hangs.wait(20), heard.of("dead"))
    for host in ("one", "two"):
        errands.send(host, "ask", lambda host=host: host, heard.of(host))
    began = time.monotonic()
    errands.settle(0.5)
    assert 0.4 < time.monotonic() - began < 2.0
    assert sorted(heard.all) == [("one", "one", ""), ("two", "two", "")]
    began = time.monotonic()
    errands.settle(10.0, late={"dead"})
    assert time.monotonic() - began < 1.0, "who is known to be late is not waited for"
    hangs.set()
    errands.settle(10.0)
    assert len(heard.all) == 22, "and is heard of when it answers"


def test_what_still_waits_gives_way_to_what_came_after(pool: ThreadPoolExecutor) -> None:
    errands, heard, hangs = Errands(pool), Heard(), threading.Event()
    errands.send("home1", "first", lambda: hangs.wait(20), heard.of("first"))
    time.sleep(0.05)
    for share in (1, 2, 3):
        errands.send("home1", "share", lambda share=share: share, heard.of("share"))
    hangs.set()
    errands.settle(10.0)
    assert heard.all == [("first", True, ""), ("share", 3, "")]
    errands.settle(10.0)
    assert len(heard.all) == 2, "nothing is outstanding, so nothing is waited for"


def test_errors_are_told_whatever_they_are(pool: ThreadPoolExecutor) -> None:
    errands, heard = Errands(pool), Heard()

    def refuse() -> None:
        raise ProxyError("conflict", "no")

    def break_down() -> None:
        raise KeyError("id")

    errands.send("home1", "a", refuse, heard.of("a"))
    errands.send("home1", "b", break_down, heard.of("b"))
    errands.settle(10.0)
    assert heard.all == [("a", None, "conflict"), ("b", None, "error")]
