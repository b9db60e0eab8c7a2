# SPDX-License-Identifier: GPL-3.0-or-later
"""A guest that obeys its shutdown only after its restart was given up: started again at home, once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from precache_proxy.errors import LifeboatError
from precache_proxy.evacuation import departures as departures_module
from precache_proxy.evacuation import late_stop, restart
from precache_proxy.evacuation import rollback as rollback_module
from precache_proxy.evacuation.departures import Departures
from precache_proxy.evacuation.fence import Fence
from precache_proxy.evacuation.guard import TOMBSTONE, Forbidden, Guard
from precache_proxy.evacuation.job import (
    EvacuationOptions,
    Job,
    Journal,
    Mode,
    ShutdownRequest,
    Step,
    Verdict,
    new_job,
)
from precache_proxy.evacuation.late_stop import LONGEST_SECONDS, WATCH_SECONDS, Next, decide
from precache_proxy.evacuation.reconcile import Life, Presence
from precache_proxy.evacuation.surroundings import Surroundings

VM = "11111111-2222-4333-8444-555555555501"
BOOT = "this boot"
RUNS = Life(Presence.RUNNING, 7)
OFF = Life(Presence.ENDED, None, in_order=True)
REQUEST = ShutdownRequest(0.0, 100.0, BOOT, 7, given_up_boottime_seconds=165.0)


@pytest.mark.parametrize(
    ("life", "boot", "seconds", "following"),
    [
        (RUNS, BOOT, 1.0, Next.LOOK_AGAIN),
        (RUNS, BOOT, WATCH_SECONDS, Next.SEEN_RUNNING),
        (OFF, BOOT, 1.0, Next.START),
        # not looked at meanwhile: the proxy was killed
        (OFF, BOOT, WATCH_SECONDS + 60, Next.START),
        (OFF, BOOT, LONGEST_SECONDS, Next.TOO_LATE),
        (Life(Presence.RUNNING, 8), BOOT, 1.0, Next.STARTED_BY_OTHERS),
        # destroyed, saved, crashed
        (Life(Presence.ENDED, None), BOOT, 1.0, Next.ENDED_BY_OTHERS),
        (Life(Presence.SHUT_OFF, None), BOOT, 1.0, Next.ENDED_BY_OTHERS),
        (Life(Presence.ABSENT), BOOT, 1.0, Next.GONE),
        (Life(Presence.UNKNOWN), BOOT, LONGEST_SECONDS, Next.LOOK_AGAIN),
        (OFF, "another boot", 1.0, Next.HOST_RESTARTED),
    ],
)
def test_what_follows_from_a_look(life: Life, boot: str, seconds: float, following: Next) -> None:
    assert decide(REQUEST, life, boot, 165.0 + seconds) is following


class Domains:
    """A guest that was asked to shut down and has not yet."""

    def __init__(self) -> None:
        self.presence, self.number, self.starts = Presence.RUNNING, 7, 0

    async def presence_at_source(self, _vm: str) -> Presence:
        return self.presence

    async def life(self, _vm: str) -> Life:
        on = self.presence is Presence.RUNNING
        return Life(self.presence, self.number if on else None, in_order=self.presence is Presence.ENDED)

    async def start(self, _vm: str) -> bool:
        self.presence, self.number, self.starts = Presence.RUNNING, self.number + 1, self.starts + 1
        return True

    def obey(self) -> None:
        self.presence = Presence.ENDED


class Source:
    async def after_rollback(self, _vm: str) -> None: ...
    async def release(self, _vm: str, _holder: str) -> None: ...
    async def hold(self, _vm: str, _holder: str) -> None: ...


class Network:
    async def stayed(self, _definition: str, _job: Job) -> None: ...


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Domains, Callable[[], Departures]]:
    """A home whose job was killed while the guest was being shut down; a proxy started on what is on disk."""

    async def nothing(*_unused: object) -> None: ...

    monkeypatch.setattr(restart, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(restart, "LATE_SECONDS", 0.0)
    monkeypatch.setattr(rollback_module, "clear_local_leftovers", nothing)
    domains = Domains()
    guard = Guard(tmp_path / "state", tmp_path / "run")
    guard.prepare_directories()
    surroundings = Surroundings(
        tmp_path / "state", tmp_path / "run", cast(Any, domains), guard, Journal(tmp_path / "state" / "jobs"),
        {"backup1": SimpleNamespace(counters=dict, state="down")}, cast(Any, Source()), cast(Any, None),
        cast(Any, Network()), cast(Any, None), 0.5,
    )  # fmt: skip
    options = EvacuationOptions(mode=Mode.RESTART, shutdown_seconds=0.0, power_off=False)
    job = new_job(VM, "web1", "backup1", 1, options, 0.0)
    job.was_running = True
    job.advance(Step.CATCH_UP, 1.0)
    job.advance(Step.STOP, 2.0)
    job.shutdown_request = ShutdownRequest(2.0, 0.0, late_stop.this_boot(), 7)
    surroundings.journal.save(job)

    async def answered(_self: object, _item: object) -> departures_module.DestinationView:
        return departures_module.DestinationView(reachable=True)

    monkeypatch.setattr(Departures, "_ask_destination", answered)

    def started() -> Departures:
        proxy = Departures(surroundings, cast(Any, None))
        proxy.load()
        return proxy

    return domains, started


async def tended(proxy: Departures) -> Job:
    """After each job was looked at once more."""
    await proxy.tend_all()
    for task in proxy._tasks.values():
        await task
    return proxy.jobs()[0]


Home = tuple[Domains, Callable[[], Departures]]


async def test_off_under_the_verdict_stayed_it_is_started_again_once(home: Home) -> None:
    domains, started = home
    job = await tended(started())
    assert (job.verdict, domains.starts) == (Verdict.STAYED, 0)
    assert late_stop.is_open(job)
    domains.obey()
    # Looked at by another proxy than that which gave it up: what is on disk says enough.
    proxy = started()
    job = await tended(proxy)
    assert (domains.presence, domains.starts) == (Presence.RUNNING, 1)
    assert "was started again here" in job.sentence
    domains.obey()
    await tended(proxy)
    assert domains.starts == 1, "shut down a second time it was not on our account"
    assert started().jobs()[0].shutdown_request is not None
    assert not late_stop.is_open(started().jobs()[0])


async def test_one_that_may_run_elsewhere_is_not_started(home: Home) -> None:
    domains, started = home
    proxy = started()
    job = await tended(proxy)
    domains.obey()
    guard = proxy._guard
    guard.forbid(Forbidden(VM, TOMBSTONE, "it runs at backup1", "another job", 2))
    await tended(proxy)
    assert (domains.starts, late_stop.is_open(job)) == (0, False)


async def test_a_fenced_one_waits_for_contact(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    domains, started = home
    proxy = started()
    job = await tended(proxy)
    domains.obey()
    monkeypatch.setattr(Fence, "is_due", lambda *_unused: True)
    await tended(proxy)
    assert (domains.starts, late_stop.is_open(job)) == (0, True)
    monkeypatch.undo()
    await late_stop.look(proxy.get(job.id), Fence())
    assert domains.starts == 1


async def test_while_it_leaves_by_another_job_that_one_decides(home: Home) -> None:
    domains, started = home
    proxy = started()
    job = await tended(proxy)
    other = new_job(VM, "web1", "backup1", 1, EvacuationOptions(), 5.0)
    other.step = Step.CATCH_UP
    proxy._departures[other.id] = proxy._departure(other)
    domains.obey()
    await proxy._settle_debts(proxy.get(job.id))
    assert domains.starts == 0
    other.step = Step.STAYED
    await proxy._settle_debts(proxy.get(job.id))
    assert domains.starts == 1


async def test_a_start_that_fails_is_tried_again(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    domains, started = home
    proxy = started()
    job = await tended(proxy)
    domains.obey()

    async def refused(_vm: str) -> bool:
        raise LifeboatError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(domains, "start", refused)
        await tended(proxy)
    assert late_stop.is_open(job)
    await tended(proxy)
    assert (domains.starts, late_stop.is_open(job)) == (1, False)
