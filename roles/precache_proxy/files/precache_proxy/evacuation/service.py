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
from precache_proxy.evacuation import stopping
from precache_proxy.evacuation.arrival import Arrival, ArrivalState
from precache_proxy.evacuation.arrival_network import ArrivalNetwork, NothingToDo
from precache_proxy.evacuation.arrival_relays import ArrivalRelays
from precache_proxy.evacuation.arrival_tender import ArrivalTender
from precache_proxy.evacuation.arrivals import Arrivals
from precache_proxy.evacuation.departures import Departures
from precache_proxy.evacuation.domains import Domains
from precache_proxy.evacuation.fail_over import FailOver
from precache_proxy.evacuation.fence import KEEP_AT_SOURCE
from precache_proxy.evacuation.guard import Forbidden, Guard
from precache_proxy.evacuation.held_opening import AHEAD_KIND
from precache_proxy.evacuation.job import EvacuationOptions, Job, Journal
from precache_proxy.evacuation.landing import Landing
from precache_proxy.evacuation.relay import STREAM_KIND
from precache_proxy.evacuation.rooms import SourceRoom, StoreRoom
from precache_proxy.evacuation.surroundings import Surroundings
from precache_proxy.hypervisor.connection import Hypervisor
from precache_proxy.hypervisor.qemu_user import find_qemu_user

logger = logging.getLogger(__name__)

TEND_SECONDS = 5.0
PRUNE_SECONDS = 3600.0
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
        self._relays = ArrivalRelays(
            self._arrivals.admitted,
            self._arrivals.sockets_directory,
            channel.links,
            self._around.stall_seconds,
        )
        self._arrivals.now_admitted = self._relays.admitted
        self._arrivals.not_admitted = self._relays.close
        self._landing = Landing(
            self._arrivals.records, self._domains, source, store, channel.links, self._arrivals.tracking
        )
        self._departures = Departures(self._around, self._landing.leave)
        self._fail_over = FailOver(self._arrivals, self._domains, store, channel.links)
        self._tender = ArrivalTender(self._arrivals, self._domains, channel.links, self._land)
        self._loaded = asyncio.Event()
        self._tending: asyncio.Task[None] | None = None
        self._pruned_at = float("-inf")

    # -- life

    def register(self, channel: Any) -> None:
        """Answer the peers' calls and carry their relays."""
        for name, handler in (
            ("check", self._arrivals.check),
            ("prepare", self._arrivals.prepare),
            ("release", self._release),
            ("status", self._arrivals.status),
            ("abort", self._arrivals.abort),
            ("job", self._departures.job_asked),
            (stopping.METHOD, self._departures.end_asked),
            ("supersede", self._departures.supersede),
            ("home", self._home),
        ):
            channel.handle_call(f"evacuation.{name}", self._when_loaded(handler))
        channel.handle_stream(STREAM_KIND, self._relays.carry)
        channel.handle_stream(AHEAD_KIND, self._relays.carry_ahead)

    def _when_loaded(self, handler: CallHandler) -> CallHandler:
        """No answer before the records are read: "no such job" would be taken for the truth."""

        async def answer(peer: str, parameters: dict[str, Any]) -> dict[str, Any]:
            await self._loaded.wait()
            return await handler(peer, parameters)

        return answer

    async def hold_from_start(self) -> None:
        """Before the source's room is started: a pass of a VM whose QEMU is halted would wait for it, and who
        holds the VM for that pass."""
        for job in await asyncio.to_thread(self._around.journal.load):
            if not job.ended:
                self._around.source.hold_from_start(job.vm, job.id)

    async def start(self) -> None:
        """Read the records and take every open job and arrival up again; the rest goes on in the
        background."""

        def load() -> None:
            self._guard.prepare_directories()
            self._arrivals.load()
            self._departures.load()

        await asyncio.to_thread(load)
        await self._departures.fence_all()
        await self._arrivals.footprint.thaw_unclaimed()
        self._loaded.set()
        self._arrivals.watch_all()
        await self._departures.hold_all()
        self._tending = asyncio.create_task(self._tend(), name="evacuation-tender")

    async def stop(self) -> None:
        """End in order what would be cut by our end (stopping.py); all else is left as it is, and taken up
        again by the next start."""
        if self._tending is not None:
            self._tending.cancel()
            await asyncio.gather(self._tending, return_exceptions=True)
        await asyncio.gather(
            self._departures.stop(),
            stopping.see_arrivals_off(
                self._arrivals.records.all(), self._relays.carried, self._channel.links
            ),
        )
        await self._relays.stop()
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
        """See :meth:`Departures.steer`."""
        return await self._departures.steer(job_id, bandwidth_bytes_per_second)

    def share(self, job_id: str, bytes_per_second: float | None, seconds: float) -> Job:
        """See :meth:`Departures.share`."""
        return self._departures.share(job_id, bytes_per_second, seconds)

    async def pause_guest(self, job_id: str) -> Job:
        """See :meth:`Departures.pause_guest`."""
        return await self._departures.pause_guest(job_id)

    async def check(self, vm: str, peer: str | None = None, *, restarts: bool = False) -> list[Finding]:
        """Everything that stands in the way of evacuating a VM, live or by restart; changes nothing."""
        return await self._departures.check(vm, peer, restarts=restarts)

    def arrivals(self) -> list[Arrival]:
        """Every evacuation that came, or tries to come, here."""
        return self._arrivals.records.all()

    async def moved_away(self) -> list[Forbidden]:
        """The VMs that may not start here any more, as they run elsewhere: evacuated, or failed over."""
        return await asyncio.to_thread(self._guard.tombstones)

    async def settle(self, job_or_vm: str, decision: str) -> dict[str, Any]:
        """The operator's word on an undecided VM. ``source-dead`` at the destination, ``keep-at-source`` at
        the source."""
        if decision == SOURCE_DEAD:
            arrival = self._arrivals.records.get(job_or_vm) or self._open_arrival(job_or_vm)
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

    async def fail_over(self, vm: str, *, source_is_dead: bool) -> Arrival:
        """See :meth:`FailOver.begin`."""
        arrival = await self._fail_over.begin(vm, source_is_dead=source_is_dead)
        if arrival.state is ArrivalState.ACTIVATED:
            self._land(arrival)
        return arrival

    async def look_at_fail_over(self, vm: str) -> dict[str, Any]:
        """See :meth:`FailOver.look`."""
        return await self._fail_over.look(vm)

    # -- helpers

    def _open_arrival(self, vm: str) -> Arrival:
        for arrival in sorted(self._arrivals.records.all(), key=lambda item: -item.epoch):
            if vm in {arrival.vm, arrival.name} and not arrival.ended:
                return arrival
        raise NotFound(f"{vm}: no open arrival of that number or VM here; see `precache-proxy status`")

    # -- the destination's side

    async def _release(self, peer: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        answer = await self._arrivals.release(peer, parameters)
        arrival = self._arrivals.records.get(str(parameters["job"]))
        if arrival is not None:
            self._land(arrival)
        return answer

    async def _home(self, _peer: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        return self._fail_over.home(str(parameters["vm"]), str(parameters["job"]), int(parameters["epoch"]))

    # -- tending what is open

    async def _tend(self) -> None:
        await self._first_contact()
        while True:
            if time.monotonic() - self._pruned_at >= PRUNE_SECONDS:
                self._pruned_at = time.monotonic()
                await self._prune()
            await self._departures.tend_all()
            for arrival in self._arrivals.records.all():
                await self._tender.tend(arrival)
                await self._fail_over.tend(arrival)
            await asyncio.sleep(TEND_SECONDS)

    async def _prune(self) -> None:
        """Forget what is history (pruning.py)."""
        try:
            gone = [*await self._departures.prune(), *await self._arrivals.records.prune()]
        except (OSError, LifeboatError) as error:
            logger.warning("old records of evacuations stay for now: %s", error)
            return
        if gone:
            logger.info("%d old records of evacuations were removed", len(gone))

    async def _first_contact(self) -> None:
        peers = {job.peer for job in self._departures.jobs() if not job.ended}
        peers |= {arrival.peer for arrival in self._arrivals.records.all() if not arrival.ended}

        async def wait(peer: str) -> None:
            link = self._channel.links.get(peer)
            if link is not None:
                with contextlib.suppress(PeerUnreachable):
                    await link.wait_up(FIRST_CONTACT_SECONDS)

        await asyncio.gather(*(wait(peer) for peer in peers))

    def _land(self, arrival: Arrival) -> None:
        """Land it, unless it is about to leave again: then its layers must keep still."""
        if not self._departures.is_leaving(arrival.vm):
            self._landing.begin(arrival)
