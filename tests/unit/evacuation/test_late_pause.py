# SPDX-License-Identifier: GPL-3.0-or-later
"""A pause that libvirt obeys only after it was given up: whom it stops goes on, after a kill as well."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, cast

import libvirt
import pytest

from precache_proxy.errors import HypervisorError
from precache_proxy.evacuation import late_pause, rollback
from precache_proxy.evacuation.calling_off import CallingOff
from precache_proxy.evacuation.departure import Departure, pause_guest
from precache_proxy.evacuation.departures import Departures
from precache_proxy.evacuation.fence import Fence
from precache_proxy.evacuation.guard import FENCED, Forbidden
from precache_proxy.evacuation.job import Step, Verdict
from precache_proxy.evacuation.late_pause import WATCH_SECONDS, Next, Standing, decide
from unit.evacuation.called_off_ground import BY_MIGRATION, BY_USER, RUNNING, VM, Place, soon

BY_NOBODY_KNOWN = (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_UNKNOWN)
BY_AN_ERROR = (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR)


@pytest.mark.parametrize(
    ("found", "seconds", "following"),
    [
        (Standing(7, paused=True), 0.0, Next.RESUME),
        (Standing(7, paused=True), WATCH_SECONDS + 60, Next.RESUME),
        (Standing(7), WATCH_SECONDS - 1, Next.LOOK_AGAIN),
        (Standing(7), WATCH_SECONDS, Next.OVER),
        # ended, and started anew by somebody
        (Standing(None), 1.0, Next.OVER),
        (Standing(8, paused=True), 1.0, Next.OVER),
    ],
)
def test_what_follows_from_a_look(found: Standing, seconds: float, following: Next) -> None:
    assert decide(found, 7, seconds) is following


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


async def given_up(place: Place) -> None:
    """The move is called off; libvirt does not answer the pause, and ends the migration."""
    place.connection.impatient = True
    place.domain.may_stop.clear()
    off = CallingOff(place.departure, waits=True)
    place.departure.enough.set()
    await soon(lambda: ("abort", True) in place.domain.told)
    await off.over()
    place.domain.migrates = False


async def comes(place: Place) -> None:
    """Libvirt obeys, long after."""
    place.domain.may_stop.set()
    await soon(lambda: place.domain.now == BY_USER)


async def tend(departures: Departures) -> None:
    await departures.tend_all()
    await asyncio.gather(*departures._tasks.values())


def anew(place: Place) -> Departures:
    """A proxy that was started after a kill."""
    departures = Departures(place.around, cast(Any, None))
    departures.load()
    return departures


async def test_who_is_paused_after_the_rollback_goes_on(place: Place) -> None:
    await given_up(place)
    departure = place.departure
    await rollback.roll_back(departure, Fence(), cold=False)
    assert (place.domain.now, departure.job.step) == (RUNNING, Step.STAYED)
    assert late_pause.is_open(departure.job)
    await late_pause.look(departure, Fence())
    await comes(place)
    await late_pause.look(departure, Fence())
    assert place.domain.now == RUNNING
    assert late_pause.is_open(departure.job), "another that was asked for may still come"


@pytest.mark.parametrize("left", [BY_USER, BY_MIGRATION, BY_NOBODY_KNOWN])
async def test_nor_does_it_stay_paused_where_a_kill_comes_first(place: Place, left: tuple[int, int]) -> None:
    await given_up(place)
    await rollback.roll_back(place.departure, Fence(), cold=False)
    await comes(place)
    place.domain.now = left
    await tend(anew(place))
    assert place.domain.now == RUNNING


async def test_nor_where_the_kill_comes_before_the_rollback(place: Place) -> None:
    await given_up(place)
    departures = anew(place)
    await tend(departures)
    (job,) = departures.jobs()
    assert (place.domain.now, job.verdict) == (RUNNING, Verdict.STAYED)
    await comes(place)
    await tend(departures)
    assert place.domain.now == RUNNING


async def test_nor_where_its_guest_was_to_be_paused_on_its_rung(place: Place) -> None:
    place.connection.impatient = True
    place.domain.may_stop.clear()
    with pytest.raises(HypervisorError):
        await pause_guest(place.departure)
    place.domain.migrates = False
    await rollback.roll_back(place.departure, Fence(), cold=False)
    await comes(place)
    await late_pause.look(place.departure, Fence())
    assert place.domain.now == RUNNING


async def test_who_was_paused_in_time_is_not_watched(place: Place) -> None:
    """An operator may pause it right after."""
    await late_pause.pause(place.departure)
    place.domain.migrates = False
    await rollback.roll_back(place.departure, Fence(), cold=False)
    assert place.domain.now == RUNNING
    assert not late_pause.is_open(place.departure.job)
    place.domain.now = BY_USER
    await tend(anew(place))
    assert place.domain.now == BY_USER


async def test_one_that_was_answered_says_nothing_of_an_earlier_one(place: Place) -> None:
    await given_up(place)
    place.connection.impatient = False
    place.domain.now = BY_USER
    await late_pause.pause(place.departure)
    await rollback.roll_back(place.departure, Fence(), cold=False)
    assert late_pause.is_open(place.departure.job)
    place.domain.may_stop.set()


async def test_it_is_watched_until_libvirt_has_answered_for_long_enough(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    await given_up(place)
    departure = place.departure
    await rollback.roll_back(departure, Fence(), cold=False)
    monkeypatch.setattr(late_pause, "WATCH_SECONDS", 0.3)

    def busy() -> dict[str, Any]:
        raise libvirt.libvirtError("cannot acquire state change lock")

    place.domain.jobStats = busy  # type: ignore[method-assign]
    await asyncio.sleep(0.4)
    with pytest.raises(HypervisorError):
        await late_pause.look(departure, Fence())
    del place.domain.jobStats  # type: ignore[method-assign]
    await late_pause.look(departure, Fence())
    assert late_pause.is_open(departure.job), "that libvirt did not answer says nothing"
    await asyncio.sleep(0.4)
    await late_pause.look(departure, Fence())
    assert not late_pause.is_open(place.journal.load()[0])
    place.domain.may_stop.set()


async def test_who_was_started_anew_or_moved_by_hand_or_has_a_bad_disk_is_left_alone(place: Place) -> None:
    await given_up(place)
    await rollback.roll_back(place.departure, Fence(), cold=False)
    place.domain.now, place.domain.migrates = BY_MIGRATION, True
    await late_pause.look(place.departure, Fence())
    place.domain.now, place.domain.migrates = BY_AN_ERROR, False
    await late_pause.look(place.departure, Fence())
    place.domain.now, place.domain.number = BY_USER, 8
    await late_pause.look(place.departure, Fence())
    assert not late_pause.is_open(place.departure.job)
    assert "resume" not in [what for what, _ in place.domain.told]
    place.domain.may_stop.set()


async def test_the_fence_is_not_undone(place: Place) -> None:
    await given_up(place)
    await rollback.roll_back(place.departure, Fence(), cold=False)
    await comes(place)
    job = place.departure.job
    place.guard.forbid(Forbidden(VM, FENCED, "backup1 may run it", job.id, 1))
    await late_pause.look(place.departure, Fence())
    assert place.domain.now == BY_USER


async def test_who_is_paused_after_the_fence_was_lifted_goes_on(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libvirt did not answer while the VM was to stand still, and obeys when contact is back."""
    job = place.departure.job
    job.step, job.verdict = Step.STAYED, Verdict.STAYED
    job.owes_abort, job.presumed_dead_after_seconds = True, 300.0
    place.domain.migrates = False
    place.connection.impatient = True
    place.domain.may_stop.clear()
    fence = Fence()
    with pytest.raises(HypervisorError):
        await fence.stand_still(place.departure)

    async def cleared(*_unused: object) -> dict[str, Any]:
        return {}

    monkeypatch.setattr(Departure, "call", cleared)
    again = place.started_again()
    again.job.owes_abort = False
    await fence.lift(again)
    await comes(place)
    await late_pause.look(again, Fence())
    assert place.domain.now == RUNNING


async def test_a_record_of_an_older_release_is_read(place: Place) -> None:
    path = place.journal.path(place.departure.job.id)
    old = json.loads(path.read_text())
    old["step"] = Step.STAYED.value
    del old["pause_unanswered"]
    path.write_text(json.dumps(old))
    (job,) = anew(place).jobs()
    assert not late_pause.is_open(job)
