# SPDX-License-Identifier: GPL-3.0-or-later
"""A VM is released while libvirt waits for its last word: only halted, and taken back only as long as nobody
may run it. Its QEMU is a real process."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from precache_proxy.errors import Conflict, HypervisorError, PeerUnreachable
from precache_proxy.evacuation import confirm, freeze, release_ahead, rollback
from precache_proxy.evacuation.arrival_network import NothingToDo
from precache_proxy.evacuation.calling_off import CallingOff
from precache_proxy.evacuation.departure import Departure
from precache_proxy.evacuation.emulator import Emulators
from precache_proxy.evacuation.fence import Fence
from precache_proxy.evacuation.finish_call import FinishCall
from precache_proxy.evacuation.guard import TOMBSTONE, Guard
from precache_proxy.evacuation.job import EvacuationOptions, Journal, Step, new_job
from precache_proxy.evacuation.libvirt_frames import DOMAIN_MIGRATE_FINISH3_PARAMS, call
from precache_proxy.evacuation.reconcile import Presence
from precache_proxy.evacuation.release_ahead import UnendedMove
from precache_proxy.evacuation.surroundings import Surroundings
from unit.evacuation.emulator_ground import FakeEmulator

VM = "11111111-2222-4333-8444-555555555555"
FINISH = call(DOMAIN_MIGRATE_FINISH3_PARAMS, (7).to_bytes(4) + bytes(4))


class Domains:
    """libvirt at the source: the VM is paused by its migration, and runs again if libvirt has to end that."""

    def __init__(self) -> None:
        self.is_there = Presence.PAUSED

    async def presence_at_source(self, _vm: str) -> Presence:
        return self.is_there

    async def migrating(self, _vm: str) -> bool:
        return False

    async def definition(self, _vm: str) -> Any:
        return SimpleNamespace(disk=lambda _key: None)

    async def wait_not_migrating(self, *_unused: object) -> None:
        return None

    async def paused_by_user(self, _vm: str) -> bool:
        return False


class Network(NothingToDo):
    """Notes that the VM was claimed back."""

    def __init__(self) -> None:
        self.claimed = 0

    async def stayed(self, definition: str, job: object) -> None:
        self.claimed += 1


class Source:
    async def after_rollback(self, _vm: str) -> None: ...
    async def release(self, _vm: str, _holder: str) -> None: ...


class Link:
    state = "up"
    round_trip_seconds = least_round_trip_seconds = 0.01
    answers: Any = None

    def counters(self) -> dict[str, Any]:
        return {}

    async def call(self, method: str, _parameters: object, *, timeout_seconds: float) -> dict[str, Any]:
        return dict(self.answers(method))


class Place:
    """A source whose libvirt has asked for Finish."""

    def __init__(self, tmp_path: Path, emulator: FakeEmulator) -> None:
        guard = Guard(tmp_path / "state", tmp_path / "run")
        guard.prepare_directories()
        self.domains, self.network, self.link = Domains(), Network(), Link()
        user = cast(Any, SimpleNamespace(uid=0, gid=0))
        self.around = Surroundings(
            tmp_path / "state", tmp_path / "run", cast(Any, self.domains), guard,
            Journal(tmp_path / "state" / "jobs"), {"backup1": self.link}, cast(Any, Source()),
            cast(Any, None), self.network, user, 0.5, emulators=Emulators(emulator.pid_files),
        )  # fmt: skip
        self.departure = self.of(new_job(VM, "web1", "backup1", 1, EvacuationOptions(), 0.0))
        self.departure.job.step = Step.MIGRATE
        self.finish = FinishCall()
        self.ours, self.libvirts = socket.socketpair()
        self.finish.carried_by(self.ours)
        self.finish.outward(FINISH)
        self.over = asyncio.Event()
        self.failure: HypervisorError | None = None
        self.concluded = 0
        self.moving = asyncio.create_task(self._move())

    def of(self, job: Any) -> Departure:
        return Departure(
            job, self.around, cast(Any, SimpleNamespace(activated=lambda _answer: None)), Fence()
        )

    async def _move(self) -> None:
        await self.over.wait()
        if self.failure is not None:
            raise self.failure

    async def _conclude(self) -> None:
        self.concluded += 1
        await self.moving

    async def unended(self) -> UnendedMove:
        async def last_look() -> None:
            return None

        made = UnendedMove(
            VM, self.around.emulators, self.moving, self.finish, CallingOff(self.departure, waits=False),
            asyncio.Lock(), last_look, self._conclude,
        )  # fmt: skip
        assert await made.memory_over()
        self.departure.unended = made
        return made

    def close(self) -> None:
        self.moving.cancel()
        self.ours.close()
        self.libvirts.close()


@pytest.fixture
def emulator(tmp_path: Path) -> Iterator[FakeEmulator]:
    made = FakeEmulator(tmp_path, VM)
    yield made
    made.clear()


async def test_it_is_released_only_halted(tmp_path: Path, emulator: FakeEmulator) -> None:
    place = Place(tmp_path, emulator)
    await place.unended()
    await confirm.confirm(place.departure)
    assert place.departure.job.step is Step.RELEASED
    assert emulator.standing(), "libvirt is not waited for, and cannot let it go on"
    forbidden = place.around.guard.forbidden(VM)
    assert forbidden is not None
    assert forbidden.cause == TOMBSTONE
    assert place.concluded == 0
    # It runs there: here it ends, whatever libvirt has to say of that.
    place.failure = HypervisorError("libvirt: broken pipe")
    place.over.set()
    place.domains.is_there = Presence.SHUT_OFF
    await release_ahead.end(place.departure)
    assert emulator.ended
    assert place.concluded == 1
    place.close()


@pytest.mark.parametrize("how", ["answered", "closed", "no process"])
async def test_where_libvirt_may_have_had_its_answer_its_own_end_is_waited_for(
    tmp_path: Path, emulator: FakeEmulator, how: str
) -> None:
    """Told that Finish failed, libvirt lets the guest go on; that order may have come before the halt."""
    place = Place(tmp_path, emulator)
    await place.unended()
    if how == "answered":
        place.finish.let_through()
        await place.finish.inward(b"".join([
            (28).to_bytes(4), FINISH[4:16], (1).to_bytes(4), bytes(8),
        ]))  # fmt: skip
    elif how == "closed":
        place.libvirts.close()
    else:
        for path in emulator.pid_files.iterdir():
            path.unlink()
    place.domains.is_there = Presence.RUNNING
    confirming = asyncio.create_task(confirm.confirm(place.departure))
    await asyncio.sleep(0.1)
    assert not confirming.done()
    place.failure = HypervisorError("libvirt: end of file")
    place.over.set()
    with pytest.raises(HypervisorError, match="end of file"):
        await confirming
    assert place.departure.job.step is Step.CONFIRM, "not released"
    assert emulator.counting()
    place.close()


async def test_one_that_runs_although_it_was_halted_is_not_released(
    tmp_path: Path, emulator: FakeEmulator
) -> None:
    place = Place(tmp_path, emulator)
    await place.unended()
    place.domains.is_there = Presence.RUNNING
    with pytest.raises(Conflict, match="it is running here"):
        await confirm.confirm(place.departure)
    assert place.departure.job.step is Step.CONFIRM
    assert place.around.guard.forbidden(VM) is None
    place.over.set()
    await release_ahead.take_back(place.departure)
    assert emulator.counting()
    place.close()


async def roll_back(place: Place, departure: Departure) -> None:
    await rollback.roll_back(departure, cast(Fence, departure.contact), cold=True)


async def test_released_it_goes_on_only_on_the_destinations_durable_word(
    tmp_path: Path, emulator: FakeEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def merge_back(*_unused: object) -> None:
        return None

    async def home(*_unused: object) -> None:
        return None

    monkeypatch.setattr(freeze, "merge_back", merge_back)
    monkeypatch.setattr(rollback.giving_up, "refuse_when_moved", home)
    place = Place(tmp_path, emulator)
    await place.unended()
    place.departure.job.owes_abort = True
    await confirm.confirm(place.departure)
    place.moving.cancel()
    # A proxy that is killed now leaves all that; the next one has the record.
    (job,) = place.around.journal.load()
    again = place.of(job)

    def silent(_method: str) -> dict[str, Any]:
        assert emulator.standing()
        raise PeerUnreachable("peer backup1: the link is down")

    place.link.answers = silent
    with pytest.raises(PeerUnreachable):
        await roll_back(place, again)
    assert emulator.standing(), "the destination may have heard the release"

    def refuses(method: str) -> dict[str, Any]:
        assert method == "evacuation.abort"
        assert emulator.standing()
        # libvirt had been told to let it go on, and does so at last.
        place.domains.is_there = Presence.RUNNING
        return {"state": "aborted"}

    place.link.answers = refuses
    await roll_back(place, again)
    assert emulator.counting()
    assert again.job.step is Step.STAYED
    assert not again.job.memory_lost
    assert place.network.claimed == 1, "the destination's gateway may have been told of it"
    assert place.around.guard.forbidden(VM) is None
    place.close()


async def test_a_proxy_that_was_killed_before_the_release_lets_it_go_on(
    tmp_path: Path, emulator: FakeEmulator
) -> None:
    place = Place(tmp_path, emulator)
    assert await place.around.emulators.halt(VM)
    again = place.of(place.departure.job)
    await release_ahead.take_back(again)
    assert emulator.counting()
    await release_ahead.take_back(again)
    place.close()
