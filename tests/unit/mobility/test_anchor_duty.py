# SPDX-License-Identifier: GPL-3.0-or-later
"""The anchor between gateways, kernel and disk, where one of them fails."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mobility_agent import durable
from mobility_agent.anchor.duty import AnchorDuty
from mobility_agent.durable import Journal
from mobility_agent.errors import KernelRefused
from mobility_agent.messages.headers import BindingAcknowledgement, Revocation, Status
from mobility_agent.messages.options import HandoffIndicator
from mobility_agent.messages.registration import acknowledge_loss, read_acknowledgement
from unit.mobility.lone_anchor import HOME, PREFIX, VM, LoneAnchor


class Anchor(LoneAnchor):
    """One that works, asked as a gateway does."""

    def anew(self) -> AnchorDuty:
        duty = super().anew()
        duty.start()
        return duty

    async def ask(
        self,
        name: str,
        epoch: int,
        handoff: HandoffIndicator = HandoffIndicator.BETWEEN_GATEWAYS,
        *,
        lifetime_seconds: int = 120,
    ) -> int:
        """Register the VM at this gateway: the status of the answer, which comes when a disk has synced."""
        self.sent.clear()
        self.register(name, epoch, handoff, lifetime_seconds)
        async with asyncio.timeout(10):
            while (status := self._status(name)) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        # What follows from it without a sync.
        await asyncio.sleep(0.02)
        return status

    async def ask_in_vain(
        self, name: str, epoch: int, handoff: HandoffIndicator = HandoffIndicator.BETWEEN_GATEWAYS
    ) -> None:
        """The same where nobody answers."""
        self.sent.clear()
        self.register(name, epoch, handoff, 120)
        await asyncio.sleep(0.1)
        assert self._status(name) is None

    def _status(self, name: str) -> int | None:
        for who, message in self.sent:
            if who == name and isinstance(message, BindingAcknowledgement):
                answer = read_acknowledgement(message)
                return message.status if answer is None else answer.status
        return None

    def kept(self) -> dict[str, Any]:
        # Of a copy: who opens a journal writes it anew.
        copy = self.directory / "copy.journal"
        copy.write_bytes((self.directory / "bindings.journal").read_bytes())
        return Journal(copy).open()


@pytest.fixture
async def anchor(tmp_path: Path) -> AsyncIterator[Anchor]:
    anchor = Anchor(tmp_path)
    yield anchor
    await anchor.duty.stop()


async def test_what_the_kernel_refused_is_carried_out_and_kept_when_it_is_asked_again(anchor: Anchor) -> None:
    assert await anchor.ask("home", 1) == Status.ACCEPTED
    anchor.kernel.refuses = True
    assert await anchor.ask("backup", 2) == Status.INSUFFICIENT_RESOURCES
    assert anchor.kept()[VM]["epoch"] == 1
    anchor.kernel.refuses = False
    # As a gateway asks again: a refresh of what the table has already.
    assert await anchor.ask("backup", 2) == Status.ACCEPTED
    assert anchor.kernel.remote == {HOME: anchor.peer("backup").tunnel_address}
    assert anchor.kept()[VM]["epoch"] == 2
    # The gateway that lost it is told, too.
    assert [who for who, message in anchor.sent if isinstance(message, Revocation)] == ["home"]


async def test_what_the_disk_refused_is_not_acknowledged_before_it_is_kept(
    anchor: Anchor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await anchor.ask("home", 1) == Status.ACCEPTED

    def full(*_unused: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mobility_agent.durable.os.fdatasync", full)
        patch.setattr("mobility_agent.durable.os.fsync", full)
        await anchor.ask_in_vain("backup", 2)
        await anchor.ask_in_vain("backup", 2)
        await anchor.ask_in_vain("backup", 2, HandoffIndicator.UNCHANGED)
    assert await anchor.ask("backup", 2) == Status.ACCEPTED
    assert anchor.kept()[VM]["epoch"] == 2


async def test_what_is_asked_twice_while_the_disk_is_slow_is_written_once_and_answered_after_it(
    anchor: Anchor, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    sync, written = durable.os.fdatasync, threading.Event()

    def slow(file: int) -> None:
        written.wait(10)
        sync(file)
        synced.append(file)

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "fdatasync", slow)
        await anchor.ask_in_vain("home", 1)
        await anchor.ask_in_vain("home", 1)
        written.set()
        async with asyncio.timeout(10):
            while len(anchor.sent) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert len(synced) == 1
    statuses = [m.status for _who, m in anchor.sent if isinstance(m, BindingAcknowledgement)]
    assert statuses == [Status.ACCEPTED, Status.ACCEPTED]
    assert (anchor.directory / "bindings.journal").read_bytes().count(b"\n") == 1


async def test_who_had_a_vm_is_awaited_until_it_knows(anchor: Anchor) -> None:
    assert await anchor.ask("home", 1) == Status.ACCEPTED
    assert anchor.duty.table.awaited(PREFIX) == 0
    assert await anchor.ask("backup", 2) == Status.ACCEPTED
    assert anchor.duty.table.awaited(PREFIX) == 1
    # It does not answer, and the anchor starts anew: still awaited.
    await anchor.duty.stop()
    anchor.duty = anchor.anew()
    assert anchor.duty.table.awaited(PREFIX) == 1
    # It comes back with what it knew, and is told better.
    assert await anchor.ask("home", 1, HandoffIndicator.UNCHANGED) == Status.SEQUENCE_OUT_OF_WINDOW
    assert anchor.duty.table.awaited(PREFIX) == 0
    assert "untold" not in anchor.kept()[VM]


async def test_who_confirms_its_loss_is_not_awaited(anchor: Anchor) -> None:
    assert await anchor.ask("home", 1) == Status.ACCEPTED
    assert await anchor.ask("backup", 2) == Status.ACCEPTED
    loss = next(message for _who, message in anchor.sent if isinstance(message, Revocation))
    anchor.duty.take(anchor.peer("home"), acknowledge_loss(loss))
    assert anchor.duty.table.awaited(PREFIX) == 0


async def test_a_binding_that_ends_while_the_kernel_refuses_does_not_end_the_anchors_work(
    anchor: Anchor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await anchor.ask("home", 1, lifetime_seconds=4) == Status.ACCEPTED

    def broken(_homes: object) -> None:
        raise KernelRefused("no")

    monkeypatch.setattr(anchor.kernel, "clear_remote", broken)
    later = time.monotonic() + 10
    clock = SimpleNamespace(monotonic=lambda: later, time=time.time)
    monkeypatch.setattr("mobility_agent.anchor.duty.time", clock)
    anchor.duty._wake.set()
    for _ in range(20):
        await asyncio.sleep(0.001)
    monkeypatch.undo()
    assert anchor.duty.failure() is None
    assert len(anchor.duty.table) == 0
    assert await anchor.ask("home", 1) == Status.ACCEPTED
