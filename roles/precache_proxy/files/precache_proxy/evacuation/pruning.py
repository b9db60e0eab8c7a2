# SPDX-License-Identifier: GPL-3.0-or-later
"""Which records of evacuations that are over may go. Pure: it is told the records and the time.

A record is kept for as long as anything asks for it: a VM's newest one says where it went or where it came
from, an open one says what is still to be done. The others are history.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

DAY_SECONDS: Final = 86400.0
# History of one VM: all of the last day, of the last month at most so many.
KEEP_SECONDS: Final = 30 * DAY_SECONDS
KEEP_SURELY_SECONDS: Final = DAY_SECONDS
KEEP_PER_VM: Final = 20


@dataclass(frozen=True, slots=True)
class Entry:
    """A record: whose, when it was made (seconds since 1970), its epoch, and whether it still matters."""

    id: str
    vm: str
    epoch: int
    since: float
    matters: bool


def superseded(entries: Iterable[Entry], now: float, must_stay: Collection[str] = ()) -> list[str]:
    """The numbers of the records that may be removed."""
    by_vm: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_vm[entry.vm].append(entry)
    found: list[str] = []
    for history in by_vm.values():
        history.sort(key=lambda entry: (entry.epoch, entry.since), reverse=True)
        for place, entry in enumerate(history):
            age = now - entry.since
            recent = age < KEEP_SURELY_SECONDS or (place < KEEP_PER_VM and age < KEEP_SECONDS)
            if place > 0 and not entry.matters and not recent and entry.id not in must_stay:
                found.append(entry.id)
    return found
