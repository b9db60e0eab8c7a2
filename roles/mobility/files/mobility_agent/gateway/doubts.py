# SPDX-License-Identifier: GPL-3.0-or-later
"""VMs of which a gateway and the anchors do not know the same, and when the anchors are asked again.

Both come of moves by hand whose other gateway's agent was dead meanwhile. At the source nobody says where the
VM went, and the anchors go on sending its packets here. At the destination libvirt has it running, but nobody
saw it come: it is claimed in no newer epoch, so that a second copy could not take it from the first one, and
the anchors refuse. The source gives it up after a while, and the destination has it as soon as nobody else
has: it confirms what it was refused, which takes it from nobody.
"""

from __future__ import annotations

from collections.abc import Collection

from mobility_agent.gateway.attachments import HERE, Attachment
from mobility_agent.messages.options import HandoffIndicator

# Whoever knows where it went has long said so then.
_UNTOLD_SECONDS = 10.0
# Anchors write down each refusal: less often, the longer it goes on.
_CONTESTED_SECONDS, _LONGER, _LONGEST_SECONDS = 3.0, 1.5, 30.0


class Doubts:
    """Pure: the clock (monotonic seconds) comes with each call."""

    def __init__(self) -> None:
        self._untold: dict[str, float] = {}
        # By VM: when it is due, and how long to wait then.
        self._contested: dict[str, tuple[float, float]] = {}

    def left(self, vm: str, now: float) -> None:
        """``vm`` went from here, and nobody has said where to."""
        self._untold[vm] = now + _UNTOLD_SECONDS

    def refused(self, vm: str, attachment: Attachment | None, now: float) -> None:
        """The anchors have ``vm`` elsewhere: contested, if it was claimed as one that libvirt has running."""
        if attachment is None or attachment.state != HERE:
            return
        if attachment.handoff is HandoffIndicator.NEW_INTERFACE:
            self._contested[vm] = now + _CONTESTED_SECONDS, _CONTESTED_SECONDS * _LONGER

    def contested(self, vm: str) -> bool:
        """Whether it runs here while anchors had it elsewhere."""
        return vm in self._contested

    def settled(self, vm: str) -> None:
        """Nothing is in doubt of it any more."""
        self._untold.pop(vm, None)
        self._contested.pop(vm, None)

    def running(self, vms: Collection[str]) -> None:
        """Those that libvirt has running here are all that can be contested; an end may have been missed."""
        for vm in self._contested.keys() - set(vms):
            del self._contested[vm]

    def untold_due(self, now: float) -> Collection[str]:
        """Those to be given up now, once."""
        due = [vm for vm, at in self._untold.items() if at <= now]
        for vm in due:
            del self._untold[vm]
        return due

    def contested_due(self, now: float) -> Collection[str]:
        """Those to be confirmed now, and again after a while."""
        due = [vm for vm, (at, _pause) in self._contested.items() if at <= now]
        for vm in due:
            pause = self._contested[vm][1]
            self._contested[vm] = now + pause, min(pause * _LONGER, _LONGEST_SECONDS)
        return due

    def times(self) -> Collection[float]:
        """When something is due."""
        return [*self._untold.values(), *(at for at, _pause in self._contested.values())]
