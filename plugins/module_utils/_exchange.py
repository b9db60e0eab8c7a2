# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Whom to save where not all can be: not the first that fit, but those that weigh most together.

The deadline is the same for all, so that it does not matter for the number saved who goes first: it is a
knapsack of the seconds that a line has. Moore and Hodgson's rule (Management Science, 1968) gives up the
longest; with weights the best of all choices is found by keeping those partial ones that no other is better
than in weight and in time (Nemhauser and Ullmann, Management Science, 1969). That is done for those about the
end of the time, in an order by weight per second, and for the weightiest behind it: whoever is far before the
end stays in, whoever is far behind it and light stays out.
"""

from __future__ import annotations

import bisect
import typing as t
from dataclasses import dataclass

# How many before the end of the time and behind it are looked at, and how many of the weightiest beyond.
_BEFORE, _BEHIND, _WEIGHTIEST = 48, 32, 16
# Partial choices that are kept: all of them for some twenty, and enough to lose little of many.
_CHOICES = 512


@dataclass(frozen=True, slots=True)
class Unit:
    """What is saved or given up as one: seconds of a line that it takes, and what it weighs."""

    name: str
    seconds: float
    weight: float


def weightiest(units: t.Sequence[Unit], seconds: float) -> set[str]:
    """Names of those to save within so many seconds; ``units`` by weight per second, the highest first."""
    fitting = [unit for unit in units if unit.seconds <= seconds]
    end, used = 0, 0.0
    while end < len(fitting) and used + fitting[end].seconds <= seconds:
        used += fitting[end].seconds
        end += 1
    first, last = max(0, end - _BEFORE), min(len(fitting), end + _BEHIND)
    beyond = sorted(fitting[last:], key=lambda unit: -unit.weight)[:_WEIGHTIEST]
    surely = fitting[:first]
    left = seconds - sum(unit.seconds for unit in surely)
    return {unit.name for unit in (*surely, *_best(fitting[first:last] + beyond, left))}


@dataclass(frozen=True, slots=True)
class _Choice:
    seconds: float
    weight: float
    # Who came last to it, and what it was before: a chain, for copies of sets would be many.
    unit: Unit | None = None
    before: _Choice | None = None


def _best(units: t.Sequence[Unit], seconds: float) -> list[Unit]:
    choices = [_Choice(0.0, 0.0)]
    for unit in units:
        more = [
            _Choice(choice.seconds + unit.seconds, choice.weight + unit.weight, unit, choice)
            for choice in choices
            if choice.seconds + unit.seconds <= seconds
        ]
        choices = _thinned(_not_beaten(choices, more), seconds)
    told: list[Unit] = []
    last: _Choice | None = choices[-1]
    while last is not None and last.unit is not None:
        told.append(last.unit)
        last = last.before
    return told


def _not_beaten(one: t.Sequence[_Choice], other: t.Sequence[_Choice]) -> list[_Choice]:
    """Both merged by seconds, without those that take longer than another and weigh no more."""
    told: list[_Choice] = []
    for choice in sorted((*one, *other), key=lambda choice: (choice.seconds, -choice.weight)):
        if not told or choice.weight > told[-1].weight:
            told.append(choice)
    return told


def _thinned(choices: list[_Choice], seconds: float) -> list[_Choice]:
    """No more than are kept: of each span of time the weightiest."""
    if len(choices) <= _CHOICES:
        return choices
    times = [choice.seconds for choice in choices]
    ends = {bisect.bisect_right(times, seconds * (number + 1) / _CHOICES) - 1 for number in range(_CHOICES)}
    return [choices[end] for end in sorted(ends | {0, len(choices) - 1}) if end >= 0]
