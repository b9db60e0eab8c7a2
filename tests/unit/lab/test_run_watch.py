# SPDX-License-Identifier: GPL-3.0-or-later
"""The watch over who runs a guest: it fails where it saw two, and where it saw nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest

from integration.run_watch import RunWatch, none_twice
from lifeboat_lab.errors import LabError


class Hosts:
    """Says one thing after the other, the last one for ever."""

    def __init__(self, *told: Mapping[str, str] | Exception) -> None:
        self.told = list(told)

    def __call__(self) -> Mapping[str, str]:
        told = self.told.pop(0) if len(self.told) > 1 else self.told[0]
        if isinstance(told, Exception):
            raise told
        return told


def watched(*told: Mapping[str, str] | Exception) -> RunWatch:
    hosts = Hosts(*told)
    return ended(RunWatch(lambda: {"web1": hosts()}, look_seconds=0.01))


def ended(watch: RunWatch) -> RunWatch:
    watch.start()
    time.sleep(0.1)
    watch.stop()
    return watch


ONCE = {"home1": "running", "backup1": "paused"}
TWICE = {"home1": "running", "backup1": "running"}


def test_one_that_runs_once_passes_and_its_looks_are_counted() -> None:
    watch = watched(ONCE, LabError("host home1: is off"), {"backup1": "running"})
    watch.check()
    assert watch.looks >= 3


def test_one_that_runs_twice_fails() -> None:
    with pytest.raises(AssertionError, match="running twice"):
        watched(ONCE, TWICE, TWICE, ONCE).check()


def test_one_that_moved_between_two_questions_passes() -> None:
    watched(TWICE, {"home1": "shut off", "backup1": "running"}).check()


def test_a_watch_that_broke_fails() -> None:
    with pytest.raises(AssertionError, match="ended after 1 looks: KeyError"):
        watched(ONCE, KeyError("leader")).check()


@pytest.mark.parametrize("never", [LabError("host home1: is off"), {}])
def test_a_watch_that_saw_nothing_fails(never: Mapping[str, str] | Exception) -> None:
    with pytest.raises(AssertionError, match="no host ever said"):
        watched(never).check()


def test_of_many_the_one_that_runs_twice_is_named() -> None:
    others = {"idle": {"home1": "running"}, "off": {}}
    watch = ended(RunWatch(lambda: {**others, "web1": TWICE}, look_seconds=0.01))
    with pytest.raises(AssertionError, match=r"web1 on \['home1', 'backup1'\]"):
        watch.check()
    assert watch.seen == {"idle", "web1"}
    ended(RunWatch(lambda: {**others, "web1": ONCE}, look_seconds=0.01)).check()


class Host:
    """A lab's host as far as a watch asks it."""

    running = True
    plan = SimpleNamespace(image="full")

    def __init__(self, *guests: str) -> None:
        self.guests = guests

    def exec(self, *_words: str, check: bool) -> SimpleNamespace:
        assert not check
        return SimpleNamespace(stdout="".join(f"{guest}\n" for guest in self.guests))


def watch_hosts(guests: set[str], **hosts: Host) -> None:
    with none_twice(cast(Any, SimpleNamespace(hosts=hosts)), guests):
        time.sleep(0.05)


def test_hosts_are_asked_for_all_guests_at_once() -> None:
    watch_hosts({"u1", "u2"}, home1=Host("u1", "stranger"), backup1=Host("u2", "stranger"))
    with pytest.raises(AssertionError, match="u1 on"):
        watch_hosts({"u1", "u2"}, home1=Host("u1"), backup1=Host("u2", "u1"))
    with pytest.raises(AssertionError, match="some ran nowhere"):
        watch_hosts({"u1", "u2"}, home1=Host("u1"))
