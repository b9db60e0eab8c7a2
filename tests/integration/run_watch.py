# SPDX-License-Identifier: GPL-3.0-or-later
"""Who runs guests, asked all the time: a watch that did not look has not seen that they run once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

from lifeboat_lab.errors import LabError
from lifeboat_lab.lab import Lab

LOOK_SECONDS = 0.2
# Each look at many is a question to each host; what lies between two the guests' own heartbeats tell.
LOOK_AT_MANY_SECONDS = 1.0
RUNNING = "running"

# Guest -> host that knows it -> its state there.
States = Mapping[str, Mapping[str, str]]


class RunWatch:
    """``states`` tells the state of each guest on each host that knows it; LabError: a host just goes off.

    ``looks`` counts those at which some host knew of a guest, ``seen`` has these guests, ``twice`` tells at
    which looks one ran on two.
    """

    def __init__(self, states: Callable[[], States], *, look_seconds: float = LOOK_SECONDS) -> None:
        self.looks = 0
        self.seen: set[str] = set()
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
            twice = {guest: running for guest in states if len(running := _running(states, guest)) > 1}
            # The hosts are asked one after the other: both count only if the first still says so after.
            again = self._states() if twice else {}
            for guest, running in twice.items():
                if running[0] in _running(again, guest):
                    self.twice.append(f"{time.time():.1f}: {guest} on {running}")
        except LabError:
            return  # a host lost power between two questions; asked again
        known = {guest for guest, hosts in states.items() if hosts}
        self.looks += bool(known)
        self.seen |= known


def _running(states: States, guest: str) -> list[str]:
    return [host for host, state in states.get(guest, {}).items() if state == RUNNING]


@contextmanager
def never_twice(states: Callable[[], Mapping[str, str]]) -> Iterator[RunWatch]:
    """Watch one guest while the block runs; what was seen is checked when it ends well."""
    with _watching(RunWatch(lambda: {"the guest": states()})) as watch:
        yield watch


@contextmanager
def none_twice(lab: Lab, guests: Collection[str]) -> Iterator[RunWatch]:
    """The same for many guests, by UUID, on all hosts of the lab."""
    states = RunWatch(lambda: _running_on_hosts(lab, guests), look_seconds=LOOK_AT_MANY_SECONDS)
    with _watching(states) as watch:
        yield watch
    assert watch.seen == set(guests), "some ran nowhere all the time"


def _running_on_hosts(lab: Lab, guests: Collection[str]) -> States:
    """Which host runs which guests: one question to each, whatever their number."""
    found: dict[str, dict[str, str]] = {guest: {} for guest in guests}
    for name, host in lab.hosts.items():
        if host.running and host.plan.image == "full":
            answer = host.exec("virsh", "list", "--state-running", "--uuid", check=False)
            for guest in found.keys() & set(answer.stdout.split()):
                found[guest][name] = RUNNING
    return found


@contextmanager
def _watching(watch: RunWatch) -> Iterator[RunWatch]:
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()
    watch.check()
