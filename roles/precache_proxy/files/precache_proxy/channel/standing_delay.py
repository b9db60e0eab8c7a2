# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a delay is our queue or a longer path: sent half as much for a moment, a queue of ours is gone.

Who only sends a little less, again and again, cannot tell: what arrives becomes less as well, and with it
what the bottleneck is taken for. Pure: looks come in, a word comes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

# A delay that is so much of what it was has not shrunk, and one that is not this much longer has not grown: a
# longer path's does neither.
_STANDS = 0.8
_GROWN = 1.25
_SHAKY_SECONDS = 0.005
# Out of a queue of ours as much arrives as before, whatever is sent, until it is gone; over a longer
# path less than this, once half is sent.
_LESS = 0.7
# Half the rate is tried where less than this of what arrived at first does, and the delay has stood for so
# many times as long as the rate takes to follow a queue.
_SINKING = 0.85
_PATIENCE = 3
# The kernel smooths round trips over eight acknowledgements of two segments, on each of four connections.
_SMOOTHED_BYTES = 4 * 8 * 2 * 1428


class Word(Enum):
    """What to do about a delay."""

    NOTHING = auto()
    HALVE = auto()  # send half of what arrives, until the next word
    WAIT = auto()  # leave the rate as it is: what it does is not seen yet
    LONGER = auto()  # it is the path's


@dataclass(slots=True)
class _Stand:
    """A delay that neither shrinks nor grows: since when, how long it was (seconds), and bytes per second
    that arrived then.
    """

    at: float
    queue: float
    delivered: float
    # Until when to wait for what a lower rate does; None: none was tried.
    until: float | None = None
    was_cut: bool = False

    def is_still(self, queue: float) -> bool:
        """Whether a delay of ``queue`` seconds is the same."""
        return _STANDS * self.queue <= queue <= _GROWN * self.queue + _SHAKY_SECONDS


class StandingDelay:
    """Give it each look at a full path."""

    def __init__(self) -> None:
        self._stand: _Stand | None = None

    def forget(self) -> None:
        """No delay to speak of, or nothing known."""
        self._stand = None

    def cut(self, at: float, queue: float, delivered: float, settle: float) -> None:
        """The rate has been lowered because of a delay of ``queue`` seconds."""
        self._stand = _Stand(at, queue, delivered, at + settle, was_cut=True)

    def look(self, at: float, queue: float, delivered: float, settle: float, *, lowest: bool) -> Word:
        """A delay of ``queue`` seconds, and ``delivered`` bytes per second arrive.

        ``settle``: seconds in which the rate follows a queue; ``lowest``: the rate cannot be less.
        """
        stand = self._stand
        waits = stand is not None and stand.until is not None and at < stand.until
        if stand is not None and stand.was_cut and waits:
            return Word.WAIT
        if stand is None or not stand.is_still(queue):
            self._stand = _Stand(at, queue, delivered)
            return Word.NOTHING
        if waits:
            return Word.WAIT
        if stand.until is None:
            sinks = lowest or delivered < _SINKING * stand.delivered
            if not sinks or at - stand.at < _PATIENCE * settle:
                return Word.NOTHING
        elif delivered < _LESS * stand.delivered or (lowest and not stand.was_cut):
            return Word.LONGER
        # The wait of the path as it is if it is longer, and for the kernel to tell of it.
        until = at + settle + 2 * queue + _SMOOTHED_BYTES / max(delivered / 2, 1.0)
        self._stand = _Stand(at, queue, delivered, until)
        return Word.HALVE
