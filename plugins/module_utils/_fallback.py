# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The ladder, for a move under way: when to go down from live, in time and not at the end."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from ansible_collections.lifeboat.evacuation.plugins.module_utils._forecast import (
    BOOT_SECONDS,
    CONVERGES_BELOW,
    MOST_WRITTEN_SHARE,
    closing_seconds,
    forecast,
    lead_in_seconds,
    usual_shutdown_seconds,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import Rung, VmSummary

# What a forecast of the last seconds may be wrong by.
MARGIN_SECONDS = 2.0
MARGIN_SHARE = 0.15

# Rounds that shrink by less than this are no series that ends.
_LEADS_NOWHERE_FROM = 0.95

# What a guest is said to dirty that outruns the mirror of its disk: more than any link carries.
OUTRUNS_BYTES_PER_SECOND = 1e12


class Phase(StrEnum):
    """Where a move stands, as the controller needs to know it."""

    LEAD_IN = "lead-in"
    BULK = "bulk"
    LAST = "last"
    CLOSING = "closing"


@dataclass(frozen=True, slots=True)
class Move:
    """A move under way, as it was seen last.

    ``remaining_bytes`` is what this round has left, ``most_remaining_bytes`` what it may have left where a
    sample of the memory said too little (None: the same), ``dirtied_bytes`` what was dirtied since it began,
    as far as is known, ``bytes_per_second`` what it got over the last interval, ``dirty_bytes_per_second``
    what the guest dirties, ``written_bytes_per_second`` what it writes to its disks, ``sent_bytes`` what of
    its memory has crossed; all on the wire. ``round_number`` is QEMU's, from 1 on; 0: none has begun, or
    nobody says. ``hopeless``: the proxy says that the longest stop that is allowed would not do. ``silent``:
    its host says nothing now, and nothing can be told to it. ``sends_since``: when its memory was
    seen to have begun to cross, by the controller's clock; None: it has not, or nobody looked meanwhile.
    """

    vm: str
    phase: Phase
    rung: Rung = Rung.LIVE
    remaining_bytes: float = 0.0
    bytes_per_second: float = 0.0
    dirty_bytes_per_second: float = 0.0
    hopeless: bool = False
    silent: bool = False
    dirtied_bytes: float = 0.0
    sent_bytes: float = 0.0
    round_number: int = 0
    most_remaining_bytes: float | None = None
    written_bytes_per_second: float = 0.0
    sends_since: float | None = None

    @property
    def at_worst(self) -> Move:
        """The same with the most that its round may have left."""
        if self.most_remaining_bytes is None:
            return self
        return replace(self, remaining_bytes=self.most_remaining_bytes, most_remaining_bytes=None)

    @property
    def left_bytes(self) -> float:
        """What would cross if the guest stood still from now on."""
        return self.remaining_bytes + self.dirtied_bytes


@dataclass(frozen=True, slots=True)
class Fall:
    """Down to ``rung``, for ``reason`` (a word) and why (a sentence)."""

    rung: Rung
    reason: str
    sentence: str


def live_seconds(move: Move, rate: float) -> float:
    """What a live move still takes at that rate: the geometric series of its rounds; infinite beyond it."""
    if move.phase is Phase.CLOSING:
        return 0.0
    if rate <= 0:
        return float("inf")
    if move.rung is not Rung.LIVE or move.phase is Phase.LAST:
        return move.left_bytes / rate
    alone = move.dirty_bytes_per_second / rate
    if alone >= _LEADS_NOWHERE_FROM:
        return float("inf")
    # The mirror of what it writes takes its share of the line until the guest stands.
    rate -= min(move.written_bytes_per_second, MOST_WRITTEN_SHARE * rate)
    # What it wrote before it moved is not measured again: that makes a move slow, but none endless.
    shrink = min(move.dirty_bytes_per_second / rate, max(alone, CONVERGES_BELOW))
    return move.left_bytes / rate / (1.0 - shrink)


def paused_seconds(move: Move, rate: float) -> float:
    """What it takes once the guest stands still."""
    return move.left_bytes / rate if rate > 0 else float("inf")


def judge(
    vm: VmSummary,
    move: Move,
    rate: float,
    round_trip_seconds: float,
    seconds_left: float | None,
    *,
    certain: bool = True,
) -> Fall | None:
    """Whether a live move must go down the ladder now, and how far; None: it may go on.

    ``rate`` is what it can have, ``seconds_left`` until the deadline (None: no deadline). ``certain``: the
    rate was seen for a while, and may be believed when it says that live leads nowhere. For a deadline that
    has passed nothing is cancelled: the power may last longer than was said, and nobody could begin instead.
    """
    if move.rung is not Rung.LIVE or move.phase is not Phase.BULK:
        return None
    allowed = set(vm.rungs)
    closing = closing_seconds(round_trip_seconds)
    # What is hopeless on a trickle may do well with what it gets in its turn. Only what QEMU tells of its
    # guest is asked: without a deadline it costs nothing to wait until it does.
    outruns = move.dirty_bytes_per_second >= CONVERGES_BELOW * rate
    hopeless = move.hopeless or (certain and not forecast(vm, Rung.LIVE, rate, round_trip_seconds).feasible)
    if hopeless and outruns and Rung.PAUSED in allowed:
        return Fall(Rung.PAUSED, "does-not-converge", _said(move, rate))
    restart = usual_shutdown_seconds(vm) + BOOT_SECONDS + lead_in_seconds(round_trip_seconds) + 2 * closing
    may_restart = Rung.RESTART in allowed and (seconds_left is None or restart <= seconds_left)
    if hopeless and outruns and may_restart:
        return Fall(Rung.RESTART, "does-not-converge", _said(move, rate))
    if seconds_left is None or seconds_left <= 0:
        return None
    if not move.dirty_bytes_per_second and move.round_number <= 1:
        # QEMU says what its guest dirties when a round is over: too late for many a deadline.
        move = replace(move, dirty_bytes_per_second=vm.dirty_bytes_per_second * vm.packed_ratio)
    likely = paused_seconds(move, rate) + closing
    likely_late = live_seconds(move, rate) + closing > seconds_left - MARGIN_SECONDS
    # What is lost by a fall that comes too late cannot be had again.
    move = move.at_worst
    live = live_seconds(move, rate) + closing
    # The guest goes on dirtying until it stands: at most what it dirties in an interval comes on top.
    paused = paused_seconds(move, rate) + closing
    if live <= seconds_left - MARGIN_SECONDS:
        return None
    if Rung.PAUSED in allowed and paused <= seconds_left:
        if seconds_left <= _last_moment(paused):
            return Fall(Rung.PAUSED, "deadline", f"{seconds_left:.0f} s are left, live takes {_long(live)}")
        return None
    # From here on stopping it is not sure to be in time, or not allowed. As long as live is thought to be in
    # time its guest runs on, until the last moment for the rung below.
    last = seconds_left <= _last_moment(restart)
    if may_restart and paused > seconds_left and (likely_late or last):
        return Fall(
            Rung.RESTART, "deadline", f"{seconds_left:.0f} s are left, its memory takes {_long(paused)}"
        )
    if may_restart and Rung.PAUSED not in allowed and likely_late and last:
        return Fall(Rung.RESTART, "deadline", f"{seconds_left:.0f} s are left, live takes {_long(live)}")
    if Rung.PAUSED in allowed and likely <= seconds_left:
        if not likely_late and seconds_left > _last_moment(likely):
            return None
        # Only if what a sample of its memory said is so: then not a moment is to be lost.
        return Fall(
            Rung.PAUSED, "deadline", f"{seconds_left:.0f} s are left, its memory takes {_long(likely)}"
        )
    # Nobody is given up for a rate or for pages of which little is known: a while later it is, soon enough
    # for others.
    if certain and likely > seconds_left * (1 + MARGIN_SHARE) + MARGIN_SECONDS:
        return Fall(Rung.STAY, "too-late", f"{seconds_left:.0f} s are left, it takes {_long(likely)}")
    return None


def _last_moment(seconds: float) -> float:
    """How long before a deadline that must begin which takes so long.

    As late as it may be, so that guests run while they can; as early as it must be.
    """
    latest = seconds * (1 + MARGIN_SHARE) + MARGIN_SECONDS
    return latest + max(MARGIN_SECONDS, 0.1 * latest)


def _long(seconds: float) -> str:
    return "for ever" if seconds == float("inf") else f"{seconds:.0f} s"


def _said(move: Move, rate: float) -> str:
    if move.dirty_bytes_per_second >= OUTRUNS_BYTES_PER_SECOND:
        return "writes to its disk as fast as the mirror follows"
    return f"dirties {move.dirty_bytes_per_second / 1e6:.1f} MB/s, {rate / 1e6:.1f} MB/s are sent"
