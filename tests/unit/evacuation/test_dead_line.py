# SPDX-License-Identifier: GPL-3.0-or-later
"""A line that is dead under a move: its guest is told to stand still before its mirrors lose their peer."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from precache_proxy.errors import LifeboatError, ProtocolError, Stalled
from precache_proxy.evacuation import calling_off, departure_relays
from precache_proxy.evacuation.calling_off import CallingOff
from precache_proxy.evacuation.relay import DISK, LIBVIRT, RAM, JobSockets
from unit.evacuation.called_off_ground import Place, soon


class Stream:
    """One that carries nothing, until it fails."""

    def __init__(self) -> None:
        self.idle_seconds = 0.0
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.reset_by: LifeboatError | None = None

    async def send(self, *_parts: bytes) -> None: ...
    async def close(self) -> None: ...
    async def drained(self) -> None: ...

    async def receive(self) -> bytes | None:
        await asyncio.shield(self.failure)
        return None

    def reset(self, error: LifeboatError) -> None:
        self.reset_by = error


class Line:
    """The link to the destination."""

    def __init__(self) -> None:
        self.state = "up"
        self.streams: dict[str, Stream] = {}

    async def open_stream(self, _kind: str, _class: object, header: dict[str, Any], *, label: str) -> Stream:
        assert label
        stream = self.streams[header["socket"]] = Stream()
        return stream


class Move:
    """A migration with its three connections open."""

    def __init__(self, tmp_path: Path, *, waits: bool) -> None:
        self.place = Place(tmp_path)
        self.line = self.place.around.links["backup1"] = Line()
        user = SimpleNamespace(uid=os.getuid(), gid=os.getgid())
        self.place.around.qemu_user = cast(Any, user)
        self.departure = self.place.departure
        self.departure.measure = cast(Any, SimpleNamespace(channel_bytes_per_second=None))
        # It ends when the relays are closed, and not before.
        self.place.domain.may_stop.clear()
        self.departure.ending = self.off = CallingOff(self.departure, waits=waits)
        #: What libvirt had been told when each connection was closed.
        self.closed: dict[str, list[str]] = {}

    async def begin(self) -> None:
        self.sockets: JobSockets = departure_relays.job_sockets(self.departure)
        self.departure.sockets = self.sockets
        await self.sockets.listen()
        self.ends = [asyncio.create_task(self._hold(name)) for name in (LIBVIRT, RAM, DISK)]
        await soon(lambda: len(self.line.streams) == 3)

    async def _hold(self, name: str) -> None:
        reader, writer = await asyncio.open_unix_connection(self.sockets.path(name))
        assert await reader.read(1) == b""
        self.closed[name] = [what for what, _recorded in self.place.domain.told]
        writer.close()

    async def over(self) -> None:
        self.place.domain.may_stop.set()
        await self.off.over()
        await self.sockets.close()


@pytest.mark.parametrize("fails", ["line", RAM, DISK])
async def test_the_guest_is_told_to_stand_still_first_where_its_writes_wait(
    tmp_path: Path, fails: str
) -> None:
    move = Move(tmp_path, waits=True)
    await move.begin()
    if fails == "line":
        move.line.state = "down"
    else:
        move.line.streams[fails].failure.set_exception(ProtocolError("the peer's end has failed"))
    await asyncio.wait_for(asyncio.gather(*move.ends), 10)
    assert set(move.closed) == {LIBVIRT, RAM, DISK}
    for told in move.closed.values():
        assert told == ["suspend"], "and the move is ended once it stands still, which the relays hinder"
    assert isinstance(move.departure.failure, Stalled) is (fails == "line")
    assert move.departure.enough.is_set()
    await move.over()
    assert all(stream.reset_by is not None for stream in move.line.streams.values())


async def test_others_are_closed_at_once(tmp_path: Path) -> None:
    move = Move(tmp_path, waits=False)
    await move.begin()
    began = time.monotonic()
    move.line.streams[DISK].failure.set_exception(ProtocolError("the peer's end has failed"))
    await asyncio.wait_for(asyncio.gather(*move.ends), 10)
    assert time.monotonic() - began < 1
    assert "suspend" not in {what for told in move.closed.values() for what in told}
    await move.over()


async def test_a_libvirt_that_is_not_heard_keeps_no_dead_relay_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its guest's writes wait in it."""
    monkeypatch.setattr(calling_off, "STANDSTILL_SECONDS", 0.5)
    move = Move(tmp_path, waits=True)

    async def unheard(*_unused: object) -> bool:
        await asyncio.sleep(60)
        return True

    monkeypatch.setattr(move.place.around.domains, "migrating", unheard)
    await move.begin()
    move.line.state = "down"
    await asyncio.wait_for(asyncio.gather(*move.ends), 10)
    assert all(told == [] for told in move.closed.values())
    await move.over()
