# SPDX-License-Identifier: GPL-3.0-or-later
"""The gateway when its home comes back, when its kernel refuses, and when its host has started anew."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path
from typing import Any, cast

import pytest

from mobility_agent.config import parse
from mobility_agent.durable import Journal
from mobility_agent.errors import InvalidInput, KernelRefused
from mobility_agent.gateway.attachments import AWAY, HERE
from mobility_agent.gateway.duty import GatewayDuty
from mobility_agent.messages.headers import (
    BindingUpdate,
    Heartbeat,
    Message,
    RevocationAcknowledgement,
    Status,
)
from mobility_agent.messages.options import HandoffIndicator
from mobility_agent.messages.registration import Acknowledgement, Loss, Registration, read_registration

VM = "11111111-2222-3333-4444-555555555555"
HOME = IPv6Network("2001:db8:100::5/128")
MAC = "52:54:00:00:00:01"
BACKUP = IPv6Address("2001:db8:2::d")
KEYS = '[[keys]]\nindex = 256\nsecret = "00112233445566778899aabbccddeeff"\n'
CONFIG = """
name = "home"
address = "2001:db8:1::2"
tunnel_address = "2001:db8:1::d"
gateway = true
{announce}
[paths]
state = "{state}"
[[prefixes]]
prefix = "2001:db8:100::/64"
native = true
[[bridges]]
name = "vmbr0"
[[peers]]
name = "backup"
address = "2001:db8:2::2"
tunnel_address = "2001:db8:2::d"
gateway = true
"""
ANCHORS = """
[[peers]]
name = "anchor1"
address = "2001:db8:a1::2"
tunnel_address = "2001:db8:a1::d"
anchor = true
[[peers]]
name = "anchor2"
address = "2001:db8:a2::2"
tunnel_address = "2001:db8:a2::d"
anchor = true
"""


class Kernel:
    """Where a data path was last told to lead the packets of each address."""

    def __init__(self) -> None:
        self.leads: dict[IPv6Network, object] = {}
        self.refuses = False
        self.anchor: IPv6Address | None = None

    def _judge(self) -> None:
        if self.refuses:
            raise KernelRefused("no")

    def set_local(self, homes: Iterable[IPv6Network], bridge: str, _mac: str) -> None:
        self.leads.update(dict.fromkeys(homes, bridge))
        self._judge()

    def set_lost(self, homes: Iterable[IPv6Network]) -> None:
        self.leads.update(dict.fromkeys(homes, "nowhere"))

    def set_away(self, homes: Iterable[IPv6Network], to: IPv6Address | None) -> None:
        self.leads.update(dict.fromkeys(homes, to or "routing"))

    def clear(self, homes: Iterable[IPv6Network]) -> None:
        for home in homes:
            self.leads.pop(home, None)

    def set_anchor(self, tunnel: IPv6Address) -> None:
        self._judge()
        self.anchor = tunnel

    def has_device(self, _bridge: str) -> bool:
        return True


class Gateway:
    """One gateway with its disk; anchors answer when the test says so."""

    def __init__(self, directory: Path, *, announce: bool = False) -> None:
        text = CONFIG.format(state=directory, announce="announce = true" if announce else "")
        self.config = parse(text + ("" if announce else ANCHORS), KEYS)
        self.directory = directory
        self.sent: list[tuple[str, Message]] = []
        self.start()

    def start(self, *, booted: bool = False) -> None:
        self.kernel = Kernel()
        journal = Journal(self.directory / "attachments.journal")
        self.duty = GatewayDuty(
            self.config, cast(Any, self.kernel), journal, lambda peer, m: self.sent.append((peer.name, m)), {}
        )
        self.duty.restore(booted=booted)
        self.duty.start()

    async def arrive(self, epoch: int) -> None:
        await self.duty.arrive(VM, (HOME,), MAC, "vmbr0", epoch)

    async def answer(
        self,
        epoch: int | None,
        holder: IPv6Address | None,
        status: Status = Status.ACCEPTED,
        anchors: tuple[str, ...] = ("anchor1", "anchor2"),
    ) -> None:
        """What anchors say to the last that each was asked."""
        await asyncio.sleep(0.01)
        for name in anchors:
            updates = [m for who, m in self.sent if who == name and isinstance(m, BindingUpdate)]
            asked = read_registration(updates[-1], self.config.address)
            told = Acknowledgement(
                VM, status, updates[-1].sequence, asked.lifetime_seconds, asked.ticks, (HOME,), epoch, holder
            )
            peer = self.config.peer(name)
            assert peer is not None
            self.duty.take(peer, told.message())
        await asyncio.sleep(0.01)

    def updates(self) -> list[Registration]:
        """The registrations that it sent."""
        sent = [message for _who, message in self.sent if isinstance(message, BindingUpdate)]
        return [read_registration(update, self.config.address) for update in sent]

    async def asked_again(self) -> None:
        """Wait until both anchors were asked."""
        for _ in range(500):
            if {who for who, message in self.sent if isinstance(message, BindingUpdate)} >= {
                "anchor1",
                "anchor2",
            }:
                return
            await asyncio.sleep(0.01)
        pytest.fail("not asked again")

    def where(self) -> tuple[str, IPv6Address | None] | None:
        known = self.duty.attachments.get(VM)
        return None if known is None else (known.state, known.to)


async def test_a_home_that_comes_back_drops_packets_until_the_anchors_say_where_a_vm_went(
    tmp_path: Path,
) -> None:
    gateway = Gateway(tmp_path)
    await gateway.arrive(1)
    await gateway.answer(1, gateway.config.tunnel_address)
    await gateway.duty.stop()

    # It was failed over while the host was off; libvirt answers before any anchor does.
    gateway.start(booted=True)
    await gateway.duty.reconcile(set())
    assert gateway.where() == (AWAY, None)
    assert gateway.kernel.leads == {HOME: "nowhere"}
    assert gateway.duty.neighbourhood.elsewhere(HOME.network_address, duplicate_detection=False)
    # One anchor may know less than the other.
    await gateway.answer(1, None, anchors=("anchor2",))
    assert gateway.where() == (AWAY, None)
    await gateway.answer(2, BACKUP, Status.SEQUENCE_OUT_OF_WINDOW, anchors=("anchor1",))
    assert gateway.where() == (AWAY, BACKUP)
    assert gateway.kernel.leads == {HOME: BACKUP}
    assert gateway.duty.registrar.status(VM) == {}
    await gateway.duty.stop()


async def test_a_vm_that_runs_nowhere_is_forgotten_when_every_anchor_has_said_so(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    await gateway.arrive(1)
    await gateway.answer(1, gateway.config.tunnel_address)
    assert (await gateway.duty.depart(VM, None, withdraw=True))["state"] == "withdrawn"
    await gateway.answer(1, None, anchors=("anchor1",))
    assert gateway.where() == (AWAY, None)
    await gateway.duty.stop()
    # Over a restart, too.
    gateway.start()
    await gateway.answer(1, None)
    assert gateway.where() is None
    assert gateway.kernel.leads == {}
    await gateway.duty.stop()


async def test_a_vm_that_went_stays_known_as_long_as_an_anchor_knows_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mobility_agent.gateway.duty._INQUIRY_SECONDS", 0.05)
    gateway = Gateway(tmp_path)
    await gateway.arrive(1)
    await gateway.duty.depart(VM, BACKUP)
    await asyncio.sleep(0.06)
    # Off for the night.
    await gateway.answer(2, None)
    assert gateway.where() == (AWAY, BACKUP)
    await asyncio.sleep(0.06)
    # No anchor knows of it: it is no more.
    await gateway.answer(None, None)
    assert gateway.where() is None
    assert gateway.kernel.leads == {}
    await gateway.duty.stop()


async def test_of_a_vm_that_was_forgotten_the_anchors_word_is_taken_where_it_runs_now(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    await gateway.arrive(1)
    await gateway.answer(1, gateway.config.tunnel_address)
    await gateway.duty.depart(VM, None, withdraw=True)
    await gateway.answer(1, None)
    assert gateway.where() is None
    anchor = gateway.config.peer("anchor1")
    assert anchor is not None
    strange = IPv6Network("2001:db8:999::5/128")
    gateway.duty.take(anchor, Loss(VM, (strange,), 2, 8, BACKUP).message(1))
    gateway.duty.take(anchor, Loss(VM, (HOME,), 2, 8, None).message(2))
    assert gateway.where() is None
    gateway.sent.clear()
    gateway.duty.take(anchor, Loss(VM, (HOME,), 2, 9, BACKUP).message(3))
    assert [who for who, m in gateway.sent if isinstance(m, RevocationAcknowledgement)] == ["anchor1"]
    assert gateway.where() == (AWAY, BACKUP)
    assert gateway.kernel.leads == {HOME: BACKUP}
    await asyncio.sleep(0.02)
    await gateway.duty.stop()
    gateway.start()
    assert gateway.where() == (AWAY, BACKUP)
    await gateway.duty.stop()


async def test_of_a_vm_that_left_the_anchors_are_asked_when_nobody_says_where_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mobility_agent.gateway.doubts._UNTOLD_SECONDS", 1.0)
    gateway = Gateway(tmp_path)
    await gateway.arrive(1)
    await gateway.answer(1, gateway.config.tunnel_address)
    gateway.sent.clear()
    await gateway.duty.depart(VM, None)
    await asyncio.sleep(0.02)
    assert gateway.updates() == []
    async with asyncio.timeout(10):
        while not gateway.updates():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert {asked.lifetime_seconds for asked in gateway.updates()} == {0}
    assert gateway.where() == (AWAY, None)
    await gateway.answer(2, BACKUP, Status.SEQUENCE_OUT_OF_WINDOW)
    assert gateway.where() == (AWAY, BACKUP)
    # One whose place is known is left in peace.
    await gateway.arrive(3)
    await gateway.answer(3, gateway.config.tunnel_address)
    await gateway.duty.depart(VM, None)
    await gateway.duty.depart(VM, BACKUP)
    gateway.sent.clear()
    await asyncio.sleep(1.3)
    assert gateway.updates() == []
    await gateway.duty.stop()


async def test_one_that_was_found_running_is_taken_up_when_nobody_else_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mobility_agent.gateway.doubts._CONTESTED_SECONDS", 0.1)
    monkeypatch.setattr("mobility_agent.gateway.doubts._LONGER", 1.0)
    gateway = Gateway(tmp_path)
    await gateway.duty.arrive(VM, (HOME,), MAC, "vmbr0", 0, handoff=HandoffIndicator.NEW_INTERFACE)
    await gateway.answer(4, BACKUP, Status.SEQUENCE_OUT_OF_WINDOW, anchors=("anchor1",))
    assert gateway.where() == (AWAY, BACKUP)
    gateway.sent.clear()
    await gateway.asked_again()
    # Asked for as a confirmation, in the epoch that is known: that takes it from nobody.
    asked = gateway.updates()
    assert {(one.epoch, one.refresh) for one in asked} == {(4, True)}
    await gateway.answer(4, BACKUP, Status.ADMINISTRATIVELY_PROHIBITED, anchors=("anchor1",))
    assert gateway.where() == (AWAY, BACKUP)
    assert gateway.kernel.leads == {HOME: BACKUP}
    gateway.sent.clear()
    await gateway.asked_again()
    await gateway.answer(4, gateway.config.tunnel_address, anchors=("anchor1",))
    assert gateway.where() == (HERE, None)
    assert gateway.kernel.leads == {HOME: "vmbr0"}
    # The other anchor has not heard yet that the other one gave it up.
    await gateway.answer(4, BACKUP, Status.ADMINISTRATIVELY_PROHIBITED, anchors=("anchor2",))
    assert gateway.where() == (AWAY, BACKUP)
    gateway.sent.clear()
    await gateway.asked_again()
    await gateway.answer(4, gateway.config.tunnel_address)
    assert gateway.where() == (HERE, None)
    assert gateway.duty.registrar.acknowledged(VM) == ["anchor1", "anchor2"]
    gateway.sent.clear()
    await asyncio.sleep(0.12)
    assert gateway.updates() == []
    await gateway.duty.stop()


@pytest.mark.parametrize("seen", [True, False])
async def test_one_that_ends_here_while_it_is_bound_elsewhere_is_asked_for_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: bool
) -> None:
    monkeypatch.setattr("mobility_agent.gateway.doubts._CONTESTED_SECONDS", 0.1)
    monkeypatch.setattr("mobility_agent.gateway.doubts._LONGER", 1.0)
    gateway = Gateway(tmp_path)
    await gateway.duty.arrive(VM, (HOME,), MAC, "vmbr0", 0, handoff=HandoffIndicator.NEW_INTERFACE)
    await gateway.answer(4, BACKUP, Status.SEQUENCE_OUT_OF_WINDOW, anchors=("anchor1",))
    if seen:
        gateway.duty.ended(VM)
    else:
        # Libvirt was out of reach meanwhile, and does not have it running when it is back.
        await gateway.duty.reconcile({VM})
        gateway.sent.clear()
        await gateway.asked_again()
        await gateway.duty.reconcile(set())
    gateway.sent.clear()
    await asyncio.sleep(0.15)
    assert gateway.updates() == []
    assert gateway.where() == (AWAY, BACKUP)
    await gateway.duty.stop()


async def test_one_that_started_here_is_claimed_as_that_also_after_a_restart_of_the_agent(
    tmp_path: Path,
) -> None:
    """One anchor missed that it left, and has it here already; the other has it nowhere, and is silent."""
    gateway = Gateway(tmp_path)
    own = gateway.config.tunnel_address
    await gateway.duty.arrive(VM, (HOME,), MAC, "vmbr0", 3, handoff=HandoffIndicator.NEW_INTERFACE)
    await gateway.answer(7, own, Status.SEQUENCE_OUT_OF_WINDOW, ("anchor1",))
    await gateway.answer(7, own, anchors=("anchor1",))
    assert gateway.updates()[-1].epoch == 7
    await gateway.duty.stop()
    gateway.sent.clear()
    gateway.start()
    await gateway.asked_again()
    assert gateway.updates()[-1].handoff is HandoffIndicator.UNCHANGED, "which takes it from nobody"
    await gateway.answer(7, None, Status.ADMINISTRATIVELY_PROHIBITED, ("anchor2",))
    last = [message for who, message in gateway.sent if who == "anchor2"][-1]
    assert isinstance(last, BindingUpdate)
    assert read_registration(last, gateway.config.address).handoff is HandoffIndicator.NEW_INTERFACE
    await gateway.answer(7, own)
    assert gateway.duty.registrar.acknowledged(VM) == ["anchor1", "anchor2"]
    known = gateway.duty.attachments.get(VM)
    assert known is not None
    assert not known.started, "every anchor knows"
    await gateway.duty.stop()


async def test_what_left_again_is_not_remembered_as_started_here(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    await gateway.duty.arrive(VM, (HOME,), MAC, "vmbr0", 3, handoff=HandoffIndicator.NEW_INTERFACE)
    known = gateway.duty.attachments.get(VM)
    assert known is not None
    assert known.started
    await gateway.duty.depart(VM, BACKUP)
    await gateway.duty.stop()
    gateway.start()
    known = gateway.duty.attachments.get(VM)
    assert known is not None
    assert (known.state, known.started) == (AWAY, False)
    await gateway.duty.stop()


async def test_a_refused_arrival_leaves_nothing_and_is_refused_again(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    gateway.kernel.refuses = True
    for _ in range(2):
        with pytest.raises(KernelRefused):
            await gateway.arrive(1)
        assert gateway.where() is None
        assert gateway.kernel.leads == {}
    gateway.kernel.refuses = False
    await gateway.arrive(1)
    assert gateway.where() == (HERE, None)
    # And one that is here and shall be elsewhere on this host stays where it was.
    gateway.kernel.refuses = True
    with pytest.raises(KernelRefused):
        await gateway.arrive(2)
    assert gateway.kernel.leads == {HOME: "vmbr0"}
    await gateway.duty.stop()


async def test_a_vm_on_a_bridge_that_the_gateway_keeps_off_is_refused(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    kept_off = {"vmbr0": 0.0}
    gateway.duty.arrivals._kept_off = kept_off.keys()
    with pytest.raises(InvalidInput, match="this gateway is not its first hop; see `mobility-agent check`"):
        await gateway.arrive(1)
    kept_off.clear()
    await gateway.arrive(1)
    await gateway.duty.stop()


async def test_registrations_go_on_while_the_kernel_refuses_the_way_by_an_anchor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = Gateway(tmp_path)
    gateway.kernel.refuses = True
    watch = gateway.duty._watch
    assert watch.in_use == "anchor1"
    peer = gateway.config.peer("anchor2")
    assert peer is not None
    request = None
    for _ in range(100):
        request = next((m for who, m in gateway.sent if who == "anchor2"), None)
        if request is not None:
            break
        await asyncio.sleep(0.01)
    assert isinstance(request, Heartbeat)
    gateway.duty.take(peer, Heartbeat(request.sequence, response=True))
    assert watch.in_use == "anchor1"
    before = len(gateway.sent)
    gateway.kernel.refuses = False
    watch.beat(time.monotonic() + 1)
    assert watch.in_use == "anchor2"
    assert gateway.kernel.anchor == peer.tunnel_address
    assert len(gateway.sent) > before
    assert gateway.duty.failure() is None
    await gateway.duty.stop()


async def test_routing_is_not_told_of_vms_that_ran_before_the_host_started(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, announce=True)
    await gateway.arrive(1)
    await gateway.duty.stop()
    gateway.start()
    assert gateway.kernel.leads == {HOME: "vmbr0"}
    await gateway.duty.stop()
    gateway.start(booted=True)
    assert gateway.kernel.leads == {HOME: "routing"}
    await asyncio.sleep(0.02)
    await gateway.duty.stop()
    # It stays so over a restart of the agent, until the VM runs here.
    gateway.start()
    assert gateway.kernel.leads == {HOME: "routing"}
    await gateway.arrive(1)
    assert gateway.kernel.leads == {HOME: "vmbr0"}
    await gateway.duty.stop()


class Holds:
    """What a gateway told its holds to do, and where the kernel led the VM's packets at that moment."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.told: list[tuple[str, object]] = []

    def begin(self, _vm: str, homes: tuple[IPv6Network, ...]) -> bool:
        self.told.append(("begin", homes))
        return True

    def end(self, _vm: str) -> None:
        self.told.append(("end", self._kernel.leads.get(HOME)))

    def end_within(self, _vm: str, seconds: float) -> None:
        self.told.append(("end within", seconds))

    def discard(self, _vm: str) -> None:
        self.told.append(("discard", self._kernel.leads.get(HOME)))

    def stop(self) -> None:
        self.told.append(("stop", None))


def holding(gateway: Gateway) -> Holds:
    """Have what it tells its holds from now on told to the test."""
    holds = Holds(gateway.kernel)
    for told in ("begin", "end", "end_within", "discard", "stop"):
        setattr(gateway.duty.holds, told, getattr(holds, told))
    return holds


async def test_what_waits_goes_on_when_it_is_known_where_to_and_not_before(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    assert not gateway.duty.hold(VM)
    await gateway.arrive(1)
    holds = holding(gateway)
    assert gateway.duty.hold(VM)
    # libvirt says that it left, and an anchor where it is.
    await gateway.duty.depart(VM, None)
    assert holds.told == [("begin", (HOME,))]
    anchor = gateway.config.peer("anchor1")
    assert anchor is not None
    gateway.duty.take(anchor, Loss(VM, (HOME,), 2, 8, BACKUP).message(1))
    assert holds.told[1:] == [("end", BACKUP)]
    # It is away: what comes for it does not wait here again.
    assert not gateway.duty.hold(VM)
    await gateway.duty.stop()


async def test_what_waits_is_the_vms_own_where_it_stays(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    await gateway.arrive(1)
    holds = holding(gateway)
    gateway.duty.hold(VM)
    gateway.duty.runs_again(VM)
    assert holds.told == [("begin", (HOME,)), ("end", "vmbr0")]
    holds.told.clear()
    # Its release was taken back after it had gone.
    gateway.duty.hold(VM)
    await gateway.duty.depart(VM, None)
    await gateway.arrive(3)
    assert holds.told == [("begin", (HOME,)), ("end", "vmbr0")]
    await gateway.duty.stop()


async def test_what_waits_for_one_that_is_nowhere_is_dropped(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    await gateway.arrive(1)
    await gateway.answer(1, gateway.config.tunnel_address)
    holds = holding(gateway)
    gateway.duty.hold(VM)
    await gateway.duty.depart(VM, None, withdraw=True)
    assert holds.told == [("begin", (HOME,))]
    await gateway.answer(1, None)
    assert holds.told[1:] == [("discard", "nowhere")]
    await gateway.duty.stop()


async def test_by_routing_alone_nothing_waits_long_for_a_word(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, announce=True)
    await gateway.arrive(1)
    holds = holding(gateway)
    gateway.duty.hold(VM)
    await gateway.duty.depart(VM, None)
    assert holds.told == [("begin", (HOME,)), ("end within", 2.0)]
    await gateway.duty.depart(VM, BACKUP)
    assert holds.told[2:] == [("end", BACKUP)]
    await gateway.duty.stop()
    assert holds.told[3:] == [("stop", None)]
