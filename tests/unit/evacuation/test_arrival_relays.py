# SPDX-License-Identifier: GPL-3.0-or-later
"""What is relayed for a job at its destination: only while it is admitted, and not a moment longer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from precache_proxy.errors import Conflict, InvalidInput, LifeboatError
from precache_proxy.evacuation.arrival import Arrival, ArrivalState
from precache_proxy.evacuation.arrival_network import NothingToDo
from precache_proxy.evacuation.arrival_relays import ArrivalRelays
from precache_proxy.evacuation.arrivals import Arrivals
from precache_proxy.evacuation.guard import Guard
from precache_proxy.evacuation.reconcile import Presence
from precache_proxy.hypervisor.qemu_user import QemuUser

VM = "11111111-2222-4333-8444-555555555501"


class Stream:
    """The source's end of a relay; nothing comes."""

    peer = "home1"
    idle_seconds = 0.0

    def __init__(self, socket: str, job: str = "j1") -> None:
        self.header = {"job": job, "socket": socket}
        self.reset_by: LifeboatError | None = None

    async def send(self, *_parts: bytes) -> None: ...
    async def close(self) -> None: ...
    async def drained(self) -> None: ...

    async def receive(self) -> bytes | None:
        await asyncio.sleep(60)
        return None

    def reset(self, error: LifeboatError) -> None:
        self.reset_by = error


class Machines:
    """A libvirt whose VM stands there paused."""

    is_there = Presence.ARRIVED

    async def presence(self, _vm: str) -> Presence:
        return self.is_there

    async def resume(self, _vm: str) -> None:
        self.is_there = Presence.RUNNING

    async def destroy(self, _vm: str) -> None:
        self.is_there = Presence.SHUT_OFF

    async def undefine(self, _vm: str) -> None:
        self.is_there = Presence.ABSENT


async def _thaw(_vm: str) -> None:
    return None


class Destination:
    """A destination with one prepared arrival, whose libvirt and QEMU listen."""

    def __init__(self, tmp_path: Path) -> None:
        state, run = tmp_path / "state", tmp_path / "run"
        state.mkdir()
        guard = Guard(state, run)
        guard.prepare_directories()
        self.guard = guard
        self.arrivals = Arrivals(
            state, run, cast(Any, Machines()), guard, cast(Any, SimpleNamespace(thaw=_thaw)), NothingToDo(),
            QemuUser(65534, 65534), presume_source_dead_after_seconds=None,
        )  # fmt: skip
        self.sockets = self.arrivals.sockets_directory / "j1"
        links = {"home1": SimpleNamespace(state="up")}
        self.relays = ArrivalRelays(self.arrivals.admitted, self.arrivals.sockets_directory, links, 10.0)
        self.arrivals.not_admitted = self.relays.close
        self.closed: list[str] = []

    async def open(self) -> None:
        await self.arrivals.records.save(
            Arrival("j1", VM, "web1", "home1", 1, 7, checkpoint="lifeboat-e1-g8")
        )
        self.arrivals.load()
        self.guard.let_arrive(VM)
        self.sockets.mkdir(parents=True)
        for name in ("libvirt", "ram", "disk"):

            async def serve(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str = name
            ) -> None:
                await reader.read()
                self.closed.append(name)
                writer.close()

            await asyncio.start_unix_server(serve, self.sockets / f"{name}.sock")


async def soon(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.fixture
async def destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Destination:
    made = Destination(tmp_path)
    monkeypatch.setattr("precache_proxy.evacuation.relay.LIBVIRT_SOCKET", made.sockets / "libvirt.sock")
    monkeypatch.setattr(
        "precache_proxy.evacuation.relay.connect_locally.__defaults__", (made.sockets / "libvirt.sock",)
    )
    await made.open()
    return made


@pytest.mark.parametrize("word", ["release", "abort"])
async def test_no_relay_outlives_the_word_that_ends_the_arrival(destination: Destination, word: str) -> None:
    relays = destination.relays
    tasks = [asyncio.create_task(relays.carry(Stream(socket))) for socket in ("libvirt", "ram", "disk")]
    await soon(lambda: relays.carried("j1") == ["disk", "libvirt", "ram"])
    await getattr(destination.arrivals, word)("home1", {"job": "j1", "vm": VM})
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
    assert all(isinstance(result, Conflict) for result in results), results
    await soon(lambda: sorted(destination.closed) == ["disk", "libvirt", "ram"])
    assert relays.carried("j1") == []
    with pytest.raises(Conflict, match="closed here"):
        await relays.carry(Stream("libvirt"))


async def test_only_known_sockets_of_the_jobs_own_source_are_carried(destination: Destination) -> None:
    with pytest.raises(InvalidInput, match="no such socket"):
        await destination.relays.carry(Stream("../libvirt"))
    with pytest.raises(Conflict, match="not admitted"):
        await destination.relays.carry(Stream("ram", job="j2"))
    stranger = Stream("ram")
    stranger.peer = "home2"
    with pytest.raises(Conflict, match="not admitted here for home2"):
        await destination.relays.carry(stranger)


async def test_after_a_restart_an_arrival_that_came_meanwhile_ends_the_hooks_exception(
    destination: Destination,
) -> None:
    exception = destination.guard.arriving_directory / VM
    assert exception.exists()
    destination.arrivals.watch_all()
    await soon(lambda: not exception.exists())
    await destination.arrivals.stop()


async def test_an_arrival_that_is_cleared_away_is_watched_no_longer(destination: Destination) -> None:
    destination.arrivals._domains.is_there = Presence.ABSENT  # type: ignore[attr-defined]
    destination.arrivals.watch_all()
    (watcher,) = destination.arrivals._watchers.values()
    await destination.arrivals.abort("home1", {"job": "j1", "vm": VM})
    await asyncio.gather(watcher, return_exceptions=True)
    assert watcher.cancelled()
    assert destination.arrivals._watchers == {}
    (arrival,) = destination.arrivals.records.all()
    assert arrival.state is ArrivalState.ABORTED
