# SPDX-License-Identifier: GPL-3.0-or-later
"""The live move itself: libvirt's call, and all that lives as long as it does."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import libvirt

from precache_proxy.crash_points import crash_point
from precache_proxy.errors import LifeboatError
from precache_proxy.evacuation import calling_off, departure_relays, finish_call, migrate, mirroring, relay
from precache_proxy.evacuation.domain_edit import destination_xml
from precache_proxy.evacuation.job import Step
from precache_proxy.evacuation.release_ahead import UnendedMove
from precache_proxy.evacuation.standstill import Standstill

if TYPE_CHECKING:
    from precache_proxy.evacuation.departure import Departure

# A look at a migration that is complete: what it costs is standstill.
LAST_LOOK_SECONDS = 0.2


async def _write_rate(departure: Departure) -> mirroring.WriteRate | None:
    """What the guest wrote a second since the evacuation began; None: not known."""
    before = departure.writes_before
    if before is None:
        return None
    now = await mirroring.guest_writes(departure.around.domains, departure.job.vm)
    return None if now is None else now.since(before)


async def cross(departure: Departure, paths: dict[str, str]) -> None:
    """Move the VM onto the disks there (target name -> path). Raises what ended the move otherwise.

    Where the destination's last word is all that libvirt waits for, and may be forestalled, its call goes on
    when this returns: ``departure.unended`` has it. Else the move is over, and well.
    """
    job, around = departure.job, departure.around
    departure.check_cancelled()
    rate = departure.measure.channel_bytes_per_second
    round_trip = departure.link.round_trip_seconds
    wanted = job.options.synchronous_writes
    written = await _write_rate(departure)
    writes = written is None or written.requests_per_second > 0
    emulator = await mirroring.emulator_version(around.domains, job.vm, decides=wanted is None and writes)
    synchronous = (
        mirroring.needs_synchronous_writes(
            written, rate, round_trip, changeable=mirroring.changeable(emulator)
        )
        if wanted is None
        else wanted
    )
    job.forecast = {
        "channel_bytes_per_second": rate,
        "round_trip_seconds": round_trip,
        "written_bytes_per_second": None if written is None else written.bytes_per_second,
        "writes_per_second": None if written is None else written.requests_per_second,
        "synchronous_writes": synchronous,
    }
    await departure.enter(Step.MIGRATE)
    finish, looking = finish_call.FinishCall(), asyncio.Lock()
    departure.sockets = departure_relays.job_sockets(departure, finish)
    await departure.sockets.listen()
    if departure.ahead is not None:
        definition = await around.domains.definition(job.vm)
        departure_relays.ask_for_mirrors(departure.ahead, definition, paths, emulator)
    plan = migrate.Plan(
        sockets=departure.sockets.directory,
        disks=tuple(paths),
        destination_xml=destination_xml(
            await around.domains.xml(job.vm, inactive=False), paths, departure.media
        ),
        persistent_xml=destination_xml(
            await around.domains.xml(job.vm, inactive=True), paths, departure.media
        ),
        options=job.options,
        channel_bytes_per_second=rate,
        round_trip_seconds=round_trip,
        synchronous_writes=synchronous,
    )

    def on_progress(progress: dict[str, Any]) -> None:
        job.progress = progress
        departure.measure.migrating(progress)
        crash_point("departure-migrating")

    def on_lifecycle(what: str, detail: int) -> None:
        departure.measure.changed_here(what)
        departure.pace.changed_here(what)
        still.changed_here(what)
        if what == "stopped" and detail == libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED and departure.sockets:
            # libvirt has nothing more to ask there: its good-byes would cost the guest two round trips.
            departure.sockets.close_connections(relay.LIBVIRT)

    end, still = calling_off.CallingOff(departure, waits=synchronous), Standstill(around.network, job)
    departure.ending = end
    unsubscribe = around.domains.on_lifecycle(job.vm, on_lifecycle)

    async def move() -> None:
        departure.check_cancelled()
        await migrate.migrate(around.domains, job.vm, plan, on_progress, end.writes_wait, looking)

    moving = asyncio.create_task(move(), name=f"move-{job.id}")

    async def conclude() -> None:
        try:
            await moving
        except LifeboatError as error:
            # The operator's word and the relay's reason say more than libvirt's "canceled" and "broken pipe".
            departure.check_cancelled()
            raise departure.failure or error from error
        finally:
            await end.over()
            departure.ending = None
            unsubscribe()
            await still.over()
            if departure.sockets is not None:
                departure.measure.migrated(
                    departure.sockets.counters, await migrate.completed_statistics(around.domains, job.vm)
                )
                await departure.sockets.close()
                departure.sockets = None

    async def last_look() -> None:
        told = await migrate.statistics(around.domains, job.vm, timeout_seconds=LAST_LOOK_SECONDS)
        on_progress({**job.progress, **told})
        if (downtime := told.get("downtime_milliseconds")) is not None:
            # In case that libvirt cannot tell any more when its own end of the move is cut off.
            job.qemu_downtime_seconds = downtime / 1000

    unended = UnendedMove(job.vm, around.emulators, moving, finish, end, looking, last_look, conclude)
    try:
        memory_over = await unended.memory_over()
    except asyncio.CancelledError:
        moving.cancel()
        with contextlib.suppress(LifeboatError, asyncio.CancelledError):
            await conclude()
        raise
    if memory_over and departure.may_release_ahead and not departure.enough.is_set():
        departure.unended = unended
    else:
        finish.let_through()
        await conclude()
    crash_point("departure-migrated")
