# SPDX-License-Identifier: GPL-3.0-or-later
"""One protected VM: what it is at, what comes next, and why it is late when it is."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, TypeVar

from precache_proxy.errors import (
    Conflict,
    HypervisorError,
    LifeboatError,
    NoSpace,
    NotFound,
    PeerUnreachable,
    StaleEpoch,
    TrackingLost,
    VmStateChanged,
)
from precache_proxy.source.environment import Environment
from precache_proxy.source.passes import PassResult
from precache_proxy.source.record import ProtectionRecord
from precache_proxy.source.replication import Replication
from precache_proxy.source.scrub import recent_differences
from precache_proxy.source.standing import OldHomeNotReady

logger = logging.getLogger(__name__)

T = TypeVar("T")

# After a failure: the first retry, and the longest wait between two.
RETRY_SECONDS = (2.0, 5.0, 15.0, 30.0, 60.0)
# Errors that no waiting heals: the operator has to do something first. Looked at again this often.
STOPPED_RETRY_SECONDS = 60.0
# A VM's old home has its domain to undefine and bitmaps to drop before it can take the way back.
OLD_HOME_SECONDS = 120.0
_NEEDS_LINK = {"protected", "seeding", "resync"}
_UNREACHABLE = {"unreachable", "link-lost", "peer-restarted", "stalled", "refused"}


class Protection:
    """The task of one VM, and what is known of it."""

    def __init__(self, record: ProtectionRecord, environment: Environment) -> None:
        self.record = record
        self.replication = Replication(record, environment)
        self.state = "starting"
        self.cause = "starting"
        self.sentence = "the proxy has just started"
        self._environment = environment
        self._holders: set[str] = set()
        # one piece of work on the VM at a time
        self._lock = asyncio.Lock()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._work: asyncio.Task[Any] | None = None
        # a pass that waits for its turn among those of other VMs
        self._in_queue: asyncio.Task[None] | None = None
        # a comparison of everything that somebody waits for (verify): an evacuation does not wait for it
        self._comparison: asyncio.Task[PassResult] | None = None
        self._failures = 0
        self._began_at = time.monotonic()
        self._duration_seconds = 0.0
        self._next_at = 0.0
        # something happened to the VM since this round of work, or the last one, began
        self._changed = False
        self._last_scrub_at = time.monotonic()
        # until then periodic passes wait (monotonic)
        self._postponed_until = 0.0

    # -- life --------------------------------------------------------------------------------------

    def start(self, holders: Iterable[str] = ()) -> None:
        """Begin to work, once none of the holders holds it."""
        self._holders.update(holders)
        if self._task is None:
            self._set_at_rest()
            self._task = asyncio.create_task(self._run(), name=f"protection-{self.record.name}")

    def refuse(self, cause: str, sentence: str) -> None:
        """Show why nothing is done for this VM; it must not have been started."""
        self._set("stopped", cause, sentence)

    async def stop(self) -> None:
        """End what is under way in order; the record stays."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        await self._cut_work()
        self.replication.ease()
        await self.replication.disks.media.stop()

    def changed(self) -> None:
        """Something happened to the VM: look anew, at once or, during a turn, soon after it."""
        self.replication.standing.needs_reconcile = True
        self._changed = True
        self.wake()

    def wake(self, *, soon: bool = True) -> None:
        """Something changed: look now instead of when the next pass is due."""
        if soon:
            self._next_at = 0.0
        self._wake.set()

    # -- holds -------------------------------------------------------------------------------------

    @property
    def held_by(self) -> list[str]:
        """Who keeps periodic passes from running."""
        return sorted(self._holders)

    async def hold(self, holder: str) -> None:
        """No work of our own from now on; returns when none is under way."""
        self._holders.add(holder)
        self.replication.hasten()
        if self._in_queue is not None or self.record.sealed is None or self.record.resync_cause:
            # a first copy or a resync takes long, and goes on where it stood
            await self._cut_work()
        if self._in_queue is not None:
            # Somebody asked for that pass: it is made now, and nobody has to ask again.
            self._in_queue.cancel()
        if self._comparison is not None:
            self._comparison.cancel()
        async with self._lock:
            pass
        self._set("held", "held", f"held by {', '.join(self.held_by)}")

    def release(self, holder: str) -> None:
        """Work again, once nobody else holds."""
        self._holders.discard(holder)
        if not self._holders:
            self.replication.pace = None
            self.replication.ease()
            self._set_at_rest()
            self.wake()

    def postpone(self, seconds: float) -> None:
        """No periodic pass for so long; 0: as usual again.

        It ends by itself, for whoever asked may die. A first copy, a resync and the way back go on: without
        them the VM could not leave at all.
        """
        waits = self.postponed_seconds > 0
        self._postponed_until = time.monotonic() + seconds
        if waits:
            self.wake()

    @property
    def postponed_seconds(self) -> float:
        """For how long periodic passes still wait."""
        record = self.record
        if record.sealed is None or record.resync_cause or record.return_overlays:
            return 0.0
        return max(0.0, self._postponed_until - time.monotonic())

    # -- work --------------------------------------------------------------------------------------

    async def exclusive(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run ``work`` on this VM when nothing else does."""
        async with self._lock:
            return await work()

    async def run_pass(self, *, reason: str, compare_all: bool = False, leave_bytes: int = 0) -> PassResult:
        """One pass now, where more than ``leave_bytes`` changed. Raises what stands in its way; a lost
        tracking puts the VM into resync."""

        async def work() -> PassResult:
            if self.replication.standing.needs_reconcile:
                await self.replication.standing.reconcile()
            await self._require_seeded()
            return await self._pass(reason=reason, compare_all=compare_all, leave_bytes=leave_bytes)

        if not compare_all:
            return await self.exclusive(work)
        if self._comparison is not None:
            raise Conflict(f"VM {self.record.name}: it is being compared already; wait for that")
        comparison = self._comparison = asyncio.create_task(self.exclusive(work))
        try:
            return await comparison
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            raise Conflict(
                f"VM {self.record.name}: the comparison was ended, for something else needs the VM "
                f"({', '.join(self.held_by)}); ask again when that is over"
            ) from None
        finally:
            self._comparison = None

    async def _require_seeded(self) -> None:
        record = self.record
        if record.sealed is None and not (self.replication.seeding and self.replication.seeding.finished):
            raise Conflict(
                f"VM {record.name}: its first copy is not complete ({self.coverage:.0%}); "
                "wait until it is protected"
            )
        if record.resync_cause:
            raise Conflict(f"VM {record.name}: a resync is under way ({record.resync_cause}); wait for it")

    async def _pass(
        self, *, reason: str, compare_all: bool = False, scrub_bytes: int = 0, leave_bytes: int = 0
    ) -> PassResult:
        record = self.record
        async with self._passes_turn(long=compare_all):
            try:
                with self.replication.totals.counted():
                    result = await self.replication.run_pass(
                        reason=reason,
                        compare_all=compare_all,
                        scrub_bytes=scrub_bytes,
                        leave_bytes=leave_bytes,
                    )
            except TrackingLost as error:
                if record.sealed is None:
                    # Nothing is sealed that could be compared with (a disk was added during the first copy):
                    # the first copy begins anew.
                    record.seeding_checkpoint = ""
                    await self.replication.standing.save()
                    raise
                record.resync_cause = error.message
                await self.replication.standing.save()
                self._set("resync", "tracking-lost", error.message)
                self.wake()
                raise
        if not result.skipped:
            self._duration_seconds = 0.6 * self._duration_seconds + 0.4 * result.total_seconds
        return result

    @contextlib.asynccontextmanager
    async def _passes_turn(self, *, long: bool) -> AsyncIterator[None]:
        """A turn among the passes of all VMs. Whoever holds this one does not queue behind the others."""
        if self._holders and not long:
            yield
            return
        if long:
            async with self._environment.long_work.turn(self.record.priority):
                yield
            return
        async with contextlib.AsyncExitStack() as stack:
            turn = self._environment.passes.turn(self.record.priority)
            queue = self._in_queue = asyncio.create_task(stack.enter_async_context(turn))
            try:
                await queue
            except asyncio.CancelledError:
                current = asyncio.current_task()
                if current is not None and current.cancelling():
                    raise
                # A hold took it out of the queue.
            finally:
                self._in_queue = None
            yield

    async def _run(self) -> None:
        while True:
            self._changed = False
            try:
                if self._holders:
                    await self._sleep(None)
                    continue
                if self.postponed_seconds > 0:
                    await self._sleep(self.postponed_seconds)
                    continue
                await self._wait_for_link()
                if (seconds := await self._environment.backups.wait_seconds(self.replication.vm)) > 0:
                    await self._sleep(seconds)
                    continue
                delay = await self._turn()
                self._failures = 0
            except LifeboatError as error:
                delay = self._failed(error)
            except Exception as error:
                logger.exception("VM %s: a pass failed in a way that nobody foresaw", self.record.name)
                delay = self._failed(HypervisorError(f"VM {self.record.name}: {error!r}; see the journal"))
            await self._sleep(min(delay, RETRY_SECONDS[0]) if self._changed else delay)

    async def _sleep(self, seconds: float | None) -> None:
        self._next_at = float("inf") if seconds is None else time.monotonic() + seconds
        while True:
            self._wake.clear()
            left = self._next_at - time.monotonic()
            if left <= 0:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if left == float("inf") else left):
                    await self._wake.wait()

    async def _wait_for_link(self) -> None:
        link = self._environment.link(self.record.peer)
        if link.state == "up":
            return
        self._set("unreachable", link.cause, f"peer {self.record.peer}: {link.sentence}")
        await link.wait_up(None)
        self.replication.standing.needs_reconcile = True
        self._set_at_rest()

    async def _turn(self) -> float:
        """One piece of work; returns in how many seconds the next is due."""
        async with self._lock:
            if self._holders:
                return 0.0
            self._work = asyncio.create_task(self._do())
            try:
                await asyncio.shield(self._work)
            except asyncio.CancelledError:
                if not self._work.cancelled():
                    raise  # it is us who are to end
                if self.record.sealed is None or self.record.resync_cause:
                    # An answer may have been on its way. A pass that was cut had only waited for its turn.
                    self.replication.standing.needs_reconcile = True
                return 0.0  # cut by a hold
            finally:
                if not self._work.done():
                    self._work.cancel()
                    await asyncio.gather(self._work, return_exceptions=True)
                self._work = None
        return self._pause_seconds()

    async def _cut_work(self) -> None:
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)

    async def _do(self) -> None:
        record, replication = self.record, self.replication
        if replication.standing.needs_reconcile:
            await replication.standing.reconcile()
        if record.return_overlays:
            self._set("seeding", "way-back", f"what changed since {record.peer} was left is on its way there")
            with replication.totals.counted():
                await replication.send_return()
        elif record.sealed is None and not record.resync_cause:
            self._set("seeding", "first-copy", f"the first copy to {record.peer} is under way")
            async with self._environment.long_work.turn(record.priority):
                await replication.seed()
            await self._pass(reason="first")
        elif record.resync_cause:
            self._set("resync", "tracking-lost", record.resync_cause)
            await self._pass(reason="resync", compare_all=True)
        else:
            await self._pass(reason="periodic", scrub_bytes=self._scrub_bytes())
        self._set_at_rest()

    def _scrub_bytes(self) -> int:
        settings = self._environment.settings
        if time.monotonic() - self._last_scrub_at < settings.scrub_interval_seconds:
            return 0
        self._last_scrub_at = time.monotonic()
        return settings.scrub_slice_bytes

    def _pause_seconds(self) -> float:
        """Until the next pass: the RPO less what a pass takes, so that its seal comes in time."""
        rpo = self.record.rpo_seconds
        period = min(max(rpo - 1.5 * self._duration_seconds - 0.5, rpo / 4), rpo * 0.9)
        # the phase is the VM's own: passes of many VMs do not come at once
        phase = int.from_bytes(hashlib.sha256(self.record.uuid.encode()).digest()[:4], "big") / 2**32
        now = time.monotonic()
        ahead = (phase * period - now) % period
        return ahead if ahead > period / 4 else ahead + period if ahead + period <= rpo * 0.9 else period

    def _failed(self, error: LifeboatError) -> float:
        record = self.record
        cause = getattr(error, "cause", "error")
        if isinstance(error, VmStateChanged):
            # The next turn looks anew; the event of its start or end wakes us.
            self.replication.standing.needs_reconcile = True
            self._set_at_rest()
            logger.info("%s", error.message)
            return RETRY_SECONDS[0]
        delay = RETRY_SECONDS[min(self._failures, len(RETRY_SECONDS) - 1)]
        self._failures += 1
        if isinstance(error, TrackingLost):
            self._set("resync", "tracking-lost", error.message)
            return 0.1 if self._failures < 3 else delay
        if isinstance(error, OldHomeNotReady) and time.monotonic() - self._began_at < OLD_HOME_SECONDS:
            self._set("seeding", "way-back", f"{record.peer} is taking what the VM left there as a replica")
            self.replication.standing.needs_reconcile = True
            return RETRY_SECONDS[0]
        if isinstance(error, PeerUnreachable) or cause in _UNREACHABLE:
            self._set("unreachable", cause, error.message)
            self.replication.standing.needs_reconcile = True
        elif isinstance(error, NoSpace) or cause == "no-space":
            self._set("no-space", "no-space", error.message)
            # Who makes room there may have removed this replica.
            self.replication.standing.needs_reconcile = True
        elif isinstance(error, NotFound | StaleEpoch) or cause in {"not-found", "stale-epoch", "unsupported"}:
            self._set("stopped", cause, error.message)
            self.replication.standing.needs_reconcile = True
            delay = STOPPED_RETRY_SECONDS
        else:
            self._set("failing", cause, error.message)
            self.replication.standing.needs_reconcile = True
        logger.warning("VM %s: %s: %s", record.name, self.state, error.message)
        return delay

    # -- what is told ------------------------------------------------------------------------------

    def _set(self, state: str, cause: str, sentence: str) -> None:
        self.state, self.cause, self.sentence = state, cause, sentence

    def _set_at_rest(self) -> None:
        record = self.record
        if self._holders:
            self._set("held", "held", f"held by {', '.join(self.held_by)}")
        elif record.resync_cause:
            self._set("resync", "tracking-lost", record.resync_cause)
        elif record.sealed is None:
            self._set("seeding", "first-copy", f"the first copy to {record.peer} is not complete")
        elif self.replication.disks.refused:
            disks = ", ".join(self.replication.disks.refused)
            self._set("protected", "disk-left-out", f"disk {disks} cannot be protected and is left out")
        else:
            self._set("protected", "ok", f"generation {record.sealed.generation} is sealed at {record.peer}")

    @property
    def coverage(self) -> float:
        """Share of the allocated bytes that the peer holds."""
        if self.record.sealed is not None:
            return 1.0
        return 0.0 if self.replication.seeding is None else self.replication.seeding.coverage

    @property
    def lag_seconds(self) -> float | None:
        """Age of the oldest change that the peer may not hold, as of the last look; None before the first."""
        replication = self.replication
        if self.record.sealed is None:
            return None
        if replication.clean_at is None:
            return max(0.0, time.time() - self.record.sealed.source_time)
        quiet = not replication.dirty_bytes and self.state in {"protected", "held"}
        return 0.0 if quiet and replication.generation is None else time.monotonic() - replication.clean_at

    def _told(self) -> tuple[str, str, str]:
        """State, cause and sentence. A link that went down in the midst of work is told at once."""
        if self.state in _NEEDS_LINK:
            with contextlib.suppress(NotFound):
                link = self._environment.link(self.record.peer)
                if link.state != "up":
                    return "unreachable", link.cause, f"peer {self.record.peer}: {link.sentence}"
        return self.state, self.cause, self.sentence

    def status(self) -> dict[str, Any]:
        """Everything for the control API."""
        record, replication = self.record, self.replication
        sealed, last = record.sealed, replication.last_pass
        state, cause, sentence = self._told()
        return {
            "uuid": record.uuid,
            "name": record.name,
            "peer": record.peer,
            "state": state,
            "cause": cause,
            "sentence": sentence,
            "rpo_seconds": record.rpo_seconds,
            "priority": record.priority,
            "disks": record.only_disks,
            "raw_overlay_consent": record.raw_overlay_consent,
            "autostart": record.autostart,
            "start_waits": self._environment.after_boot.waits.get(record.uuid, ""),
            "generation": 0 if sealed is None else sealed.generation,
            "checkpoint": "" if sealed is None else sealed.checkpoint,
            "epoch": record.epoch,
            "sealed_at": None if sealed is None else sealed.sealed_at,
            "coverage": self.coverage,
            "lag_bytes": replication.dirty_bytes,
            "lag_seconds": self.lag_seconds,
            "written_bytes_per_second": replication.written_bytes_per_second,
            "last_pass": None if last is None else {**last.as_dict(), "at": replication.last_pass_at},
            "passes": replication.totals.as_dict(),
            "pass_open": replication.generation is not None,
            "held_by": self.held_by,
            "postponed_seconds": self.postponed_seconds,
            "scrub": {
                "turns": record.scrub_turns,
                "different_blocks": record.scrub_differences,
                "recent_different_blocks": recent_differences(record),
                "offsets": dict(record.scrub_offsets),
            },
            "disk_paths": {target: disk.path for target, disk in record.disks.items()},
            "refused_disks": replication.disks.refused,
            "media": replication.disks.media.status(),
        }

    async def measure_lag(self) -> None:
        """Ask QEMU how much changed since the last sealed generation."""
        sealed = self.record.sealed
        if sealed is None or not sealed.checkpoint or self.replication.generation is not None:
            return
        with contextlib.suppress(LifeboatError):
            tracker, vm = self._environment.tracker, self.replication.vm
            dirty = await tracker.dirty_bytes(vm, sealed.checkpoint, sealed.disks)
            if dirty is not None:
                self.replication.note_dirty(sum(dirty.values()), sealed)
