# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Waiting for something to become true: small predicates, and one loop that is given its clock."""

from __future__ import annotations

import time
import typing as t

T = t.TypeVar("T")

Job = t.Mapping[str, t.Any]
Vm = t.Mapping[str, t.Any]


def wait_for(
    read: t.Callable[[], T],
    good: t.Callable[[T], bool],
    timeout_seconds: float,
    sleep_seconds: float,
    clock: t.Callable[[], float] = time.monotonic,
    sleep: t.Callable[[float], None] = time.sleep,
) -> tuple[T, bool]:
    """What ``read`` told last and whether it is good; reads at least once, and once more at the very end."""
    until = clock() + timeout_seconds
    while True:
        value = read()
        if good(value):
            return value, True
        left = until - clock()
        if left <= 0:
            return value, False
        sleep(min(sleep_seconds, left))


def job_settled(job: Job) -> bool:
    """The job has ended, or waits for an operator's decision: waiting longer changes nothing by itself."""
    return bool(job.get("ended")) or job.get("step") == "undecided"


def job_out(job: Job) -> bool:
    """The VM is where it was to go."""
    return job.get("verdict") in ("evacuated", "already-there")


def replicated(
    vm: Vm, lag_bytes: int | None = None, lag_seconds: float | None = None, coverage: float | None = None
) -> bool:
    """Whether a protected VM's replica is sealed and at least as fresh and as complete as asked for."""
    if not vm.get("generation"):
        return False
    if coverage is not None and (vm.get("coverage") or 0.0) < coverage:
        return False
    if lag_bytes is not None and _above(vm.get("lag_bytes"), lag_bytes):
        return False
    return lag_seconds is None or not _above(vm.get("lag_seconds"), lag_seconds)


def _above(value: float | None, limit: float) -> bool:
    # What is not known is never good enough.
    return value is None or value > limit
