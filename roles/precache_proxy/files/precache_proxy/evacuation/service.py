# SPDX-License-Identifier: GPL-3.0-or-later
"""Evacuations of this host, leaving and arriving: the one object that the rest of the proxy talks to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from precache_proxy.crash_points import crash_point
from precache_proxy.errors import (
    Conflict,
    Finding,
    InvalidInput,
    LifeboatError,
    NotFound,
    PeerUnreachable,
)
from precache_proxy.evacuation import confirm, departure, migrate, rollback
from precache_proxy.evacuation.arrival import Arrival, ArrivalState
from precache_proxy.evacuation.arrival_network import ArrivalNetwork, NothingToDo
from precache_proxy.evacuation.arrivals import Arrivals
from precache_proxy.evacuation.departure import Departure, Surroundings
from precache_proxy.evacuation.domains import Domains
from precache_proxy.evacuation.guard import Guard
from precache_proxy.evacuation.job import (
    BEFORE_FREEZE,
    FOLLOWING,
    EvacuationOptions,
    Job,
    Journal,
    Step,
    Verdict,
    new_job,
)
from precache_proxy.evacuation.landing import Landing
from precache_proxy.evacuation.measure import Measure
from precache_proxy.evacuation.reconcile import (
    ArrivalDecision,
    DestinationView,
    Presence,
    SourceDecision,
    decide_at_destination,
    decide_at_source,
)
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
SETTLE_SOURCE_DEAD = "source-dead"
SETTLE_KEEP_AT_SOURCE = "keep-at-source"


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
        self._directory = directory
        self._channel = channel
        self._settings = settings
        self._source = source
        self._domains = Domains(hypervisor)
        self._guard = Guard(directory, run_directory)
        user = find_qemu_user(qemu_user)
        self._around = Surroundings(
            directory=directory,
            run_directory=run_directory,
            domains=self._domains,
            guard=self._guard,
            journal=Journal(directory / "jobs"),
            links=channel.links,
            source=source,
            store=store,
            qemu_user=user,
            stall_seconds=float(settings.stall_seconds),
        )
        self._arrivals = Arrivals(
            directory,
            run_directory,
            self._domains,
            self._guard,
            store,
            network or NothingToDo(),
            user,
            presume_source_dead_after_seconds=settings.presume_source_dead_after_seconds,
        )
        self._landing = Landing(self._arrivals, self._domains, source, store)
        self._departures: dict[str, Departure] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._beginning: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
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
            ("job", self._job_asked),
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

        def load() -> list[Job]:
            self._guard.prepare_directories()
            self._arrivals.load()
            return self._around.journal.load()

        for job in await asyncio.to_thread(load):
            self._departures[job.id] = self._departure(job)
        self._loaded.set()
        for item in self._departures.values():
            if not item.job.ended:
                if not item.job.sentence:
                    item.job.explain(
                        "proxy-restarted", f"the proxy here was restarted during step {item.job.step.value}."
                    )
                # No periodic pass may touch the disks of a VM whose hand-off is not over.
                with contextlib.suppress(LifeboatError):
                    await self._source.hold(item.job.vm, item.job.id)
        self._tender = asyncio.create_task(self._tend(), name="evacuation-tender")

    async def stop(self) -> None:
        """Leave everything as it is; it is taken up again by the next start."""
        tasks = [*self._tasks.values(), *self._relays, *([self._tender] if self._tender else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._arrivals.stop()
        await self._landing.stop()

    # -- what the control API asks

    def jobs(self) -> list[Job]:
        """Every evacuation that left, or tries to leave, from here."""
        return [item.job for item in self._departures.values()]

    def job(self, job_id: str) -> Job:
        """One of them. Raises NotFound."""
        return self._get(job_id).job

    def arrivals(self) -> list[Arrival]:
        """Every evacuation that came, or tries to come, here."""
        return self._arrivals.all()

    async def begin(self, vm: str, *, options: EvacuationOptions | None = None) -> Job:
        """Start evacuating a VM (name or UUID), or return the job that does, or did, at this epoch.

        Raises NotFound, InvalidInput, Conflict with one sentence while nothing has been changed.
        """
        options = options or EvacuationOptions()
        try:
            domain = await self._domains.hypervisor.lookup(vm)
        except NotFound:
            gone = self._latest(vm)
            if gone is not None and (gone.verdict is Verdict.EVACUATED or not gone.ended):
                return gone
            raise
        uuid = str(await self._domains.hypervisor.call(domain.UUIDString, subject=f"VM {vm}"))
        name = str(await self._domains.hypervisor.call(domain.name, subject=f"VM {vm}"))
        async with self._beginning[uuid]:
            running = self._latest(uuid)
            if running is not None and not running.ended:
                return running
            status = self._source.status(uuid)
            peer = options.peer or str(status["peer"])
            if peer not in self._channel.links:
                raise NotFound(f"peer {peer}: not configured here; add it to precache_proxy.toml")
            epoch = int(status["epoch"]) + 1
            if running is not None and running.verdict is Verdict.EVACUATED and running.epoch >= epoch:
                return running
            job = new_job(uuid, name, peer, epoch, options, time.time())
            await asyncio.to_thread(self._around.journal.save, job)
            item = self._departures[job.id] = self._departure(job)
            item.measure = Measure(job, self._channel.links[peer], status.get("lag_bytes"))
            crash_point("departure-admitted")
            self._run(job.id, self._depart(item))
            return job

    async def wait(self, job_id: str, timeout_seconds: float) -> Job:
        """The job once it has ended, or as it is after that time."""
        item = self._get(job_id)
        deadline = time.monotonic() + timeout_seconds
        while not item.job.ended and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        return item.job

    async def cancel(self, job_id: str) -> Job:
        """Stop an evacuation and roll it back. Raises Conflict when it is too late for that."""
        item = self._get(job_id)
        await departure.cancel(item)
        return item.job

    async def steer(self, job_id: str, bandwidth_bytes_per_second: float) -> Job:
        """Change the bandwidth of a migration under way. Raises InvalidInput, Conflict."""
        item = self._get(job_id)
        if bandwidth_bytes_per_second <= 0:
            raise InvalidInput(
                f"bandwidth {bandwidth_bytes_per_second}: nothing could be sent; give one above 0"
            )
        if item.job.step is not Step.MIGRATE:
            raise Conflict(
                f"evacuation {job_id}: at step {item.job.step.value} there is no bandwidth to steer"
            )
        await migrate.steer(self._domains, item.job.vm, bandwidth_bytes_per_second)
        return item.job

    async def check(self, vm: str, peer: str | None = None) -> list[Finding]:
        """Everything that stands in the way of evacuating a VM; changes nothing."""
        definition = await self._domains.hypervisor.definition(vm)
        try:
            status: Mapping[str, Any] = self._source.status(definition.uuid)
        except NotFound:
            status = {}
        peer = peer or str(status.get("peer") or "")
        _, found, already_there = await departure.findings(
            self._around, definition.uuid, peer, int(status.get("epoch") or 0) + 1
        )
        return [] if already_there else found

    async def settle(self, job_or_vm: str, decision: str) -> dict[str, Any]:
        """The operator's word on an undecided VM. ``source-dead`` at the destination, ``keep-at-source`` at
        the source."""
        if decision == SETTLE_SOURCE_DEAD:
            arrival = self._arrivals.get(job_or_vm) or self._open_arrival(job_or_vm)
            await self._arrivals.declare_source_dead(arrival)
            self._land(arrival)
            return arrival.as_dict()
        if decision == SETTLE_KEEP_AT_SOURCE:
            job = (
                self._departures[job_or_vm].job if job_or_vm in self._departures else self._latest(job_or_vm)
            )
            if job is None:
                raise NotFound(
                    f"{job_or_vm}: no evacuation of that number or VM here; see `precache-proxy status`"
                )
            await self._keep_at_source(self._get(job.id))
            return job.as_dict()
        raise InvalidInput(
            f"settle {decision!r}: not a decision; say {SETTLE_SOURCE_DEAD} (at the destination) or "
            f"{SETTLE_KEEP_AT_SOURCE} (at the source)"
        )

    # -- helpers

    def _open_arrival(self, vm: str) -> Arrival:
        for arrival in sorted(self._arrivals.all(), key=lambda item: -item.epoch):
            if vm in {arrival.vm, arrival.name} and not arrival.ended:
                return arrival
        raise NotFound(f"{vm}: no open arrival of that number or VM here; see `precache-proxy status`")

    def _get(self, job_id: str) -> Departure:
        item = self._departures.get(job_id)
        if item is None:
            raise NotFound(f"evacuation {job_id}: no such job here; see `precache-proxy status`")
        return item

    def _latest(self, vm: str) -> Job | None:
        jobs = [item.job for item in self._departures.values() if vm in {item.job.vm, item.job.name}]
        return max(jobs, key=lambda job: job.commanded_at, default=None)

    def _departure(self, job: Job) -> Departure:
        return Departure(job, self._around, Measure.resumed(job, self._channel.links.get(job.peer)))

    def _run(self, key: str, work: Any) -> None:
        self._tasks[key] = asyncio.create_task(work, name=f"evacuation-{key}")

    # -- the source's side

    async def _depart(self, item: Departure) -> None:
        job = item.job
        try:
            await self._landing.leave(job.vm)
            await departure.run_forward(item)
            if job.step is Step.PREFLIGHT:
                job.verdict = Verdict.ALREADY_THERE
                job.explain("already-there", f"VM {job.name} arrived at {job.peer} before")
                await item.enter(Step.DONE)
                return
            await confirm.confirm(item)
            await confirm.release(item)
        except LifeboatError as error:
            await self._went_wrong(item, error)
        except Exception as error:  # a defect of ours must not leave a VM between two hosts
            logger.exception("evacuation %s of VM %s", job.id, job.vm)
            await self._went_wrong(
                item, LifeboatError(f"evacuation of {job.name}: {error!r}; see the journal")
            )

    async def _went_wrong(self, item: Departure, error: LifeboatError) -> None:
        job = item.job
        logger.warning("evacuation %s of VM %s, step %s: %s", job.id, job.vm, job.step.value, error)
        job.explain(error.cause, error.message, error.findings)
        try:
            if job.step is Step.PREFLIGHT:
                job.verdict = Verdict.STAYED
                await item.enter(Step.STAYED)
                return
            await self._decide(item)
        except LifeboatError as further:
            logger.warning("evacuation %s of VM %s: %s; asked again", job.id, job.vm, further)

    async def _decide(self, item: Departure) -> None:
        """Ask both sides who runs the VM, and go the one way that follows."""
        job = item.job
        if job.step in BEFORE_FREEZE:
            if job.step is Step.PREFLIGHT:
                job.verdict = Verdict.STAYED
                await item.enter(Step.STAYED)
            else:
                await rollback.roll_back(item, cold=False)
            return
        if job.effective_step is Step.MIGRATE:
            await departure.clear_local_leftovers(item)
        if job.settled == SETTLE_KEEP_AT_SOURCE and job.step is Step.ROLLBACK:
            await self._roll_back(item, cold=True)
            return
        presence = await self._domains.presence_at_source(job.vm)
        view = await self._ask_destination(item)
        decision = decide_at_source(job.effective_step, presence, view)
        logger.info(
            "evacuation %s of VM %s: step %s, here %s, there %s/%s: %s",
            job.id, job.vm, job.effective_step.value, presence.value,
            view.state if view.reachable else "not reached", view.vm.value, decision.value,
        )  # fmt: skip
        if decision is SourceDecision.ROLL_BACK:
            await self._roll_back(item, cold=False)
        elif decision is SourceDecision.ROLL_BACK_COLD:
            await self._roll_back(item, cold=True)
        elif decision is SourceDecision.CONFIRM:
            await confirm.confirm(item)
            await confirm.release(item)
        elif decision is SourceDecision.RELEASE:
            await confirm.release(item)
        elif decision is SourceDecision.FINISH:
            await confirm.finish(item)
        elif decision is SourceDecision.WAIT:
            await self._undecided(item, view)

    async def _roll_back(self, item: Departure, *, cold: bool) -> None:
        try:
            await rollback.roll_back(item, cold=cold)
        except rollback.ActivatedThere:
            await confirm.finish(item)

    async def _undecided(self, item: Departure, view: DestinationView) -> None:
        job = item.job
        if not view.reachable:
            job.explain(
                "no-contact",
                f"VM {job.name} is off here and {job.peer} cannot be asked whether it runs there; waiting "
                f"for contact, "
                f"or for `precache-proxy settle {job.id} keep-at-source` (only when {job.peer} does not run "
                f"it)",
            )
        job.verdict = Verdict.UNDECIDED
        if job.step is not Step.UNDECIDED and Step.UNDECIDED in FOLLOWING[job.step]:
            await item.enter(Step.UNDECIDED)

    async def _ask_destination(self, item: Departure) -> DestinationView:
        try:
            answer = await item.call("status", {}, STATUS_TIMEOUT_SECONDS)
        except LifeboatError:
            return DestinationView(reachable=False)
        state = answer.get("state")
        return DestinationView(True, ArrivalState(state) if state else None, Presence(answer["vm"]))

    async def _keep_at_source(self, item: Departure) -> None:
        job = item.job
        if job.step not in {Step.UNDECIDED, Step.RELEASED, Step.CONFIRM, Step.ROLLBACK}:
            raise Conflict(
                f"evacuation {job.id} of {job.name}: it is at step {job.step.value}, there is nothing to "
                f"settle"
            )
        task = self._tasks.get(job.id)
        if task is not None and not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        view = await self._ask_destination(item)
        if view.reachable:
            # With contact nobody has to guess: the ordinary way decides.
            await self._decide(item)
            return
        job.settled = SETTLE_KEEP_AT_SOURCE
        job.explain("settled", f"the operator keeps VM {job.name} here; {job.peer} must not run it.")
        await item.save()
        if job.step is not Step.ROLLBACK:
            await item.enter(Step.ROLLBACK)
        self._run(job.id, self._decide_quietly(item))

    async def _decide_quietly(self, item: Departure) -> None:
        try:
            await self._decide(item)
        except LifeboatError as error:
            logger.warning("evacuation %s of VM %s: %s; asked again", item.job.id, item.job.vm, error)
        except Exception:
            logger.exception("evacuation %s of VM %s", item.job.id, item.job.vm)

    # -- the destination's side

    async def _release(self, peer: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        answer = await self._arrivals.release(peer, parameters)
        arrival = self._arrivals.get(str(parameters["job"]))
        if arrival is not None:
            self._land(arrival)
        return answer

    async def _abort(self, peer: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        for task, (job_id, _) in list(self._relays.items()):
            if job_id == parameters["job"]:
                task.cancel()
        return await self._arrivals.abort(peer, parameters)

    async def _job_asked(self, peer: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        item = self._departures.get(str(parameters["job"]))
        if item is None or item.job.peer != peer:
            return {"known": False, "step": None}
        return {"known": True, "step": item.job.effective_step.value}

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
            for item in list(self._departures.values()):
                await self._tend_job(item)
            for arrival in self._arrivals.all():
                await self._tend_arrival(arrival)
            await asyncio.sleep(TEND_SECONDS)

    async def _first_contact(self) -> None:
        peers = {item.job.peer for item in self._departures.values() if not item.job.ended}
        peers |= {arrival.peer for arrival in self._arrivals.all() if not arrival.ended}

        async def wait(peer: str) -> None:
            link = self._channel.links.get(peer)
            if link is not None:
                with contextlib.suppress(PeerUnreachable):
                    await link.wait_up(FIRST_CONTACT_SECONDS)

        await asyncio.gather(*(wait(peer) for peer in peers))

    async def _tend_job(self, item: Departure) -> None:
        job = item.job
        task = self._tasks.get(job.id)
        if task is not None and not task.done():
            return
        if not job.ended:
            self._run(job.id, self._decide_quietly(item))
        elif job.owes_abort:
            self._run(job.id, self._settle_debt(item))

    async def _settle_debt(self, item: Departure) -> None:
        job = item.job
        try:
            await rollback.settle_debt(item)
            if job.owes_abort:
                await rollback.fence_if_due(item)
            else:
                await rollback.unfence(item)
        except rollback.ActivatedThere as error:
            await self._end_old_copy(item, error)
        except LifeboatError as error:
            logger.warning("evacuation %s of VM %s: %s; asked again", job.id, job.vm, error)

    async def _end_old_copy(self, item: Departure, error: LifeboatError) -> None:
        """The operator at the destination declared us dead while we were not: the newer epoch is right."""
        job = item.job
        logger.critical("VM %s: %s", job.vm, error)
        await asyncio.to_thread(self._guard.forbid, confirm.tombstone(job))
        await self._domains.destroy(job.vm)
        await self._domains.undefine(job.vm)
        with contextlib.suppress(LifeboatError):
            await self._source.handed_over(job.vm)
        job.owes_abort = False
        job.verdict = Verdict.EVACUATED
        job.explain(
            "old-copy-ended", f"{job.peer} was told that this host is dead and runs VM {job.name}; {error}"
        )
        await item.save()

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
        if all(item.job.ended for item in self._departures.values() if item.job.vm == arrival.vm):
            self._landing.begin(arrival)

    def _presumed_dead(self, arrival: Arrival) -> bool:
        limit = self._arrivals.presume_source_dead_after_seconds
        since = self._contact_at.setdefault(arrival.id, time.monotonic())
        return limit is not None and time.monotonic() - since >= limit
