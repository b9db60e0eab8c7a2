# SPDX-License-Identifier: GPL-3.0-or-later
"""The source gives its VM up: tombstone, released, and after the destination's word, the end of it here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

from precache_proxy.blocks.images import ImageReference
from precache_proxy.crash_points import crash_point
from precache_proxy.errors import Conflict, HypervisorError, LifeboatError, NotFound
from precache_proxy.evacuation import freeze, release_ahead, restart
from precache_proxy.evacuation.departure import Departure
from precache_proxy.evacuation.guard import TOMBSTONE, Forbidden
from precache_proxy.evacuation.images import drop_own_bitmaps
from precache_proxy.evacuation.job import Job, Step, Verdict
from precache_proxy.evacuation.layers import forget_definition
from precache_proxy.evacuation.reconcile import Presence

logger = logging.getLogger(__name__)

RELEASE_TIMEOUT_SECONDS = 60.0
# What comes for the VM is led on so much later than the release: it finds the VM's routes there, which stand
# 8 to 9 ms after the release was heard on an idle lab.
LEAD_ON_SECONDS = 0.03


def tombstone(job: Job) -> Forbidden:
    """What forbids a start here after the release."""
    sentence = (
        f"VM {job.name} was evacuated to {job.peer} (job {job.id}, epoch {job.epoch}) and runs there. "
        "Do not start the copy that stayed here; to bring the VM back, evacuate it from there."
    )
    return Forbidden(job.vm, TOMBSTONE, sentence, job.id, job.epoch, name=job.name, peer=job.peer)


async def confirm(departure: Departure) -> None:
    """From the source's shut-off domain, or its halted QEMU (release_ahead.py), to the release.

    Raises Conflict when the domain turns out to run, HypervisorError when libvirt does not say, Cancelled for
    a guest that can be booted here again; where the move is not over by then, what ends it.
    """
    job, around = departure.job, departure.around
    unended = departure.unended
    if unended is not None:
        await unended.quieten()
    if job.step is not Step.CONFIRM:
        await departure.enter(Step.CONFIRM)
    if job.cancelled:
        # It came before this step, after which none is taken any more.
        if job.restarts:
            departure.check_cancelled()
        job.warn("It was cancelled when its memory was there already, and was not taken back.")
    crash_point("departure-before-tombstone")
    halted = unended is not None and await unended.halt()
    if halted:
        crash_point("departure-halted")
    await asyncio.to_thread(around.guard.forbid, tombstone(job))
    crash_point("departure-tombstoned")
    if unended is not None and not halted:
        # By its own end libvirt says whether it runs here or there.
        departure.unended = None
        await unended.give_up()
    # Asked after the tombstone is durable: a start that the hook let through before it is visible by now.
    presence = await around.domains.presence_at_source(job.vm)
    if presence is Presence.UNKNOWN:
        # Lifted now, the tombstone would let it be started here while this job may yet release it.
        raise HypervisorError(
            f"VM {job.name}: libvirt here does not say whether it has ended; it is not released, asked again"
        )
    if presence is Presence.RUNNING or (presence is Presence.PAUSED and not halted):
        await asyncio.to_thread(around.guard.allow, job.vm, job=job.id)
        raise Conflict(
            f"VM {job.name}: it is {presence.value} here although libvirt had ended it; it is not released"
        )
    await departure.enter(Step.RELEASED)
    crash_point("departure-released")


async def release(departure: Departure) -> None:
    """Tell the destination; on its word that it runs the VM, finish. Raises what the call raised."""
    job = departure.job
    if job.step is not Step.RELEASED:
        await departure.enter(Step.RELEASED)
    if departure.unended is not None:
        departure.unended.let_through()
    leading = asyncio.create_task(_lead_on(departure), name=f"lead-on-{job.id}")
    try:
        answer = await departure.call("release", {}, RELEASE_TIMEOUT_SECONDS)
    finally:
        leading.cancel()
        await asyncio.gather(leading, return_exceptions=True)
    job.memory_lost = bool(answer.get("memory_lost"))
    if answer.get("network"):
        job.warn(f"Its addresses do not lead there yet; it is tried again: {answer['network']}")
    elif job.address_findings and "network_installed" not in answer:
        _warn_of_addresses(job, f"{job.peer}'s version does not say")
    elif job.address_findings and not answer["network_installed"]:
        # Nobody there has led them since.
        job.warn("Its addresses may not lead there: " + "; ".join(job.address_findings))
    departure.measure.activated(answer)
    crash_point("departure-activated")
    await finish(departure, answered=True)


async def _lead_on(departure: Departure) -> None:
    """What has come for the VM while it stands still leaves for where it will run, with the release and not a
    round trip after it. A rollback claims it back."""
    await asyncio.sleep(LEAD_ON_SECONDS)
    await departure.around.network.left(departure.job)


def _warn_of_addresses(job: Job, why: str) -> None:
    job.warn(
        f"Whether its addresses lead there is not known ({why}); before it left: "
        + "; ".join(job.address_findings)
    )


async def finish(departure: Departure, *, answered: bool = False) -> None:
    """The VM runs at the destination: forget it here, and keep its image as the base for coming back.
    Repeatable. ``answered``: the destination has said to us what became of its addresses."""
    job, around = departure.job, departure.around
    if job.step is not Step.FINISH:
        if job.address_findings and not answered:
            _warn_of_addresses(job, f"{job.peer}'s word on them was not heard")
        if job.memory_lost:
            job.warn("It had to be started anew there: its memory was lost, its disks are whole.")
        # Its memory is there with it: nothing was lost, whatever was asked for meanwhile.
        job.owes_abort = False
        await departure.enter(Step.FINISH)
    crash_point("departure-before-undefine")
    await asyncio.to_thread(around.guard.forbid, tombstone(job))
    await around.network.left(job)
    await release_ahead.end(departure)
    presence = await around.domains.presence_at_source(job.vm)
    if presence is Presence.UNKNOWN:
        raise HypervisorError(
            f"VM {job.name}: libvirt does not say what became of it here; asked again shortly"
        )
    if presence in {Presence.RUNNING, Presence.PAUSED}:
        # Only after an operator's word, or time, that we were dead: there it runs with the newer epoch.
        logger.critical(
            "VM %s: activated at %s (epoch %d) while it was still active here; the old copy is ended now",
            job.vm, job.peer, job.epoch,
        )  # fmt: skip
        job.warn(f"{job.peer} was told that this host is dead; the old copy here was ended.")
        await around.domains.destroy(job.vm)
    await asyncio.to_thread(freeze.restore_ownership, job.disks)
    await forget_definition(around.domains, job.vm)
    crash_point("departure-undefined")
    await asyncio.to_thread(freeze.remove_overlays, job.disks)
    await _keep_images(departure)
    crash_point("departure-adopted")
    with contextlib.suppress(NotFound):
        await around.source.handed_over(job.vm)
    job.verdict = Verdict.EVACUATED
    runs = restart.sentence(job) if job.restarts else f"VM {job.name} runs at {job.peer}."
    if not job.warning:
        job.explain("", runs)
    else:
        job.explain("warning", f"{runs} {job.warning}")
    await departure.enter(Step.DONE)


async def _keep_images(departure: Departure) -> None:
    """Make the image that stayed the base of a replica. A failure costs the way back a copy, not the VM."""
    job, around = departure.job, departure.around
    kept = {
        key: ImageReference(Path(disk.image), disk.format, disk.size_bytes) for key, disk in job.disks.items()
    }
    try:
        for image in kept.values():
            await drop_own_bitmaps(str(image.path), image.format)
        await around.store.adopt(
            job.vm,
            name=job.name,
            epoch=job.epoch,
            generation=job.generation,
            checkpoint="",
            disks=kept,
            definition=job.definition,
            peer=job.peer,
        )
    except LifeboatError as error:
        logger.error(
            "VM %s: what stayed here was not adopted, the way back will be a full copy: %s", job.vm, error
        )
        job.warn(f"What stayed here was not adopted, the way back will be a full copy: {error}")
