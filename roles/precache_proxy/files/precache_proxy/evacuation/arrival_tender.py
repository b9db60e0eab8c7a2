# SPDX-License-Identifier: GPL-3.0-or-later
"""What is done with arrivals that nobody works on: after a restart, when contact is lost or returns."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from precache_proxy.errors import LifeboatError, PeerUnreachable
from precache_proxy.evacuation.arrival import NO_CONTACT, Arrival, ArrivalState
from precache_proxy.evacuation.arrivals import Arrivals
from precache_proxy.evacuation.domains import Domains
from precache_proxy.evacuation.job import Step
from precache_proxy.evacuation.reconcile import ArrivalDecision, Presence, decide_at_destination

logger = logging.getLogger(__name__)

STATUS_TIMEOUT_SECONDS = 30.0


def _is_the_operators(arrival: Arrival) -> bool:
    """Released on the operator's word: it holds when this host has gone down before the VM ran."""
    return arrival.state is ArrivalState.RELEASED and arrival.activated_by == "operator"


class ArrivalTender:
    """Looks at each arrival now and then. ``land`` is told of those that run here."""

    def __init__(
        self,
        arrivals: Arrivals,
        domains: Domains,
        links: Mapping[str, Any],
        land: Callable[[Arrival], None],
    ) -> None:
        self._arrivals = arrivals
        self._records = arrivals.records
        self._domains = domains
        self._links = links
        self._land = land

    async def tend(self, arrival: Arrival) -> None:
        """Do what is to be done next; what fails is tried again."""
        try:
            if arrival.network_owed:
                await self._arrivals.activation.install_owed_network(arrival)
            if arrival.state is ArrivalState.ACTIVATED:
                await self._tend_activated(arrival)
            elif arrival.fails_over and arrival.state is ArrivalState.PREPARED:
                # Its home knows no such job: fail_over.py asks it what can be asked.
                return
            elif not arrival.ended:
                await self._decide(arrival)
        except LifeboatError as error:
            logger.warning("arrival %s of VM %s: %s; asked again", arrival.id, arrival.vm, error)
        except Exception:
            logger.exception("arrival %s of VM %s", arrival.id, arrival.vm)

    async def _ask_source(self, arrival: Arrival) -> tuple[bool, Step | None]:
        """Whether the source answered, and at which step its job stands; None: it knows no such job."""
        link = self._links.get(arrival.peer)
        try:
            if link is None:
                raise PeerUnreachable(f"peer {arrival.peer} is not configured any more")
            answer = await link.call(
                "evacuation.job", {"job": arrival.id}, timeout_seconds=STATUS_TIMEOUT_SECONDS
            )
            step = Step(answer["step"]) if answer["known"] else None
        except LifeboatError:
            return False, None
        self._arrivals.contact.heard(arrival.id)
        return True, step

    async def _decide(self, arrival: Arrival) -> None:
        reachable, step = await self._ask_source(arrival)
        presumed = not reachable and self._arrivals.contact.presumed_dead(arrival.id)
        async with self._records.lock(arrival.vm):
            presence = await self._domains.presence(arrival.vm)
            decision = decide_at_destination(
                arrival.state,
                presence,
                step,
                source_reachable=reachable,
                source_presumed_dead=presumed or _is_the_operators(arrival),
            )
            if decision is not ArrivalDecision.WAIT:
                logger.info(
                    "arrival %s of VM %s: %s here, source %s: %s", arrival.id, arrival.vm, presence.value,
                    step.value if step else ("knows no such job" if reachable else "not reached"),
                    decision.value,
                )  # fmt: skip
            elif reachable and arrival.cause == NO_CONTACT:
                arrival.contact_matters_no_more()
                await self._records.save(arrival)
            elif not reachable and presence is Presence.ARRIVED and arrival.cause != NO_CONTACT:
                arrival.cause = NO_CONTACT
                arrival.sentence = (
                    f"VM {arrival.name} stands here complete and paused; {arrival.peer} cannot be asked "
                    f"whether it runs "
                    f"there: wait, or `precache-proxy settle {arrival.id} source-dead` when that host is "
                    f"surely dead"
                )
                await self._records.save(arrival)
            word = "presumed" if not reachable else ""
            await self._arrivals.act(arrival, decision, on_whose_word=word)
        if arrival.state is ArrivalState.ACTIVATED:
            self._land(arrival)

    async def _tend_activated(self, arrival: Arrival) -> None:
        if self._records.latest_of(arrival.vm) is not arrival:
            # The VM has left and come back since: the newer arrival lands it.
            arrival.landing = "left"
            await self._records.enter(arrival, ArrivalState.LANDED)
            return
        if not arrival.landing:
            await self._arrivals.activation.settle_down(arrival)
        self._land(arrival)
