# SPDX-License-Identifier: GPL-3.0-or-later
"""Who runs a guest, asked all the time: a watch that did not look has not seen that it runs once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from lifeboat_lab.errors import LabError

LOOK_SECONDS = 0.2
RUNNING = "running"


class RunWatch:
    """``states`` tells the state of the guest on each host that knows it; LabError: a host is just going off.

    ``looks`` counts those at which some host knew of the guest, ``twice`` tells those at which it ran on two.
    """

    def __init__(
        self, states: Callable[[], Mapping[str, str]], *, look_seconds: float = LOOK_SECONDS
    ) -> None:
        self.looks = 0
        self.twice: list[str] = []
        self.failure: BaseException | None = None
        self._states = states
        self._look_seconds = look_seconds
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Look from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._end.set()
        # One question may take as long as a command on a host may.
        self._thread.join(150)

    def check(self) -> None:
        """Raise AssertionError where it ran twice, or where nobody can say."""
        assert self.twice == [], f"running twice: {self.twice}"
        assert self.failure is None, f"the watch ended after {self.looks} looks: {self.failure!r}"
        assert not self._thread.is_alive(), "the watch still waits for an answer"
        assert self.looks > 0, "no host ever said where the guest runs"

    def _watch(self) -> None:
        try:
            while True:
                self._look()
                if self._end.wait(self._look_seconds):
                    return
        except BaseException as error:  # noqa: BLE001 - a thread's end is told by check()
            self.failure = error

    def _look(self) -> None:
        try:
            states = self._states()
            running = _running(states)
            # The hosts are asked one after the other: both count only if the first still says so after.
            if len(running) > 1 and running[0] in _running(self._states()):
                self.twice.append(f"{time.time():.1f}: {running}")
        except LabError:
            return  # a host lost power between two questions; asked again
        self.looks += bool(states)


def _running(states: Mapping[str, str]) -> list[str]:
    return [host for host, state in states.items() if state == RUNNING]


@contextmanager
def never_twice(states: Callable[[], Mapping[str, str]]) -> Iterator[RunWatch]:
    """Watch while the block runs; what was seen is checked when it ends well."""
    watch = RunWatch(states)
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()
    watch.check()
