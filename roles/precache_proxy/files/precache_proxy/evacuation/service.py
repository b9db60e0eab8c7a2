# SPDX-License-Identifier: GPL-3.0-or-later
"""Evacuations of this host, leaving and arriving: the one object that the rest of the proxy talks to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from precache_proxy.errors import Finding, InvalidInput, LifeboatError, NotFound, PeerUnreachable
from precache_proxy.evacuation.arrival import Arrival, ArrivalState
from precache_proxy.evacuation.arrival_network import ArrivalNetwork, NothingToDo
from precache_proxy.evacuation.arrivals import Arrivals
from precache_proxy.evacuation.departure import Surroundings
from precache_proxy.evacuation.departures import KEEP_AT_SOURCE, Departures
from precache_proxy.evacuation.domains import Domains
from precache_proxy.evacuation.guard import Guard
from precache_proxy.evacuation.job import EvacuationOptions, Job, Journal, Step
from precache_proxy.evacuation.landing import Landing
from precache_proxy.evacuation.reconcile import ArrivalDecision, Presence, decide_at_destination
from precache_proxy.evacuation.relay import (
    LIBVIRT,
    SOCKETS,
    STREAM_KIND,
    RelayCounters,
    RelayedConnection,
    connect_locally,
)
from precache_proxy.evacuation.rooms import SourceRoom, StoreRoom
from precache_proxy.hypervisor.connection import Hypervisor
from precache_proxy.hypervisor.qemu_user import find_qemu_user

logger = logging.getLogger(__name__)

TEND_SECONDS = 5.0
STATUS_TIMEOUT_SECONDS = 30.0
# After a start the links need a moment; a decision without the other side is a worse one.
FIRST_CONTACT_SECONDS = 5.0
CallHandler = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]
SOURCE_DEAD = "source-dead"


class Evacuation:
    """Both sides of this host's evacuations. ``settings``: stall_seconds,
    presume_source_dead_after_seconds."""

    def __init__(
        self,
        directory: Path,
        run_directory: Path,
        hypervisor: Hypervisor,
        channel: Any,
        source: SourceRoom,
        store: StoreRoom,
        settings: Any,
        *,
        network: ArrivalNetwork | None = None,
        qemu_user: str | None = None,
    ) -> None:
        self._channel = channel
        self._domains = Domains(hypervisor)
        self._guard = Guard(directory, run_directory)
        user = find_qemu_user(qemu_user)
        network = network or NothingToDo()
        self._around = Surroundings(
            directory=directory,
            run_directory=run_directory,
            domains=self._domains,
            guard=self._guard,
            journal=Journal(directory / "jobs"),
            links=channel.links,
            source=source,
            store=store,
            network=network,
            qemu_user=user,
            stall_seconds=float(settings.stall_seconds),
        )
        self._arrivals = Arrivals(
            directory,
            run_directory,
            self._domains,
            self._guard,
            store,
            network,
            user,
            presume_source_dead_after_seconds=settings.presume_source_dead_after_seconds,
        )
        self._landing = Landing(self._arrivals, self._domains, source, store, channel.links)
        self._departures = Departures(self._around, self._landing.leave)
        self._loaded = asyncio.Event()
        self._tender: asyncio.Task[None] | None = None
        self._contact_at: dict[str, float] = {}
        self._relays: dict[asyncio.Task[None], tuple[str, str]] = {}

    # -- life

    def register(self, channel: Any) -> None:
        """Answer the peers' calls and carry their relays."""
        for name, handler in (
            ("check", self._arrivals.check),
            ("prepare", self._arrivals.prepare),
            ("release", self._release),
            ("status", self._arrivals.status),
            ("abort", self._abort),
            ("job", self._departures.job_asked),
        ):
            channel.handle_call(f"evacuation.{name}", self._when_loaded(handler))
        channel.handle_stream(STREAM_KIND, self._relay)

    def _when_loaded(self, handler: CallHandler) -> CallHandler:
        """No answer before the records are read: "no such job" would be taken for the truth."""

        async def answer(peer: str, parameters: dict[str, Any]) -> dict[str, Any]:
            await self._loaded.wait()
            return await handler(peer, parameters)

        return answer

    async def start(self) -> None:
        """Read the records and take every open job and arrival up again; the rest goes on in the
        background."""

        def load() -> None:
            self._guard.prepare_directories()
            self._arrivals.load()
            self._departures.load()

        await asyncio.to_thread(load)
        await self._arrivals.thaw_unclaimed()
        self._loaded.set()
        self._arrivals.watch_all()
        await self._departures.hold_all()
        self._tender = asyncio.create_task(self._tend(), name="evacuation-tender")

    async def stop(self) -> None:
        """Leave everything as it is; it is taken up again by the next start."""
        tasks = [*self._relays, *([self._tender] if self._tender else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._departures.stop()
        await self._arrivals.stop()
        await self._landing.stop()

    # -- what the control API asks

    def jobs(self) -> list[Job]:
        """Every evacuation that left, or tries to leave, from here."""
        return self._departures.jobs()

    def job(self, job_id: str) -> Job:
        """One of them. Raises NotFound."""
        return self._departures.job(job_id)

    async def begin(self, vm: str, *, options: EvacuationOptions | None = None) -> Job:
        """See :meth:`Departures.begin`."""
        return await self._departures.begin(vm, options=options)

    async def wait(self, job_id: str, timeout_seconds: float) -> Job:
        """The job once it has ended, or as it is after that time."""
        return await self._departures.wait(job_id, timeout_seconds)

    async def cancel(self, job_id: str) -> Job:
        """Stop an evacuation and roll it back. Raises Conflict when it is too late for that."""
        return await self._departures.cancel(job_id)

    async def steer(self, job_id: str, bandwidth_bytes_per_second: float) -> Job:
        """Change the bandwidth of a migration under way. Raises InvalidInput, Conflict."""
        return await self._departures.steer(job_id, bandwidth_bytes_per_second)

    async def check(self, vm: str, peer: str | None = None) -> list[Finding]:
        """Everything that stands in the way of evacuating a VM; changes nothing."""
        return await self._departures.check(vm, peer)

    def arrivals(self) -> list[Arrival]:
        """Every evacuation that came, or tries to come, here."""
        return self._arrivals.all()

    async def settle(self, job_or_vm: str, decision: str) -> dict[str, Any]:
        """The operator's word on an undecided VM. ``source-dead`` at the destination, ``keep-at-source`` at
        the source."""
        if decision == SOURCE_DEAD:
            arrival = self._arrivals.get(job_or_vm) or self._open_arrival(job_or_vm)
            await self._arrivals.declare_source_dead(arrival)
            self._land(arrival)
            return arrival.as_dict()
        if decision == KEEP_AT_SOURCE:
            job = self._departures.latest(job_or_vm)
            if job is None:
                raise NotFound(
                    f"{job_or_vm}: no evacuation of that number or VM here; see `precache-proxy status`"
                )
            await self._departures.keep_at_source(job.id)
            return job.as_dict()
        raise InvalidInput(
            f"settle {decision!r}: not a decision; say {SOURCE_DEAD} (at the destination) or "
            f"{KEEP_AT_SOURCE} (at the source)"
        )

    # -- helpers

    def _open_arrival(self, vm: str) -> Arrival:
        for arrival in sorted(self._arrivals.all(), key=lambda item: -item.epoch):
            if vm in {arrival.vm, arrival.name} and not arrival.ended:
                return arrival
        raise NotFound(f"{vm}: no open arrival of that number or VM here; see `precache-proxy status`")

    # -- the destination's side

    async def _release(self, peer: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        answer = await self._arrivals.release(peer, parameters)
        arrival = self._arrivals.get(str(parameters["job"]))
        if arrival is not None:
            self._land(arrival)
        return answer

    async def _abort(self, peer: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        for task, (job_id, _unused) in list(self._relays.items()):
            if job_id == parameters["job"]:
                task.cancel()
        return await self._arrivals.abort(peer, parameters)

    async def _relay(self, stream: Any) -> None:
        """Carry one of the source's connections to the local libvirt or QEMU, for an admitted job only."""
        job_id, socket = str(stream.header.get("job")), str(stream.header.get("socket"))
        arrival = self._arrivals.admitted(job_id, stream.peer)
        if socket not in SOCKETS:
            raise InvalidInput(f"relay {socket!r}: no such socket; {', '.join(SOCKETS)} there are")
        path = self._arrivals.sockets_directory / arrival.id / f"{socket}.sock"
        reader, writer = await connect_locally(socket, path)
        link = self._channel.links[stream.peer]
        connection = RelayedConnection(
            socket,
            reader,
            writer,
            stream,
            RelayCounters(),
            stall_seconds=self._around.stall_seconds,
            link_up=lambda: bool(link.state == "up"),
        )
        task = asyncio.create_task(connection.run())
        self._relays[task] = (job_id, socket)
        try:
            await asyncio.shield(task)
        except LifeboatError:
            if socket != LIBVIRT:
                for other, (other_job, other_socket) in list(self._relays.items()):
                    if other_job == job_id and other_socket != LIBVIRT and other is not task:
                        other.cancel()
            raise
        finally:
            task.cancel()
            self._relays.pop(task, None)

    # -- tending what is open

    async def _tend(self) -> None:
        await self._first_contact()
        while True:
            await self._departures.tend_all()
            for arrival in self._arrivals.all():
                await self._tend_arrival(arrival)
            await asyncio.sleep(TEND_SECONDS)

    async def _first_contact(self) -> None:
        peers = {job.peer for job in self._departures.jobs() if not job.ended}
        peers |= {arrival.peer for arrival in self._arrivals.all() if not arrival.ended}

        async def wait(peer: str) -> None:
            link = self._channel.links.get(peer)
            if link is not None:
                with contextlib.suppress(PeerUnreachable):
                    await link.wait_up(FIRST_CONTACT_SECONDS)

        await asyncio.gather(*(wait(peer) for peer in peers))

    async def _tend_arrival(self, arrival: Arrival) -> None:
        try:
            if arrival.state is ArrivalState.ACTIVATED:
                await self._tend_activated(arrival)
                return
            if arrival.ended:
                return
            await self._decide_arrival(arrival)
        except LifeboatError as error:
            logger.warning("arrival %s of VM %s: %s; asked again", arrival.id, arrival.vm, error)
        except Exception:
            logger.exception("arrival %s of VM %s", arrival.id, arrival.vm)

    async def _decide_arrival(self, arrival: Arrival) -> None:
        reachable, step = True, None
        link = self._channel.links.get(arrival.peer)
        try:
            if link is None:
                raise PeerUnreachable(f"peer {arrival.peer} is not configured any more")
            answer = await link.call(
                "evacuation.job", {"job": arrival.id}, timeout_seconds=STATUS_TIMEOUT_SECONDS
            )
            step = Step(answer["step"]) if answer["known"] else None
            self._contact_at[arrival.id] = time.monotonic()
        except LifeboatError:
            reachable = False
        async with self._arrivals.lock(arrival.vm):
            presence = await self._domains.presence(arrival.vm)
            decision = decide_at_destination(
                arrival.state,
                presence,
                step,
                source_reachable=reachable,
                source_presumed_dead=not reachable and self._presumed_dead(arrival),
            )
            if decision is not ArrivalDecision.WAIT:
                logger.info(
                    "arrival %s of VM %s: %s here, source %s: %s", arrival.id, arrival.vm, presence.value,
                    step.value if step else ("knows no such job" if reachable else "not reached"),
                    decision.value,
                )  # fmt: skip
            elif not reachable and presence is Presence.ARRIVED and arrival.cause != "no-contact":
                arrival.cause = "no-contact"
                arrival.sentence = (
                    f"VM {arrival.name} stands here complete and paused; {arrival.peer} cannot be asked "
                    f"whether it runs "
                    f"there: wait, or `precache-proxy settle {arrival.id} source-dead` when that host is "
                    f"surely dead"
                )
                await self._arrivals.save(arrival)
            word = "presumed" if not reachable else ""
            await self._arrivals.act(arrival, decision, on_whose_word=word)
        if arrival.state is ArrivalState.ACTIVATED:
            self._land(arrival)

    async def _tend_activated(self, arrival: Arrival) -> None:
        if self._arrivals.latest_of(arrival.vm) is not arrival:
            # The VM has left and come back since: the newer arrival lands it.
            arrival.landing = "left"
            await self._arrivals.enter(arrival, ArrivalState.LANDED)
            return
        if not arrival.landing:
            await self._arrivals.settle_down(arrival)
        self._land(arrival)

    def _land(self, arrival: Arrival) -> None:
        """Land it, unless it is about to leave again: then its layers must keep still."""
        if not self._departures.is_leaving(arrival.vm):
            self._landing.begin(arrival)

    def _presumed_dead(self, arrival: Arrival) -> bool:
        limit = self._arrivals.presume_source_dead_after_seconds
        since = self._contact_at.setdefault(arrival.id, time.monotonic())
        return limit is not None and time.monotonic() - since >= limit
