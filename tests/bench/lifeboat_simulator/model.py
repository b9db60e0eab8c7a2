# SPDX-License-Identifier: GPL-3.0-or-later
"""Links and guests as a fluid model: memory crosses in rounds, flows share links max-min fairly.

What the controller may know of it goes through an Observation; the truth stays here. Bytes are those on the
wire, times seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import factorial

from ansible_collections.lifeboat.evacuation.plugins.module_utils._fallback import Move, Phase
from ansible_collections.lifeboat.evacuation.plugins.module_utils._forecast import (
    BOOT_SECONDS,
    DOWNTIME_LIMIT_SECONDS,
    SHUTDOWN_SECONDS,
    closing_seconds,
    lead_in_seconds,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import Rung, VmSummary

Key = tuple[str, str]

# QEMU's rounds, as the proxy watches them: bulk ones first, then two more without progress.
_BULK_ROUNDS = 3
_CONVERGES_BELOW = 0.7
_STOP_MARGIN = 1.25


@dataclass
class TruePair:
    """A pair as it is. ``stream`` is what one move can carry, ``rate`` what the pair's own link can.

    ``busy_lead_in``: by how many times a lead-in that begins while others send takes longer.
    """

    key: Key
    uplink: str
    rate: float
    stream: float
    round_trip_seconds: float
    cores: int = 4
    up: bool = True
    busy_lead_in: float = 1.0


@dataclass
class TrueVm:
    """A VM and where it stands.

    ``empty_share``: what is told of its first round and turns out to be empty pages, over what crosses.
    """

    summary: VmSummary
    lag: float
    phase: Phase | None = None
    rung: Rung = Rung.LIVE
    timer: float = 0.0
    remaining: float = 0.0
    dirtied: float = 0.0
    rounds: int = 0
    round_began_with: float = 0.0
    without_progress: int = 0
    hopeless: bool = False
    stopped_seconds: float = 0.0
    sent: float = 0.0
    sent_before: float = 0.0
    out_at: float | None = None
    failed: bool = False
    may_retry: bool = True
    share: float | None = None
    share_until: float = 0.0
    empty_share: float = 0.0
    sends_since: float | None = None

    @property
    def memory(self) -> float:
        """What its memory is on the wire."""
        return self.summary.memory_used_bytes * self.summary.packed_ratio if self.summary.running else 0.0

    @property
    def dirties(self) -> float:
        """What it dirties a second, on the wire."""
        if not self.summary.running or self.guest_stands:
            return 0.0
        return self.summary.dirty_bytes_per_second * self.summary.packed_ratio

    @property
    def guest_stands(self) -> bool:
        """Its guest does not run."""
        return self.phase is not None and (
            self.rung is not Rung.LIVE or self.phase in {Phase.LAST, Phase.CLOSING}
        )

    @property
    def sends(self) -> bool:
        """It has bytes for the link."""
        return self.phase in {Phase.BULK, Phase.LAST} and self.remaining > 0

    def begin(self, rung: Rung, pair: TruePair, *, beside_others: bool = False) -> None:
        """Its move starts."""
        self.phase, self.rung = Phase.LEAD_IN, rung
        self.timer = lead_in_seconds(pair.round_trip_seconds) * (pair.busy_lead_in if beside_others else 1.0)
        self.sends_since = None
        if rung is Rung.RESTART:
            self.timer += SHUTDOWN_SECONDS
        self.remaining = self.dirtied = self.round_began_with = 0.0
        self.rounds = self.without_progress = 0
        self.hopeless = self.failed = False
        self.share = None

    def stop(self, *, may_retry: bool) -> None:
        """Its move failed: it runs on at its source."""
        self.phase = None
        self.failed, self.may_retry = True, may_retry

    def pause(self) -> None:
        """The guest stands still from now on: what it dirtied is all that is left beside the round."""
        if self.phase is Phase.BULK:
            self.rung = Rung.PAUSED

    def advance(
        self, seconds: float, rate: float, pair: TruePair, now: float, *, lead_in_pace: float = 1.0
    ) -> None:
        """Let time pass; ``rate`` is what the links give it. At a ``lead_in_pace`` of 0.5 a lead-in takes
        twice as long."""
        while seconds > 1e-9 and self.phase is not None:
            if self.phase is Phase.LEAD_IN:
                took = self._phase(seconds * lead_in_pace, rate, pair) / lead_in_pace
            else:
                took = self._phase(seconds, rate, pair)
            if self.guest_stands:
                self.stopped_seconds += took
            seconds -= took
            now += took
            if self.sends_since is None and self.phase is Phase.BULK:
                self.sends_since = now
            if self._over():
                self.out_at = now

    def _over(self) -> bool:
        return self.phase is None and not self.failed

    def _phase(self, seconds: float, rate: float, pair: TruePair) -> float:
        if self.phase in {Phase.LEAD_IN, Phase.CLOSING}:
            took = min(seconds, self.timer)
            self.timer -= took
            if self.timer <= 1e-9:
                if self.phase is Phase.LEAD_IN:
                    self.phase = Phase.BULK
                    self.remaining = self.lag + (0.0 if self.rung is Rung.RESTART else self.memory)
                    self.round_began_with = self.remaining
                else:
                    self.phase = None
            return took
        if self.remaining <= 0:
            self._round_ends(rate, pair)
            return 1e-9
        if rate <= 0:
            self.dirtied = min(self.dirtied + self.dirties * seconds, self.memory)
            return seconds
        took = min(seconds, self.remaining / rate)
        self.sent += took * rate
        self.remaining = max(0.0, self.remaining - took * rate)
        self.dirtied = min(self.dirtied + self.dirties * took, self.memory)
        if self.remaining <= 1e-6:
            self.remaining = 0.0
            self._round_ends(rate, pair)
        return max(took, 1e-9)

    def _round_ends(self, rate: float, pair: TruePair) -> None:
        left, self.dirtied = self.dirtied, 0.0
        done = self.phase is Phase.LAST or (self.rung is not Rung.LIVE and left <= 0)
        if done or self.rung is Rung.RESTART:
            self.phase = Phase.CLOSING
            self.timer = closing_seconds(pair.round_trip_seconds)
            self.timer += BOOT_SECONDS if self.rung is Rung.RESTART else 0.0
            return
        self.rounds += 1
        self.remaining = left
        if self.rung is not Rung.LIVE or left <= DOWNTIME_LIMIT_SECONDS * max(rate, 1.0):
            self.phase = Phase.LAST
            return
        shrank = left < _CONVERGES_BELOW * self.round_began_with
        self.round_began_with = left
        if self.rounds > _BULK_ROUNDS and not shrank:
            self.without_progress += 1
            if self.without_progress >= 2:
                if left / max(rate, 1.0) * _STOP_MARGIN <= self.summary.longest_stop_seconds:
                    self.phase = Phase.LAST
                else:
                    self.hopeless = True

    def seen(self, interval: float) -> Move:
        """What the proxy would tell of it."""
        rate = (self.sent - self.sent_before) / interval if interval > 0 else 0.0
        left = self.remaining
        if self.phase is Phase.BULK and self.rounds == 0:
            # Empty pages lie at the end: the fewer are left, the better it is known.
            left *= 1.0 + self.empty_share * left / max(self.memory, left, 1.0)
        return Move(
            self.summary.uuid,
            self.phase or Phase.CLOSING,
            self.rung,
            left + (self.dirtied if self.rung is not Rung.LIVE else 0.0),
            rate,
            self.summary.dirty_bytes_per_second * self.summary.packed_ratio,
            self.hopeless,
            sent_bytes=self.sent,
            round_number=self.rounds + 1,
            sends_since=self.sends_since,
        )


def fair_rates(caps: Mapping[str, float], capacity: float) -> dict[str, float]:
    """Max-min fair shares of one link for flows with caps of their own (progressive filling)."""
    shares: dict[str, float] = {}
    left, count = capacity, len(caps)
    for name, cap in sorted(caps.items(), key=lambda item: (item[1], item[0])):
        shares[name] = min(cap, max(0.0, left) / count)
        left -= shares[name]
        count -= 1
    return shares


@dataclass(frozen=True)
class Processors:
    """What all hosts of a site share, as those of a lab do: ``count`` processors, of which ``others`` are
    busy with guests. ``lead_in``: how many a lead-in keeps busy, ``each``: how many one that is under way
    takes besides, ``per_byte``: their seconds for each byte that crosses, at both ends. As they are, eight
    VMs of 22 MB take about what they took in a lab of two processors at 400 Mbit/s and 40 ms.
    """

    count: int = 2
    others: float = 0.9
    lead_in: float = 0.8
    each: float = 0.05
    per_byte: float = 23e-9

    def wanted(self, lead_ins: int, under_way: int, bytes_per_second: float) -> float:
        """How many would be busy with moves if there were as many as are wanted."""
        return lead_ins * self.lead_in + under_way * self.each + bytes_per_second * self.per_byte

    def pace(self, wanted: float) -> float:
        """How fast all goes, of 1, where moves would keep so many busy."""
        return min(1.0, (self.count - self.others) / max(wanted, 1e-9))

    def waited(self, wanted: float) -> float:
        """In what share of the time somebody waits for one: that more are to be served than there are, where
        they come at random (Erlang's C formula)."""
        wanted += self.others
        if wanted >= self.count:
            return 1.0
        free = [wanted**number / factorial(number) for number in range(self.count)]
        share = wanted / self.count
        queue = wanted**self.count / factorial(self.count) / (1.0 - share)
        return share * queue / (sum(free) + queue)


@dataclass
class Links:
    """Uplinks and the pairs behind them. ``lead_ins``: the hosts have time for so many at once;
    ``processors``: those that all hosts share, None: they have as many as they want."""

    uplinks: dict[str, float]
    pairs: dict[Key, TruePair]
    lead_ins: float = float("inf")
    processors: Processors | None = None
    carried: dict[Key, float] = field(default_factory=dict)

    def rates(self, vms: Iterable[TrueVm], background: Mapping[str, float]) -> dict[str, float]:
        """What each sending VM gets. Precaching is the lowest class: it has a floor of 5 %, no more."""
        by_pair: dict[Key, dict[str, float]] = {}
        for vm in vms:
            if not vm.sends:
                continue
            pair = self.pairs[vm.summary.pair]
            # The proxy lifts the share of a guest that stands still.
            free = vm.share is None or vm.guest_stands
            cap = pair.stream if free else min(pair.stream, vm.share or 0.0)
            by_pair.setdefault(pair.key, {})[vm.summary.uuid] = cap if pair.up else 0.0
        by_uplink: dict[str, dict[str, float]] = {}
        pair_of: dict[str, Key] = {}
        for key, caps in by_pair.items():
            pair = self.pairs[key]
            # Packing is work: a source's cores carry no more than so many streams.
            for name, rate in fair_rates(caps, min(pair.rate, pair.stream * pair.cores)).items():
                by_uplink.setdefault(pair.uplink, {})[name] = rate
                pair_of[name] = key
        given: dict[str, float] = {}
        self.carried = {}
        for uplink, caps in by_uplink.items():
            capacity = self.uplinks[uplink]
            floor = min(0.05 * capacity, background.get(uplink, 0.0))
            for name, rate in fair_rates(caps, capacity - floor).items():
                given[name] = rate
                self.carried[pair_of[name]] = self.carried.get(pair_of[name], 0.0) + rate
        return given
