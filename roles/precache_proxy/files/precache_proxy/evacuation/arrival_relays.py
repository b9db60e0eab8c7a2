# SPDX-License-Identifier: GPL-3.0-or-later
"""The destination's side of a job's sockets: the source's connections, carried to libvirt or QEMU here.

A relayed libvirt connection is root on this host: it is let in for an admitted job only and ends with that.
So is one that is opened ahead of its use (held_opening.py).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

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

Result = TypeVar("Result")
# How long an opening waits for its job, or for QEMU: the source ends it, or this does.
AHEAD_SECONDS = 180.0
# Of one job's socket: a disk each.
AHEAD_LIMIT = 64


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
        self._tasks: dict[asyncio.Task[Any], tuple[str, str]] = {}
        # jobs whose openings have come before their admission
        self._awaited: dict[str, asyncio.Event] = {}
        # jobs of which libvirt has prepared the VM: QEMU listens on their sockets
        self._listening: dict[str, asyncio.Event] = {}

    async def carry(self, stream: Any) -> None:
        """Carry one stream of the source to its end; raises Conflict, InvalidInput, Stalled,
        ProtocolError."""
        job_id, socket = str(stream.header.get("job")), str(stream.header.get("socket"))
        arrival = self._admitted(job_id, stream.peer)
        if socket not in SOCKETS:
            raise InvalidInput(f"relay {socket!r}: no such socket; {', '.join(SOCKETS)} there are")
        path = self._sockets_directory / arrival.id / f"{socket}.sock"
        reader, writer = await connect_locally(socket, path)
        await self._relay(stream, job_id, socket, reader, writer, Begun())

    async def carry_ahead(self, stream: Any) -> None:
        """Open a connection before the source's libvirt or QEMU asks for it, tell what was answered, and
        carry it once it is used; raises as :meth:`carry`. The source does without where this fails."""
        job_id, socket = str(stream.header.get("job")), str(stream.header.get("socket"))
        requests = held_opening.requests_of(stream.header)
        await self._until_admitted(stream, job_id)
        if sum(listed == (job_id, socket) for listed in self._tasks.values()) >= AHEAD_LIMIT:
            raise Conflict(f"job {job_id}: {AHEAD_LIMIT} connections of its {socket} socket are open here")
        opening = self._open(stream, job_id, socket, requests)
        reader, writer, begun = await self._listed(stream, job_id, socket, opening)
        await self._relay(stream, job_id, socket, reader, writer, begun)

    async def _until_admitted(self, stream: Any, job_id: str) -> None:
        """The opening is asked for together with the arrival, and may come first."""
        with contextlib.suppress(Conflict):
            self._admitted(job_id, stream.peer)
            return
        event = self._awaited.setdefault(job_id, asyncio.Event())
        try:
            await held_opening.until(event, stream, AHEAD_SECONDS)
        finally:
            self._awaited.pop(job_id, None)
        self._admitted(job_id, stream.peer)

    async def _open(
        self, stream: Any, job_id: str, socket: str, requests: tuple[bytes, ...]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, Begun]:
        """A connection that is open and in use."""
        if socket == DISK:
            listening = self._listening.setdefault(job_id, asyncio.Event())
            await held_opening.until(listening, stream, AHEAD_SECONDS)
        reader, writer = await connect_locally(socket, self._sockets_directory / job_id / f"{socket}.sock")
        try:
            replies = await held_opening.ask(LANGUAGES[socket], requests, reader, writer)
            await stream.send(held_opening.pack_replies(replies))
            begun = await held_opening.hold(
                LANGUAGES[socket],
                stream,
                reader,
                writer,
                stall_seconds=self._stall_seconds,
                link_up=self._link_up(stream.peer),
            )
            return reader, writer, begun
        except BaseException:
            writer.transport.abort()
            raise

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
            await self._listed(stream, job_id, socket, connection.run())
        except LifeboatError:
            if socket != LIBVIRT:
                # One dead stream leaves QEMU waiting in the other.
                self.close(job_id, but_for={LIBVIRT})
            raise
        finally:
            # Where it did not even begin.
            connection.abort()

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

    async def _listed(
        self, stream: Any, job_id: str, socket: str, work: Coroutine[Any, Any, Result]
    ) -> Result:
        """Do it, on the list of what ends with the job."""
        task = asyncio.create_task(work)
        self._tasks[task] = (job_id, socket)
        try:
            # Once more, with the task on the list: the job may have ended while we connected.
            self._admitted(job_id, stream.peer)
            await asyncio.wait({task})
            if task.cancelled():
                raise Conflict(f"job {job_id}: its relays were closed here")
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self._tasks.pop(task, None)
            if job_id not in {listed for listed, _socket in self._tasks.values()}:
                self._listening.pop(job_id, None)

    def admitted(self, job_id: str) -> None:
        """What was asked for ahead of this may be opened now."""
        if job_id in self._awaited:
            self._awaited[job_id].set()

    def close(self, job_id: str, *, but_for: frozenset[str] | set[str] = frozenset()) -> None:
        """Cut what is carried for a job."""
        for task, (of_job, socket) in list(self._tasks.items()):
            if of_job == job_id and socket not in but_for:
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
