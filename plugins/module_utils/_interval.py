# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What is seen and what is asked for in one interval of control: values, without any logic."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, field

from ansible_collections.lifeboat.evacuation.plugins.module_utils._fallback import Fall, Move
from ansible_collections.lifeboat.evacuation.plugins.module_utils._shares import INTERVAL_SECONDS
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import Rung

INTERVAL_ROUND_TRIPS = 10.0

Pair = tuple[str, str]


def interval_seconds(round_trip_seconds: t.Iterable[float]) -> float:
    """How often to look and decide."""
    longest = max(round_trip_seconds, default=0.0)
    return max(INTERVAL_SECONDS, INTERVAL_ROUND_TRIPS * longest)


@dataclass(frozen=True, slots=True)
class PairView:
    """A pair over the last interval; not ``heard``: as it was seen before, for its host owes an answer.

    ``round_trip_seconds`` is with queues, ``least_round_trip_seconds`` the least of late; 0: not known.
    ``processors_waited``: in what share of the interval the source's processors were waited for; None where
    its kernel does not tell.
    """

    up: bool = True
    goodput_bytes_per_second: float = 0.0
    round_trip_seconds: float = 0.0
    heard: bool = True
    least_round_trip_seconds: float = 0.0
    processors_waited: float | None = None


@dataclass(frozen=True)
class Observation:
    """What was seen: moves under way by UUID, VMs that are over with whether they may be tried again."""

    now: float
    moves: t.Mapping[str, Move] = field(default_factory=dict)
    pairs: t.Mapping[tuple[str, str], PairView] = field(default_factory=dict)
    out: t.Collection[str] = ()
    failed: t.Mapping[str, bool] = field(default_factory=dict)
    deadline_at: float | None = None

    def is_up(self, pair: Pair) -> bool:
        """Whether a pair's link is up, as far as is known."""
        view = self.pairs.get(pair)
        return view is None or view.up


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided about a VM: a word for the report, a sentence for people."""

    vm: str
    what: str
    reason: str
    sentence: str = ""


@dataclass
class Orders:
    """What to ask of the proxies now. A share of None: no limit of ours.

    ``ends_in``: of shares that are to end by themselves before the next look, in how many seconds.

    ``shutdowns``: of those that start by restart, how long their guests may take to shut down, seconds.
    """

    starts: list[tuple[str, Rung]] = field(default_factory=list)
    shutdowns: dict[str, float] = field(default_factory=dict)
    shares: dict[str, float | None] = field(default_factory=dict)
    ends_in: dict[str, float] = field(default_factory=dict)
    falls: dict[str, Fall] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    decisions: list[Decision] = field(default_factory=list)
