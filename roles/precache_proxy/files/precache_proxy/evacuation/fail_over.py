# SPDX-License-Identifier: GPL-3.0-or-later
"""A VM whose home is dead runs here from the last sealed generation of its replica, on the operator's word.

It arrives like one that comes by restart, without a source: prepared, then released by the operator instead
of by its home. Nobody can know from here that the home is off; one that answers is asked, and forbids the
start there before the VM runs here. One that does not is told as soon as it answers: it forbids the start
then, and ends a copy that somebody has started meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from precache_proxy.crash_points import crash_point
from precache_proxy.errors import (
    Conflict,
    Finding,
    HypervisorError,
    InvalidInput,
    LifeboatError,
    NotFound,
    PeerUnreachable,
)
from precache_proxy.evacuation.arrival import NO_CONTACT, RUNS_HERE, Arrival, ArrivalState
from precache_proxy.evacuation.arrivals import Arrivals
from precache_proxy.evacuation.domains import Domains
from precache_proxy.evacuation.preflight import QEMU_OVERHEAD_BYTES
from precache_proxy.evacuation.reconcile import ArrivalDecision, Presence
from precache_proxy.evacuation.rooms import StoreRoom
from precache_proxy.units import format_seconds

logger = logging.getLogger(__name__)

TELL_TIMEOUT_SECONDS = 30.0
_ACTIVE = frozenset({Presence.RUNNING, Presence.PAUSED})
_NOT_WHOLE = frozenset({Presence.ABSENT, Presence.SHUT_OFF, Presence.ENDED})


def _what(generation: int, sealed_at: float) -> str:
    """Which generation, and how old; what an evacuation has left here is of no known age (0)."""
    if not sealed_at:
        return f"generation {generation}, of unknown age"
    return f"generation {generation}, sealed {format_seconds(max(0.0, time.time() - sealed_at))} ago"


def _is_begun(arrival: Arrival) -> bool:
    """Whether its home may have been asked already, and may have given the VM up."""
    return (
        arrival.fails_over and arrival.state is ArrivalState.PREPARED and arrival.activated_by == "operator"
    )


def _told(arrival: Arrival) -> dict[str, Any]:
    return {
        "vm": arrival.vm,
        "name": arrival.name,
        "epoch": arrival.epoch,
        "job": arrival.id,
        "generation": arrival.generation,
    }


def _nothing_to_start(name: str) -> Finding:
    fact = "its replica has no sealed generation"
    return Finding(f"VM {name}", fact, "there is nothing to start; leave it out", "conflict")


def _as_findings(error: LifeboatError) -> list[Finding]:
    """What an error says: thing, fact and way out of its sentence where it brings no findings."""
    subject, _unused, rest = error.message.partition(": ")
    fact, _unused, way_out = rest.partition("; ")
    return list(error.findings) or [Finding(subject, fact, way_out, error.cause)]


def _outlook(
    vm: str,
    name: str,
    peer: str | None,
    *,
    status: Mapping[str, Any] | None = None,
    arrival: Arrival | None = None,
    is_running: bool | None = None,
    findings: Sequence[Finding] = (),
) -> dict[str, Any]:
    """An answer of :meth:`FailOver.look`; what is not known is None."""
    sealed: Mapping[str, Any] = (status or {}).get("sealed") or {}
    sealed_at = sealed.get("sealed_at") or None
    if arrival is not None and arrival.fails_over:
        sealed, sealed_at = {"generation": arrival.generation}, arrival.sealed_at or None
    return {
        "vm": vm,
        "name": name,
        "peer": peer,
        "is_here": arrival is not None,
        "is_running": is_running,
        "job": None if arrival is None else arrival.id,
        "epoch": (status or {}).get("epoch") if arrival is None else arrival.epoch,
        "generation": sealed.get("generation"),
        "sealed_at": sealed_at,
        "age_seconds": None if sealed_at is None else max(0.0, time.time() - sealed_at),
        "memory_bytes": None,
        "priority": ((status or {}).get("protection") or {}).get("priority"),
        "home_answers": None,
        "findings": list(findings),
    }


class FailOver:
    """Starts VMs from their replicas here, and tells their homes."""

    def __init__(
        self, arrivals: Arrivals, domains: Domains, store: StoreRoom, links: Mapping[str, Any]
    ) -> None:
        self._arrivals = arrivals
        self._domains = domains
        self._store = store
        self._links = links
        # what a home refused with, as it was logged last
        self._complaints: dict[str, str] = {}

    async def begin(self, vm: str, *, source_is_dead: bool) -> Arrival:
        """Run the VM (name or UUID) from its last sealed generation. Raises NotFound, InvalidInput, Conflict
        while nothing was changed here; a home that answered may have been told by then."""
        if source_is_dead and (running := await self._running_here(vm)) is not None:
            return running
        status = await self._replica(vm)
        uuid_of_vm, name, peer = str(status["vm"]), str(status["name"]), str(status["peer"])
        sealed = status.get("sealed")
        if not sealed:
            raise Conflict(str(_nothing_to_start(name)))
        generation, sealed_at = int(sealed["generation"]), float(sealed["sealed_at"])
        if not source_is_dead:
            raise InvalidInput(
                f"VM {name}: it would run here from {_what(generation, sealed_at)}, and what {peer} wrote "
                f"since would be lost; say source_is_dead only when {peer} has lost power, or surely does "
                "not run it"
            )
        epoch = int(status["epoch"]) + 1
        job_id = uuid.uuid4().hex[:12]
        async with self._arrivals.records.lock(uuid_of_vm):
            # Another operator may have come first.
            if (running := await self._running_here(uuid_of_vm)) is not None:
                return running
            in_the_way = await self._in_the_way(uuid_of_vm, name)
            prepared = next((other for other in in_the_way if _is_begun(other)), None)
            if prepared is None:
                told = {"vm": uuid_of_vm, "name": name, "epoch": epoch, "job": job_id}
                await self._refuse_what_home_refuses(peer, {**told, "generation": generation})
                for other in in_the_way:
                    await self._arrivals.clear(other)
                prepared = await self._arrivals.prepare_from_generation(
                    peer, job_id, uuid_of_vm, generation, epoch, sealed_at, status.get("protection") or {}
                )
                # Durable before the home is asked: it may give the VM up and never reach us with that.
                prepared.activated_by = "operator"
                await self._arrivals.records.save(prepared)
                crash_point("fail-over-prepared")
            await self._go_on(prepared, says_so_now=True)
        return prepared

    async def look(self, vm: str) -> dict[str, Any]:
        """What :meth:`begin` would run from which generation, and everything that stands in the way of it.
        Changes nothing, here or at the home, which is asked where it answers. Raises NotFound."""
        try:
            status = await self._replica(vm)
        except NotFound:
            here, is_running = await self._lives_here(vm)
            if here is None:
                raise
            return _outlook(here.vm, here.name, here.peer, arrival=here, is_running=is_running)
        except Conflict as error:
            return _outlook(vm, vm, None, findings=_as_findings(error))
        uuid_of_vm, name, peer = str(status["vm"]), str(status["name"]), str(status["peer"])
        here, is_running = await self._lives_here(uuid_of_vm)
        if here is not None:
            return _outlook(uuid_of_vm, name, peer, arrival=here, is_running=is_running)
        link = self._links.get(peer)
        told = _outlook(uuid_of_vm, name, peer, status=status)
        told["home_answers"] = link is not None and link.state == "up"
        findings: list[Finding] = []
        in_the_way: list[Arrival] = []
        try:
            in_the_way = await self._in_the_way(uuid_of_vm, name)
        except Conflict as error:
            findings += _as_findings(error)
        # What an arrival has made here would be found in its own way.
        is_clear = not (in_the_way or findings)
        sealed = status.get("sealed")
        if sealed:
            asked = {"vm": uuid_of_vm, "name": name, "epoch": int(status["epoch"]) + 1, "job": ""}
            try:
                await self._refuse_what_home_refuses(peer, {**asked, "generation": sealed["generation"]})
            except LifeboatError as error:
                findings += _as_findings(error)
            definition, others = await self._arrivals.look_at_generation(
                peer, uuid_of_vm, int(sealed["generation"])
            )
            told["memory_bytes"] = definition.memory_bytes + QEMU_OVERHEAD_BYTES
            findings += others if is_clear else []
        else:
            findings.append(_nothing_to_start(name))
        told["findings"] = findings
        return told

    async def _lives_here(self, vm: str) -> tuple[Arrival | None, bool | None]:
        """The arrival by which a VM (name or UUID) came to be here and still is, and whether it runs (None:
        it was shut off when it left its home, and is still). Raises HypervisorError."""
        for arrival in self._came_here(vm):
            presence = await self._domains.presence(arrival.vm)
            if presence is Presence.UNKNOWN:
                raise HypervisorError(f"VM {arrival.name}: libvirt here does not say whether it is here")
            if presence is not Presence.ABSENT:
                is_off = presence in {Presence.SHUT_OFF, Presence.ENDED}
                return arrival, None if is_off and not arrival.boots else not is_off
        return None, None

    async def _running_here(self, vm: str) -> Arrival | None:
        """The arrival by which a VM (name or UUID) runs here from a generation already."""
        for arrival in self._came_here(vm):
            if arrival.fails_over and await self._domains.presence(arrival.vm) in _ACTIVE:
                return arrival
        return None

    def _came_here(self, vm: str) -> Iterator[Arrival]:
        """Arrivals by which a VM (name or UUID) came to be here, as far as the records say."""
        records = self._arrivals.records
        for arrival in records.all():
            meant = vm in {arrival.vm, arrival.name} and arrival.state in RUNS_HERE
            if meant and records.latest_of(arrival.vm) is arrival:
                yield arrival

    async def _replica(self, vm: str) -> dict[str, Any]:
        statuses = [
            dict(status)
            for status in await self._store.statuses()
            if vm in {status.get("vm"), status.get("name")} and status.get("state") != "detached"
        ]
        if not statuses:
            raise NotFound(f"{vm}: no replica of that VM here; see `precache-proxy status`")
        if len(statuses) > 1:
            numbers = " or ".join(str(status.get("vm")) for status in statuses)
            raise Conflict(f"VM {vm}: replicas of {len(statuses)} VMs of that name are here; say {numbers}")
        [status] = statuses
        if status.get("state") == "damaged":
            raise Conflict(f"VM {vm}: the record of its replica is damaged: {status.get('sentence')}")
        return status

    async def _in_the_way(self, vm: str, name: str) -> list[Arrival]:
        """What is left of an evacuation that did not come to its end. Raises Conflict for one that is whole;
        changes nothing."""
        found: list[Arrival] = []
        for other in self._arrivals.records.of(vm):
            if other.ended:
                continue
            presence = await self._domains.presence(vm)
            begun_before = other.fails_over and other.state is ArrivalState.PREPARED
            half = other.state is ArrivalState.PREPARED and presence in _NOT_WHOLE
            if not (other.state is ArrivalState.ABORTING or begun_before or half):
                raise Conflict(
                    f"VM {name}: its arrival {other.id} is {other.state.value} here, and more than the "
                    f"replica; `precache-proxy settle {other.id} source-dead` runs that"
                )
            found.append(other)
        return found

    async def _refuse_what_home_refuses(self, peer: str, told: Mapping[str, Any]) -> None:
        """Before anything is changed, here or there: raise what the home has against it, where it answers."""
        with contextlib.suppress(PeerUnreachable):
            await self._tell(peer, {**told, "only_if_off": True, "only_asked": True})

    async def _go_on(self, arrival: Arrival, *, says_so_now: bool) -> None:
        """From PREPARED on: the home's consent where it answers, then the release. Its lock is held.

        Raises Conflict when the home refuses; then it is cleared away. A home that does not answer is taken
        for dead while the operator ``says_so_now``, and waited for otherwise: it may have refused.
        """
        answer: dict[str, Any] | None = {}
        if not arrival.home_told:
            answer = await self._ask_home(arrival)
            if answer is None and says_so_now:
                await self._arrivals.tracking.begin(arrival)
                # What came before took its time: the home may be back by now.
                answer = await self._ask_home(arrival)
            if answer is None and not says_so_now:
                await self._wait_for_home(arrival)
                return
            if answer is not None:
                arrival.home_told = not answer.get("owes")
                await self._arrivals.records.save(arrival)
        crash_point("fail-over-home-told")
        what = _what(arrival.generation, arrival.sealed_at or 0.0)
        arrival.cause = ""
        arrival.sentence = f"It runs here from {what}: what {arrival.peer} wrote since is not in it."
        logger.critical(
            "VM %s: runs here from %s on the operator's word that %s is dead",
            arrival.name, what, arrival.peer,
        )  # fmt: skip
        await self._arrivals.act(arrival, ArrivalDecision.ACTIVATE, on_whose_word="operator")

    async def _wait_for_home(self, arrival: Arrival) -> None:
        if arrival.cause == NO_CONTACT:
            return
        arrival.cause = NO_CONTACT
        arrival.sentence = (
            f"VM {arrival.name}: its fail-over was interrupted, and {arrival.peer} cannot be asked again "
            f"whether it runs there; wait, or repeat `precache-proxy fail-over {arrival.name} "
            f"--source-is-dead`"
        )
        logger.critical("%s", arrival.sentence)
        await self._arrivals.records.save(arrival)

    async def _ask_home(self, arrival: Arrival) -> dict[str, Any] | None:
        """The word of the home that it will not start it any more, None where it does not answer. A refusal
        clears the arrival away and is raised; what else it raises says neither yes nor no."""
        try:
            return await self._tell(arrival.peer, {**_told(arrival), "only_if_off": True})
        except PeerUnreachable as error:
            logger.warning("VM %s: %s cannot be asked: %s", arrival.vm, arrival.peer, error)
            return None
        except Conflict:
            await self._arrivals.clear(arrival)
            raise

    async def _tell(self, peer: str, told: dict[str, Any]) -> dict[str, Any]:
        link = self._links.get(peer)
        if link is None or link.state != "up":
            raise PeerUnreachable(f"peer {peer}: no contact")
        answer: dict[str, Any] = await link.call(
            "evacuation.supersede", told, timeout_seconds=TELL_TIMEOUT_SECONDS
        )
        return answer

    async def tend(self, arrival: Arrival) -> None:
        """Take up one that was interrupted; tell the old home of one that runs here, until it has heard."""
        if not arrival.fails_over:
            return
        try:
            if arrival.state is ArrivalState.PREPARED:
                await self._take_up(arrival)
            elif arrival.state in RUNS_HERE and not arrival.home_told:
                await self._tell_late(arrival)
        except PeerUnreachable:
            return
        except (LifeboatError, OSError) as error:
            self._complain(arrival, str(error))

    async def _take_up(self, arrival: Arrival) -> None:
        lock = self._arrivals.records.lock(arrival.vm)
        if lock.locked():
            # Somebody works on it.
            return
        async with lock:
            if arrival.state is not ArrivalState.PREPARED:
                return
            if not _is_begun(arrival):
                # Its home was asked for nothing yet, and the operator has no answer: as if it was never said.
                await self._arrivals.clear(arrival)
            elif await self._domains.presence(arrival.vm) is not Presence.UNKNOWN:
                await self._go_on(arrival, says_so_now=False)

    async def _tell_late(self, arrival: Arrival) -> None:
        answer = await self._tell(arrival.peer, {**_told(arrival), "only_if_off": False})
        if answer.get("owes"):
            self._complain(arrival, str(answer["owes"]))
            return
        arrival.home_told = True
        await self._arrivals.records.save(arrival)
        logger.info("VM %s: %s knows now that it runs here", arrival.vm, arrival.peer)

    def _complain(self, arrival: Arrival, message: str) -> None:
        # Tried every few seconds: said once.
        level = logging.DEBUG if self._complaints.get(arrival.id) == message else logging.ERROR
        self._complaints[arrival.id] = message
        logger.log(level, "VM %s: %s has not given it up to this host: %s", arrival.vm, arrival.peer, message)

    def home(self, vm: str, job: str, epoch: int) -> dict[str, Any]:
        """What a home that is about to start a VM again asks: whether another arrival of it runs here."""
        latest = self._arrivals.records.latest_of(vm)
        # It may be released at any moment, by one who could not reach the home that asks now.
        is_coming = latest is not None and latest.fails_over and latest.state is ArrivalState.PREPARED
        runs_here = (
            latest is not None
            and latest.id != job
            and latest.epoch >= epoch
            and (latest.state in {ArrivalState.RELEASED, *RUNS_HERE} or is_coming)
        )
        return {"runs_here": runs_here}
