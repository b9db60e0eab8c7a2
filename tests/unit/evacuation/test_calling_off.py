# SPDX-License-Identifier: GPL-3.0-or-later
"""A move that is ended before its end: its guest stands still first where its writes wait, and goes on
after."""

from __future__ import annotations

import asyncio
import errno
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import libvirt
import pytest

from precache_proxy.errors import HypervisorError, PeerUnreachable
from precache_proxy.evacuation import calling_off, rollback
from precache_proxy.evacuation.calling_off import CallingOff
from precache_proxy.evacuation.departure import Departure, pause_guest
from precache_proxy.evacuation.departures import Departures
from precache_proxy.evacuation.fence import Fence
from precache_proxy.evacuation.guard import FENCED, Forbidden
from precache_proxy.evacuation.job import Journal, Step, Verdict
from unit.evacuation.called_off_ground import BY_MIGRATION, BY_USER, RUNNING, VM, Place, soon


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


async def end(place: Place, *, waits: bool) -> list[tuple[str, bool]]:
    """What a move that is called off comes to, until libvirt was told twice."""
    off = CallingOff(place.departure, waits=waits)
    await asyncio.sleep(0.05)
    assert place.domain.told == [], "nothing is ended before it is asked for"
    place.departure.enough.set()
    await soon(lambda: [what for what, _ in place.domain.told].count("abort") == 2)
    await off.over()
    return place.domain.told


async def test_a_guest_whose_writes_wait_stands_still_before_its_move_is_ended(place: Place) -> None:
    assert await end(place, waits=True) == [("suspend", True), ("abort", True), ("abort", True)]
    assert place.domain.now == BY_MIGRATION, "libvirt lets it go on, or the rollback: not who ends it"
    assert 0 < (place.departure.job.stood_still_seconds or 0) < 5


async def test_a_guest_with_its_mirrors_in_the_background_is_not_stopped(place: Place) -> None:
    assert await end(place, waits=False) == [("abort", False), ("abort", False)]
    assert place.departure.job.stood_still_seconds is None
    assert not place.journal.load()[0].stopped_here


async def test_nor_is_one_that_libvirt_does_not_move_yet(place: Place) -> None:
    place.domain.migrates = False
    off = CallingOff(place.departure, waits=True)
    place.departure.enough.set()
    await soon(lambda: ("abort", False) in place.domain.told)
    place.domain.migrates = True
    await soon(lambda: ("abort", True) in place.domain.told)
    await off.over()
    assert ("suspend", True) in place.domain.told, "but as soon as it does"


async def test_a_mirror_that_was_changed_under_way_counts(place: Place) -> None:
    off = CallingOff(place.departure, waits=False)
    off.writes_wait()
    place.departure.enough.set()
    await soon(lambda: ("suspend", True) in place.domain.told)
    await off.over()


async def test_a_stop_that_hangs_is_awaited_before_anything_is_decided(place: Place) -> None:
    """It may come only after libvirt has let the guest go on: nobody would look for a paused one then."""
    place.domain.may_stop.clear()
    off = CallingOff(place.departure, waits=True)
    place.departure.enough.set()
    await soon(lambda: ("suspend", True) in place.domain.told)
    over = asyncio.create_task(off.over())
    await asyncio.sleep(0.1)
    assert not over.done()
    place.domain.migrates = False
    place.domain.may_stop.set()
    await asyncio.wait_for(over, 5)
    assert place.domain.now == BY_USER
    await rollback.roll_back(place.departure, Fence(), cold=False)
    assert (place.domain.now, place.departure.job.step) == (RUNNING, Step.STAYED)


async def test_a_move_that_ends_while_the_stop_goes_on_record_leaves_its_guest_running(place: Place) -> None:
    """A dead relay ends it at once, and a record may take its time: libvirt would let nobody go on any more,
    and the rollback only after it has waited for a peer that is not heard."""
    save = place.journal.save

    def slow(job: Any) -> None:
        save(job)
        place.domain.migrates = False

    place.journal.save = slow  # type: ignore[method-assign]
    assert await end(place, waits=True) == [("abort", True), ("abort", True)]
    assert place.domain.now == RUNNING
    assert place.departure.job.stood_still_seconds is None


async def test_a_dead_relay_waits_for_the_order_and_not_for_what_goes_before_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libvirt may take its time to tell whether it moves the guest; its stop is ordered after that."""
    monkeypatch.setattr(calling_off, "SETTLE_SECONDS", 0.05)
    ask = place.domain.state

    def slow() -> list[int]:
        time.sleep(0.3)
        return ask()

    place.domain.state = slow  # type: ignore[method-assign]
    off = CallingOff(place.departure, waits=True)
    await asyncio.wait_for(off.stand_still(), 5)
    assert ("suspend", True) in place.domain.told
    await off.over()


async def test_a_guest_that_cannot_be_stopped_is_called_off_all_the_same(place: Place) -> None:
    def refuse() -> None:
        raise libvirt.libvirtError("cannot acquire state change lock")

    place.domain.suspend = refuse  # type: ignore[method-assign]
    assert await end(place, waits=True) == [("abort", True), ("abort", True)]
    assert place.departure.job.stood_still_seconds is None, "it did not"


async def test_a_full_disk_keeps_nobody_from_stopping_it(place: Place) -> None:
    def no_space(_job: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    place.journal.save = no_space  # type: ignore[method-assign]
    assert await end(place, waits=True) == [("suspend", False), ("abort", False), ("abort", False)]


# -- what a kill leaves


@pytest.mark.parametrize("left", [BY_MIGRATION, BY_USER, RUNNING])
async def test_who_was_stopped_to_be_called_off_goes_on_after_a_kill(
    place: Place, left: tuple[int, int]
) -> None:
    await calling_off.stop_guest(place.departure)
    place.domain.now, place.domain.migrates = left, False
    again = place.started_again()
    assert again.job.stopped_here
    await rollback.roll_back(again, Fence(), cold=False)
    assert (place.domain.now, again.job.verdict) == (RUNNING, Verdict.STAYED)


async def test_a_stop_that_libvirt_obeys_only_after_the_kill_is_found(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    await calling_off.stop_guest(place.departure)
    place.domain.now, place.domain.migrates = RUNNING, False
    again = place.started_again()
    again.job.disks = {"vda": cast(Any, SimpleNamespace(overlay="", image="/i"))}

    async def merge(*_unused: object) -> None:
        place.domain.now = BY_USER

    monkeypatch.setattr(rollback.freeze, "merge_back", merge)
    monkeypatch.setattr(place.journal, "save", lambda _job: None)
    await rollback.roll_back(again, Fence(), cold=False)
    assert place.domain.now == RUNNING


async def test_who_was_paused_by_somebody_else_stays_paused(place: Place) -> None:
    place.domain.now, place.domain.migrates = BY_USER, False
    again = place.started_again()

    async def not_yet(_vm: str) -> None:
        raise HypervisorError("it is asked again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place.around.source, "after_rollback", not_yet)
        with pytest.raises(HypervisorError):
            await rollback.roll_back(again, Fence(), cold=False)
    await rollback.roll_back(again, Fence(), cold=False)
    assert (place.domain.now, again.job.verdict) == (BY_USER, Verdict.STAYED)
    assert again.job.sentence.count("It is paused here") == 1
    assert place.domain.told == []


async def test_who_was_paused_by_somebody_else_is_not_taken_for_ours(place: Place) -> None:
    """Its move is called off, too: there are no writes to wait for."""
    place.domain.now = BY_USER
    assert await end(place, waits=True) == [("abort", False), ("abort", False)]
    await pause_guest(place.departure)
    assert not place.journal.load()[0].stopped_here


async def test_what_libvirt_itself_left_paused_goes_on(place: Place) -> None:
    place.domain.now, place.domain.migrates = BY_MIGRATION, False
    await rollback.roll_back(place.started_again(), Fence(), cold=False)
    assert place.domain.now == RUNNING


async def test_who_was_paused_on_its_rung_goes_on_after_a_kill(place: Place) -> None:
    await pause_guest(place.departure)
    assert place.domain.told == [("suspend", True)]
    place.domain.now, place.domain.migrates = BY_USER, False
    await rollback.roll_back(place.started_again(), Fence(), cold=False)
    assert place.domain.now == RUNNING


async def test_who_was_fenced_by_an_older_release_goes_on_when_that_is_over(place: Place) -> None:
    """Its record says nothing of the stop, and the guard's file is gone if a kill comes before the resume."""
    place.domain.now, place.domain.migrates = BY_USER, False
    job = place.departure.job
    place.guard.forbid(Forbidden(VM, FENCED, "backup1 may run it", job.id, 1))

    def killed() -> None:
        raise libvirt.libvirtError("connection closed")

    place.domain.resume = killed  # type: ignore[method-assign]
    with pytest.raises(HypervisorError):
        await rollback.roll_back(place.started_again(), Fence(), cold=False)
    assert place.guard.forbidden(VM) is None
    del place.domain.resume  # type: ignore[method-assign]
    await rollback.roll_back(place.started_again(), Fence(), cold=False)
    assert place.domain.now == RUNNING


async def test_the_fence_is_not_undone(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libvirt lets the guest go on with the end of the migration; the fence stops it again, and the rollback
    leaves it so."""
    job = place.departure.job
    job.owes_abort, job.presumed_dead_after_seconds = True, 300.0
    fence = Fence(time.monotonic, "another boot")
    monkeypatch.setattr("precache_proxy.evacuation.fence.LOOK_SECONDS", 0.01)
    await fence.stand_still(place.departure)
    assert (place.domain.now, job.stopped_here) == (BY_MIGRATION, True)
    off = CallingOff(place.departure, waits=True)
    place.departure.enough.set()
    await soon(lambda: ("abort", True) in place.domain.told)
    await off.over()
    place.domain.now, place.domain.migrates = RUNNING, False

    async def unheard(*_unused: object) -> dict[str, Any]:
        raise HypervisorError("no link")

    monkeypatch.setattr(Departure, "call", unheard)
    fence.watch(place.departure)
    await soon(lambda: place.domain.now == BY_USER)
    with pytest.raises(PeerUnreachable, match="stands still here"):
        await rollback.roll_back(place.departure, fence, cold=False)
    await fence.stop()
    assert place.domain.now == BY_USER
    assert ("resume", True) not in place.domain.told


# -- what an earlier migration left


async def test_what_is_left_of_a_migration_is_ended_with_the_guest_stopped(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.departure.job.disks = {"vda": cast(Any, None)}
    monkeypatch.setattr(place.journal, "save", _without_disks(place.journal))
    ended = threading.Event()

    def abort() -> None:
        place.domain._note("abort")
        ended.set()

    place.domain.abortJob = abort  # type: ignore[method-assign]
    place.domain.jobStats = lambda *_unused: (  # type: ignore[method-assign]
        {} if ended.is_set() else {"operation": libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT}
    )
    await calling_off.end_leftovers(place.departure)
    asked = [what for what, recorded in place.domain.told if recorded]
    assert asked == ["suspend", "abort", "cancel vda"]


def _without_disks(journal: Journal) -> Callable[[Any], None]:
    def save(job: Any) -> None:
        journal.path(job.id).write_text(json.dumps({"stopped_here": job.stopped_here}))

    return save


async def test_who_goes_on_where_nothing_is_left_is_not_stopped(place: Place) -> None:
    place.domain.migrates = False
    place.departure.job.disks = {"vda": cast(Any, None)}
    await calling_off.end_leftovers(place.departure)
    assert place.domain.told == []


def test_a_record_of_an_older_release_is_read(place: Place) -> None:
    path = place.journal.path(place.departure.job.id)
    old = json.loads(path.read_text())
    del old["stopped_here"], old["stood_still_seconds"]
    path.write_text(json.dumps(old))
    departures = Departures(place.around, cast(Any, None))
    departures.load()
    assert not departures.jobs()[0].stopped_here
