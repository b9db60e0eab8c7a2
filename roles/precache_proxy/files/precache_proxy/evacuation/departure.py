# SPDX-License-Identifier: GPL-3.0-or-later
"""The source's side of one evacuation: the steps forward, each durable before it is begun."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from precache_proxy.blocks.images import ImageReference
from precache_proxy.crash_points import crash_point
from precache_proxy.errors import (
    Cancelled,
    Conflict,
    GuestBoots,
    InvalidInput,
    LifeboatError,
    NoSpace,
    NotFound,
    PeerUnreachable,
)
from precache_proxy.evacuation import (
    addresses,
    calling_off,
    crossing,
    departure_relays,
    freeze,
    late_pause,
    migrate,
    mirroring,
    preflight,
    relay,
)
from precache_proxy.evacuation.arrival import RUNS_HERE, ArrivalState
from precache_proxy.evacuation.job import Job, Step
from precache_proxy.evacuation.measure import Measure
from precache_proxy.evacuation.opening_ahead import OpeningsAhead
from precache_proxy.evacuation.pace import Pace
from precache_proxy.evacuation.release_ahead import UnendedMove
from precache_proxy.evacuation.surroundings import Surroundings, look
from precache_proxy.source.scratch import boottime_seconds
from precache_proxy.units import MIB

logger = logging.getLogger(__name__)

# Another pass pays only while it is worth more than this, and shrinks what is left by at least so much.
CATCH_UP_ENOUGH_BYTES = 8 * MIB
CATCH_UP_SHRINK = 0.7
# What a pass takes besides its data.
PASS_ROUND_TRIPS = 3
PREPARE_TIMEOUT_SECONDS = 180.0
LINK_LOOK_SECONDS = 0.5
_SENDING = frozenset(
    {
        Step.PREFLIGHT,
        Step.CATCH_UP,
        Step.STOP,
        Step.FREEZE,
        Step.RESIDUAL,
        Step.PREPARE,
        Step.MIGRATE,
    }
)
_LET_RUN_THERE = frozenset({ArrivalState.RELEASED.value, *(state.value for state in RUNS_HERE)})


class DestinationContact(Protocol):
    """Who keeps account of when the destination was last in touch (fence.py)."""

    def heard(self, departure: Departure, asked_at: float) -> None:
        """It has answered what we asked at that time of the boot clock."""

    def watch(self, departure: Departure) -> None:
        """From now on the account matters, if the destination may presume us dead."""


@dataclass(slots=True)
class Departure:
    """A job under way, with what only lives as long as this process."""

    job: Job
    around: Surroundings
    measure: Measure
    contact: DestinationContact
    # why the destination could not be asked, as it was logged last
    complaint: str = ""
    failure: LifeboatError | None = None
    sockets: relay.JobSockets | None = field(default=None)
    # connections that libvirt and QEMU there are asked for before libvirt and QEMU here ask
    ahead: OpeningsAhead | None = field(default=None)
    # what it may put on the wire while others go first
    pace: Pace = field(default_factory=Pace)
    # its bandwidth while blocks go as generations; that of the migration is QEMU's to keep
    bandwidth: Pace = field(default_factory=Pace)
    # set when the migration has to end: on the operator's word, or because a relay is dead
    enough: asyncio.Event = field(default_factory=asyncio.Event)
    # how its migration is brought to that end, while there is one
    ending: calling_off.CallingOff | None = None
    # why, where neither the operator wants it nor a relay is dead
    called_off_for: LifeboatError | None = None
    # whether the VM runs here is changed by one at a time
    deciding: asyncio.Lock = field(default_factory=asyncio.Lock)
    # where the destination has the media of the VM's drives
    media: dict[str, str] = field(default_factory=dict)
    # what its guest had written when the evacuation began
    writes_before: mirroring.GuestWrites | None = None
    # the pauses of its guest that libvirt was asked for
    pauses: late_pause.Pauses = field(default_factory=late_pause.Pauses)
    # the destination takes a release that comes before libvirt there has ended the move
    may_release_ahead: bool = False
    # libvirt's call for the move, where its memory is over and libvirt has not ended it
    unended: UnendedMove | None = None

    def __post_init__(self) -> None:
        # What an earlier process asked for may have been answered to it or not.
        if self.job.pause_unanswered or (self.job.stopped_here and not self.job.ended):
            self.pauses.unanswered = 1

    @property
    def link(self) -> Any:
        """The link to the destination. Raises NotFound for a peer that is not configured."""
        link = self.around.links.get(self.job.peer)
        if link is None:
            raise NotFound(f"peer {self.job.peer}: not configured here; add it to precache_proxy.toml")
        return link

    async def enter(self, *steps: Step) -> None:
        """Make the step durable; only then it is begun. Of several only the last is ever on disk."""
        await asyncio.to_thread(self.around.journal.enter, self.job, *steps)
        logger.info("evacuation %s of VM %s: %s", self.job.id, self.job.vm, steps[-1].value)

    async def save(self) -> None:
        """Make what the record says now durable."""
        await asyncio.to_thread(self.around.journal.save, self.job)

    async def note_stop(self) -> None:
        """On record that we pause the guest here, before it is done: a rollback lets only such a one go on.

        Where that cannot be written (a full disk) it is paused all the same: what it is done for cannot wait.
        """
        if not self.job.stopped_here:
            self.job.stopped_here = True
            try:
                await self.save()
            except OSError as error:
                logger.error("evacuation %s: its record cannot be written: %s", self.job.id, error)

    def check_cancelled(self) -> None:
        """Raise Cancelled when the operator asked for it, or the relay's failure, or why else it is to
        end."""
        if self.job.cancelled:
            raise Cancelled(cancelled_sentence(self.job))
        if (reason := self.failure or self.called_off_for) is not None:
            raise reason

    async def call(self, method: str, parameters: dict[str, Any], timeout_seconds: float) -> dict[str, Any]:
        """Ask the destination about this job. Raises PeerUnreachable when the link stays down for too long.

        A link that comes back carries the question on; whatever is asked may be asked twice.
        """
        complete = {"job": self.job.id, "vm": self.job.vm, **parameters}
        link, asked_at = self.link, boottime_seconds()
        call = asyncio.ensure_future(
            link.call(f"evacuation.{method}", complete, timeout_seconds=timeout_seconds)
        )
        try:
            down_seconds = 0.0
            while not (await asyncio.wait({call}, timeout=LINK_LOOK_SECONDS))[0]:
                down_seconds = 0.0 if link.state == "up" else down_seconds + LINK_LOOK_SECONDS
                if down_seconds >= self.around.stall_seconds:
                    raise PeerUnreachable(
                        f"peer {self.job.peer}: the link has been down for {down_seconds:.0f} s while it was "
                        f"asked to {method}; see `precache-proxy status`"
                    )
        finally:
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
        answer: dict[str, Any] = call.result()
        if answer.get("state") not in _LET_RUN_THERE:
            # One that has presumed us dead grants no time: contact may be gone before it is asked back.
            self.contact.heard(self, asked_at)
        return answer


def cancelled_sentence(job: Job) -> str:
    """Why a cancelled job goes no further."""
    return f"evacuation of {job.name}: cancelled on the operator's word; the VM stays here"


async def run_forward(departure: Departure) -> None:
    """From preflight to the end of migrate. Raises LifeboatError: then the job is to be decided and rolled
    back."""
    if not await pass_preflight(departure):
        return
    departure.writes_before = await mirroring.guest_writes(departure.around.domains, departure.job.vm)
    await catch_up(departure, leave_bytes=_left_to_the_residual(departure))
    await _freeze(departure)
    await send_residual(departure)
    departure.ahead = departure_relays.openings_ahead(departure)
    try:
        paths = await prepare(departure, {"bitmaps": [departure.job.checkpoint]})
        await crossing.cross(departure, paths)
    finally:
        await departure.ahead.close()
        departure.ahead = None


async def pass_preflight(departure: Departure) -> bool:
    """Whether to go on. What stands in the way is raised while nothing has been changed."""
    job = departure.job
    told = await look(departure.around, job.vm, job.peer, job.epoch, restarts=job.restarts)
    if told.already_there:
        return False
    if in_the_way := [finding for finding in told.findings if addresses.stops(finding)]:
        raise InvalidInput(f"VM {job.name} cannot be evacuated: {preflight.sentence(in_the_way)}", in_the_way)
    departure.check_cancelled()
    job.address_findings = [str(finding) for finding in told.findings]
    for sentence in job.address_findings:
        logger.warning("evacuation %s of VM %s goes on all the same: %s", job.id, job.vm, sentence)
    job.presumed_dead_after_seconds = told.presumed_dead_after_seconds
    # While a VM is protected libvirt's own mark is off and the protection remembers it.
    job.autostart = told.definition.autostart or bool(departure.around.source.status(job.vm).get("autostart"))
    return True


async def catch_up(departure: Departure, *, leave_bytes: int = 0) -> None:
    """Passes while each leaves clearly less to do: what is sent now is not sent while the guest waits.

    None where no more than ``leave_bytes`` changed: the residual takes that.
    """
    job, around = departure.job, departure.around
    await departure.enter(Step.CATCH_UP)
    await around.source.hold(job.vm, job.id)
    departure.bandwidth.keep_to(job.options.bandwidth_bytes_per_second)
    around.source.pace(job.vm, departure.bandwidth)
    if around.source.libvirt_stands_still():
        logger.warning(
            "evacuation %s of VM %s: libvirt is late with the end of a backup job: no pass; what has "
            "changed is sent once its images are frozen", job.id, job.vm,
        )  # fmt: skip
        return
    before: int | None = None
    for _unused in range(job.options.catch_up_passes_limit):
        departure.check_cancelled()
        try:
            result = await around.source.run_pass(job.vm, reason="evacuation", leave_bytes=leave_bytes)
        except GuestBoots as error:
            logger.warning("evacuation %s: no pass: %s", job.id, error)
            return
        sent_bytes = int(result.data_bytes)
        if sent_bytes <= CATCH_UP_ENOUGH_BYTES or (
            before is not None and sent_bytes > before * CATCH_UP_SHRINK
        ):
            break
        before = sent_bytes


def _left_to_the_residual(departure: Departure) -> int:
    """So many bytes cross in the time that a pass's own exchanges take; the guest runs while they do."""
    rate = departure.measure.channel_bytes_per_second or 0.0
    round_trip = departure.link.round_trip_seconds or 0.0
    return min(CATCH_UP_ENOUGH_BYTES, int(rate * PASS_ROUND_TRIPS * round_trip))


async def _freeze(departure: Departure) -> None:
    job, around = departure.job, departure.around
    departure.check_cancelled()
    definition = await around.domains.definition(job.vm)
    job.checkpoint = last_checkpoint(departure)
    # Planned before the step is entered: a crash after it finds the overlays' names in the record.
    job.disks = await freeze.plan(
        definition, preflight.covered_disks(definition), job.id, around.fallback_overlay_directory
    )
    await departure.enter(Step.FREEZE)
    crash_point("departure-before-freeze")
    await freeze.freeze(around.domains, job.vm, job.disks)
    crash_point("departure-frozen")


def last_checkpoint(departure: Departure) -> str:
    """From which the changes since the last sealed generation are counted."""
    status = departure.around.source.status(departure.job.vm)
    return str(status.get("checkpoint") or f"lifeboat-e{status['epoch']}-g{status['generation']}")


async def send_residual(departure: Departure) -> None:
    """What the images of the job hold beyond the last generation, sealed as the last one of this home."""
    job, around = departure.job, departure.around
    departure.check_cancelled()
    await departure.enter(Step.RESIDUAL)
    frozen = {
        key: ImageReference(Path(disk.image), disk.format, disk.size_bytes) for key, disk in job.disks.items()
    }
    job.definition = xml = await around.domains.xml(job.vm, inactive=True)
    result = await around.source.send_residual(job.vm, frozen, job.checkpoint, xml)
    job.generation = int(result.generation)
    job.bytes["residual_data_bytes"] = int(result.data_bytes)
    crash_point("departure-residual-sealed")


async def prepare(departure: Departure, further: Mapping[str, Any]) -> dict[str, str]:
    """Have the destination make everything ready; ``further`` is what this kind of move tells it besides.

    Where each disk is there: target name -> path. Raises what the call raises.
    """
    job, around = departure.job, departure.around
    departure.check_cancelled()
    job.owes_abort = True
    # On disk before anything is there that might be run: the answer may be lost.
    departure.contact.heard(departure, boottime_seconds())
    await departure.enter(Step.PREPARE)
    departure.contact.watch(departure)
    crash_point("departure-before-prepare")
    if departure.ahead is not None:
        departure.ahead.begin_libvirt()
    status = around.source.status(job.vm)
    answer = await departure.call(
        "prepare",
        {
            "name": job.name,
            "epoch": job.epoch,
            "generation": job.generation,
            "disks": {key: disk.size_bytes for key, disk in job.disks.items()},
            "definition": await around.domains.xml(job.vm, inactive=False),
            "autostart": job.autostart,
            "protection": {key: status[key] for key in ("rpo_seconds", "priority") if key in status},
            **further,
        },
        PREPARE_TIMEOUT_SECONDS,
    )
    job.presumed_dead_after_seconds = answer.get("presumed_dead_after_seconds")
    departure.contact.watch(departure)
    crash_point("departure-prepared")
    departure.may_release_ahead = bool(answer.get("awaits_libvirt"))
    departure.media = {str(key): str(path) for key, path in answer.get("media", {}).items()}
    return {str(key): str(path) for key, path in answer["disks"].items()}


async def cancel(departure: Departure) -> None:
    """Ask a job to stop, durably when this returns. Raises NoSpace where it cannot be put on record, and
    Conflict once it is too late: then it goes forward or is settled."""
    job = departure.job
    if job.ended or job.step in {Step.CONFIRM, Step.RELEASED, Step.FINISH, Step.UNDECIDED, Step.ROLLBACK}:
        raise Conflict(
            f"evacuation {job.id} of {job.name}: at step {job.step.value} it cannot be cancelled any more; "
            "wait for its verdict, or settle it if it stays undecided"
        )
    job.cancelled = True
    departure.enough.set()
    try:
        await departure.save()
    except OSError as error:
        raise NoSpace(
            f"evacuation {job.id} of {job.name}: it is being cancelled, but that could not be put on record "
            f"({error.strerror}): a proxy that is killed now would forget it; free space on "
            f"{departure.around.journal.directory} and cancel it again"
        ) from error


async def steer(departure: Departure, bytes_per_second: float) -> None:
    """Change the bandwidth of a job under way, durably. Raises InvalidInput, and Conflict when nothing is
    left to send."""
    job = departure.job
    sent = Step.RESIDUAL if job.restarts else Step.MIGRATE
    if job.step not in _SENDING or (job.restarts and job.began(Step.PREPARE) is not None):
        raise Conflict(
            f"evacuation {job.id} of {job.name}: at step {job.step.value} nothing is sent any more; its "
            f"bandwidth could be changed until the end of step {sent.value}"
        )
    departure.bandwidth.keep_to(bytes_per_second)
    job.options = replace(job.options, bandwidth_bytes_per_second=bytes_per_second)
    await departure.save()
    if job.step is Step.MIGRATE:
        await migrate.steer(departure.around.domains, job.vm, bytes_per_second)


async def pause_guest(departure: Departure) -> None:
    """Stop the guest in the middle of its migration: what is left is sent once, and its memory is kept.

    It goes on at the destination, or here after a rollback. Raises Conflict at any other step.
    """
    job = departure.job
    if job.step is not Step.MIGRATE or job.cancelled:
        raise Conflict(
            f"evacuation {job.id} of {job.name}: at step {job.step.value} its guest is not paused; ask again "
            f"at step {Step.MIGRATE.value}"
        )
    logger.warning("evacuation %s of VM %s: its guest is paused until it has arrived", job.id, job.vm)
    if not await departure.around.domains.paused_by_user(job.vm):
        await late_pause.pause(departure)
    job.guest_paused = True


async def clear_local_leftovers(departure: Departure) -> None:
    """What a migration that did not end well may have left in our QEMU and run directory."""
    job, around = departure.job, departure.around
    if departure.sockets is not None:
        await departure.sockets.close()
        departure.sockets = None
    with contextlib.suppress(LifeboatError):
        await calling_off.end_leftovers(departure)
    await asyncio.to_thread(relay.remove_job_directory, around.run_directory / "jobs" / job.id)
