# SPDX-License-Identifier: GPL-3.0-or-later
"""Whom an anchor tells where a VM went, before a home gets its prefix back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path
from typing import Any, cast

import pytest

from mobility_agent.anchor import duty as duty_module
from mobility_agent.anchor.duty import AnchorDuty
from mobility_agent.config import Peer, parse
from mobility_agent.durable import Journal
from mobility_agent.messages.headers import Message, Revocation
from mobility_agent.messages.options import HandoffIndicator, Timestamp
from mobility_agent.messages.registration import Registration, acknowledge_loss, read_loss

VM = "11111111-2222-3333-4444-555555555555"
HOME = IPv6Network("2001:db8:100::5/128")
PREFIX = IPv6Network("2001:db8:100::/64")
KEYS = '[[keys]]\nindex = 256\nsecret = "00112233445566778899aabbccddeeff"\n'
CONFIG = """
name = "anchor1"
address = "2001:db8:a1::2"
tunnel_address = "2001:db8:a1::d"
anchor = true
[paths]
state = "{state}"
[[prefixes]]
prefix = "2001:db8:100::/64"
[[peers]]
name = "home"
address = "2001:db8:1::2"
tunnel_address = "2001:db8:1::d"
gateway = true
[[peers]]
name = "backup"
address = "2001:db8:2::2"
tunnel_address = "2001:db8:2::d"
gateway = true
"""


class Kernel:
    """A data path that takes everything."""

    def set_remote(self, _homes: Iterable[IPv6Network], _care_of: IPv6Address) -> None:
        pass

    def clear_remote(self, _homes: Iterable[IPv6Network]) -> None:
        pass

    def attract(self, _prefixes: Iterable[IPv6Network]) -> None:
        pass


class Anchor:
    """One anchor, and what it sent; its clock-driven work is not begun."""

    def __init__(self, directory: Path) -> None:
        self.config = parse(CONFIG.format(state=directory), KEYS)
        self.sent: list[tuple[str, Message]] = []
        self.sequence = 0
        journal = Journal(directory / "bindings.journal")
        self.duty = AnchorDuty(
            self.config, cast(Any, Kernel()), journal, 1, lambda p, m: self.sent.append((p.name, m)), {}
        )
        self.duty.restore()

    def peer(self, name: str) -> Peer:
        found = self.config.peer(name)
        assert found is not None
        return found

    async def ask(self, name: str, handoff: HandoffIndicator, *, lifetime_seconds: int = 120) -> None:
        self.sequence += 1
        ticks = Timestamp.of_seconds(time.time()).ticks + self.sequence
        asked = Registration(VM, (HOME,), self.peer(name).tunnel_address, 1, ticks, lifetime_seconds, handoff)
        assert self.duty.take(self.peer(name), asked.update(self.sequence))
        await asyncio.sleep(0.02)

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
