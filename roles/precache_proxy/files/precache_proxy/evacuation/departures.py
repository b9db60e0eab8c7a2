# SPDX-License-Identifier: GPL-3.0-or-later
"""The source's side: its jobs, forward, back, or waiting for the other side's word."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from precache_proxy.crash_points import crash_point
from precache_proxy.errors import Conflict, Finding, LifeboatError, NotFound
from precache_proxy.evacuation import (
    confirm,
    departure,
    giving_up,
    late_pause,
    late_stop,
    release_ahead,
    restart,
    rollback,
    stopping,
)
from precache_proxy.evacuation.arrival import ArrivalState
from precache_proxy.evacuation.departure import Departure
from precache_proxy.evacuation.fence import KEEP_AT_SOURCE, Fence, this_boot
from precache_proxy.evacuation.job import (
    BEFORE_FREEZE,
    FOLLOWING,
    EvacuationOptions,
    Job,
    Step,
    Verdict,
    new_job,
)
from precache_proxy.evacuation.layers import forget_definition
from precache_proxy.evacuation.measure import Measure
from precache_proxy.evacuation.pace import refuse_too_little
from precache_proxy.evacuation.pruning import Entry, superseded
from precache_proxy.evacuation.reconcile import DestinationView, Presence, SourceDecision, decide_at_source
from precache_proxy.evacuation.surroundings import Surroundings, look

logger = logging.getLogger(__name__)

STATUS_TIMEOUT_SECONDS = 30.0


def _owes(job: Job) -> bool:
    """Whether there is something left to do about a job that is over."""
    return job.owes_abort or late_stop.is_open(job) or late_pause.is_open(job)


class Departures:
    """Every evacuation that left, or tries to leave, this host.

    ``leave`` stops what else works on the layers of a VM.
    """

    def __init__(self, around: Surroundings, leave: Callable[[str], Awaitable[None]]) -> None:
        self._around = around
        self._domains = around.domains
        self._guard = around.guard
        self._source = around.source
        self._leave = leave
        self._fence = Fence()
        self._departures: dict[str, Departure] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        # VMs that are being given up: nobody else goes on with their jobs
        self._superseded: set[str] = set()
        self._beginning: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def load(self) -> None:
        """Read the records (blocking)."""
        for job in self._around.journal.load():
            self._departures[job.id] = self._departure(job)

    async def fence_all(self) -> None:
        """Whatever was due while this proxy was not there comes before anything else."""
        for item in self._departures.values():
            if self._fence.is_due(item):
                with contextlib.suppress(LifeboatError, OSError):
                    await self._fence.stand_still(item)
            self._fence.watch(item)

    async def prune(self) -> list[str]:
        """Forget jobs that are history; see pruning.py. Their numbers. Raises IntegrityError."""
        guarding = {forbidden.job for forbidden in await asyncio.to_thread(lambda: list(self._guard.all()))}
        entries = [
            Entry(job.id, job.vm, job.epoch, job.commanded_at, not job.ended or _owes(job))
            for job in self.jobs()
        ]
        gone = superseded(entries, time.time(), guarding)
        for job_id in gone:
            await asyncio.to_thread(self._around.journal.remove, job_id)
            del self._departures[job_id]
            self._tasks.pop(job_id, None)
        return gone

    async def hold_all(self) -> None:
        """No periodic pass may touch the disks of a VM whose hand-off is not over."""
        for item in self._departures.values():
            if item.job.ended:
                continue
            if item.job.cancelled and not item.job.sentence:
                item.job.explain("cancelled", departure.cancelled_sentence(item.job))
            elif not item.job.sentence:
                item.job.explain(
                    "proxy-restarted", f"the proxy here was restarted during step {item.job.step.value}."
                )
            with contextlib.suppress(LifeboatError):
                await self._source.hold(item.job.vm, item.job.id)

    async def stop(self) -> None:
        """End the moves under way in order, as far as they come to it in time; every other job is left as it
        is, and taken up again by the next start."""
        working = ((item, self._tasks.get(item.job.id)) for item in self._departures.values())
        await stopping.end_moves(
            (item, task) for item, task in working if task is not None and not task.done()
        )
        await self._fence.stop()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def is_leaving(self, vm: str) -> bool:
        """Whether an evacuation of the VM from here is not over."""
        return any(not item.job.ended for item in self._departures.values() if item.job.vm == vm)

    async def tend_all(self) -> None:
        """Take up what nobody works on at the moment."""
        for item in list(self._departures.values()):
            await self.tend(item)

    def jobs(self) -> list[Job]:
        """Every evacuation that left, or tries to leave, from here."""
        return [item.job for item in self._departures.values()]

    def job(self, job_id: str) -> Job:
        """One of them. Raises NotFound."""
        return self.get(job_id).job

    def get(self, job_id: str) -> Departure:
        """One of them with what lives as long as this process. Raises NotFound."""
        item = self._departures.get(job_id)
        if item is None:
            raise NotFound(f"evacuation {job_id}: no such job here; see `precache-proxy status`")
        return item

    def latest(self, vm: str) -> Job | None:
        """The newest job of that number, VM or name, or None; of one VM the one that is not over, if any."""
        jobs = [job for job in self.jobs() if vm in {job.id, job.vm, job.name}]
        # Of VMs that had the name one after the other only the clock knows which is meant.
        named = max(jobs, key=lambda job: job.commanded_at, default=None)
        if named is None:
            return None

        # The clock may be set back: a second job beside an open one would move the VM twice.
        def age(job: Job) -> tuple[bool, int, bool, float]:
            return not job.ended, job.epoch, job.step is Step.DONE, job.commanded_at

        return max((job for job in jobs if job.vm == named.vm), key=age)

    async def begin(self, vm: str, *, options: EvacuationOptions | None = None) -> Job:
        """Start evacuating a VM (name or UUID), or return the job that does, or did, at this epoch.

        Raises NotFound, InvalidInput, Conflict with one sentence while nothing has been changed.
        """
        options = options or EvacuationOptions()
        refuse_too_little("bandwidth", options.bandwidth_bytes_per_second)
        try:
            domain = await self._domains.hypervisor.lookup(vm)
        except NotFound:
            gone = self.latest(vm)
            if gone is not None and (gone.verdict is Verdict.EVACUATED or not gone.ended):
                return gone
            raise
        uuid = str(await self._domains.hypervisor.call(domain.UUIDString, subject=f"VM {vm}"))
        name = str(await self._domains.hypervisor.call(domain.name, subject=f"VM {vm}"))
        async with self._beginning[uuid]:
            running = self.latest(uuid)
            if running is not None and not running.ended:
                return running
            status = self._source.status(uuid)
            peer = options.peer or str(status["peer"])
            if peer not in self._around.links:
                raise NotFound(f"peer {peer}: not configured here; add it to precache_proxy.toml")
            epoch = int(status["epoch"]) + 1
            if running is not None and running.verdict is Verdict.EVACUATED and running.epoch >= epoch:
                return running
            job = new_job(uuid, name, peer, epoch, options, time.time())
            job.boot = this_boot()
            await asyncio.to_thread(self._around.journal.save, job)
            item = self._departures[job.id] = self._departure(job)
            item.measure = Measure(job, self._around.links[peer], status.get("lag_bytes"))
            crash_point("departure-admitted")
            self._run(job.id, self._depart(item))
            return job

    async def wait(self, job_id: str, timeout_seconds: float) -> Job:
        """The job once it has ended, or as it is after that time."""
        item = self.get(job_id)
        deadline = time.monotonic() + timeout_seconds
        while not item.job.ended and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        return item.job

    async def cancel(self, job_id: str) -> Job:
        """Stop an evacuation and roll it back. Raises Conflict when it is too late for that."""
        item = self.get(job_id)
        await departure.cancel(item)
        return item.job

    async def steer(self, job_id: str, bandwidth_bytes_per_second: float) -> Job:
        """See :func:`departure.steer`."""
        item = self.get(job_id)
        await departure.steer(item, bandwidth_bytes_per_second)
        return item.job

    def share(self, job_id: str, bytes_per_second: float | None, seconds: float) -> Job:
        """Lend an evacuation a share of the wire for so long. Raises InvalidInput, Conflict."""
        item = self.get(job_id)
        if item.job.ended:
            raise Conflict(f"evacuation {job_id}: has ended; there is nothing to share")
        item.pace.lend(bytes_per_second, seconds)
        return item.job

    async def pause_guest(self, job_id: str) -> Job:
        """See :func:`departure.pause_guest`."""
        item = self.get(job_id)
        await departure.pause_guest(item)
        return item.job

    async def check(self, vm: str, peer: str | None = None, *, restarts: bool = False) -> list[Finding]:
        """Everything that stands in the way of evacuating a VM; changes nothing."""
        definition = await self._domains.hypervisor.definition(vm)
        try:
            status: Mapping[str, Any] = self._source.status(definition.uuid)
        except NotFound:
            status = {}
        peer = peer or str(status.get("peer") or "")
        told = await look(
            self._around, definition.uuid, peer, int(status.get("epoch") or 0) + 1, restarts=restarts
        )
        return [] if told.already_there else told.findings

    # -- forward and back

    def _departure(self, job: Job) -> Departure:
        measure = Measure.resumed(job, self._around.links.get(job.peer))
        return Departure(job, self._around, measure, self._fence)

    def _run(self, key: str, work: Coroutine[Any, Any, None]) -> None:
        self._tasks[key] = asyncio.create_task(work, name=f"evacuation-{key}")

    async def _depart(self, item: Departure) -> None:
        job = item.job
        try:
            await self._leave(job.vm)
            await (restart if job.restarts else departure).run_forward(item)
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
                # After a restart it is held like every open job: without this its passes would never go on.
                with contextlib.suppress(NotFound):
                    await self._source.release(job.vm, job.id)
                job.verdict = Verdict.STAYED
                await item.enter(Step.STAYED)
            else:
                await rollback.roll_back(item, self._fence, cold=False)
            return
        if job.effective_step in {Step.MIGRATE, Step.CONFIRM} and not self._fence.is_due(item):
            # A release that could not be recorded may be on the disk all the same: whoever finds it there
            # would have the VM run at the destination, too.
            await item.save()
            await release_ahead.take_back(item)
        if job.effective_step is Step.MIGRATE:
            await departure.clear_local_leftovers(item)
        if job.settled == KEEP_AT_SOURCE and job.step is Step.ROLLBACK:
            await self._roll_back(item, cold=True)
            return
        presence = await self._domains.presence_at_source(job.vm)
        view = await self._ask_destination(item)
        decision = decide_at_source(
            job.effective_step, presence, view, restarts=job.restarts, cancelled=job.cancelled
        )
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
            await rollback.roll_back(item, self._fence, cold=cold)
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
        # The answer to our release may have been lost, and with it the word that it had to be started anew.
        item.job.memory_lost = item.job.memory_lost or bool(answer.get("memory_lost"))
        return DestinationView(True, ArrivalState(state) if state else None, Presence(answer["vm"]))

    async def keep_at_source(self, job_id: str) -> None:
        """The operator keeps an undecided VM here. Raises Conflict when there is nothing to settle."""
        item = self.get(job_id)
        job = item.job
        if job.vm in self._superseded:
            raise Conflict(f"VM {job.name}: it is being given up to {job.peer}, which runs it by now")
        fenced = job.step is Step.STAYED and self._fence.is_due(item)
        if job.step not in {Step.UNDECIDED, Step.RELEASED, Step.CONFIRM, Step.ROLLBACK} and not fenced:
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
            await (self._settle_debt(item) if fenced else self._decide(item))
            return
        job.settled = KEEP_AT_SOURCE
        job.explain("settled", f"the operator keeps VM {job.name} here; {job.peer} must not run it.")
        await item.save()
        if fenced:
            await self._fence.lift(item)
            return
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

    async def job_asked(self, peer: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """A destination asks where its job stands."""
        item = self._departures.get(str(parameters["job"]))
        if item is None or item.job.peer != peer:
            return {"known": False, "step": None}
        return {"known": True, "step": item.job.effective_step.value}

    async def end_asked(self, peer: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """See :func:`stopping.end_asked`."""
        return await stopping.end_asked(self._departures.get(str(parameters["job"])), peer)

    async def supersede(self, peer: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The peer runs a VM of ours from a generation, on its operator's word that we are dead."""
        vm = str(parameters["vm"])
        async with self._beginning[vm]:
            concerned = [
                item
                for item in self._departures.values()
                if item.job.vm == vm and item.job.peer == peer and (not item.job.ended or _owes(item.job))
            ]
            await giving_up.refuse_what_is_not_so(self._around, concerned, peer, parameters)
            if parameters.get("only_asked"):
                return {}
            self._superseded.add(vm)
            try:
                for item in concerned:
                    task = self._tasks.get(item.job.id)
                    if task is not None and not task.done():
                        task.cancel()
                        await asyncio.gather(task, return_exceptions=True)
                return await giving_up.give_up(self._around, concerned, peer, parameters)
            finally:
                self._superseded.discard(vm)

    async def tend(self, item: Departure) -> None:
        """Go on with a job that nobody works on."""
        job = item.job
        task = self._tasks.get(job.id)
        if (task is not None and not task.done()) or job.vm in self._superseded:
            return
        if not job.ended:
            self._run(job.id, self._decide_quietly(item))
        elif _owes(job):
            self._run(job.id, self._settle_debts(item))

    async def _settle_debts(self, item: Departure) -> None:
        """What a job that is over owes its VM here, and then its peer, whom nobody may hear for long."""
        for late in (late_stop, late_pause):
            if not late.is_open(item.job) or self.is_leaving(item.job.vm):
                continue
            try:
                await late.look(item, self._fence)
            except (LifeboatError, OSError) as error:
                logger.warning("evacuation %s of VM %s: %s; tried again", item.job.id, item.job.vm, error)
        if item.job.owes_abort:
            await self._settle_debt(item)

    async def _settle_debt(self, item: Departure) -> None:
        job = item.job
        try:
            await rollback.settle_debt(item)
            if not job.owes_abort:
                await self._fence.lift(item)
        except rollback.ActivatedThere as error:
            await self._end_old_copy(item, error)
        except LifeboatError as error:
            logger.warning("evacuation %s of VM %s: %s; asked again", job.id, job.vm, error)

    async def _end_old_copy(self, item: Departure, error: LifeboatError) -> None:
        """The operator at the destination declared us dead while we were not: the newer epoch is right."""
        job = item.job
        logger.critical("VM %s: %s", job.vm, error)
        await asyncio.to_thread(self._guard.forbid, confirm.tombstone(job))
        await release_ahead.end(item)
        await self._domains.destroy(job.vm)
        await forget_definition(self._domains, job.vm)
        with contextlib.suppress(LifeboatError):
            await self._source.handed_over(job.vm)
        job.owes_abort = False
        job.verdict = Verdict.EVACUATED
        job.explain(
            "old-copy-ended", f"{job.peer} was told that this host is dead and runs VM {job.name}; {error}"
        )
        await item.save()
