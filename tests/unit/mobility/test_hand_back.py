# SPDX-License-Identifier: GPL-3.0-or-later
"""Whom an anchor tells where a VM went, before a home gets its prefix back."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mobility_agent.anchor import duty as duty_module
from mobility_agent.messages.headers import Heartbeat, Revocation
from mobility_agent.messages.options import HandoffIndicator
from mobility_agent.messages.registration import acknowledge_loss, read_loss
from unit.mobility.lone_anchor import HOME, PREFIX, LoneAnchor


class Anchor(LoneAnchor):
    """One that tells only when it is asked."""

    async def ask(self, name: str, handoff: HandoffIndicator, *, lifetime_seconds: int = 120) -> None:
        self.register(name, 1, handoff, lifetime_seconds)
        await asyncio.sleep(0.02)

    def beat(self, name: str) -> None:
        assert self.duty.take(self.peer(name), Heartbeat(1, response=False))

    def losses(self) -> list[tuple[str, Revocation]]:
        """What was told since this was asked last."""
        found = [(who, m) for who, m in self.sent if isinstance(m, Revocation)]
        self.sent.clear()
        return found


async def test_a_gateway_that_gave_a_vm_up_is_told_where_it_was_started_and_told_again_at_each_refresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duty_module, "_FIRST_TELLING_SECONDS", 0.0)
    anchor = Anchor(tmp_path)
    await anchor.ask("home", HandoffIndicator.NEW_INTERFACE)
    # Shut off in order, then started elsewhere in the same epoch: nobody was displaced.
    await anchor.ask("home", HandoffIndicator.UNCHANGED, lifetime_seconds=0)
    assert anchor.losses() == []
    await anchor.ask("backup", HandoffIndicator.NEW_INTERFACE)
    assert anchor.duty.table.awaited(PREFIX) == 1
    ((who, message),) = anchor.losses()
    loss = read_loss(message)
    assert loss is not None
    assert (who, loss.homes, loss.holder) == ("home", (HOME,), anchor.peer("backup").tunnel_address)
    # It is cut off: what is told at once is over after some seconds.
    for _ in range(12):
        anchor.duty._tell_again(time.monotonic())
    assert anchor.duty._tellings == {}
    anchor.losses()
    await anchor.ask("backup", HandoffIndicator.UNCHANGED)
    ((who, message),) = anchor.losses()
    assert who == "home"
    anchor.duty.take(anchor.peer("home"), acknowledge_loss(message))
    assert anchor.duty.table.awaited(PREFIX) == 0
    await anchor.ask("backup", HandoffIndicator.UNCHANGED)
    assert anchor.losses() == []
    await anchor.duty.stop()


async def test_a_gateway_that_was_cut_off_is_told_what_it_lost_when_its_heartbeat_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duty_module, "_FIRST_TELLING_SECONDS", 0.0)
    anchor = Anchor(tmp_path)
    await anchor.duty.stop()
    anchor.config = replace(anchor.config, heartbeat_seconds=0.05)
    anchor.duty = anchor.anew()
    await anchor.ask("home", HandoffIndicator.NEW_INTERFACE)
    await anchor.ask("home", HandoffIndicator.UNCHANGED, lifetime_seconds=0)
    anchor.beat("home")
    await anchor.ask("backup", HandoffIndicator.NEW_INTERFACE)
    for _ in range(12):
        anchor.duty._tell_again(time.monotonic())
    anchor.losses()
    anchor.beat("backup")
    assert anchor.losses() == [], "it has the VM"
    await asyncio.sleep(0.2)
    anchor.beat("home")
    ((who, message),) = anchor.losses()
    assert who == "home"
    anchor.beat("home")
    assert anchor.losses() == [], "it was not silent"
    anchor.duty.take(anchor.peer("home"), acknowledge_loss(message))
    await asyncio.sleep(0.2)
    anchor.beat("home")
    assert anchor.losses() == [], "it knows"
    await anchor.duty.stop()


async def test_an_anchor_that_begins_tells_each_gateway_that_it_hears_what_it_lost(tmp_path: Path) -> None:
    anchor = Anchor(tmp_path)
    await anchor.ask("home", HandoffIndicator.NEW_INTERFACE)
    await anchor.ask("home", HandoffIndicator.UNCHANGED, lifetime_seconds=0)
    await anchor.ask("backup", HandoffIndicator.NEW_INTERFACE)
    await anchor.duty.stop()
    anchor.losses()
    anchor.duty = anchor.anew()
    anchor.beat("home")
    ((who, _unused),) = anchor.losses()
    assert who == "home"
    await anchor.duty.stop()
