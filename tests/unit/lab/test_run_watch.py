# SPDX-License-Identifier: GPL-3.0-or-later
"""The watch over who runs a guest: it fails where it saw two, and where it saw nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping

import pytest

from integration.run_watch import RunWatch
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
    watch = RunWatch(Hosts(*told), look_seconds=0.01)
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
