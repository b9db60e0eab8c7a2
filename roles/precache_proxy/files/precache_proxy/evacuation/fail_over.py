# SPDX-License-Identifier: GPL-3.0-or-later
"""A VM whose home is dead runs here from the last sealed generation of its replica, on the operator's word.

It arrives like one that comes by restart, without a source: prepared, then released by the operator instead
of by its home. Nobody can know from here that the home is off; one that answers is asked, and forbids the
start there before the VM runs here. One that does not is told as soon as it answers: it forbids the start
then, and ends a copy that somebody has started meanwhile.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping
from typing import Any

from precache_proxy.errors import Conflict, InvalidInput, LifeboatError, NotFound, PeerUnreachable
from precache_proxy.evacuation.arrival import RUNS_HERE, Arrival, ArrivalState
from precache_proxy.evacuation.arrivals import Arrivals
from precache_proxy.evacuation.domains import Domains
from precache_proxy.evacuation.reconcile import ArrivalDecision, Presence
from precache_proxy.evacuation.rooms import StoreRoom
from precache_proxy.units import format_seconds

logger = logging.getLogger(__name__)

TELL_TIMEOUT_SECONDS = 30.0
_NOT_WHOLE = frozenset({Presence.ABSENT, Presence.SHUT_OFF, Presence.ENDED})


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
        status = await self._replica(vm)
        uuid_of_vm, name, peer = str(status["vm"]), str(status["name"]), str(status["peer"])
        sealed = status.get("sealed")
        if not sealed:
            raise Conflict(f"VM {name}: its replica has no sealed generation; there is nothing to start")
        age = max(0.0, time.time() - float(sealed["sealed_at"]))
        what = f"generation {sealed['generation']}, sealed {format_seconds(age)} ago"
        if not source_is_dead:
            raise InvalidInput(
                f"VM {name}: it would run here from {what}, and what {peer} wrote since would be lost; "
                f"say source_is_dead only when {peer} has lost power, or surely does not run it"
            )
        epoch = int(status["epoch"]) + 1
        job_id = uuid.uuid4().hex[:12]
        async with self._arrivals.records.lock(uuid_of_vm):
            await self._make_room(uuid_of_vm, name)
            prepared = await self._arrivals.prepare_from_generation(
                peer, job_id, uuid_of_vm, int(sealed["generation"]), epoch, float(sealed["sealed_at"])
            )
            try:
                prepared.home_told = await self._ask_home(prepared)
            except LifeboatError:
                await self._arrivals.clear(prepared)
                raise
            prepared.sentence = f"It runs here from {what}: what {peer} wrote since is not in it."
            logger.critical(
                "VM %s: runs here from %s on the operator's word that %s is dead", name, what, peer
            )
            await self._arrivals.act(prepared, ArrivalDecision.ACTIVATE, on_whose_word="operator")
        return prepared

    async def _replica(self, vm: str) -> dict[str, Any]:
        for status in await self._store.statuses():
            if vm in {status.get("vm"), status.get("name")} and status.get("state") != "detached":
                if status.get("state") == "damaged":
                    raise Conflict(f"VM {vm}: the record of its replica is damaged: {status.get('sentence')}")
                return dict(status)
        raise NotFound(f"{vm}: no replica of that VM here; see `precache-proxy status`")

    async def _make_room(self, vm: str, name: str) -> None:
        """End what is left of an evacuation that did not come to its end."""
        for other in self._arrivals.records.of(vm):
            if other.ended:
                continue
            presence = await self._domains.presence(vm)
            begun_before = other.fails_over and other.state is ArrivalState.PREPARED
            half = other.state is ArrivalState.PREPARED and presence in _NOT_WHOLE
            if other.state is ArrivalState.ABORTING or begun_before or half:
                await self._arrivals.clear(other)
            else:
                raise Conflict(
                    f"VM {name}: its arrival {other.id} is {other.state.value} here, and more than the "
                    f"replica; `precache-proxy settle {other.id} source-dead` runs that"
                )

    async def _ask_home(self, arrival: Arrival) -> bool:
        """Whether the home has answered, and will not start it any more. Raises what it refuses with."""
        try:
            await self._tell(arrival, only_if_off=True)
        except PeerUnreachable as error:
            logger.warning("VM %s: %s cannot be asked: %s", arrival.vm, arrival.peer, error)
            return False
        return True

    async def _tell(self, arrival: Arrival, *, only_if_off: bool) -> None:
        link = self._links.get(arrival.peer)
        if link is None or link.state != "up":
            raise PeerUnreachable(f"peer {arrival.peer}: no contact")
        await link.call(
            "evacuation.supersede",
            {
                "vm": arrival.vm,
                "name": arrival.name,
                "epoch": arrival.epoch,
                "job": arrival.id,
                "generation": arrival.generation,
                "only_if_off": only_if_off,
            },
            timeout_seconds=TELL_TIMEOUT_SECONDS,
        )

    async def tend(self, arrival: Arrival) -> None:
        """Tell the old home of one that runs here, until it has heard."""
        if not arrival.fails_over or arrival.home_told or arrival.state not in RUNS_HERE:
            return
        try:
            await self._tell(arrival, only_if_off=False)
        except PeerUnreachable:
            return
        except LifeboatError as error:
            # Told every few seconds: said once.
            level = logging.DEBUG if self._complaints.get(arrival.id) == error.message else logging.ERROR
            self._complaints[arrival.id] = error.message
            logger.log(
                level, "VM %s: %s does not take it that it runs here: %s", arrival.vm, arrival.peer, error
            )
            return
        arrival.home_told = True
        await self._arrivals.records.save(arrival)
        logger.info("VM %s: %s knows now that it runs here", arrival.vm, arrival.peer)

    def home(self, vm: str, job: str, epoch: int) -> dict[str, Any]:
        """What a home that is about to start a VM again asks: whether another arrival of it runs here."""
        latest = self._arrivals.records.latest_of(vm)
        runs_here = (
            latest is not None
            and latest.id != job
            and latest.epoch >= epoch
            and latest.state in {ArrivalState.RELEASED, *RUNS_HERE}
        )
        return {"runs_here": runs_here}
