# SPDX-License-Identifier: GPL-3.0-or-later
"""The destination's side of a job's sockets: the source's connections, carried to libvirt or QEMU here.

A relayed libvirt connection is root on this host: it is let in for an admitted job only and ends with that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from precache_proxy.errors import Conflict, InvalidInput, LifeboatError
from precache_proxy.evacuation.arrival import Arrival
from precache_proxy.evacuation.relay import (
    LIBVIRT,
    SOCKETS,
    RelayCounters,
    RelayedConnection,
    connect_locally,
)


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

    async def carry(self, stream: Any) -> None:
        """Carry one stream of the source to its end; raises Conflict, InvalidInput, Stalled,
        ProtocolError."""
        job_id, socket = str(stream.header.get("job")), str(stream.header.get("socket"))
        arrival = self._admitted(job_id, stream.peer)
        if socket not in SOCKETS:
            raise InvalidInput(f"relay {socket!r}: no such socket; {', '.join(SOCKETS)} there are")
        path = self._sockets_directory / arrival.id / f"{socket}.sock"
        reader, writer = await connect_locally(socket, path)
        link = self._links[stream.peer]
        connection = RelayedConnection(
            socket,
            reader,
            writer,
            stream,
            RelayCounters(),
            stall_seconds=self._stall_seconds,
            link_up=lambda: bool(link.state == "up"),
        )
        task = asyncio.create_task(connection.run())
        self._tasks[task] = (job_id, socket)
        try:
            # Once more, with the task on the list: the job may have ended while we connected.
            self._admitted(job_id, stream.peer)
            await asyncio.wait({task})
            if task.cancelled():
                raise Conflict(f"job {job_id}: its relays were closed here")
            task.result()
        except LifeboatError:
            if socket != LIBVIRT:
                # One dead stream leaves QEMU waiting in the other.
                self.close(job_id, but_for={LIBVIRT})
            raise
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self._tasks.pop(task, None)

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
