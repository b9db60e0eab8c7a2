# SPDX-License-Identifier: GPL-3.0-or-later
"""Home addresses learnt from what guests use, and refused where another VM has them."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv6Address, IPv6Network

import pytest

from mobility_agent.anchor.bindings import BindingTable, KnownGateway, Rules
from mobility_agent.errors import Unreachable
from mobility_agent.gateway.attachments import AWAY, Attachment, Attachments
from mobility_agent.gateway.claims import AnchorClaims
from mobility_agent.gateway.learning import MOST_ADDRESSES, Heard, Learner, Sighting, Unnamed
from mobility_agent.gateway.registrar import Registrar
from mobility_agent.messages.registration import Acknowledgement

PREFIX = IPv6Network("2001:db8:100::/64")
GATEWAY, TUNNEL = IPv6Address("2001:db8:b1::2"), IPv6Address("2001:db8:b1::d")
VM, OTHER = "11111111-2222-4333-8444-555555555501", "11111111-2222-4333-8444-555555555502"
MAC, FOREIGN_MAC = "52:54:00:00:00:01", "52:54:00:00:00:02"
HOME = IPv6Address("2001:db8:100::5")
WEB1 = Unnamed(VM, "web1", "vmbr0", MAC)


class Clock:
    """A time that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Host:
    """A hypervisor with the VMs that it is given."""

    vms: list[Unnamed] = field(default_factory=lambda: [WEB1])
    seen: list[Sighting] = field(default_factory=lambda: [Sighting(MAC, HOME)])
    definitions: dict[IPv6Network, str] = field(default_factory=dict)
    written: list[tuple[str, tuple[IPv6Address, ...]]] = field(default_factory=list)
    refuses: bool = False

    async def unnamed(self) -> list[Unnamed]:
        return self.vms

    async def claimed(self) -> Mapping[IPv6Network, str]:
        return self.definitions

    async def sightings(self, vm: Unnamed) -> list[Sighting]:
        return self.seen

    async def write(self, vm: str, homes: Iterable[IPv6Address]) -> None:
        if self.refuses:
            raise Unreachable("libvirt: no answer; see its journal")
        self.written.append((vm, tuple(homes)))


class Anchors:
    """A real anchor's table behind a gateway's real registrar, without the network between."""

    def __init__(self, *, silent: bool = False) -> None:
        rules = Rules(
            prefixes=[PREFIX],
            gateways={GATEWAY: KnownGateway("kvm1", TUNNEL)},
            timestamp_window_seconds=10,
        )
        self.table = BindingTable(rules)
        self.registrar = Registrar(["anchor1"], TUNNEL, 120)
        self.attachments = Attachments()
        self.claims = AnchorClaims(self.registrar, self.attachments, self._exchange)
        self._silent = silent

    def _exchange(self) -> None:
        for outgoing in self.registrar.due(time.monotonic(), time.time()):
            if self._silent:
                continue
            asked = outgoing.registration
            verdict = self.table.register(
                asked, GATEWAY, outgoing.sequence, now=time.monotonic(), wall=time.time()
            )
            after = verdict.after
            answer = Acknowledgement(
                vm=asked.vm,
                status=verdict.status,
                sequence=outgoing.sequence,
                lifetime_seconds=asked.lifetime_seconds,
                ticks=verdict.ticks,
                homes=asked.homes,
                epoch=None if after is None else after.epoch,
                holder=after.care_of if after is not None and after.active else None,
            )
            self.registrar.acknowledge("anchor1", answer, time.monotonic())


def learner(host: Host, anchors: Anchors, clock: Clock | None = None) -> Learner:
    return Learner(host, anchors.claims, (PREFIX,), clock or Clock())


async def rounds(made: Learner, count: int = 2) -> None:
    for _unused in range(count):
        await made.round()


async def test_an_address_seen_twice_that_no_anchor_refuses_is_written_and_claimed() -> None:
    host, anchors = Host(), Anchors()
    made = learner(host, anchors)
    await rounds(made, 1)
    assert host.written == []
    await rounds(made, 1)
    assert host.written == [(VM, (HOME,))]
    assert anchors.table.owner(HOME) == VM
    assert made.findings() == []


@pytest.mark.parametrize(
    "seen",
    [
        [],
        [Sighting(FOREIGN_MAC, HOME)],
        [Sighting(MAC, IPv6Address("2001:db8:200::5"))],
        [Sighting(MAC, IPv6Address("fe80::5054:ff:fe00:1"))],
    ],
    ids=["nothing", "another card", "outside the home prefixes", "link-local"],
)
async def test_what_is_not_the_vms_home_address_is_not_learnt(seen: list[Sighting]) -> None:
    host, anchors = Host(seen=seen), Anchors()
    made = learner(host, anchors)
    await rounds(made, 3)
    assert (host.written, made.findings(), len(anchors.table)) == ([], [], 0)


async def test_addresses_that_still_change_are_waited_for() -> None:
    host, anchors = Host(), Anchors()
    made = learner(host, anchors)
    for number in itertools.islice(itertools.count(1), 4):
        host.seen = [*host.seen, Sighting(MAC, HOME + number)]
        await rounds(made, 1)
        assert host.written == []
    await rounds(made, 1)
    assert host.written == [(VM, tuple(HOME + number for number in range(5)))]


async def test_an_address_that_an_anchor_has_for_another_vm_is_refused_told_and_not_asked_for_at_once() -> (
    None
):
    host, anchors, clock = Host(), Anchors(), Clock()
    elsewhere = Anchors()
    elsewhere.table = anchors.table
    assert await elsewhere.claims.ask(OTHER, (IPv6Network(HOME),), 1) is None
    made = learner(host, anchors, clock)
    await rounds(made)
    assert host.written == []
    (finding,) = made.findings()
    assert finding.subject == "VM web1"
    assert "uses 2001:db8:100::5, not learnt: " in finding.fact
    assert "not authorized for prefix" in finding.fact
    assert anchors.table.owner(HOME) == OTHER
    assert anchors.registrar.pending() == 0
    before = anchors.registrar.epoch(VM)
    await rounds(made, 3)
    assert anchors.registrar.epoch(VM) == before
    # The other one gives it up: asked for again after a while.
    elsewhere.claims.drop(OTHER)
    clock.now += 1000
    await rounds(made, 1)
    assert host.written == [(VM, (HOME,))]
    assert made.findings() == []


async def test_an_address_of_another_vm_here_is_refused_without_asking_anybody() -> None:
    host, anchors = Host(definitions={IPv6Network(HOME): OTHER}), Anchors()
    made = learner(host, anchors)
    await rounds(made)
    assert "is the address of VM " + OTHER in made.findings()[0].fact
    gone = Anchors()
    gone.attachments.put(Attachment(OTHER, (IPv6Network(HOME),), FOREIGN_MAC, "vmbr0", 3, 0.0, state=AWAY))
    made = learner(Host(), gone)
    await rounds(made)
    assert "is the address of VM " + OTHER in made.findings()[0].fact
    assert len(anchors.table) == len(gone.table) == 0


async def test_a_guest_cannot_take_many_addresses() -> None:
    host = Host(seen=[Sighting(MAC, HOME + number) for number in range(MOST_ADDRESSES + 1)])
    anchors = Anchors()
    made = learner(host, anchors)
    await rounds(made)
    assert f"{MOST_ADDRESSES} at most" in made.findings()[0].fact
    assert (host.written, len(anchors.table)) == ([], 0)


async def test_nothing_is_learnt_while_no_anchor_answers() -> None:
    anchors = Anchors(silent=True)
    assert await anchors.claims.ask(VM, (IPv6Network(HOME),), 0.1) == "no anchor answered within 0.1 s"


async def test_a_definition_that_cannot_be_written_leaves_nothing_claimed() -> None:
    host, anchors = Host(refuses=True), Anchors()
    made = learner(host, anchors)
    with pytest.raises(Unreachable):
        await rounds(made)
    assert anchors.table.owner(HOME) is None


async def test_a_vm_that_is_named_meanwhile_is_forgotten() -> None:
    host, anchors = Host(definitions={IPv6Network(HOME): OTHER}), Anchors()
    made = learner(host, anchors)
    await rounds(made)
    assert made.findings()
    host.vms = []
    await rounds(made, 1)
    assert made.findings() == []


async def test_it_goes_on_when_a_round_fails(caplog: pytest.LogCaptureFixture) -> None:
    host, anchors = Host(refuses=True), Anchors()
    made = learner(host, anchors)
    await rounds(made, 1)
    made.start()
    await asyncio.sleep(0.05)
    await made.stop()
    assert "nothing is learnt now: libvirt: no answer" in caplog.text


def test_what_was_heard_is_kept_by_card_for_a_while_and_bounded() -> None:
    clock = Clock()
    heard = Heard([PREFIX], clock)
    card = bytes.fromhex(MAC.replace(":", ""))
    heard.note(HOME, card)
    heard.note(IPv6Address("fe80::1"), card)
    assert heard.of(MAC) == [Sighting(MAC, HOME)]
    assert heard.of(FOREIGN_MAC) == []
    for number in range(100):
        heard.note(HOME + number, card)
    assert len(heard.of(MAC)) == MOST_ADDRESSES + 1
    clock.now += 601
    assert heard.of(MAC) == []
    for number in range(10_000):
        heard.note(HOME, number.to_bytes(6, "big"))
    assert len(heard._at) <= 4096
