# SPDX-License-Identifier: GPL-3.0-or-later
"""The streams of one evacuation at its source: those of its sockets, and those that are asked for ahead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from precache_proxy.channel.settings import TrafficClass
from precache_proxy.errors import LifeboatError, Stalled
from precache_proxy.evacuation import held_opening, nbd_frames, relay
from precache_proxy.evacuation.finish_call import FinishCall
from precache_proxy.evacuation.opening_ahead import OpeningsAhead
from precache_proxy.evacuation.packing import level_for
from precache_proxy.hypervisor.domain_xml import Definition
from precache_proxy.processor_wait import recent_share

if TYPE_CHECKING:
    from precache_proxy.evacuation.departure import Departure


async def _open(departure: Departure, kind: str, header: dict[str, Any]) -> relay.RelayStream:
    stream: relay.RelayStream = await departure.link.open_stream(
        kind, TrafficClass.MIGRATION, header, label=departure.job.vm
    )
    return stream


def job_sockets(departure: Departure, finish: FinishCall | None = None) -> relay.JobSockets:
    """The sockets that libvirt and QEMU here connect to; ``finish`` hears libvirt's last call."""
    job, around, link = departure.job, departure.around, departure.link

    async def open_stream(socket: str) -> relay.RelayStream:
        return await _open(departure, relay.STREAM_KIND, relay.header(job.id, socket))

    def on_failure(error: LifeboatError) -> None:
        """A dead relay: cut both streams, tell libvirt to stop; QEMU alone would wait with the guest's
        writes."""
        if departure.sockets is not None:
            note(error)
            departure.sockets.close_connections()
            departure.enough.set()

    def note(error: LifeboatError) -> None:
        if departure.failure is None and isinstance(error, Stalled):
            departure.failure = error

    async def before_end(error: LifeboatError) -> None:
        """With the relay its mirrors end: the guest is to stand still by then, where its writes wait for
        them."""
        note(error)
        if departure.ending is not None:
            await departure.ending.stand_still()

    return relay.JobSockets(
        around.run_directory / "jobs" / job.id,
        (around.qemu_user.uid, around.qemu_user.gid),
        open_stream,
        stall_seconds=around.stall_seconds,
        link_up=lambda: bool(link.state == "up"),
        on_failure=on_failure,
        before_end=before_end,
        level=level_for(departure.measure.channel_bytes_per_second, recent_share()),
        pace=departure.pace,
        ahead=departure.ahead,
        finish=finish,
    )


def openings_ahead(departure: Departure) -> OpeningsAhead:
    """What libvirt and QEMU at the destination are asked before libvirt and QEMU here ask it."""
    job, around = departure.job, departure.around

    async def open_ahead(socket: str, requests: Sequence[bytes]) -> relay.RelayStream:
        header = held_opening.header(job.id, socket, requests)
        return await _open(departure, held_opening.AHEAD_KIND, header)

    link = departure.link
    return OpeningsAhead(
        job.peer,
        around.openings,
        open_ahead,
        stall_seconds=around.stall_seconds,
        round_trip=lambda: link.round_trip_seconds,
    )


def ask_for_mirrors(
    ahead: OpeningsAhead, definition: Definition, disks: Iterable[str], emulator_version: int | None
) -> None:
    """Have the connection of each disk's mirror opened as soon as QEMU listens there."""
    for key in disks:
        disk = definition.disk(key)
        if disk is not None and disk.alias and emulator_version is not None:
            # libvirt, src/qemu/qemu_alias.c: so it names a disk's NBD export.
            ahead.begin(relay.DISK, nbd_frames.opening(f"drive-{disk.alias}", emulator_version))
