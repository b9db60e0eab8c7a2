# SPDX-License-Identifier: GPL-3.0-or-later
"""The rung `restart` at the source: the guest ends here and boots there, no memory crosses.

It is for a VM whose memory cannot be carried in time, and for one that is shut off. The destination has it
started and paused before the release, which is then the same as that of a live move: what stands there has
not run an instruction. Until the release the guest may be started here again, whatever the destination says.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time

from precache_proxy.crash_points import crash_point
from precache_proxy.errors import Conflict, HypervisorError, LifeboatError, NotFound
from precache_proxy.evacuation import late_stop, preflight
from precache_proxy.evacuation.departure import (
    Departure,
    catch_up,
    last_checkpoint,
    pass_preflight,
    prepare,
    send_residual,
)
from precache_proxy.evacuation.fence import this_boot
from precache_proxy.evacuation.guard import LEAVING, Forbidden
from precache_proxy.evacuation.images import image_size_bytes
from precache_proxy.evacuation.job import FrozenDisk, Job, Mode, Step
from precache_proxy.evacuation.reconcile import Presence
from precache_proxy.source.attachments import read_attachments
from precache_proxy.source.scratch import boottime_seconds

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
# Some guests miss a press of the power button that comes while they boot.
ASK_AGAIN_SECONDS = 15.0
# A shutdown that was under way when it was given up comes to its end within this.
LATE_SECONDS = 5.0
_OFF = frozenset({Presence.SHUT_OFF, Presence.ENDED})
_ON = frozenset({Presence.RUNNING, Presence.PAUSED})


async def run_forward(departure: Departure) -> None:
    """From preflight to the VM standing at the destination, started and paused. Raises LifeboatError: then
    the job is to be decided and rolled back."""
    if not await pass_preflight(departure):
        return
    presence = await departure.around.domains.presence_at_source(departure.job.vm)
    # On record with the next step: a power cut in it must not leave off what ran before.
    departure.job.was_running = presence in _ON
    await catch_up(departure)
    await _stop(departure)
    await _take_images(departure)
    await send_residual(departure)
    await _prepare(departure)


def _leaving(job: Job) -> Forbidden:
    """Nobody but a rollback starts it here again while its last blocks are read."""
    sentence = (
        f"VM {job.name} was shut down here to be started at {job.peer} (job {job.id}). Do not start it: wait "
        f"for its verdict, or cancel that evacuation, which starts it here again."
    )
    return Forbidden(job.vm, LEAVING, sentence, job.id, job.epoch)


async def _stop(departure: Departure) -> None:
    job, around = departure.job, departure.around
    departure.check_cancelled()
    presence = await around.domains.presence_at_source(job.vm)
    if presence in {Presence.UNKNOWN, Presence.ABSENT}:
        raise HypervisorError(f"VM {job.name}: libvirt here says {presence.value}; it is left as it is")
    if presence is Presence.ENDED:
        # Its user has shut it down meanwhile, and wants it off.
        job.was_running = False
    elif presence is not Presence.SHUT_OFF:
        job.was_running = True
    is_on = presence not in _OFF
    job.definition = await around.domains.xml(job.vm, inactive=True)
    job.checkpoint = last_checkpoint(departure)
    await departure.enter(Step.STOP)
    await asyncio.to_thread(around.guard.forbid, _leaving(job))
    crash_point("restart-before-stop")
    if is_on:
        departure.measure.stopping()
        await _shut_down(departure)
    crash_point("restart-stopped")


async def _shut_down(departure: Departure) -> None:
    """Ask the guest to end and wait; power it off when it does not. Raises Conflict where that is not
    allowed, Cancelled."""
    job, around = departure.job, departure.around
    began, asked_at = time.monotonic(), float("-inf")
    while await _is_on(departure):
        departure.check_cancelled()
        now = time.monotonic()
        if now - began >= job.options.shutdown_seconds:
            if not job.options.power_off:
                raise Conflict(
                    f"VM {job.name}: its guest did not shut down within {job.options.shutdown_seconds:.0f} s "
                    "and is not to be powered off; shut it down from inside, or allow power_off"
                )
            logger.warning(
                "VM %s: did not shut down within %.0f s; powered off", job.vm, job.options.shutdown_seconds
            )
            job.powered_off = True
            await around.domains.destroy(job.vm)
        elif now - asked_at >= ASK_AGAIN_SECONDS:
            asked_at = now
            await late_stop.asked(departure, (await around.domains.life(job.vm)).number)
            try:
                await around.domains.shut_down(job.vm)
            except HypervisorError as error:
                # A machine without a power button: only time, or the guest's own end, helps.
                logger.warning("VM %s: cannot be asked to shut down: %s", job.vm, error)
        await asyncio.sleep(LOOK_SECONDS)


async def _is_on(departure: Departure) -> bool:
    """Whether the guest has a QEMU process. Raises HypervisorError where the VM vanished with it."""
    presence = await departure.around.domains.presence_at_source(departure.job.vm)
    if presence is Presence.ABSENT:
        raise HypervisorError(
            f"VM {departure.job.name}: libvirt does not know it any more; define it from the job's record"
        )
    return presence not in _OFF


async def _take_images(departure: Departure) -> None:
    """The images that it would be started from: what they hold now is final."""
    job, around = departure.job, departure.around
    definition = await around.domains.definition(job.vm, inactive=True)
    for key in preflight.covered_disks(definition):
        disk = definition.disk(key)
        if disk is not None:
            size_bytes = await image_size_bytes(disk.path, disk.format)
            job.disks[key] = FrozenDisk(disk.path, disk.format, "", size_bytes)


async def _prepare(departure: Departure) -> None:
    job, around = departure.job, departure.around
    definition = await around.domains.definition(job.vm, inactive=True)
    contents = await asyncio.to_thread(read_attachments, definition)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    further = {"mode": Mode.RESTART.value, "boots": job.was_running, "attachments": digests}
    await prepare(departure, further)


async def presence_for_rollback(departure: Departure, presence: Presence) -> Presence:
    """What is to be done about the VM here: SHUT_OFF is started again, ENDED stays off.

    A guest that was asked to end may still be about to: that is waited for, or it would be off a moment
    after it was said to have stayed. One that ends even later is looked after by late_stop.py.
    """
    job, around = departure.job, departure.around
    request = job.shutdown_request
    if request is not None and request.boot == this_boot():
        until = request.boottime_seconds + job.options.shutdown_seconds + LATE_SECONDS
        while presence is Presence.RUNNING and boottime_seconds() < until:
            with contextlib.suppress(LifeboatError, NotFound):
                presence = await around.domains.presence_at_source(job.vm)
            await asyncio.sleep(LOOK_SECONDS)
    if presence in _ON and request is not None:
        late_stop.give_up(job)
    if presence not in _OFF:
        return presence
    if presence is Presence.ENDED and job.began(Step.STOP) is None:
        # Not on our account: its user wants it off.
        return Presence.ENDED
    return Presence.SHUT_OFF if job.was_running else Presence.ENDED


def sentence(job: Job) -> str:
    """What became of the guest, for the verdict."""
    if not job.was_running:
        return f"VM {job.name} is at {job.peer}, shut off as it was here."
    how = (
        f"It did not shut down here within {job.options.shutdown_seconds:.0f} s and was powered off"
        if job.powered_off
        else "It was shut down here"
    )
    return f"VM {job.name} runs at {job.peer}. {how}, and booted there: its memory did not go along."
