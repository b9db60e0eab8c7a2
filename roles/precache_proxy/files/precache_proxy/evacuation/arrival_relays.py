# SPDX-License-Identifier: GPL-3.0-or-later
"""The destination's side of a job's sockets: the source's connections, carried to libvirt or QEMU here.

A relayed libvirt connection is root on this host: it is let in for an admitted job only and ends with that.
So is one that is opened ahead of its use (held_opening.py).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Coroutine, Mapping
from pathlib import Path
from typing import Any

from precache_proxy.errors import Conflict, InvalidInput, LifeboatError
from precache_proxy.evacuation import held_opening
from precache_proxy.evacuation.arrival import Arrival
from precache_proxy.evacuation.libvirt_frames import DOMAIN_MIGRATE_PREPARE3_PARAMS
from precache_proxy.evacuation.libvirt_replies import Replies
from precache_proxy.evacuation.openings import LANGUAGES
from precache_proxy.evacuation.relay import (
    DISK,
    LIBVIRT,
    SOCKETS,
    Begun,
    RelayCounters,
    RelayedConnection,
    connect_locally,
)

# How long an opening waits for its job, or for QEMU: the source ends it, or this does.
AHEAD_SECONDS = 180.0
# Of one job's socket: a disk each; and of one peer's that wait for their jobs.
AHEAD_LIMIT = 64
# Jobs that were closed are remembered for the little while in which their records still say "prepared".
_CLOSED_LIMIT = 1024


class ArrivalRelays:
    """What is carried at the moment. ``admitted`` raises Conflict for a job that may not."""

    def __init__(
        self,
        admitted: Callable[[str, str], Arrival],
        sockets_directory: Path,
        links: Mapping[str, Any],
        stall_seconds: float,
    ) -> None:
        self._admitted = admitted
        self._sockets_directory = sockets_directory
        self._links = links
        self._stall_seconds = stall_seconds
        self._tasks: dict[asyncio.Task[None], tuple[str, str]] = {}
        # openings that have come before their jobs' admission: peer and job of each that waits
        self._awaited: dict[asyncio.Event, tuple[str, str]] = {}
        # jobs that were closed, the last ones; their records may not say so yet
        self._closed: dict[str, None] = {}
        # jobs of which libvirt has prepared the VM: QEMU listens on their sockets
        self._listening: dict[str, asyncio.Event] = {}

    async def carry(self, stream: Any) -> None:
        """Carry one stream of the source to its end; raises Conflict, InvalidInput, Stalled,
        ProtocolError."""
        job_id, socket = str(stream.header.get("job")), str(stream.header.get("socket"))
        self._check(job_id, stream.peer)
        if socket not in SOCKETS:
            raise InvalidInput(f"relay {socket!r}: no such socket; {', '.join(SOCKETS)} there are")
        await self._listed(stream, job_id, socket, self._connect(stream, job_id, socket, None))

    async def carry_ahead(self, stream: Any) -> None:
        """Open a connection before the source's libvirt or QEMU asks for it, tell what was answered, and
        carry it once it is used; raises as :meth:`carry`. The source does without where this fails."""
        job_id, socket = str(stream.header.get("job")), str(stream.header.get("socket"))
        await self._until_admitted(stream, job_id)
        requests = held_opening.requests_of(stream.header)
        if sum(listed == (job_id, socket) for listed in self._tasks.values()) >= AHEAD_LIMIT:
            raise Conflict(f"job {job_id}: {AHEAD_LIMIT} connections of its {socket} socket are open here")
        await self._listed(stream, job_id, socket, self._connect(stream, job_id, socket, requests))

    def _check(self, job_id: str, peer: str) -> None:
        """Raise Conflict for a job that may not use relays, or that is being cleared away."""
        self._check_open(job_id)
        self._admitted(job_id, peer)

    def _check_open(self, job_id: str) -> None:
        if job_id in self._closed:
            raise Conflict(f"job {job_id}: its relays were closed here")

    async def _until_admitted(self, stream: Any, job_id: str) -> None:
        """The opening is asked for together with the arrival, and may come first."""
        self._check_open(job_id)
        with contextlib.suppress(Conflict):
            self._admitted(job_id, stream.peer)
            return
        if sum(peer == stream.peer for peer, _job in self._awaited.values()) >= AHEAD_LIMIT:
            raise Conflict(f"peer {stream.peer}: {AHEAD_LIMIT} openings of it wait for their jobs here")
        event = asyncio.Event()
        self._awaited[event] = (stream.peer, job_id)
        try:
            await held_opening.until(event, stream, AHEAD_SECONDS)
        finally:
            del self._awaited[event]
        self._check(job_id, stream.peer)

    async def _connect(
        self, stream: Any, job_id: str, socket: str, requests: tuple[bytes, ...] | None
    ) -> None:
        """From connecting to the end of what is carried: one task, for what is not on the list for an
        instant is not closed with its job. ``requests``: what of it is opened ahead."""
        if requests is not None and socket == DISK:
            listening = self._listening.setdefault(job_id, asyncio.Event())
            await held_opening.until(listening, stream, AHEAD_SECONDS)
        reader, writer = await connect_locally(socket, self._sockets_directory / job_id / f"{socket}.sock")
        try:
            begun = Begun()
            if requests is not None:
                begun = await self._hold(stream, socket, requests, reader, writer)
            await self._relay(stream, job_id, socket, reader, writer, begun)
        finally:
            writer.transport.abort()

    async def _hold(
        self,
        stream: Any,
        socket: str,
        requests: tuple[bytes, ...],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> Begun:
        """Open it, tell the answers, and wait until it is used."""
        replies = await held_opening.ask(LANGUAGES[socket], requests, reader, writer)
        await stream.send(held_opening.pack_replies(replies))
        return await held_opening.hold(
            LANGUAGES[socket],
            stream,
            reader,
            writer,
            stall_seconds=self._stall_seconds,
            link_up=self._link_up(stream.peer),
        )

    async def _relay(
        self,
        stream: Any,
        job_id: str,
        socket: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        begun: Begun,
    ) -> None:
        connection = RelayedConnection(
            socket,
            reader,
            writer,
            stream,
            RelayCounters(),
            stall_seconds=self._stall_seconds,
            link_up=self._link_up(stream.peer),
            begun=begun,
            on_piece=self._watch_for_prepared(job_id) if socket == LIBVIRT else None,
        )
        try:
            await connection.run()
        except LifeboatError:
            if socket != LIBVIRT:
                # One dead stream leaves QEMU waiting in the other.
                self._cut(job_id, but_for={LIBVIRT}, spare=asyncio.current_task())
            raise

    def _link_up(self, peer: str) -> Callable[[], bool]:
        link = self._links[peer]
        return lambda: bool(link.state == "up")

    def _watch_for_prepared(self, job_id: str) -> Callable[[bytes], None]:
        replies: Replies | None = Replies(DOMAIN_MIGRATE_PREPARE3_PARAMS)

        def on_piece(piece: bytes) -> None:
            nonlocal replies
            if replies is not None and replies.contain(piece):
                replies = None
                self._listening.setdefault(job_id, asyncio.Event()).set()

        return on_piece

    async def _listed(self, stream: Any, job_id: str, socket: str, work: Coroutine[Any, Any, None]) -> None:
        """Do it, on the list of what ends with the job."""
        task = asyncio.create_task(work)
        self._tasks[task] = (job_id, socket)
        try:
            # Once more, with the task on the list: from here on the end of the job is its end.
            self._check(job_id, stream.peer)
            await asyncio.wait({task})
            if task.cancelled():
                raise Conflict(f"job {job_id}: its relays were closed here")
            task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self._tasks.pop(task, None)
            if job_id not in {listed for listed, _socket in self._tasks.values()}:
                self._listening.pop(job_id, None)

    def admitted(self, job_id: str) -> None:
        """What was asked for ahead of this may be opened now."""
        self._closed.pop(job_id, None)
        self._wake(job_id)

    def close(self, job_id: str) -> None:
        """Cut what is carried for a job, and let nothing more in, whatever its record says yet."""
        self._closed.pop(job_id, None)
        self._closed[job_id] = None
        while len(self._closed) > _CLOSED_LIMIT:
            del self._closed[next(iter(self._closed))]
        self._wake(job_id)
        self._cut(job_id)

    def _wake(self, job_id: str) -> None:
        for event, (_peer, awaited) in self._awaited.items():
            if awaited == job_id:
                event.set()

    def _cut(
        self,
        job_id: str,
        *,
        but_for: Collection[str] = (),
        spare: asyncio.Task[Any] | None = None,
    ) -> None:
        """End the tasks of a job; ``spare`` has its own reason to end."""
        for task, (of_job, socket) in list(self._tasks.items()):
            if of_job == job_id and socket not in but_for and task is not spare:
                task.cancel()

    def carried(self, job_id: str) -> list[str]:
        """The sockets of a job that are carried now."""
        return sorted(socket for task, (of_job, socket) in self._tasks.items() if of_job == job_id)

    async def stop(self) -> None:
        """Cut everything."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
