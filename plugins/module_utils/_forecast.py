# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""How long a VM takes to get out, at a given rate, by each rung of the ladder.

Memory crosses in rounds: each sends what the guest dirtied during the one before, so that rounds shrink by
the factor dirty rate / transfer rate (pre-copy; Clark et al., NSDI 2005). Where they do not shrink the guest
is stopped for as long as what is left takes. What the guest writes to its disks meanwhile crosses as well:
before the memory as a residual, beside it as the mirror's share of the line.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import LADDER, Rung, VmSummary

# What one evacuation spends beside its bytes, fitted to single moves whose bytes were counted: eight of
# 22.6 MB took 7.1 s in the mean at 50 Mbit/s and 180 ms. Catch-up, residual and making ready take some seven
# round trips before the memory begins to cross; the openings of libvirt and NBD, fifteen more, were made
# ahead.
LEAD_IN_ROUND_TRIPS = 7.0
LEAD_IN_SECONDS = 0.8
# QEMU's switch-over, the word that all is there, the release, the destination's start.
CLOSING_ROUND_TRIPS = 7.0
CLOSING_SECONDS = 0.3
# Between two that take turns on a line: some of a look until the second one may take what it can get, its
# window's growth from a trickle, the ramp of another pair's way. At 50 Mbit/s and 180 ms eight VMs of 22 MB
# lost 0.8 to 1 s each that way, in three runs.
TURN_SECONDS = 0.4
TURN_ROUND_TRIPS = 2.5
DOWNTIME_LIMIT_SECONDS = 0.3
SHUTDOWN_SECONDS = 20.0
BOOT_SECONDS = 5.0
# Rounds that do not shrink below this share of the one before lead nowhere: the proxy gives them two more.
CONVERGES_BELOW = 0.7
ROUNDS_WITHOUT_PROGRESS = 4
# Where a guest writes more than half of what can be sent, its proxy lets its writes wait for the way
# (evacuation/mirroring.py): they take no more of it than that.
MOST_WRITTEN_SHARE = 0.5
_STOP_MARGIN = 1.25


@dataclass(frozen=True, slots=True)
class Forecast:
    """What moving a VM by one rung comes to, if it has the rate all the time.

    ``stop_seconds``: how long its guest will not run. ``feasible`` is False where the rung does not lead out;
    ``reason`` says why in a word.
    """

    rung: Rung
    seconds: float
    wire_bytes: float
    stop_seconds: float
    feasible: bool
    reason: str
    bytes_per_second: float


def written_share(vm: VmSummary, bytes_per_second: float) -> float:
    """What of a rate the guest's writes take while it runs, of 1."""
    if not vm.running or bytes_per_second <= 0:
        return 0.0
    return min(MOST_WRITTEN_SHARE, vm.written_bytes_per_second / bytes_per_second)


def residual_bytes(vm: VmSummary, running_seconds: float) -> float:
    """What its replica lacks when its guest has run, and written, for so long from now."""
    return vm.lag_bytes + (vm.written_bytes_per_second * running_seconds if vm.running else 0.0)


def lead_in_seconds(round_trip_seconds: float) -> float:
    """What passes before the memory begins to cross, with nothing to catch up."""
    return LEAD_IN_SECONDS + LEAD_IN_ROUND_TRIPS * round_trip_seconds


def closing_seconds(round_trip_seconds: float) -> float:
    """What passes between the last byte of memory and the destination's word."""
    return CLOSING_SECONDS + CLOSING_ROUND_TRIPS * round_trip_seconds


def turn_seconds(round_trip_seconds: float) -> float:
    """What a line idles between the memory of one VM and that of the next."""
    return TURN_SECONDS + TURN_ROUND_TRIPS * round_trip_seconds


def usual_shutdown_seconds(vm: VmSummary) -> float:
    """What a guest that shuts down in order is thought to take."""
    return min(SHUTDOWN_SECONDS, vm.shutdown_seconds)


def shutdown_seconds_within(
    vm: VmSummary, seconds_left: float | None, bytes_per_second: float, round_trip_seconds: float
) -> float:
    """How long a guest may be given to shut down for a restart that is to be over before the deadline.

    What is forecast at least, the operator's limit at most, and between them what else is to be done leaves.
    """
    if seconds_left is None:
        return vm.shutdown_seconds
    usual = usual_shutdown_seconds(vm)
    rest = forecast(vm, Rung.RESTART, bytes_per_second, round_trip_seconds).seconds - usual
    return min(vm.shutdown_seconds, max(usual, seconds_left - rest))


def forecast(vm: VmSummary, rung: Rung, bytes_per_second: float, round_trip_seconds: float) -> Forecast:
    """The forecast of one rung. A rate of 0 or less leads nowhere."""
    rate = bytes_per_second
    fixed = lead_in_seconds(round_trip_seconds) + closing_seconds(round_trip_seconds)
    if rung is Rung.STAY:
        return Forecast(rung, 0.0, 0.0, 0.0, True, "stays", rate)
    if rate <= 0:
        return Forecast(rung, float("inf"), 0.0, 0.0, False, "no-link", rate)
    memory = vm.memory_used_bytes * vm.packed_ratio if vm.running else 0.0
    lead = lead_in_seconds(round_trip_seconds)
    share = written_share(vm, rate)
    if rung is Rung.RESTART:
        if not vm.running:
            lag = vm.lag_bytes
            return Forecast(rung, fixed + lag / rate, lag, 0.0, True, "shut-off", rate)
        shutdown = usual_shutdown_seconds(vm)
        lag = residual_bytes(vm, lead + shutdown) * (1.0 + share)
        stop = shutdown + BOOT_SECONDS + lag / rate + closing_seconds(round_trip_seconds)
        return Forecast(rung, fixed + stop, lag, stop, True, "restarts", rate)
    lag = residual_bytes(vm, lead)
    if rung is Rung.PAUSED or not vm.running:
        # What is written while that crosses crosses after it.
        lag *= 1.0 + share
        stop = memory / rate + closing_seconds(round_trip_seconds) if vm.running else 0.0
        return Forecast(rung, fixed + (lag + memory) / rate, lag + memory, stop, True, "pauses", rate)
    # Its mirror takes its share of the line for as long as the memory needs.
    rest = rate * (1.0 - share)
    shrink = vm.dirty_bytes_per_second * vm.packed_ratio / rest
    if shrink < CONVERGES_BELOW:
        # Rounds until what is left takes no longer than QEMU is allowed to stop the guest for.
        left, sent = memory, 0.0
        while left / rest > DOWNTIME_LIMIT_SECONDS and left > 1.0:
            sent += left
            left *= shrink
        stop = left / rest + round_trip_seconds
        seconds = (lag + sent + left) / rest
        return Forecast(rung, fixed + seconds, seconds * rate, stop, True, "converges", rate)
    left = min(shrink * memory, memory)
    seconds = (lag + memory + ROUNDS_WITHOUT_PROGRESS * left + left) / rest
    stop = left / rest * _STOP_MARGIN + round_trip_seconds
    feasible = stop <= vm.longest_stop_seconds
    return Forecast(
        rung, fixed + seconds, seconds * rate, stop, feasible,
        "dirties-as-fast-as-sent" if feasible else "does-not-converge", rate,
    )  # fmt: skip


def choose(vm: VmSummary, bytes_per_second: float, round_trip_seconds: float) -> Forecast:
    """The first rung that the operator allows and that leads out; STAY where none does."""
    last: Forecast | None = None
    for rung in LADDER:
        if rung not in vm.rungs or rung is Rung.STAY:
            continue
        last = forecast(vm, rung, bytes_per_second, round_trip_seconds)
        if last.feasible:
            return last
    reason = last.reason if last is not None else "no-rung-allowed"
    return Forecast(Rung.STAY, 0.0, 0.0, 0.0, True, reason, bytes_per_second)


def alternatives(
    vm: VmSummary, bytes_per_second: float, round_trip_seconds: float, other_than: Rung = Rung.STAY
) -> t.Iterator[Forecast]:
    """Every rung that leads out but STAY (and ``other_than``), in the ladder's order."""
    for rung in LADDER:
        if rung in vm.rungs and rung is not Rung.STAY and rung is not other_than:
            told = forecast(vm, rung, bytes_per_second, round_trip_seconds)
            if told.feasible:
                yield told


class Forecasts:
    """Forecasts that are asked for again and again, each made once while rate and way are the same."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[VmSummary, float, float, Forecast]] = {}
        self._others: dict[str, tuple[Forecast, tuple[Forecast, ...]]] = {}

    def first(self, vm: VmSummary, bytes_per_second: float, round_trip_seconds: float) -> Forecast:
        """As :func:`choose`."""
        known = self._first.get(vm.uuid)
        if (
            known is not None
            and known[0] is vm
            and known[1] == bytes_per_second
            and known[2] == round_trip_seconds
        ):
            return known[3]
        told = choose(vm, bytes_per_second, round_trip_seconds)
        self._first[vm.uuid] = (vm, bytes_per_second, round_trip_seconds, told)
        return told

    def all_rungs(
        self, vm: VmSummary, bytes_per_second: float, round_trip_seconds: float
    ) -> tuple[Forecast, ...]:
        """As :func:`alternatives`: every rung that leads out."""
        first = self.first(vm, bytes_per_second, round_trip_seconds)
        known = self._others.get(vm.uuid)
        if known is None or known[0] is not first:
            # The first that leads out is the first choice.
            below = alternatives(vm, bytes_per_second, round_trip_seconds, other_than=first.rung)
            known = self._others[vm.uuid] = (first, (first, *below) if first.rung is not Rung.STAY else ())
        return known[1]
