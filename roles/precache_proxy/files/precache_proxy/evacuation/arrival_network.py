# SPDX-License-Identifier: GPL-3.0-or-later
"""The network at the destination, which must stand before the VM runs there."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import aiohttp
from lxml import etree

from precache_proxy.errors import Finding, LifeboatError
from precache_proxy.evacuation.arrival import Arrival
from precache_proxy.evacuation.job import Job

logger = logging.getLogger(__name__)

# An agent that is just being restarted is back within this: asked anew so often.
_RETRY_SECONDS = 0.1
# For its outlook, which stops nothing, no evacuation waits longer: the source gives the whole check a minute.
_OUTLOOK_SECONDS = 2.0
# Of its answers, those that asking again may change.
_PASSING = frozenset({502, 503, 504})
#: Of what concerns a VM's addresses only.
NETWORK_CAUSE = "network"
# Where home addresses stand in a VM's definition.
_METADATA = "{urn:lifeboat:mobility:1}"


def home_addresses(definition: str) -> list[str]:
    """The addresses that a definition's metadata says."""
    found = etree.fromstring(definition.encode()).iterfind(f"metadata//{_METADATA}address")
    return [text for element in found if (text := (element.text or "").strip())]


class ArrivalNetwork(Protocol):
    """Told where a VM runs. Every call may be repeated: a crash may call it twice."""

    @property
    def leads_addresses(self) -> bool:
        """Whether VMs' addresses are led here at all, or are somebody else's business."""

    async def outlook(self, vm: str, name: str, definition: str, *, arriving: bool) -> list[Finding]:
        """What would keep its home addresses from following it, to here (``arriving``) or from here.

        Changes nothing, never raises.
        """

    async def install(self, definition: str, arrival: Arrival) -> None:
        """Of a released, still paused VM: make its addresses lead here, with the arrival's epoch.

        Raises LifeboatError.
        """

    async def remove(self, arrival: Arrival) -> None:
        """It will not run here after all. Never raises: the old place's claim has to hold without it."""

    async def stands_still(self, job: Job) -> bool:
        """It still stands still here, to go on at the job's peer: what comes for it goes on waiting, for some
        seconds. Whether that is to be said again. Never raises."""

    async def left(self, job: Job) -> None:
        """It runs at the job's peer: what still comes here is sent on. Never raises."""

    async def stayed(self, definition: str, job: Job) -> None:
        """It was started anew here after its release had been taken back. Never raises."""


class NothingToDo:
    """Both sites share the VM's network (or the operator moves it): nothing to install."""

    leads_addresses = False

    async def outlook(self, *_unused: str, arriving: bool) -> list[Finding]:  # noqa: ARG002
        """Nothing that concerns us."""
        return []

    async def install(self, definition: str, arrival: Arrival) -> None:
        """Do nothing."""

    async def remove(self, arrival: Arrival) -> None:
        """Do nothing."""

    async def stands_still(self, job: Job) -> bool:  # noqa: ARG002
        """Nobody has anything that waits."""
        return False

    async def left(self, job: Job) -> None:
        """Do nothing."""

    async def stayed(self, definition: str, job: Job) -> None:
        """Do nothing."""


class NetworkNotInstalled(LifeboatError):
    """The mobility agent did not take the VM."""

    cause = NETWORK_CAUSE
    http_status = 502


class MobilityAgent:
    """This host's mobility agent, asked over its UNIX socket (its control API ``/v1``).

    ``wait_seconds``: how long an agent that does not answer may keep a VM waiting.
    """

    leads_addresses = True

    def __init__(self, socket: Path, wait_seconds: float) -> None:
        self._socket = socket
        self._wait_seconds = wait_seconds

    async def outlook(self, vm: str, name: str, definition: str, *, arriving: bool) -> list[Finding]:
        """Ask it, once: what it says of the VM's home addresses, or that it does not answer."""
        of, seconds = "its home addresses", min(self._wait_seconds, _OUTLOOK_SECONDS)
        try:
            homes = home_addresses(definition)
            if not homes:
                return []
            of = ", ".join(homes)
            async with asyncio.timeout(seconds):
                status, answer = await self._once(
                    vm, "outlook", {"definition": definition, "arriving": arriving}
                )
            if status < 400:
                return [
                    Finding(**{key: str(said) for key, said in each.items()}) for each in answer["findings"]
                ]
            reason = str(answer.get("message", f"status {status}"))
        except TimeoutError:
            reason = f"no answer within {seconds:g} s"
        except (aiohttp.ClientError, OSError, ValueError, etree.LxmlError) as error:
            reason = str(error)
        except (KeyError, TypeError, AttributeError) as error:
            reason = f"its answer is not understood: {error!r}"
        where = "there" if arriving else "here"
        fact = f"the mobility agent {where} cannot be asked of {of} ({reason})"
        way_out = f"see `mobility-agent check` and journalctl -u mobility-agent {where}"
        return [Finding(f"VM {name}", fact, way_out)]

    async def install(self, definition: str, arrival: Arrival) -> None:
        """Have routes and registrations made for it. Raises NetworkNotInstalled."""
        began = time.monotonic()
        # The release is the word that it runs nowhere else: a newer epoch that anchors know of a move by
        # hand, or of an attempt that was taken back, must not stand against it.
        body = {"epoch": arrival.epoch, "definition": definition, "evident": True}
        answer = await self._post(arrival.vm, arrival.name, "arrive", body)
        arrival.timings["network_seconds"] = time.monotonic() - began
        if answer.get("state") == "no-home-address":
            logger.info("VM %s: has no home address; its network is left as it is", arrival.vm)

    async def remove(self, arrival: Arrival) -> None:
        """Withdraw it here."""
        await self._tell(arrival.vm, arrival.name, "depart", {"withdraw": True})

    async def stands_still(self, job: Job) -> bool:
        """Ask it, once. One that is away for a moment may be back; one of an older version cannot."""
        try:
            async with asyncio.timeout(min(self._wait_seconds, _OUTLOOK_SECONDS)):
                status, _answer = await self._once(job.vm, "hold", {"longer": True})
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
            logger.debug("VM %s: what waits for it here is not held for longer: %s", job.vm, error)
            return True
        return status < 400 or status in _PASSING

    async def left(self, job: Job) -> None:
        """Have the agent send on to the peer's gateway; anchors tell it the same a little later."""
        await self._tell(job.vm, job.name, "depart", {"to": job.peer})

    async def stayed(self, definition: str, job: Job) -> None:
        """Claim it back from the destination, which may have been told of it already."""
        # The epoch before the attempt: raised only where anchors have heard of the attempt.
        body = {"epoch": max(job.epoch - 1, 0), "definition": definition, "evident": True}
        await self._tell(job.vm, job.name, "arrive", body)

    async def _tell(self, vm: str, name: str, what: str, body: dict[str, Any]) -> None:
        try:
            await self._post(vm, name, what, body)
        except NetworkNotInstalled as error:
            logger.warning("%s", error)

    async def _post(self, vm: str, name: str, what: str, body: dict[str, Any]) -> dict[str, Any]:
        reason = "no answer"
        try:
            async with asyncio.timeout(self._wait_seconds):
                while True:
                    try:
                        status, answer = await self._once(vm, what, body)
                    except (aiohttp.ClientError, OSError, ValueError) as error:
                        reason = str(error)
                    else:
                        reason = str(answer.get("message", f"status {status}"))
                        if status < 400 or (what == "depart" and status == 404):
                            return answer
                        if status not in _PASSING:
                            break
                    await asyncio.sleep(_RETRY_SECONDS)
        except TimeoutError:
            reason = f"not within {self._wait_seconds:g} s: {reason}"
        raise NetworkNotInstalled(
            f"VM {name}: the mobility agent at {self._socket} did not take it ({reason}); "
            "see `mobility-agent check` and journalctl -u mobility-agent"
        )

    async def _once(self, vm: str, what: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        connector = aiohttp.UnixConnector(path=str(self._socket))
        url = f"http://agent/v1/vms/{quote(vm, safe='')}/{what}"
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.post(url, json=body) as response,
        ):
            answer = await response.json()
            if not isinstance(answer, dict):
                raise ValueError(f"status {response.status} and no JSON object: is that a mobility agent?")
            return response.status, answer
