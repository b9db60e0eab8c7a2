# SPDX-License-Identifier: GPL-3.0-or-later
"""The destination's side: prepares for an arrival, activates it on the source's release, or clears it away.

One lock per VM orders everything that is done to it. The rule that all of this serves: the VM is resumed or
started
here only after RELEASED is durable, and RELEASED is entered only on the source's word or the operator's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from precache_proxy.crash_points import crash_point
from precache_proxy.errors import Conflict, Finding, InvalidInput, LifeboatError, NotFound, StaleEpoch
from precache_proxy.evacuation import addresses, cold_arrival, depth, preflight
from precache_proxy.evacuation.activation import Activation
from precache_proxy.evacuation.arrival import RUNS_HERE, Arrival, ArrivalDisk, ArrivalState
from precache_proxy.evacuation.arrival_network import ArrivalNetwork
from precache_proxy.evacuation.arrival_records import ArrivalRecords
from precache_proxy.evacuation.domain_edit import destination_xml
from precache_proxy.evacuation.domains import Domains
from precache_proxy.evacuation.footprint import Footprint
from precache_proxy.evacuation.guard import TOMBSTONE, Guard
from precache_proxy.evacuation.job import Mode
from precache_proxy.evacuation.media_places import find_places
from precache_proxy.evacuation.reconcile import ArrivalDecision, Presence, decide_at_destination
from precache_proxy.evacuation.rooms import StoreRoom
from precache_proxy.evacuation.source_contact import SourceContact
from precache_proxy.evacuation.tracking import Tracking
from precache_proxy.hypervisor.domain_xml import Definition, parse_definition
from precache_proxy.hypervisor.qemu_user import QemuUser

logger = logging.getLogger(__name__)

ARRIVAL_POLL_SECONDS = 0.25
# A released one: each look that comes late is downtime. libvirt's last call is over long before, or never.
ARRIVAL_LOOK_SECONDS = 0.005
ARRIVAL_SECONDS = 20.0
# Of one that came with its memory the release is under way, or has to wait for something.
RELEASE_SECONDS = 1.0
# It names files and a directory here.
_JOB_ID = re.compile(r"[A-Za-z0-9-]{1,64}")


def _foreign_replica(peer: str, status: Mapping[str, Any]) -> list[Finding]:
    """A replica is for the host that sends its generations; no other one may have a VM run on it."""
    owner = str(status.get("peer") or peer)
    if owner == peer:
        return []
    name = status.get("name") or status.get("vm")
    return [
        Finding(
            f"replica of {name}", f"it belongs to {owner}, not to {peer}", "protect the VM anew", "conflict"
        )
    ]


class Arrivals:
    """All arrivals of this host. ``now_admitted`` and ``not_admitted`` are told of jobs that may use relays
    from now on, and no longer."""

    def __init__(
        self,
        directory: Path,
        run_directory: Path,
        domains: Domains,
        guard: Guard,
        store: StoreRoom,
        network: ArrivalNetwork,
        qemu_user: QemuUser,
        *,
        presume_source_dead_after_seconds: float | None,
    ) -> None:
        self.disks_directory = directory / "disks"
        self.sockets_directory = run_directory / "jobs"
        self.records = ArrivalRecords(directory / "arrivals")
        self.contact = SourceContact(presume_source_dead_after_seconds)
        self.tracking = Tracking(domains, self.records)
        self.activation = Activation(
            self.records, domains, guard, network, self.tracking, self.sockets_directory
        )
        self.footprint = Footprint(
            self.records, domains, guard, store, network, qemu_user, self.sockets_directory
        )
        self.now_admitted: Callable[[str], None] = lambda _job_id: None
        self.not_admitted: Callable[[str], None] = lambda _job_id: None
        self._domains = domains
        self._guard = guard
        self._store = store
        self._network = network
        self._watchers: dict[str, asyncio.Task[None]] = {}
        # jobs that were called off before they were known here: a late `prepare` of theirs is refused
        self._called_off: set[str] = set()

    def load(self) -> None:
        """Read the records (blocking)."""
        self.disks_directory.mkdir(parents=True, exist_ok=True, mode=0o711)
        self.disks_directory.chmod(0o711)
        self.records.load()
        for arrival in self.records.all():
            if arrival.restarts:
                # A kill before our start left it open, for a process that is gone.
                self._guard.arrived(arrival.vm)

    def admitted(self, job_id: str, peer: str) -> Arrival:
        """The arrival for which that peer may use relays now. Raises Conflict."""
        arrival = self.records.get(job_id)
        if arrival is None or arrival.peer != peer or arrival.state is not ArrivalState.PREPARED:
            raise Conflict(f"job {job_id}: not admitted here for {peer}; nothing is relayed")
        return arrival

    # -- asked by the source

    async def check(self, peer: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """What stands in the way here, and whether the VM is here already. Changes nothing."""
        vm = str(parameters["vm"])
        latest = self.records.latest_of(vm)
        findings: list[Finding] = []
        if latest is not None and latest.state in RUNS_HERE and latest.epoch >= int(parameters["epoch"]):
            # A record alone may be of an earlier stay: "it is out" is said of a VM that is here now.
            if await self._domains.presence(vm) is not Presence.ABSENT:
                return {"already_there": True, "findings": []}
            findings.append(
                Finding(
                    f"VM {latest.name}",
                    f"it was here with epoch {latest.epoch} and has left, the source counts only to epoch "
                    f"{parameters['epoch']}",
                    f"see that it runs nowhere else, then move {latest.id}.json away from this host's "
                    "arrivals, restart the proxy and try again",
                    "stale-epoch",
                )
            )
        findings += await preflight.destination_findings(
            self._domains, self._guard, str(parameters["definition"]), self.disks_directory, self._store.media
        )
        try:
            findings += _foreign_replica(peer, await self._store.status(vm))
            findings += depth.destination_findings(
                str(parameters.get("name", vm)),
                await self._store.depths(vm),
                further=depth.COMING_LAYERS + depth.ARRIVAL_LAYERS,
            )
        except NotFound:
            findings.append(
                Finding(
                    f"VM {parameters.get('name', vm)}",
                    f"{peer}'s replica is not here",
                    "protect it anew",
                    "not-found",
                )
            )
        return {
            "already_there": False,
            "findings": [asdict(finding) for finding in findings],
            "presumed_dead_after_seconds": self.contact.limit_seconds,
            **await addresses.at_destination(
                self._network, vm, str(parameters.get("name", vm)), str(parameters["definition"])
            ),
        }

    async def prepare(self, peer: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Make everything ready for libvirt to come: overlays on the replica, guard, sockets' directory."""
        job_id, vm = str(parameters["job"]), str(parameters["vm"])
        if not _JOB_ID.fullmatch(job_id):
            raise InvalidInput(f"job {job_id!r}: not a job's number; are both proxies of one version?")
        async with self.records.lock(vm):
            arrival = self.records.get(job_id)
            if arrival is None:
                await self._refuse_or_clear(job_id, vm, peer, int(parameters["epoch"]))
                told = {key: value for key, value in parameters.items() if key != "sealed_at"}
                arrival = await self._prepare(peer, told)
            elif arrival.peer != peer or arrival.state is not ArrivalState.PREPARED:
                raise Conflict(f"job {job_id}: it is {arrival.state.value} here; start the evacuation again")
            self.contact.heard(job_id)
            return {
                "disks": {key: disk.overlay for key, disk in arrival.disks.items()},
                "media": arrival.media,
                "presumed_dead_after_seconds": self.contact.limit_seconds,
                # A release may come before libvirt here has ended the move.
                "awaits_libvirt": True,
            }

    async def _refuse_or_clear(self, job_id: str, vm: str, peer: str, epoch: int) -> None:
        if job_id in self._called_off:
            raise Conflict(f"job {job_id}: it was called off; start the evacuation again")
        for other in self.records.of(vm):
            if other.epoch > epoch or (other.epoch == epoch and other.state in RUNS_HERE):
                raise StaleEpoch(
                    f"VM {other.name}: it arrived here with epoch {other.epoch}, this is an evacuation to "
                    f"epoch "
                    f"{epoch}; the copy that wants to come is an old one: do not start it again"
                )
            if other.state in {ArrivalState.PREPARED, ArrivalState.ABORTING} and other.peer == peer:
                # The source has one job at a time: the earlier one is over there, it only could not tell us.
                await self.clear(other)
            elif not other.ended and other.state is not ArrivalState.ACTIVATED:
                raise Conflict(
                    f"VM {other.name}: arrival {other.id} is {other.state.value} here; settle it first"
                )

    async def look_at_generation(
        self, peer: str, vm: str, generation: int
    ) -> tuple[Definition, list[Finding]]:
        """What :meth:`prepare_from_generation` would make stand here, and all that is in the way of it."""
        chains = await self._store.sealed_chain(vm, generation)
        definition = parse_definition(chains.definition)
        return definition, await self._findings(peer, vm, definition.name, chains.definition)

    async def prepare_from_generation(
        self,
        peer: str,
        job_id: str,
        vm: str,
        generation: int,
        epoch: int,
        sealed_at: float,
        protection: Mapping[str, Any],
    ) -> Arrival:
        """Make it stand here, booted and paused, from what is sealed; its lock is held by the caller.
        ``protection``: what its home had been asked for. Raises InvalidInput with everything in the way."""
        chains = await self._store.sealed_chain(vm, generation)
        definition = parse_definition(chains.definition)
        parameters = {
            "job": job_id,
            "vm": vm,
            "name": definition.name,
            "epoch": epoch,
            "generation": generation,
            "definition": chains.definition,
            "disks": {key: image.size_bytes for key, image in chains.items()},
            "mode": Mode.RESTART.value,
            # A blob's file has its digest's name.
            "attachments": {name: path.name for name, path in chains.attachments.items()},
            "sealed_at": sealed_at,
            "autostart": protection.get("autostart", False),
            "protection": {key: protection[key] for key in ("rpo_seconds", "priority") if key in protection},
        }
        return await self._prepare(peer, parameters)

    async def _findings(self, peer: str, vm: str, name: str, definition: str) -> list[Finding]:
        findings = await preflight.destination_findings(
            self._domains, self._guard, definition, self.disks_directory, self._store.media
        )
        findings += _foreign_replica(peer, await self._store.status(vm))
        return findings + depth.destination_findings(
            name, await self._store.depths(vm), further=depth.ARRIVAL_LAYERS
        )

    async def _prepare(self, peer: str, parameters: Mapping[str, Any]) -> Arrival:
        job_id, vm, name = (str(parameters[key]) for key in ("job", "vm", "name"))
        findings = await self._findings(peer, vm, name, str(parameters["definition"]))
        if findings:
            raise InvalidInput(f"VM {name} cannot arrive here: {preflight.sentence(findings)}", findings)
        earlier = await asyncio.to_thread(self._guard.forbidden, vm)
        arrival = Arrival(
            id=job_id,
            vm=vm,
            name=name,
            peer=peer,
            epoch=int(parameters["epoch"]),
            generation=int(parameters["generation"]),
            since=time.time(),
            autostart=bool(parameters.get("autostart", False)),
            protection=dict(parameters.get("protection", {})),
            mode=Mode(parameters.get("mode", Mode.LIVE)).value,
            boots=bool(parameters.get("boots", True)),
            attachments={str(key): str(value) for key, value in parameters.get("attachments", {}).items()},
            stray_bitmaps=[str(name) for name in parameters.get("bitmaps", [])],
            fails_over="sealed_at" in parameters,
            sealed_at=parameters.get("sealed_at"),
            # What an evacuation left here is sealed without them (0.0): they stayed in their places.
            state_is_in_place=parameters.get("sealed_at") == 0.0,
            tombstone=asdict(earlier) if earlier is not None and earlier.cause == TOMBSTONE else None,
        )
        chains = await self._store.freeze_for_arrival(vm, arrival.generation, arrival.epoch)
        try:
            directory = self.disks_directory / vm
            for key, size_bytes in dict(parameters["disks"]).items():
                image = chains[key]
                overlay = directory / f"{key}-e{arrival.epoch}-{job_id}-arrival.qcow2"
                top = directory / f"{key}-e{arrival.epoch}-{job_id}.qcow2"
                arrival.disks[key] = ArrivalDisk(
                    str(image.path), str(image.format), str(overlay), str(top), int(size_bytes)
                )
            definition = parse_definition(str(parameters["definition"]))
            arrival.media = (await asyncio.to_thread(find_places, definition, self._store.media)).paths
            await asyncio.to_thread(self._store.media.claim, vm, arrival.epoch)
            arrival.definition = destination_xml(
                definition.xml, {key: disk.overlay for key, disk in arrival.disks.items()}, arrival.media
            )
            await self.records.save(arrival)
        except BaseException:
            await self._store.thaw(vm)
            raise
        self.records.add(arrival)
        crash_point("arrival-recorded")
        self.now_admitted(job_id)
        try:
            await self.footprint.make(arrival)
            if arrival.restarts:
                await cold_arrival.stand_ready(self._domains, self._guard, arrival, chains.attachments)
        except BaseException:
            await self.clear(arrival)
            raise
        crash_point("arrival-prepared")
        self._watchers[job_id] = asyncio.create_task(self._watch_arrival(arrival))
        return arrival

    async def release(self, peer: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The source will not run the VM any more: run it here. Raises Conflict when it is not whole here."""
        began = time.monotonic()
        job_id, vm = str(parameters["job"]), str(parameters["vm"])
        async with self.records.lock(vm):
            arrival, presence = self._known(job_id, peer), None
            if arrival.state is ArrivalState.PREPARED:
                presence = await self._until_arrived(vm)
                if presence not in {Presence.ARRIVED, Presence.RUNNING}:
                    raise Conflict(
                        f"VM {arrival.name}: it did not arrive whole here ({presence.value}); it stays at "
                        f"{peer}"
                    )
                await self._before_it_runs(arrival, presence)
                await self.records.enter(arrival, ArrivalState.RELEASED)
                crash_point("arrival-released")
            if arrival.state is ArrivalState.RELEASED:
                await self._run(arrival, presence)
            if arrival.state not in RUNS_HERE:
                raise Conflict(
                    f"VM {arrival.name}: its arrival {job_id} is {arrival.state.value}; it will not run here"
                )
            now = time.monotonic()
            resumed = arrival.timings.get("resumed_monotonic", now)
            return {
                "state": arrival.state.value,
                "memory_lost": arrival.has_lost_memory,
                "network": arrival.sentence if arrival.network_owed else "",
                "network_installed": "network_seconds" in arrival.timings and not arrival.network_owed,
                "activation_seconds": max(0.0, resumed - began),
                "running_seconds": max(0.0, now - resumed),
            }

    async def _before_it_runs(self, arrival: Arrival, presence: Presence) -> None:
        if arrival.restarts:
            # It has no memory that would go on from where it stood: nobody counts its milliseconds.
            await self.tracking.begin(arrival, presence)
        elif not arrival.checkpoint:
            await self.tracking.make_durable(arrival)

    async def _until_arrived(self, vm: str) -> Presence:
        """A source may release it while libvirt's last call is under way here: what libvirt makes of that."""
        until = time.monotonic() + ARRIVAL_SECONDS
        while (presence := await self._domains.presence(vm)) is Presence.INCOMING:
            if time.monotonic() > until:
                break
            await asyncio.sleep(ARRIVAL_LOOK_SECONDS)
        return presence

    async def status(self, peer: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """What the source asks when it is in doubt."""
        arrival = self.records.get(str(parameters["job"]))
        known = arrival is not None and arrival.peer == peer
        if known and arrival is not None and not arrival.ended:
            self.contact.heard(arrival.id)
        presence = await self._domains.presence(str(parameters["vm"]))
        return {
            "known": known,
            "state": arrival.state.value if known and arrival is not None else None,
            "vm": presence.value,
            "memory_lost": bool(known and arrival is not None and arrival.has_lost_memory),
        }

    async def abort(self, peer: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The source rolls back: clear the arrival away for good. Raises Conflict when the VM runs here."""
        job_id, vm = str(parameters["job"]), str(parameters["vm"])
        async with self.records.lock(vm):
            arrival = self.records.get(job_id)
            if arrival is None:
                self._called_off.add(job_id)
                await self.footprint.thaw_if_unclaimed(vm)
                return {"state": ArrivalState.ABORTED.value}
            self._known(job_id, peer)
            if arrival.state is ArrivalState.RELEASED:
                presence = await self._domains.presence(vm)
                if presence is Presence.RUNNING or not parameters.get("kept_at_source"):
                    await self._run(arrival)
            if arrival.state in RUNS_HERE:
                raise Conflict(
                    f"VM {arrival.name}: it runs here since its arrival {job_id} with epoch {arrival.epoch}; "
                    "the copy at the source is the old one"
                )
            await self.clear(arrival)
            return {"state": arrival.state.value}

    def watch_all(self) -> None:
        """After a restart: see to it that the hook's exception ends for those that have arrived meanwhile."""
        for arrival in self.records.all():
            if arrival.state is ArrivalState.PREPARED:
                self._watchers[arrival.id] = asyncio.create_task(self._watch_arrival(arrival))

    def _known(self, job_id: str, peer: str) -> Arrival:
        arrival = self.records.get(job_id)
        if arrival is None or arrival.peer != peer:
            raise NotFound(
                f"job {job_id}: no arrival from {peer} by that number here; see `precache-proxy status`"
            )
        self.contact.heard(job_id)
        return arrival

    # -- doing it

    async def _watch_arrival(self, arrival: Arrival) -> None:
        """When the VM stands here complete and paused: end the hook's exception, and track it already.

        Tracking needs no release, for it changes nothing that the guest can see. It is begun only where none
        is about to come: one that found it under way would wait for it, and the guest stands still.
        """
        with contextlib.suppress(LifeboatError):
            while arrival.state is ArrivalState.PREPARED:
                await asyncio.sleep(ARRIVAL_POLL_SECONDS)
                presence = await self._domains.presence(arrival.vm)
                if presence is not Presence.ABSENT:
                    await asyncio.to_thread(self._guard.arrived, arrival.vm)
                if presence is Presence.ARRIVED:
                    if not arrival.restarts:
                        await asyncio.sleep(RELEASE_SECONDS)
                    async with self.records.lock(arrival.vm):
                        if arrival.state is ArrivalState.PREPARED:
                            await self.tracking.begin(arrival)
                    return

    async def clear(self, arrival: Arrival) -> None:
        """It will never run here: nothing of it is left."""
        self.not_admitted(arrival.id)
        watcher = self._watchers.pop(arrival.id, None)
        if watcher is not None and watcher is not asyncio.current_task():
            watcher.cancel()
        await self.footprint.remove(arrival)
        self.contact.forget(arrival.id)

    async def _run(self, arrival: Arrival, seen: Presence | None = None) -> None:
        """It is released: from here on nothing of the source's reaches libvirt or QEMU here."""
        self.not_admitted(arrival.id)
        await self.activation.run(arrival, seen)

    # -- on the operator's word, and after a restart

    async def act(self, arrival: Arrival, decision: ArrivalDecision, *, on_whose_word: str = "") -> None:
        """Carry out what :func:`decide_at_destination` said. The VM's lock is held by the caller."""
        if decision is ArrivalDecision.ABORT:
            await self.clear(arrival)
        elif decision in {
            ArrivalDecision.ACTIVATE,
            ArrivalDecision.ACTIVATE_COLD,
            ArrivalDecision.RECORD_ACTIVATED,
        }:
            if arrival.state is ArrivalState.PREPARED:
                arrival.activated_by = on_whose_word
                await self.tracking.begin(arrival)
                await self.records.enter(arrival, ArrivalState.RELEASED)
            await self._run(arrival)

    async def declare_source_dead(self, arrival: Arrival) -> None:
        """The operator vouches that the source does not run the VM and never will by itself."""
        async with self.records.lock(arrival.vm):
            presence = await self._domains.presence(arrival.vm)
            decision = decide_at_destination(
                arrival.state, presence, None, source_reachable=False, source_presumed_dead=True
            )
            if decision is ArrivalDecision.WAIT:
                raise Conflict(
                    f"VM {arrival.name}: it did not arrive whole here ({presence.value}); "
                    f"start its replica instead (`precache-proxy fail-over {arrival.name} --source-is-dead`)"
                )
            await self.act(arrival, decision, on_whose_word="operator")

    async def stop(self) -> None:
        """End the watchers; the arrivals stay as they are."""
        for task in self._watchers.values():
            task.cancel()
        await asyncio.gather(*self._watchers.values(), return_exceptions=True)
        self._watchers.clear()
