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
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from precache_proxy import durable
from precache_proxy.crash_points import crash_point
from precache_proxy.errors import Conflict, Finding, InvalidInput, LifeboatError, NotFound, StaleEpoch
from precache_proxy.evacuation import layers, preflight
from precache_proxy.evacuation.arrival import RUNS_HERE, Arrival, ArrivalDisk, ArrivalJournal, ArrivalState
from precache_proxy.evacuation.arrival_network import ArrivalNetwork
from precache_proxy.evacuation.domain_edit import destination_xml
from precache_proxy.evacuation.domains import Domains
from precache_proxy.evacuation.guard import ARRIVAL, TOMBSTONE, Forbidden, Guard
from precache_proxy.evacuation.images import create_overlay
from precache_proxy.evacuation.reconcile import ArrivalDecision, Presence, decide_at_destination
from precache_proxy.evacuation.relay import make_job_directory, remove_job_directory
from precache_proxy.evacuation.rooms import StoreRoom
from precache_proxy.hypervisor.qemu_user import QemuUser

logger = logging.getLogger(__name__)

ARRIVAL_POLL_SECONDS = 0.25
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
    """All arrivals of this host."""

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
        self.presume_source_dead_after_seconds = presume_source_dead_after_seconds
        self._domains = domains
        self._guard = guard
        self._store = store
        self._network = network
        self._qemu_user = qemu_user
        self._journal = ArrivalJournal(directory / "arrivals")
        self._arrivals: dict[str, Arrival] = {}
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._watchers: dict[str, asyncio.Task[None]] = {}
        # jobs that were called off before they were known here: a late `prepare` of theirs is refused
        self._called_off: set[str] = set()

    # -- records

    def load(self) -> None:
        """Read the records (blocking)."""
        self.disks_directory.mkdir(parents=True, exist_ok=True, mode=0o711)
        self.disks_directory.chmod(0o711)
        self._arrivals = {arrival.id: arrival for arrival in self._journal.load()}

    def all(self) -> list[Arrival]:
        """Every arrival on record."""
        return list(self._arrivals.values())

    def get(self, job_id: str) -> Arrival | None:
        """The arrival of a job, or None."""
        return self._arrivals.get(job_id)

    def latest_of(self, vm: str) -> Arrival | None:
        """The newest arrival of a VM, or None. Attempts that were rolled back share an epoch: the later
        counts."""
        return max(
            (item for item in self._arrivals.values() if item.vm == vm),
            key=lambda item: (item.epoch, item.since),
            default=None,
        )

    def lock(self, vm: str) -> asyncio.Lock:
        """What orders everything done to one VM's arrivals."""
        return self._locks[vm]

    async def save(self, arrival: Arrival) -> None:
        """Make the record durable."""
        await asyncio.to_thread(self._journal.save, arrival)

    async def enter(self, arrival: Arrival, state: ArrivalState) -> None:
        """Go on to a state, durably."""
        await asyncio.to_thread(self._journal.enter, arrival, state)
        logger.info("arrival %s of VM %s: %s", arrival.id, arrival.vm, state.value)

    def admitted(self, job_id: str, peer: str) -> Arrival:
        """The arrival for which that peer may use relays now. Raises Conflict."""
        arrival = self._arrivals.get(job_id)
        if arrival is None or arrival.peer != peer or arrival.state is not ArrivalState.PREPARED:
            raise Conflict(f"job {job_id}: not admitted here for {peer}; nothing is relayed")
        return arrival

    # -- asked by the source

    async def check(self, peer: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """What stands in the way here, and whether the VM is here already. Changes nothing."""
        vm = str(parameters["vm"])
        latest = self.latest_of(vm)
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
            self._domains, self._guard, str(parameters["definition"]), self.disks_directory
        )
        try:
            findings += _foreign_replica(peer, await self._store.status(vm))
        except NotFound:
            findings.append(
                Finding(
                    f"VM {parameters.get('name', vm)}",
                    f"{peer}'s replica is not here",
                    "protect it anew",
                    "not-found",
                )
            )
        return {"already_there": False, "findings": [asdict(finding) for finding in findings]}

    async def prepare(self, peer: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Make everything ready for libvirt to come: overlays on the replica, guard, sockets' directory."""
        job_id, vm = str(parameters["job"]), str(parameters["vm"])
        if not _JOB_ID.fullmatch(job_id):
            raise InvalidInput(f"job {job_id!r}: not a job's number; are both proxies of one version?")
        async with self.lock(vm):
            arrival = self._arrivals.get(job_id)
            if arrival is None:
                await self._refuse_or_clear(job_id, vm, peer, int(parameters["epoch"]))
                arrival = await self._prepare(peer, parameters)
            elif arrival.peer != peer or arrival.state is not ArrivalState.PREPARED:
                raise Conflict(f"job {job_id}: it is {arrival.state.value} here; start the evacuation again")
            return {
                "disks": {key: disk.overlay for key, disk in arrival.disks.items()},
                "presumed_dead_after_seconds": self.presume_source_dead_after_seconds,
            }

    async def _refuse_or_clear(self, job_id: str, vm: str, peer: str, epoch: int) -> None:
        if job_id in self._called_off:
            raise Conflict(f"job {job_id}: it was called off; start the evacuation again")
        for other in [item for item in self._arrivals.values() if item.vm == vm]:
            if other.epoch > epoch or (other.epoch == epoch and other.state in RUNS_HERE):
                raise StaleEpoch(
                    f"VM {other.name}: it arrived here with epoch {other.epoch}, this is an evacuation to "
                    f"epoch "
                    f"{epoch}; the copy that wants to come is an old one: do not start it again"
                )
            if other.state in {ArrivalState.PREPARED, ArrivalState.ABORTING} and other.peer == peer:
                # The source has one job at a time: the earlier one is over there, it only could not tell us.
                await self._clear(other)
            elif not other.ended and other.state is not ArrivalState.ACTIVATED:
                raise Conflict(
                    f"VM {other.name}: arrival {other.id} is {other.state.value} here; settle it first"
                )

    async def _prepare(self, peer: str, parameters: Mapping[str, Any]) -> Arrival:
        job_id, vm, name = (str(parameters[key]) for key in ("job", "vm", "name"))
        findings = await preflight.destination_findings(
            self._domains, self._guard, str(parameters["definition"]), self.disks_directory
        )
        findings += _foreign_replica(peer, await self._store.status(vm))
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
            stray_bitmaps=[str(name) for name in parameters.get("bitmaps", [])],
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
            arrival.definition = destination_xml(
                str(parameters["definition"]), {key: disk.overlay for key, disk in arrival.disks.items()}
            )
            await self.save(arrival)
        except BaseException:
            await self._store.thaw(vm)
            raise
        self._arrivals[job_id] = arrival
        crash_point("arrival-recorded")
        try:
            await self._set_up(arrival, directory)
        except BaseException:
            await self._clear(arrival)
            raise
        crash_point("arrival-prepared")
        self._watchers[job_id] = asyncio.create_task(self._watch_arrival(arrival))
        return arrival

    async def _set_up(self, arrival: Arrival, directory: Path) -> None:
        sentence = (
            f"VM {arrival.name} is arriving from {arrival.peer} (job {arrival.id}) and was not released by "
            f"it yet; "
            f"it may run there. Wait, or settle it: precache-proxy settle {arrival.id} source-dead"
        )
        forbidden = Forbidden(arrival.vm, ARRIVAL, sentence, arrival.id, arrival.epoch)
        await asyncio.to_thread(self._guard.forbid, forbidden)
        crash_point("arrival-guarded")

        def make_directories() -> None:
            directory.mkdir(exist_ok=True, mode=0o711)
            directory.chmod(0o711)
            durable.sync_directory(directory.parent)
            owner = (self._qemu_user.uid, self._qemu_user.gid)
            make_job_directory(self.sockets_directory / arrival.id, owner)
            self._guard.let_arrive(arrival.vm)

        await asyncio.to_thread(make_directories)
        for disk in arrival.disks.values():
            await create_overlay(Path(disk.overlay), disk.replica, disk.replica_format, disk.size_bytes)

    async def release(self, peer: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The source will not run the VM any more: run it here. Raises Conflict when it is not whole here."""
        began = time.monotonic()
        job_id, vm = str(parameters["job"]), str(parameters["vm"])
        async with self.lock(vm):
            arrival = self._known(job_id, peer)
            if arrival.state is ArrivalState.PREPARED:
                presence = await self._domains.presence(vm)
                if presence not in {Presence.ARRIVED, Presence.RUNNING}:
                    raise Conflict(
                        f"VM {arrival.name}: it did not arrive whole here ({presence.value}); it stays at "
                        f"{peer}"
                    )
                await self._track(arrival)
                await self.enter(arrival, ArrivalState.RELEASED)
                crash_point("arrival-released")
            if arrival.state is ArrivalState.RELEASED:
                await self._activate_whichever(arrival)
            if arrival.state not in RUNS_HERE:
                raise Conflict(
                    f"VM {arrival.name}: its arrival {job_id} is {arrival.state.value}; it will not run here"
                )
            now = time.monotonic()
            resumed = arrival.timings.get("resumed_monotonic", now)
            return {
                "state": arrival.state.value,
                "memory_lost": arrival.memory_lost,
                "activation_seconds": max(0.0, resumed - began),
                "running_seconds": max(0.0, now - resumed),
            }

    async def status(self, peer: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """What the source asks when it is in doubt."""
        arrival = self._arrivals.get(str(parameters["job"]))
        presence = await self._domains.presence(str(parameters["vm"]))
        known = arrival is not None and arrival.peer == peer
        return {
            "known": known,
            "state": arrival.state.value if known and arrival is not None else None,
            "vm": presence.value,
            "memory_lost": bool(known and arrival is not None and arrival.memory_lost),
        }

    async def abort(self, peer: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The source rolls back: clear the arrival away for good. Raises Conflict when the VM runs here."""
        job_id, vm = str(parameters["job"]), str(parameters["vm"])
        async with self.lock(vm):
            arrival = self._arrivals.get(job_id)
            if arrival is None:
                self._called_off.add(job_id)
                await self._thaw_unclaimed(vm)
                return {"state": ArrivalState.ABORTED.value}
            self._known(job_id, peer)
            if arrival.state is ArrivalState.RELEASED:
                presence = await self._domains.presence(vm)
                if presence is Presence.RUNNING or not parameters.get("kept_at_source"):
                    await self._activate_whichever(arrival)
            if arrival.state in RUNS_HERE:
                raise Conflict(
                    f"VM {arrival.name}: it runs here since its arrival {job_id} with epoch {arrival.epoch}; "
                    "the copy at the source is the old one"
                )
            await self._clear(arrival)
            return {"state": arrival.state.value}

    async def thaw_unclaimed(self) -> None:
        """Replicas that a killed `prepare` froze before its arrival was on record take generations again.

        Called after :meth:`load` and before any peer is answered.
        """
        for status in await self._store.statuses():
            if status["state"] == "frozen":
                await self._thaw_unclaimed(str(status["vm"]))

    async def _thaw_unclaimed(self, vm: str) -> None:
        # An activated arrival holds it too: the VM runs on those files until the store has let them go.
        if any(not item.ended for item in self._arrivals.values() if item.vm == vm):
            return
        with contextlib.suppress(NotFound):
            if (await self._store.status(vm))["state"] == "frozen":
                logger.warning("VM %s: its replica was held for an arrival that is not on record", vm)
                await self._store.thaw(vm)

    def watch_all(self) -> None:
        """After a restart: see to it that the hook's exception ends for those that have arrived meanwhile."""
        for arrival in self._arrivals.values():
            if arrival.state is ArrivalState.PREPARED:
                self._watchers[arrival.id] = asyncio.create_task(self._watch_arrival(arrival))

    def _known(self, job_id: str, peer: str) -> Arrival:
        arrival = self._arrivals.get(job_id)
        if arrival is None or arrival.peer != peer:
            raise NotFound(
                f"job {job_id}: no arrival from {peer} by that number here; see `precache-proxy status`"
            )
        return arrival

    # -- doing it

    async def _watch_arrival(self, arrival: Arrival) -> None:
        """When the VM stands here complete and paused: end the hook's exception, and track it already.

        Tracking needs no release, for it changes nothing that the guest can see; done now, it is not
        downtime.
        """
        with contextlib.suppress(LifeboatError):
            while arrival.state is ArrivalState.PREPARED:
                await asyncio.sleep(ARRIVAL_POLL_SECONDS)
                presence = await self._domains.presence(arrival.vm)
                if presence is not Presence.ABSENT:
                    await asyncio.to_thread(self._guard.arrived, arrival.vm)
                if presence is Presence.ARRIVED:
                    async with self.lock(arrival.vm):
                        if arrival.state is ArrivalState.PREPARED:
                            await self._track(arrival)
                    return

    async def _track(self, arrival: Arrival) -> None:
        """Put the top overlays on and the checkpoint in, while paused: the way back is tracked from the first
        instant.

        What arrived stands still below, flushed and synced. A failure costs the way back its bitmap, not the
        VM its run.
        """
        if arrival.checkpoint:
            return
        checkpoint = f"lifeboat-e{arrival.epoch}-g{arrival.generation + 1}"
        tops = {key: disk.top for key, disk in arrival.disks.items()}
        try:
            await self._refuse_late_tracking(arrival, checkpoint)
            definition = await self._domains.definition(arrival.vm)
            on_top = [key for key, top in tops.items() if (disk := definition.disk(key)) and disk.path == top]
            if len(on_top) < len(tops):
                await layers.put_overlays(self._domains, arrival.vm, tops)
            await layers.create_checkpoint(self._domains, arrival.vm, checkpoint, tops)
        except LifeboatError as error:
            logger.error(
                "VM %s: the way back is not tracked and will need a comparison: %s", arrival.vm, error
            )
            arrival.cause, arrival.sentence = "tracking-lost", str(error)
        else:
            arrival.checkpoint = checkpoint

        def sync() -> None:
            for disk in arrival.disks.values():
                durable.sync_file(Path(disk.overlay))

        await asyncio.to_thread(sync)
        await self.save(arrival)
        crash_point("arrival-tracked")

    async def _refuse_late_tracking(self, arrival: Arrival, checkpoint: str) -> None:
        """Raise where the VM has run untracked: between overlay and checkpoint its writes would be lost."""
        if await self._domains.presence(arrival.vm) is not Presence.RUNNING:
            return
        if not await layers.has_checkpoint(self._domains, arrival.vm, checkpoint):
            raise Conflict(f"VM {arrival.name}: it ran before its writes were counted from {checkpoint}")

    async def _activate_whichever(self, arrival: Arrival) -> None:
        """Run a released VM: resume it, or start it anew when this host lost its memory meanwhile."""
        presence = await self._domains.presence(arrival.vm)
        if presence in {Presence.ARRIVED, Presence.PAUSED, Presence.RUNNING}:
            await self._activate(arrival)
        elif presence in {Presence.SHUT_OFF, Presence.ABSENT, Presence.ENDED}:
            await self._activate_cold(arrival)
        else:
            raise Conflict(f"VM {arrival.name}: libvirt here says {presence.value}; asked again shortly")

    async def _activate(self, arrival: Arrival) -> None:
        await self._track(arrival)
        await self._install_network(arrival)
        await self._domains.resume(arrival.vm)
        arrival.timings["resumed_monotonic"] = time.monotonic()
        crash_point("arrival-resumed")
        await self.enter(arrival, ArrivalState.ACTIVATED)
        crash_point("arrival-activated")
        await self.settle_down(arrival)

    async def _activate_cold(self, arrival: Arrival) -> None:
        """The memory is gone, the disks are whole: ACTIVATED is durable first, for the guard must go before a
        start."""
        arrival.memory_lost = True
        await self._install_network(arrival)
        await self.enter(arrival, ArrivalState.ACTIVATED)
        await self.settle_down(arrival)

    async def _install_network(self, arrival: Arrival) -> None:
        try:
            await self._network.install(arrival.definition, arrival)
        except LifeboatError as error:
            # A VM without its routes is better than no VM; the agent goes on trying.
            logger.error("VM %s: network not installed before it runs: %s", arrival.vm, error)
            arrival.cause, arrival.sentence = "network", str(error)

    async def settle_down(self, arrival: Arrival) -> None:
        """After ACTIVATED, repeatable: lift the guard, run if it has to be started, autostart, close the
        sockets."""
        await asyncio.to_thread(self._guard.arrived, arrival.vm)
        await asyncio.to_thread(self._guard.allow, arrival.vm, job=arrival.id)
        if arrival.memory_lost and "started_at" not in arrival.timings:
            if await self._domains.presence(arrival.vm) is Presence.ABSENT:
                connection = self._domains.hypervisor.connection
                await self._domains.hypervisor.call(
                    connection.defineXML, arrival.definition, subject=f"VM {arrival.name}"
                )
            await self._domains.start(arrival.vm)
            arrival.timings["started_at"] = time.time()
            await self.save(arrival)
        await asyncio.to_thread(remove_job_directory, self.sockets_directory / arrival.id)
        logger.info("VM %s runs here since the release by %s", arrival.vm, arrival.peer)

    async def _clear(self, arrival: Arrival) -> None:
        """Remove everything of an arrival that will never run here; repeatable after a crash at any line."""
        if arrival.state is ArrivalState.ABORTED:
            return
        if arrival.state is not ArrivalState.ABORTING:
            await self.enter(arrival, ArrivalState.ABORTING)
        crash_point("arrival-aborting")
        watcher = self._watchers.pop(arrival.id, None)
        if watcher is not None and watcher is not asyncio.current_task():
            watcher.cancel()
        await self._domains.destroy(arrival.vm)
        await self._domains.undefine(arrival.vm)

        def remove_files() -> None:
            for disk in arrival.disks.values():
                durable.remove(Path(disk.overlay))
                durable.remove(Path(disk.top))
            self._guard.arrived(arrival.vm)
            if arrival.tombstone is not None:
                self._guard.forbid(Forbidden(**arrival.tombstone))
            else:
                self._guard.allow(arrival.vm, job=arrival.id)
            remove_job_directory(self.sockets_directory / arrival.id)

        await asyncio.to_thread(remove_files)
        await self._store.thaw(arrival.vm)
        await self.enter(arrival, ArrivalState.ABORTED)

    # -- on the operator's word, and after a restart

    async def act(self, arrival: Arrival, decision: ArrivalDecision, *, on_whose_word: str = "") -> None:
        """Carry out what :func:`decide_at_destination` said. The VM's lock is held by the caller."""
        if decision is ArrivalDecision.ABORT:
            await self._clear(arrival)
        elif decision in {
            ArrivalDecision.ACTIVATE,
            ArrivalDecision.ACTIVATE_COLD,
            ArrivalDecision.RECORD_ACTIVATED,
        }:
            if arrival.state is ArrivalState.PREPARED:
                arrival.activated_by = on_whose_word
                await self._track(arrival)
                await self.enter(arrival, ArrivalState.RELEASED)
            await self._activate_whichever(arrival)

    async def declare_source_dead(self, arrival: Arrival) -> None:
        """The operator vouches that the source does not run the VM and never will by itself."""
        async with self.lock(arrival.vm):
            presence = await self._domains.presence(arrival.vm)
            decision = decide_at_destination(
                arrival.state, presence, None, source_reachable=False, source_presumed_dead=True
            )
            if decision is ArrivalDecision.WAIT:
                raise Conflict(
                    f"VM {arrival.name}: it did not arrive whole here ({presence.value}); "
                    "start its replica instead (fail_over)"
                )
            await self.act(arrival, decision, on_whose_word="operator")

    async def stop(self) -> None:
        """End the watchers; the arrivals stay as they are."""
        for task in self._watchers.values():
            task.cancel()
        await asyncio.gather(*self._watchers.values(), return_exceptions=True)
        self._watchers.clear()
