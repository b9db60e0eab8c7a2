# SPDX-License-Identifier: GPL-3.0-or-later
"""What waits while a VM is moved: how much, how long, in which order, and who gets it in the end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterable
from ipaddress import IPv6Address, IPv6Network
from typing import Any

import pytest

from mobility_agent.errors import KernelRefused, Unsupported
from mobility_agent.gateway import holds as holds_module
from mobility_agent.gateway.holds import Holds

VM, OTHER_VM = "11111111-2222-3333-4444-555555555555", "11111111-2222-3333-4444-666666666666"
PREFIX = IPv6Network("2001:db8:100::/64")
HOME, OTHER_HOME = IPv6Network("2001:db8:100::5/128"), IPv6Network("2001:db8:100::6/128")
WIDE = IPv6Network("2001:db8:100:0:8000::/66")


class Device:
    """A TUN device's two ends as a pair of sockets that keep packets apart; ``kernel`` is the kernel's."""

    def __init__(self) -> None:
        self.refusal: Unsupported | None = None
        self.is_open = False

    def open(self) -> None:
        if self.refusal is not None:
            raise self.refusal
        self._near, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._near, self.kernel):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.is_open = True

    def fileno(self) -> int:
        return self._near.fileno()

    def read(self) -> bytes | None:
        try:
            packet = self._near.recv(65536)
        except BlockingIOError:
            return None
        if not packet:
            raise OSError("gone")
        return packet

    def write(self, packet: bytes) -> bool:
        try:
            self._near.send(packet)
        except OSError:
            return False
        return True

    def close(self) -> None:
        if self.is_open:
            self._near.close()
        self.is_open = False


class Ways:
    """Which addresses lead into the device. ``at_end`` is done as the last step of a hold's end."""

    def __init__(self) -> None:
        self.held: set[IPv6Network] = set()
        self.refuses = False
        self.prepared = 0
        self.at_end: Any = None

    def prepare_hold(self) -> None:
        self.prepared += 1

    def hold(self, homes: Iterable[IPv6Network]) -> None:
        if self.refuses:
            raise KernelRefused("no")
        self.held.update(homes)

    def end_hold(self, homes: Iterable[IPv6Network]) -> None:
        if self.at_end is not None:
            self.at_end()
        self.held.difference_update(homes)


class Held:
    """Holds, what is under them, and a kernel's hands."""

    def __init__(self, longest_seconds: float = 10.0) -> None:
        self.device, self.ways = Device(), Ways()
        self.holds = Holds(self.ways, self.device, (PREFIX,), longest_seconds)

    def comes(self, *numbers: int, home: IPv6Network = HOME, octets: int = 60) -> None:
        for number in numbers:
            self.device.kernel.send(packet(number, home.network_address, octets))

    def went(self) -> list[int]:
        found = []
        try:
            # Nothing at all: the other end is closed.
            while one := self.device.kernel.recv(65536):
                found.append(int.from_bytes(one[40:44], "big"))
        except BlockingIOError:
            pass
        return found

    async def until_read(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)


def packet(number: int, to: IPv6Address, octets: int = 60) -> bytes:
    body = number.to_bytes(4, "big").ljust(octets - 40, b"\0")
    head = (6 << 28).to_bytes(4, "big") + len(body).to_bytes(2, "big") + bytes([17, 64])
    return head + IPv6Address("2001:db8:c::2").packed + to.packed + body


@pytest.fixture
async def held() -> AsyncIterator[Held]:
    made = Held()
    made.holds.start()
    yield made
    made.holds.stop()


async def test_what_comes_waits_and_goes_in_order_before_what_comes_later(held: Held) -> None:
    assert held.holds.begin(VM, (HOME,))
    assert held.ways.held == {HOME}
    held.comes(*range(300))
    await held.until_read()
    assert held.went() == []
    # Some are still on their way in when the hold ends, and one even behind its end.
    held.comes(*range(300, 400))
    held.ways.at_end = lambda: held.comes(400)
    held.holds.end(VM)
    await held.until_read()
    assert held.went() == [*range(401)]
    assert held.ways.held == set()
    assert held.holds.status() == {"vms": 0, "held": 401, "sent_on": 401, "dropped": 0}


async def test_each_vm_has_its_own(held: Held) -> None:
    held.holds.begin(VM, (HOME,))
    held.holds.begin(OTHER_VM, (OTHER_HOME, WIDE))
    held.comes(1)
    held.comes(2, home=OTHER_HOME)
    held.comes(3, home=IPv6Network(WIDE.network_address + 77))
    held.holds.end(OTHER_VM)
    await held.until_read()
    assert held.went() == [2, 3]
    assert held.ways.held == {HOME}
    held.holds.end(VM)
    await held.until_read()
    assert held.went() == [1]


async def test_what_is_nobodys_is_not_given_back_and_what_is_late_is(held: Held) -> None:
    held.comes(1, home=IPv6Network("ff02::16/128"))
    held.comes(2)
    held.device.kernel.send(b"\x45" + bytes(59))
    held.device.kernel.send(b"\x60")
    await held.until_read()
    assert held.went() == [2]


async def test_a_vm_that_stops_again_while_it_is_served_waits_on_in_order(held: Held) -> None:
    held.holds.begin(VM, (HOME,))
    held.comes(*range(10))
    await held.until_read()
    held.holds.end(VM)
    held.holds.begin(VM, (HOME,))
    await held.until_read()
    assert held.went() == []
    assert held.ways.held == {HOME}
    held.comes(10)
    held.holds.end(VM)
    await held.until_read()
    assert held.went() == [*range(11)]


async def test_of_too_many_packets_the_newest_are_dropped(
    held: Held, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(holds_module, "VM_PACKETS", 5)
    held.holds.begin(VM, (HOME,))
    held.comes(*range(9))
    await held.until_read()
    held.holds.end(VM)
    await held.until_read()
    assert held.went() == [0, 1, 2, 3, 4]
    assert held.holds.status() == {"vms": 0, "held": 9, "sent_on": 5, "dropped": 4}
    assert caplog.text.count("more comes for it than may wait") == 1


@pytest.mark.parametrize("limit", ["VM_OCTETS", "ALL_OCTETS"])
async def test_octets_are_bounded(held: Held, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(holds_module, limit, 2500)
    held.holds.begin(VM, (HOME,))
    held.holds.begin(OTHER_VM, (OTHER_HOME,))
    held.comes(1, home=OTHER_HOME, octets=1000)
    held.comes(2, 3, octets=1000)
    await held.until_read()
    both = limit == "VM_OCTETS"
    assert held.holds.status()["dropped"] == (0 if both else 1)
    held.holds.end(VM)
    held.holds.end(OTHER_VM)
    await held.until_read()
    assert sorted(held.went()) == ([1, 2, 3] if both else [1, 2])
    # What went on makes room again.
    held.holds.begin(VM, (HOME,))
    held.comes(4, 5, octets=1000)
    held.holds.end(VM)
    await held.until_read()
    assert held.went() == [4, 5]


async def test_nobody_waits_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    held = Held(longest_seconds=0.05)
    held.holds.start()
    held.holds.begin(VM, (HOME,))
    held.comes(1)
    await asyncio.sleep(0.2)
    assert held.went() == [1]
    assert held.ways.held == set()
    assert "nobody has said where it goes on" in caplog.text
    held.holds.stop()


async def test_who_says_so_again_and_again_waits_on(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(longest_seconds=2.0)
    held.holds.start()
    assert not held.holds.extend(VM), "its word begins none: the VM may run again by then"
    held.holds.begin(VM, (HOME,))
    held.comes(1)
    for _again in range(5):
        await asyncio.sleep(0.5)
        assert held.holds.extend(VM)
    assert held.went() == []
    held.comes(2)
    held.holds.end(VM)
    assert not held.holds.extend(VM), "it goes on"
    await held.until_read()
    assert held.went() == [1, 2]
    assert held.ways.held == set()
    held.holds.stop()


async def test_what_is_older_than_a_segment_may_get_is_dropped(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holds_module, "OLDEST_SECONDS", 0.3)
    held.holds.begin(VM, (HOME,))
    held.comes(1, 2)
    await held.until_read()
    await asyncio.sleep(0.4)
    held.comes(3)
    await held.until_read()
    held.holds.end(VM)
    await held.until_read()
    assert held.went() == [3]
    assert held.holds.status() == {"vms": 0, "held": 3, "sent_on": 1, "dropped": 2}


async def test_where_nobody_may_say_where_it_went_it_is_sooner_over(held: Held) -> None:
    held.holds.begin(VM, (HOME,))
    held.comes(1)
    held.holds.end_within(VM, 0.05)
    held.holds.end_within(VM, 60)
    held.holds.end_within(OTHER_VM, 1)
    await asyncio.sleep(0.2)
    assert held.went() == [1]


async def test_what_nobody_has_any_more_is_dropped(held: Held) -> None:
    held.holds.begin(VM, (HOME,))
    held.comes(1, 2)
    await held.until_read()
    held.holds.discard(VM)
    held.holds.discard(VM)
    assert held.went() == []
    assert held.ways.held == set()
    assert held.holds.status() == {"vms": 0, "held": 2, "sent_on": 0, "dropped": 2}


async def test_an_agent_that_stops_gives_back_what_waits() -> None:
    held = Held()
    held.holds.start()
    held.holds.begin(VM, (HOME,))
    held.comes(1, 2)
    await held.until_read()
    held.comes(3)
    held.holds.stop()
    assert held.went() == [1, 2, 3]
    assert not held.device.is_open
    assert not held.holds.begin(VM, (HOME,))


async def test_a_kernel_that_refuses_leaves_nothing_held(held: Held) -> None:
    held.ways.refuses = True
    assert not held.holds.begin(VM, (HOME,))
    assert held.holds.status()["vms"] == 0
    held.ways.refuses = False
    assert held.holds.begin(VM, (HOME,))


async def test_a_way_that_cannot_be_closed_lets_packets_through_all_the_same(held: Held) -> None:
    held.holds.begin(VM, (HOME,))
    held.comes(1)

    def refuse() -> None:
        raise KernelRefused("no")

    held.ways.at_end = refuse
    held.holds.end(VM)
    await held.until_read()
    held.comes(2)
    await held.until_read()
    assert held.went() == [1, 2]


async def test_a_device_that_is_taken_away_is_made_anew(held: Held) -> None:
    held.holds.begin(VM, (HOME,))
    held.device.kernel.close()
    await held.until_read()
    assert held.device.is_open
    assert held.ways.prepared == 2
    assert held.ways.held == set()
    held.holds.begin(VM, (HOME,))
    held.comes(1)
    held.holds.end(VM)
    await held.until_read()
    assert held.went() == [1]


async def test_where_there_is_no_such_device_nothing_is_held_and_it_is_told() -> None:
    held = Held()
    said = "device lbhold0: cannot be made (no), so it is lost; load the module"
    held.device.refusal = Unsupported(said)
    held.holds.start()
    assert not held.holds.begin(VM, (HOME,))
    held.holds.end(VM)
    (finding,) = held.holds.findings()
    assert str(finding) == f"moves from here: {said}"
    held.holds.stop()
    assert not Holds(held.ways, None, ()).begin(VM, (HOME,))
