# SPDX-License-Identifier: GPL-3.0-or-later
"""How fast a path can be filled without making its queue long.

The kernel's congestion control fills the bottleneck's queue: several BBR connections keep up to one
bandwidth-delay product in it, Reno all of it. Then a call waits behind a copy however strict our classes are,
and a short queue overflows. So what is sent is paced here to what the path is seen to deliver, steered to a
small queueing delay. Pure: samples and clock come in, a rate comes out.
"""

from __future__ import annotations

from collections import deque

from precache_proxy.channel.path_watch import Sample
from precache_proxy.channel.pulses import PULSE_BEAT_SECONDS, PULSE_FACTOR, PULSE_SECONDS, Pulse, PulseEcho
from precache_proxy.channel.standing_delay import StandingDelay, Word

# A queue of about this is kept, so that the link never runs dry.
_TARGET_SECONDS = 0.01
_BEAT_SECONDS = 0.025
# Shorter paths than this are local: there the processors are the limit, and delays say nothing.
_LOCAL_SECONDS = 0.003
_FIRST_RATE = 2_000_000.0
_LEAST_RATE = 64_000.0
_BASE_SECONDS = 30.0
# Of an idle path only so much is remembered: pings tell of it as it is.
_IDLE_BASE_SECONDS = 6.0
# A pause of this length ends what was learnt of queues.
_QUIET_SECONDS = 1.0
_FOREIGN_SECONDS = 10.0
_PAUSE_SECONDS = 15.0
# Headers and uneven looks take something: who delivers so much of the rate was pressed by it.
_PRESSED = 0.8
# Who delivers less of the rate is not doubled before the next look.
_ALL = 0.9
# So much of a pulse arrives where the path carries it, and less than so many times the rate where it is full.
_PULSE_CARRIED = 0.8
_WHOLE = 0.95
_PULSE_FULL = 1.6
# Below what was seen to arrive, so that the queue which the last pulse left drains.
_BELOW = 0.95
# How the rate grows where pulses show nothing, as on a busy host.
_BLIND_GROWTH = 1.25
# A delay of this length is a queue, whatever arrives.
_LONG_SECONDS = 0.1
# Looks in a row that say so before a path is taken for longer than it seemed.
_DELAYED_LOOKS = 3
# A cut leaves at least so much of what the path was seen to carry.
_FORGET = 0.25
# Round trips that differ by this factor are those of different paths.
_OTHER_PATH = 1.5
# A rate that is so much of what was carried needs no swift beginning.
_NEARLY = 0.8
# At least so many looks in a row without a queue before the rate grows by steps, each twice the last.
_CALM_LOOKS = 3
_LAST_TRIPS = 4
# So many times as many in which it grew, and the queue did not come up to its target: shorter ones are hidden
# where most round trips are a few milliseconds late.
_SHORT_LOOKS = 1.5
_GROWN = 1.03
# The most by which the rate grows from one look to the next, and by how much it is swiftly more than what the
# bottleneck is known to let through.
_STEEP = 0.1
_KNOWN = 0.02
# Of each look at the bottleneck's rate so much counts.
_SMOOTHING = 0.25


class Governor:
    """Give it a sample every ``beat_seconds``; it says what rate (bytes per second) to keep, None = no
    limit.
    """

    def __init__(self) -> None:
        self.rate_bytes_per_second: float | None = None
        self.queue_seconds = 0.0
        # It ends with a sample: the next one must not be late, whatever there is to send.
        self.pulse_is_on = False
        self._rate = _FIRST_RATE
        self._starting = True
        self._mark: Sample | None = None
        self._backlogged = True
        self._least_trip = float("inf")
        self._delivered: deque[float] = deque(maxlen=6)
        self._base: deque[tuple[float, float]] = deque()
        self._calm = self._under = 0
        self._under_from = 0.0
        self._trips: deque[float] = deque(maxlen=_LAST_TRIPS)
        self._long = 0
        # At the beginning of a spell: the rate at the last look; looks in a row in which less arrived than
        # was sent, and in which all did but late.
        self._rate_before = 0.0
        self._short = self._delayed = 0
        # Pulses are sent where the round trip without queues is known by more than inference, and once the
        # first rate has come up. Looks in a row in which they showed nothing; what was seen of one that was
        # perhaps too much.
        self._echo = PulseEcho()
        self._base_seen = True
        self._pulses = False
        self._blind, self._full = 0, 0.0
        self._foreign_since: float | None = None
        self._longer_at: float | None = None
        self._paused_until = 0.0
        self._peak = 0.0
        # What the path carried when it was last pressed: like the peak, but a cut takes it down.
        self._carried = 0.0
        self._pressed_base: float | None = None
        # What arrives while a queue stands, smoothed; 0 while none was seen.
        self._bottleneck = 0.0
        self._standing = StandingDelay()
        # Since when there is a backlog without a longer pause, and since when there is none.
        self._spell_at: float | None = None
        self._quiet_since: float | None = None

    @property
    def capacity_bytes_per_second(self) -> float | None:
        """What the path carried when it was last pressed; None while it never was."""
        return max(self._delivered) if self._delivered else None

    @property
    def steady_bytes_per_second(self) -> float | None:
        """The rate, but for a pulse; None = no limit."""
        return None if self.rate_bytes_per_second is None else self._rate

    @property
    def least_round_trip_seconds(self) -> float | None:
        """Of late: what the path's round trip is thought to be without queues. None before the first look."""
        return self._base[0][1] if self._base else None

    @property
    def pulse(self) -> Pulse | None:
        """More than the rate for a moment; None: not now."""
        if not self.pulse_is_on or self.rate_bytes_per_second is None or self._mark is None:
            return None
        return Pulse(self.rate_bytes_per_second, self._mark.at + PULSE_SECONDS)

    @property
    def beat_seconds(self) -> float:
        """How soon to give the next sample while there is something to send."""
        return PULSE_BEAT_SECONDS if self._pulsing else _BEAT_SECONDS

    def sample(self, now: Sample) -> float | None:
        """The new rate."""
        self._trips.append(now.round_trip_seconds)
        self._follow_spell(now)
        base = self._base_seconds(now)
        if base < _LOCAL_SECONDS:
            self._mark = now
            self.pulse_is_on = False
            self.rate_bytes_per_second = None
            return None
        mark = self._mark
        if mark is None:
            self._mark = now
        else:
            self._backlogged = self._backlogged and now.backlog
            self._least_trip = min(self._least_trip, now.round_trip_seconds)
            self._echo.sample(now.at, now.acknowledged_bytes)
            if self._may_pulse(now, base):
                self._pulses = True
                self._begin_look(now)
            elif now.at - mark.at >= self._look_seconds(base) and not self._awaits_echo(now, base):
                # A queue that stands is there at every look; a late wake-up of some process is not.
                self._step(mark, now, max(0.0, self._least_trip - base), base)
                self._begin_look(now)
        self.pulse_is_on = self._is_pulse(now)
        rate = self._rate * PULSE_FACTOR if self.pulse_is_on else self._rate
        self.rate_bytes_per_second = None if now.at < self._paused_until else rate
        return self.rate_bytes_per_second

    def _begin_look(self, now: Sample) -> None:
        self._mark = now
        self._echo.begin()
        self._least_trip = float("inf")
        self._backlogged = now.backlog

    def _may_pulse(self, now: Sample, base: float) -> bool:
        # Connections that are new come up to the first rate by themselves: a pulse says nothing before. Nor
        # does it in a queue that somebody else has made.
        if self._spell_at is None or now.at - self._spell_at < base + PULSE_SECONDS:
            return False
        return (
            self._starting
            and self._base_seen
            and not self._pulses
            and self._echo.swiftest_bytes_per_second >= _PULSE_CARRIED * self._rate
            and now.round_trip_seconds - base < 2 * _TARGET_SECONDS
        )

    @property
    def _pulsing(self) -> bool:
        return self._starting and self._pulses and self._base_seen and self._spell_at is not None

    def _look_seconds(self, base: float) -> float:
        # The echo of a look's pulse belongs to that look.
        return base + PULSE_SECONDS + PULSE_BEAT_SECONDS if self._pulsing else max(base, 0.05)

    def _awaits_echo(self, now: Sample, base: float) -> bool:
        # What a bottleneck has slowed down takes longer to arrive, and smoothed round trips tell of it late.
        return (
            self._pulsing
            and self._mark is not None
            and now.at - self._mark.at < base + 2 * PULSE_SECONDS + PULSE_BEAT_SECONDS
            and self._echo.swiftest_bytes_per_second < _PULSE_CARRIED * PULSE_FACTOR * self._rate
            and now.round_trip_seconds - self._least_trip <= _TARGET_SECONDS
        )

    def _is_pulse(self, now: Sample) -> bool:
        # Half a beat less: a beat that is late must not make it longer.
        until = PULSE_SECONDS - PULSE_BEAT_SECONDS / 2
        return self._pulsing and self._mark is not None and now.at - self._mark.at < until

    def _follow_spell(self, now: Sample) -> None:
        if not now.backlog:
            if self._quiet_since is None:
                self._quiet_since = now.at
            if now.at - self._quiet_since <= _QUIET_SECONDS:
                return  # in the midst of a copy: what its queue has hidden for a while is the path's still
            self._spell_at = None
            while len(self._base) > 1 and now.at - self._base[0][0] > _IDLE_BASE_SECONDS:
                self._base.popleft()
            # Now, not at the next spell: until its first look it would send by the rate of the other path.
            self._forget_another_path()
            return
        self._quiet_since = None
        if self._spell_at is None:
            # What the last spell saw of queues says nothing about this one.
            self._spell_at = now.at
            self._long = self._calm = self._under = self._short = self._delayed = 0
            self._rate_before = 0.0
            self._pulses, self._base_seen = False, True
            self._blind, self._full = 0, 0.0
            self._standing.forget()
            self._foreign_since = None
            # Small things sent now and then press nothing and find out nothing: begin from what the path last
            # carried, and as swiftly as the first time where it is less. What it carried before it became
            # slower would be a queue of seconds by the time that one can be seen.
            self._forget_another_path()
            self._rate = max(min(self._rate, self._carried), self._carried / 2, _FIRST_RATE)
            # A spell that ended before a queue was seen has not found out what the path carries: it goes on.
            self._starting = self._starting or self._rate < _NEARLY * self._carried or not self._carried

    def _forget_another_path(self) -> None:
        """Begin anew where the round trip is that of another path than the one that was pressed last."""
        if self._pressed_base is None or not self._base:
            return
        shorter, longer = sorted((self._pressed_base, self._base[0][1]))
        if longer > _OTHER_PATH * shorter and longer - shorter > _TARGET_SECONDS:
            self._rate, self._carried, self._pressed_base = _FIRST_RATE, 0.0, None
            self._bottleneck = 0.0
            self._delivered.clear()

    def _base_seconds(self, now: Sample) -> float:
        # Least round trip of the last half minute, in a monotonic queue: a path that became longer
        # is believed.
        value = (
            min(now.round_trip_seconds, now.least_round_trip_seconds)
            if not self._base
            else now.round_trip_seconds
        )
        while self._base and self._base[-1][1] >= value:
            self._base.pop()
        self._base.append((now.at, value))
        while len(self._base) > 1 and now.at - self._base[0][0] > _BASE_SECONDS:
            self._base.popleft()
        return self._base[0][1]

    def _step(self, mark: Sample, now: Sample, queue: float, base: float) -> None:
        delivered = (now.acknowledged_bytes - mark.acknowledged_bytes) / (now.at - mark.at)
        self.queue_seconds = queue
        settle = 2 * base + 0.1
        begins = base + 0.05 if self._starting else settle
        if self._spell_at is not None and now.at - self._spell_at < begins:
            return  # what arrives now was sent, and its delay smoothed, before there was a backlog
        wanted = (0.5 if queue > 2 * _TARGET_SECONDS else _PRESSED) * self._rate
        if not self._backlogged and delivered < wanted:
            # Nobody wanted more: it says nothing about the path.
            self._long = self._calm = self._under = 0
            self._standing.forget()
            self._foreign_since = None
            return
        if queue < 2 * _TARGET_SECONDS and delivered < _PRESSED * self._rate and not self._starting:
            return  # no queue to speak of, and yet less arrived than was allowed: we had no time to send it
        self._delivered.append(delivered)
        capacity = max(self._delivered)
        self._peak = max(self._peak * 0.999, capacity)
        self._carried = max(self._carried * 0.999, capacity)
        self._pressed_base = base
        if self._starting:
            # What arrives now was sent by the rate of the look before.
            sent, self._rate_before = self._rate_before, self._rate
            all_arrives = delivered >= _PRESSED * sent
            self._short = 0 if all_arrives else self._short + 1
            queued = queue >= max(2 * _TARGET_SECONDS, base / 8)
            if self._pulsing:
                # What a path that is full leaves in its queue is late as well, and yet arrives.
                all_arrives = (
                    self._echo.swiftest_bytes_per_second >= _PULSE_CARRIED * PULSE_FACTOR * self._rate
                )
            self._delayed = self._delayed + 1 if queued and all_arrives else 0
            if self._delayed >= _DELAYED_LOOKS:
                # More and more is sent, all of it arrives, and as late as before: the path is longer.
                self._believe(base + queue, now.at)
            if not (queued and self._short > 1) and queue < max(_LONG_SECONDS, base / 2):
                if delivered < _ALL * sent and queue > _TARGET_SECONDS / 2:
                    # The path may be full: what is doubled now would stand in its queue.
                    self._rate = min(self._rate, max(delivered, _FIRST_RATE))
                elif (queue >= 2 * _TARGET_SECONDS and not self._pulses) or not self._base_seen:
                    # Whose queue it is, or if it is one, is not known: a pulse would show nothing. As slow
                    # start does, but each step only when the step before is seen to arrive.
                    self._rate = max(self._rate, delivered * 2)
                elif self._pulses:
                    self._grow_by_pulses(now.round_trip_seconds - self._least_trip)
                return
            self._starting = False
        self._long = self._long + 1 if queue > 4 * _TARGET_SECONDS else 0
        if queue <= _TARGET_SECONDS:
            self._standing.forget()
        else:
            # A longer queue than that may be our own even then, on a line that carries less.
            lowest = self._rate <= _LEAST_RATE and queue <= 4 * _TARGET_SECONDS
            word = self._standing.look(now.at, queue, delivered, settle, lowest=lowest)
            if word is Word.WAIT:
                return
            if word is Word.HALVE:
                self._rate = max(delivered / 2, _LEAST_RATE)
                return
            if word is Word.LONGER:
                self._go_on_with_a_longer_path(base + queue, now.at)
                return
        if self._long > 1:
            # Seen twice: the path has become slower. Forget older figures and empty the queue.
            self._standing.cut(now.at, queue, delivered, settle)
            self._delivered.clear()
            self._delivered.append(delivered)
            capacity = self._bottleneck = delivered
            # By steps, for it may have been a busy processor; a path that became slower is cut again.
            self._carried = max(delivered, self._carried * _FORGET)
        if queue >= _TARGET_SECONDS / 2:
            # It stood there for the whole look: what arrived is what the bottleneck lets through.
            before = self._bottleneck or delivered
            self._bottleneck = before + _SMOOTHING * (delivered - before)
        # First order: the queue approaches its target within about two round trips, from either side. A rate
        # that is too high is seen to be so two or three looks later: of a tenth too much a call would wait in
        # the queue of a long path for longer than it may.
        gain = min(_STEEP, max(-0.5, (_TARGET_SECONDS - queue) / settle))
        if queue >= _TARGET_SECONDS / 3:
            self._calm = 0
        elif min(self._trips) - base < _TARGET_SECONDS / 3:
            # Nor does one begin to grow, which the least of the look would hide; of the last few round trips
            # the least, for on a busy host most are late.
            self._calm += 1
        self._under = self._under + 1 if queue < _TARGET_SECONDS else 0
        if self._under == 1:
            self._under_from = delivered
        calm_looks = max(_CALM_LOOKS, round(1.5 * settle / self._look_seconds(base)))
        # More arrives than at the first of them: a queue that somebody else keeps short is full all the same.
        grown = capacity >= _GROWN * self._under_from
        short = self._base_seen and grown and self._under >= _SHORT_LOOKS * calm_looks
        if short or self._calm >= calm_looks:
            # No queue at all although we press: the path is faster than we believed.
            if self._base_seen:
                self._find_out_anew()
                return
            gain = min(1.0, 0.125 * 2 ** (self._calm - calm_looks))
            # But slowly beyond the best that was seen: the round trip is inferred, and may hide a queue.
            gain = max(_STEEP, min(gain, (1 + _STEEP) * self._peak / max(capacity, self._rate) - 1))
        if gain < 0:
            self._rate = max((self._bottleneck or capacity) * (1 + gain), _LEAST_RATE)
        else:
            # Swiftly up to what the bottleneck is known to let through, and a little more; without a queue
            # there is no reason to send less than before.
            known = min(capacity * (1 + _STEEP), self._bottleneck * (1 + _KNOWN))
            self._rate = max(capacity * (1 + gain), known, self._rate)
        self._watch_for_others(now.at, queue)

    def _grow_by_pulses(self, late: float) -> None:
        seen = self._echo.swiftest_bytes_per_second
        if seen >= _PULSE_CARRIED * PULSE_FACTOR * self._rate:
            # What was seen to arrive, not more: the next pulse shall begin where the path is not full. Less
            # where this one was perhaps held up already.
            tried = PULSE_FACTOR * self._rate
            self._rate = min(seen if seen >= _WHOLE * tried else _BELOW * seen, tried)
            self._blind, self._full = 0, 0.0
        elif late > _TARGET_SECONDS and seen < _PULSE_FULL * self._rate:
            # The pulse came through slower than it was sent, and stood in a queue: the bottleneck's rate.
            if self._echo.is_whole or self._full:
                # A path that stood still for a moment shows less than it carries, or nothing at all.
                self._bottleneck = max(seen, self._full)
                self._rate = max(_BELOW * self._bottleneck, _FORGET * self._rate, _LEAST_RATE)
                self._delivered.clear()
                self._delivered.append(self._rate)
                self._starting = False
            else:
                self._full = seen  # or it came so to a process that was held up: once more
        else:
            self._full = 0.0
            self._blind = 0 if seen > 1.1 * self._rate else self._blind + 1
            if self._blind > 1 and late < _TARGET_SECONDS:
                seen = max(seen, min(_BLIND_GROWTH * self._rate, 2 * seen))
            self._rate = max(self._rate, min(seen, PULSE_FACTOR * self._rate))
            # Somebody's limit, or the disk's: a pulse would not leave here.
            self._pulses = self._echo.swiftest_bytes_per_second >= _PULSE_CARRIED * self._rate

    def _find_out_anew(self) -> None:
        self._starting = self._pulses = True
        self._bottleneck = 0.0
        self._rate_before = self._rate
        self._calm = self._under = self._short = self._delayed = self._blind = 0
        self._full = 0.0

    def _go_on_with_a_longer_path(self, base: float, at: float) -> None:
        """Half as much was sent, less arrived, and the delay stands: it is no queue of ours."""
        self._believe(base, at)
        self._long = self._calm = self._under = 0
        # Half of the best, not all: it may be somebody else's queue.
        self._rate = max(self._rate, self._peak / 2)
        self._bottleneck = 0.0
        self._standing.forget()
        if self._longer_at is not None and at - self._longer_at < _FOREIGN_SECONDS:
            # No path becomes longer again so soon: it is somebody else's queue.
            self._leave_it_to_the_kernel(at)
        self._longer_at = at

    def _believe(self, base: float, at: float) -> None:
        self._base.clear()
        self._base.append((at, base))
        self._base_seen = False

    def _watch_for_others(self, at: float, queue: float) -> None:
        # A queue that does not shrink although we went down a long way is somebody else's, who
        # would take all.
        if queue > 3 * _TARGET_SECONDS and self._rate < 0.6 * self._peak:
            if self._foreign_since is None:
                self._foreign_since = at
            elif at - self._foreign_since > _FOREIGN_SECONDS:
                self._leave_it_to_the_kernel(at)
        else:
            self._foreign_since = None

    def _leave_it_to_the_kernel(self, at: float) -> None:
        self._paused_until = at + _PAUSE_SECONDS
        self._foreign_since = None
        self._peak = self._rate
        self._base.clear()
