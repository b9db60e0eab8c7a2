# SPDX-License-Identifier: GPL-3.0-or-later
"""Who goes first, how fast, and how much may be under way: the pure parts."""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import replace
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precache_proxy.channel.counters import Tally
from precache_proxy.channel.governor import Governor
from precache_proxy.channel.identifiers import IdentifierSet
from precache_proxy.channel.path_watch import Sample
from precache_proxy.channel.rate import TokenBucket, check_windows, rate_at
from precache_proxy.channel.scheduler import Scheduler
from precache_proxy.channel.settings import CLASS_LIMITS, RateWindow, TrafficClass
from precache_proxy.channel.stream import Stream
from precache_proxy.channel.window import ReceiveWindow, RoundTrip
from precache_proxy.errors import ConfigurationError, InvalidInput, LifeboatError


class Owner:
    """Stands for the session: hands active streams to the scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def activate(self, stream: Stream) -> None:
        self.scheduler.activate(stream)

    def reclassify(self, stream: Stream, before: TrafficClass) -> None:
        self.scheduler.remove(stream, before)
        self.scheduler.activate(stream)

    def owe_acknowledgement(self, stream: Stream, *, soon: bool) -> None: ...

    def announce_reset(self, stream: Stream, error: LifeboatError) -> None: ...

    def forget(self, stream: Stream) -> None: ...

    def count_acknowledged(self, raw_bytes: int) -> None: ...


def stream_of(owner: Owner, number: int, traffic_class: TrafficClass) -> Stream:
    window = ReceiveWindow(CLASS_LIMITS[traffic_class], RoundTrip())
    stream = Stream(owner, number, peer="backup", window=window, peer_limit_bytes=1 << 40, tally=Tally())
    stream.begin(b"{}", traffic_class)
    return stream


async def fill(stream: Stream, size: int) -> None:
    """Keep at least one message of ``size`` waiting."""
    if not stream.has_work or stream._sending.pending_bytes == 0:
        await stream.send(bytes(size))


async def test_classes_are_strict_but_for_the_floor() -> None:
    scheduler = Scheduler(0.05)
    owner = Owner(scheduler)
    streams = {member: stream_of(owner, member + 1, member) for member in TrafficClass}
    sent: Counter[TrafficClass] = Counter()
    for _ in range(4000):
        for member in (TrafficClass.MIGRATION, TrafficClass.PRECACHE):
            await fill(streams[member], 16384)
        found = scheduler.next_frame(16384)
        assert found is not None
        sent[found[0].traffic_class] += found[1].length
    share = sent[TrafficClass.PRECACHE] / sent.total()
    assert 0.045 < share < 0.055
    await streams[TrafficClass.CONTROL].send(b"now")
    found = scheduler.next_frame(16384)
    assert found is not None
    # Its OPEN frame, then the message: before anything else, but for a turn of the floor.
    kinds = [found[0].traffic_class] + [
        next_found[0].traffic_class
        for _ in range(2)
        if (next_found := scheduler.next_frame(16384)) is not None
    ]
    assert kinds.count(TrafficClass.CONTROL) >= 2


async def test_streams_of_a_class_share_by_bytes_not_by_messages() -> None:
    scheduler = Scheduler(0.05)
    owner = Owner(scheduler)
    large, small = (stream_of(owner, number, TrafficClass.PRECACHE) for number in (1, 2))
    sent: Counter[int] = Counter()
    for _ in range(20_000):
        await fill(large, 1 << 20)
        while small._sending.pending_bytes < 50_000:
            await small.send(bytes(1000))
        found = scheduler.next_frame(16384)
        assert found is not None
        sent[found[0].identifier] += found[1].length
    assert 0.9 < sent[1] / sent[2] < 1.1


async def test_lowest_allowed_holds_the_rest_back() -> None:
    scheduler = Scheduler(0.05)
    owner = Owner(scheduler)
    await stream_of(owner, 1, TrafficClass.PRECACHE).send(b"later")
    assert scheduler.next_frame(16384, TrafficClass.CONTROL) is None
    assert scheduler.next_frame(16384) is not None


def test_token_bucket_keeps_the_rate_through_changes() -> None:
    now, sent = 0.0, 0
    bucket = TokenBucket(1_000_000, now)
    for rate, until in ((1_000_000, 10.0), (5_000_000, 20.0), (250_000, 30.0)):
        bucket.set_rate(rate, now)
        begin, before = now, sent
        while now < until:
            wait = bucket.wait_seconds(now)
            if wait:
                now += wait
                continue
            bucket.take(64 * 1024)
            sent += 64 * 1024
        assert (sent - before) / (now - begin) == pytest.approx(rate, rel=0.05)
    bucket.set_rate(None, now)
    assert bucket.wait_seconds(now) == 0
    with pytest.raises(InvalidInput, match="nothing could be sent"):
        bucket.set_rate(0, now)


def test_rate_windows() -> None:
    windows = (RateWindow("08:00", "18:00", 2.5e6, days=(0, 1, 2, 3, 4)), RateWindow("22:00", "06:00", None))
    monday = datetime(2026, 11, 23)  # noqa: DTZ001 - local time is what windows are about
    assert rate_at(1e6, windows, monday.replace(hour=8)) == 2.5e6
    assert rate_at(1e6, windows, monday.replace(hour=17, minute=59)) == 2.5e6
    assert rate_at(1e6, windows, monday.replace(hour=18)) == 1e6
    assert rate_at(1e6, windows, monday.replace(hour=23)) is None
    assert rate_at(1e6, windows, monday.replace(hour=5, minute=59)) is None
    assert rate_at(1e6, windows, monday.replace(day=22, hour=9)) == 1e6  # a Sunday


@pytest.mark.parametrize(
    ("window", "words"),
    [
        (RateWindow("8", "18:00", 1e6), "not a time of day"),
        (RateWindow("25:00", "18:00", 1e6), "not a time of day"),
        (RateWindow("08:00", "08:00", 1e6), "empty"),
        (RateWindow("08:00", "18:00", 0), "rate of 0"),
        (RateWindow("08:00", "18:00", 1e6, days=(7,)), "0 \\(Monday\\)"),
    ],
)
def test_impossible_windows_are_refused(window: RateWindow, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        check_windows([window])


@given(st.permutations(range(1, 40)))
def test_identifier_set_knows_what_was_added(order: list[int]) -> None:
    numbers = IdentifierSet()
    for count, number in enumerate(order, 1):
        numbers.add(number)
        assert all((each in numbers) == (each in order[:count]) for each in range(1, 45))
    assert numbers.missing_before(40) == 0


@pytest.mark.parametrize(("rate", "trip"), [(50e6, 0.04), (6.25e6, 0.18), (50e6, 0.18)])
def test_windows_grow_to_the_bandwidth_delay_product_and_not_beyond(rate: float, trip: float) -> None:
    path = RoundTrip()
    path.sample(trip, 0.0)
    window = ReceiveWindow(CLASS_LIMITS[TrafficClass.PRECACHE], path)
    now, total = 100.0, 0
    for _ in range(int(10 / 0.01)):
        now += 0.01
        total += int(min(rate, window.size_bytes / trip) * 0.01)
        window.consumed(total, now)
    assert 1.5 * rate * trip < window.size_bytes < 4 * rate * (trip + 0.02)


def test_a_window_grows_soon_after_the_path_became_longer() -> None:
    """What fitted the short path would be a tenth of the long one, for as long as that is remembered."""
    path, window_class = RoundTrip(), CLASS_LIMITS[TrafficClass.MIGRATION]
    rate, trip = 6.25e6, 0.18
    for beat in range(200):
        path.sample(0.0005, 70.0 + beat * 0.1)
    path.sample(trip, 90.5)
    path.sample(trip, 93.0)
    window = ReceiveWindow(window_class, path)
    now, total = 93.0, 0
    for beat in range(int(4 / 0.01)):
        now += 0.01
        if beat % 100 == 0:
            path.sample(trip, now)
        total += int(min(rate, window.size_bytes / trip) * 0.01)
        window.consumed(total, now)
    assert window.size_bytes > rate * trip
    assert path.least_seconds == 0.0005, "what it was without queues is remembered for longer"


class Line:
    """A link of a rate and a delay with a queue, stepped in time: what a governor would see of it."""

    def __init__(self, rate: float, trip: float) -> None:
        self.rate, self.trip = rate, trip
        self.now = self.acknowledged = self.queue = 0.0
        self._under_way: deque[tuple[float, float, float]] = deque()
        self._seen = trip

    def step(self, seconds: float, sent: float) -> Sample:
        # In small pieces: what was sent between two looks does not arrive in one instant.
        pieces = max(1, round(seconds / 0.005))
        for _ in range(pieces):
            sample = self._piece(seconds / pieces, sent / pieces)
        return sample

    def _piece(self, seconds: float, sent: float) -> Sample:
        self.now += seconds
        delivered = min(self.queue + sent, self.rate * seconds)
        self.queue += sent - delivered
        self._under_way.append((self.now + self.trip, delivered, self.trip + self.queue / self.rate))
        while self._under_way and self._under_way[0][0] <= self.now:
            _, arrived, self._seen = self._under_way.popleft()
            self.acknowledged += arrived
        return Sample(self.now, int(self.acknowledged), self._seen, self.trip, backlog=True)


@pytest.mark.parametrize(
    ("rate", "trip"), [(50e6, 0.01), (50e6, 0.04), (6.25e6, 0.18), (50e6, 0.18), (1.25e6, 0.18)]
)
def test_governor_fills_the_link_with_a_short_queue_and_follows_changes(rate: float, trip: float) -> None:
    line, governor = Line(rate, trip), Governor()
    for factor in (1.0, 0.3, 1.0):
        line.rate = rate * factor
        begin = worst = 0.0
        for beat in range(int(30 / 0.025)):
            if beat == 800:  # the last ten seconds count
                begin = line.acknowledged
            sample = line.step(0.025, (governor.rate_bytes_per_second or 2e6) * 0.025)
            governor.sample(sample)
            if beat > 800:
                worst = max(worst, line.queue / line.rate)
        assert (line.acknowledged - begin) / 10 > 0.95 * line.rate
        assert worst < 0.05


def test_governor_believes_a_path_that_grew_longer_while_it_was_idle() -> None:
    """A failover, told of by pings: the half minute before it is no measure for a queue any more."""
    line, governor = Line(6.25e6, 0.18), Governor()
    for beat in range(1600):
        line.now += 0.025
        governor.sample(Sample(line.now, 0, 0.0005 if beat < 1000 else 0.18, 0.0005, backlog=False))
    begin = 0.0
    for beat in range(200):
        if beat == 80:
            begin = line.acknowledged
        governor.sample(line.step(0.025, (governor.rate_bytes_per_second or 2e6) * 0.025))
    assert (line.acknowledged - begin) / 3 > 0.85 * line.rate


def test_governor_begins_a_long_copy_at_full_speed_after_many_small_ones() -> None:
    """Passes that are over before they fill the path say little of it, and what they say is soon unlearnt."""
    line, governor, source = Line(6.25e6, 0.18), Governor(), random.Random(5)
    for _ in range(6):
        for beat in range(200):
            busy = beat < 60
            sent = (governor.rate_bytes_per_second or 2e6) * 0.025 * (0.7 if busy else 0)
            sample = replace(line.step(0.025, sent), backlog=busy and beat % 4 != 0)
            noise = 0.03 + source.random() * 0.03 if busy else 0
            governor.sample(replace(sample, round_trip_seconds=sample.round_trip_seconds + noise))
    begin = line.acknowledged
    for _ in range(120):
        governor.sample(line.step(0.025, (governor.rate_bytes_per_second or 2e6) * 0.025))
    assert (line.acknowledged - begin) / 3 > 0.5 * line.rate


def busy(
    line: Line, governor: Governor, seconds: float, *, beat: float | None = 0.025, noise: float = 0.0
) -> float:
    """As much as is allowed. The longest queue, in seconds.

    ``beat``: seconds between two looks, None: as often as the governor asks for; ``noise``: the most by which
    round trips are longer than they are, in seconds.
    """
    source, longest, until = random.Random(7), 0.0, line.now + seconds
    while line.now < until - 1e-9:
        step = beat or governor.beat_seconds
        sample = line.step(step, (governor.rate_bytes_per_second or 2e6) * step)
        trip = sample.round_trip_seconds + noise * source.random()
        governor.sample(replace(sample, round_trip_seconds=trip))
        longest = max(longest, line.queue / line.rate)
    return longest


def idle(line: Line, governor: Governor, seconds: float) -> None:
    """Nothing to send."""
    for _ in range(int(seconds / 0.025)):
        governor.sample(replace(line.step(0.025, 0), backlog=False))


def test_governor_begins_with_no_queue_of_seconds_once_a_path_has_become_slower() -> None:
    """What it carried before must not be tried again at the beginning of each copy."""
    line, governor = Line(50e6, 0.18), Governor()
    busy(line, governor, 20)
    line.rate = 6.25e6
    busy(line, governor, 20)
    for _ in range(3):
        idle(line, governor, 30)
        begin = line.acknowledged
        assert busy(line, governor, 3) < 0.25
        assert (line.acknowledged - begin) / 3 > 0.85 * line.rate


def test_governor_goes_on_finding_out_where_short_copies_left_off() -> None:
    """Passes of a second each over a long path: none lasts long enough to find out what it carries."""
    line, governor = Line(50e6, 0.18), Governor()
    for _ in range(20):
        busy(line, governor, 1)
        idle(line, governor, 5)
    begin = line.acknowledged
    busy(line, governor, 2)
    assert (line.acknowledged - begin) / 2 > 0.5 * line.rate


def test_governor_begins_anew_on_another_path() -> None:
    """A failover while nothing was sent: the round trip tells of it, and the old rate would flood it."""
    line, governor = Line(50e6, 0.04), Governor()
    busy(line, governor, 20)
    line.rate, line.trip = 6.25e6, 0.18
    idle(line, governor, 20)
    # Before there is anything to send: by the old rate a second would be under way before the first look.
    assert governor.rate_bytes_per_second == 2e6
    begin = line.acknowledged
    assert busy(line, governor, 4) < 0.2
    assert (line.acknowledged - begin) / 4 > 0.75 * line.rate


@pytest.mark.parametrize(("rate", "trip"), [(6.25e6, 0.18), (50e6, 0.04), (50e6, 0.18)])
def test_governor_finds_out_what_a_path_carries_with_a_short_queue(rate: float, trip: float) -> None:
    """What stands in the queue when the rate has come up is what a call waits for at a copy's beginning."""
    line, governor = Line(rate, trip), Governor()
    idle(line, governor, 3)
    assert busy(line, governor, 6) < 0.13


@pytest.mark.parametrize(("rate", "known"), [(6.25e6, 0.15), (6.25e6, 0.17), (50e6, 0.14)])
def test_governor_begins_swiftly_on_a_path_that_is_longer_than_it_seemed(rate: float, known: float) -> None:
    """Round trips are smoothed: just after a failover they are short, and what is missing is no queue."""
    line, governor = Line(rate, known), Governor()
    idle(line, governor, 10)
    line.trip = 0.18
    busy(line, governor, 4)
    begin = line.acknowledged
    busy(line, governor, 3)
    assert (line.acknowledged - begin) / 3 > 0.8 * line.rate
    assert line.queue / line.rate < 0.2


def test_governor_keeps_the_round_trip_in_mind_where_a_copy_has_nothing_to_send_for_a_moment() -> None:
    """Its queue has hidden it for a while: what is short of it would be taken for no queue."""
    line, governor = Line(6.25e6, 0.18), Governor()
    busy(line, governor, 12, beat=None)
    line.queue += 0.005 * line.rate
    for _ in range(2):
        governor.sample(replace(line.step(0.025, 0.025 * line.rate), backlog=False))
    assert governor._base[0][1] == pytest.approx(0.18, abs=0.0005)
    assert busy(line, governor, 10, beat=None) < 0.05


def test_governor_leaves_local_paths_alone() -> None:
    governor = Governor()
    for beat in range(100):
        assert (
            governor.sample(Sample(beat / 40, beat * 10_000_000, 0.02 * (beat % 2) + 0.0004, 0.0004, True))
            is None
        )


@pytest.mark.parametrize(("rate", "trip"), [(50e6, 0.04), (6.25e6, 0.18), (50e6, 0.18)])
def test_governor_keeps_most_of_the_link_on_a_busy_host(rate: float, trip: float) -> None:
    """One beat in ten sends nothing and one in ten sees a late acknowledgement, as other processes cause."""
    source, line, governor, tokens = random.Random(3), Line(rate, trip), Governor(), 0.0
    begin = longest = 0.0
    for beat in range(1600):
        allowed = governor.rate_bytes_per_second or 2e6
        tokens = min(allowed * 0.05, tokens + allowed * 0.025)
        stalled = source.random() < 0.1
        sample = line.step(0.025, 0 if stalled else tokens)
        tokens = tokens if stalled else 0.0
        if source.random() < 0.1:
            sample = replace(sample, round_trip_seconds=sample.round_trip_seconds + source.random() * 0.08)
        governor.sample(sample)
        if beat == 800:
            begin = line.acknowledged
        if beat > 800:
            longest = max(longest, line.queue / line.rate)
    assert (line.acknowledged - begin) / 20 > 0.95 * rate
    assert longest < 0.05, "a call waits that long beyond the round trip"
