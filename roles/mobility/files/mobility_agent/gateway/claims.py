# SPDX-License-Identifier: GPL-3.0-or-later
"""Asking the anchors whether a VM may have addresses, before anything is routed to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from ipaddress import IPv6Network

from mobility_agent.gateway.attachments import Attachments
from mobility_agent.gateway.registrar import Phase, Registrar
from mobility_agent.messages.options import HandoffIndicator

_STEP_SECONDS = 0.05


class AnchorClaims:
    """A registration like any other, but of a VM that is not attached; ``nudge`` has it sent at once."""

    def __init__(self, registrar: Registrar, attachments: Attachments, nudge: Callable[[], None]) -> None:
        self._registrar = registrar
        self._attachments = attachments
        self._nudge = nudge

    def owner(self, home: IPv6Network) -> str | None:
        """The VM (UUID) that this gateway knows to have it, here or gone from here."""
        known = self._attachments.owner(home)
        return None if known is None else known.vm

    def drop(self, vm: str) -> None:
        """Take back what was asked for, unless the VM has been attached since."""
        if self._attachments.get(vm) is None:
            self._registrar.withdraw(vm, time.monotonic())
            self._nudge()

    async def ask(self, vm: str, homes: tuple[IPv6Network, ...], seconds: float) -> str | None:
        """None: one anchor at least said yes and none no, and it stays claimed; else why not."""
        known = self._attachments.get(vm)
        epoch = 0 if known is None else known.epoch
        until = time.monotonic() + seconds
        self._registrar.attach(vm, homes, epoch, HandoffIndicator.NEW_INTERFACE, time.monotonic())
        self._nudge()
        while True:
            lines = self._registrar.status(vm)
            phases = [line["phase"] for line in lines.values()]
            if not lines:
                return "an anchor has this VM at another gateway, in a newer epoch"
            if Phase.REFUSED.value in phases:
                refused = next(line for line in lines.values() if line["phase"] == Phase.REFUSED.value)
                self.drop(vm)
                return str(refused["sentence"]).removeprefix(f"VM {vm}: ")
            if set(phases) == {Phase.REGISTERED.value}:
                return None
            if time.monotonic() >= until:
                break
            await asyncio.sleep(_STEP_SECONDS)
        if Phase.REGISTERED.value in phases:
            # Those that are silent now are asked for as long as it takes.
            return None
        self.drop(vm)
        return f"no anchor answered within {seconds:g} s"
