# SPDX-License-Identifier: GPL-3.0-or-later
"""Named places where a test may kill this process, to see what a crash there leaves behind.

Honoured only when the environment says ``LIFEBOAT_CRASH_AT=name`` (or ``name:3`` for the third time there)
when the process starts, as in the precache proxy. The table is the one list of them.
"""

from __future__ import annotations

import os
import signal
from typing import Final

from mobility_agent.errors import ConfigurationError

VARIABLE: Final = "LIFEBOAT_CRASH_AT"

CRASH_POINTS: Final[dict[str, str]] = {
    # a gateway, a VM that comes, in order
    "arrival-routed": "its routes and its neighbour stand, nobody was told, nothing is recorded",
    "arrival-claimed": "the anchors were asked, nothing is recorded",
    "arrival-recorded": "the claim is durable, whoever told of the VM has no answer",
    "arrival-acknowledged": "an anchor has it here, the record still says that it is to be claimed",
    "arrival-raised": "the anchors knew a newer epoch, the record has the older one",
    "arrival-adopted": "the anchors have another epoch, the record does not have it",
    # a gateway, a VM that goes
    "departure-led-on": "what still comes is led on or dropped, the record still says that it is here",
    "departure-recorded": "away is durable, whoever told of it has no answer",
    "departure-revoked": "an anchor's word that it is elsewhere is confirmed, nothing was done here",
    "withdrawal-asked": "the anchors were asked to forget it, away is not durable",
    "withdrawal-confirmed": "no anchor has it, the record of it is still there",
    "forwarding-ended": "what still comes goes by way of the anchors again",
    # an anchor
    "binding-routed": "packets go to the new gateway, the record names the former one",
    "binding-recorded": "the binding is durable, the new gateway has no answer",
    "binding-answered": "the new gateway has its answer, the former one was not told",
    "loss-told": "the former gateway was told once",
    "loss-confirmed": "the former gateway has confirmed, the record still says that it was not told",
    "attraction-routed": "the home prefixes are attracted, or not any more; what is kept says otherwise",
    # either
    "stop-first-hop-left": "bridges are as they were found, the data path still stands",
}


def _wanted() -> tuple[str, int]:
    name, _unused, count = os.environ.get(VARIABLE, "").partition(":")
    if name and name not in CRASH_POINTS:
        raise ConfigurationError(f"{VARIABLE}={name}: no such point; the table is in crash_points.py")
    return name, int(count) if count.isdigit() else 1


_name, _remaining = _wanted()


def crash_point(name: str) -> None:
    """Die here by SIGKILL if the environment asked for it; otherwise nothing. KeyError: an unlisted name."""
    global _remaining  # noqa: PLW0603  (how often we came by is a fact of the process)
    CRASH_POINTS[name]
    if name != _name:
        return
    _remaining -= 1
    if _remaining <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
