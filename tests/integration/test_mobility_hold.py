# SPDX-License-Identifier: GPL-3.0-or-later
"""What comes for a VM while it is moved: it gets there, wherever the VM goes on, whoever dies meanwhile."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from integration.mobility_agents import ANCHORS, GATEWAYS, Agent, Agents, Conversation, Refused
from integration.mobility_net import HOME_PREFIX, Guest, Namespace, eventually, pings, small_internet

PER_SECOND = 1000
DEVICE, TABLE = "lbhold0", "7603"
_RECEIVE_BUFFER_FORCE = 33
# So many go out one after the other, at most.
_AT_ONCE = 20
# Those that the kernel took on their way in when that was closed, and what was sent at once just then.
OVERTAKEN_AT_MOST = 2 + _AT_ONCE


class Numbers:
    """Datagrams with a number each, from a client to a guest, all the time."""

    def __init__(
        self, client: Namespace, guest: Guest, octets: int = 100, per_second: float = PER_SECOND
    ) -> None:
        self._far = guest.space.inside(socket.socket, socket.AF_INET6, socket.SOCK_DGRAM)
        # What has waited comes all at once.
        self._far.setsockopt(socket.SOL_SOCKET, _RECEIVE_BUFFER_FORCE, 16 << 20)
        guest.space.inside(self._far.bind, (str(guest.home), 0))
        self._near = client.inside(socket.socket, socket.AF_INET6, socket.SOCK_DGRAM)
        self._near.connect(self._far.getsockname()[:2])
        self._octets = octets
        self._per_second = per_second
        self._ending = threading.Event()
        self.sent = 0
        self.received: list[int] = []
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()
        eventually(lambda: len(self.received) > 10)

    def _send(self) -> None:
        due, before = 0.0, time.monotonic()
        while not self._ending.is_set():
            now = time.monotonic()
            # What a machine that stood still missed is not made good: it would be more than a queue holds.
            due, before = min(due + (now - before) * self._per_second, _AT_ONCE), now
            while due >= 1:
                self._near.send(self.sent.to_bytes(4, "big").ljust(self._octets, b"\0"))
                self.sent += 1
                due -= 1
            time.sleep(0.0005)

    def _receive(self) -> None:
        self._far.settimeout(0.2)
        last = time.monotonic()
        while not (self._ending.is_set() and time.monotonic() - last > 1):
            try:
                self.received.append(int.from_bytes(self._far.recv(65536)[:4], "big"))
            except TimeoutError:
                continue
            last = time.monotonic()

    def end(self) -> None:
        """Send no more, and receive what is still under way."""
        self._ending.set()
        for thread in self._threads:
            thread.join(20)
        for one in (self._near, self._far):
            one.close()

    def lost_since(self, number: int) -> set[int]:
        """Which of those that were sent from ``number`` on did not come."""
        return set(range(number, self.sent)) - set(self.received)

    def overtaken_since(self, number: int) -> int:
        """How many came after a later one, of those from ``number`` on."""
        found, greatest = 0, -1
        for each in self.received:
            if each >= number:
                found += each < greatest
                greatest = max(greatest, each)
        return found


def hold(agent: Agent, guest: Guest, **body: bool) -> bool:
    """Say that the guest's vCPUs stand still (or, ``end``, that they run again)."""
    return bool(agent.ask("POST", f"/v1/vms/{guest.vm}/hold", dict(body))["held"])


def counters(agent: Agent) -> dict[str, int]:
    return dict(agent.ask("GET", "/v1/status")["gateway"]["holds"])


def ways_in(agent: Agent) -> int:
    return len(agent.space.show("route", "show", "table", TABLE))


@contextmanager
def stopped(agent: Agent, guest: Guest, numbers: Numbers) -> Iterator[int]:
    """The guest stands still, and what comes for it waits; gives the first number that surely does."""
    before = counters(agent)
    assert hold(agent, guest)
    # What was already on its way to the guest gets there.
    time.sleep(0.1)
    guest.plug(None)
    first = numbers.sent
    time.sleep(0.4)
    assert max(numbers.received) < first
    yield first
    eventually(lambda: counters(agent)["vms"] == 0)
    after = counters(agent)
    assert after["held"] - before["held"] == after["sent_on"] - before["sent_on"] > 400
    assert after["dropped"] == before["dropped"]
    assert ways_in(agent) == 0


def test_what_comes_in_a_long_stop_waits_to_its_end(agents: Agents) -> None:
    """Ten seconds without anybody's word would be over by then."""
    guest, gateway = agents.settle(), agents["gateway1"]
    numbers = Numbers(agents.net["client"], guest, per_second=400)
    with stopped(gateway, guest, numbers) as first:
        for _again in range(4):
            time.sleep(3)
            assert hold(gateway, guest, longer=True)
        guest.plug("gateway2")
        agents["gateway2"].arrive(guest, 2)
    numbers.end()
    assert numbers.lost_since(first) == set()
    assert not hold(gateway, guest, longer=True), "begins none"
    assert "nobody has said where it goes on" not in gateway.log


def test_what_came_while_it_was_moved_is_sent_after_it(agents: Agents) -> None:
    guest, gateway = agents.settle(), agents["gateway1"]
    talk = Conversation(agents.net["client"], guest)
    numbers = Numbers(agents.net["client"], guest)
    with stopped(gateway, guest, numbers) as first:
        guest.plug("gateway2")
        agents["gateway2"].arrive(guest, 2)
        # The anchors tell the old gateway.
    numbers.end()
    assert numbers.lost_since(first) == set()
    assert "since it stood still; sent on, but for 0 dropped" in gateway.log
    talk.goes_on()
    talk.end()


def test_order_is_kept_where_all_of_it_comes_by_the_old_gateway(agents: Agents) -> None:
    guest, gateway = agents.settle(), agents["gateway1"]
    numbers = Numbers(agents.net["client"], guest)
    # Their kernels go on sending to the old gateway.
    for anchor in ANCHORS:
        agents[anchor].kill()
    with stopped(gateway, guest, numbers) as first:
        guest.plug("gateway2")
        agents["gateway2"].arrive(guest, 2)
        gateway.depart(guest, to="gateway2")
    time.sleep(0.3)
    numbers.end()
    assert numbers.lost_since(first) == set()
    assert numbers.overtaken_since(first) <= OVERTAKEN_AT_MOST


def test_a_vm_that_goes_on_here_gets_all_of_it_in_order_and_others_wait_for_nothing(agents: Agents) -> None:
    guest, gateway = agents.settle(), agents["gateway1"]
    neighbour = agents.settle("guest2")
    numbers = Numbers(agents.net["client"], guest)
    with stopped(gateway, guest, numbers) as first:
        assert pings(agents.net["client"], neighbour.home, seconds=5)
        guest.plug("gateway1")
        hold(gateway, guest, end=True)
    time.sleep(0.3)
    numbers.end()
    assert numbers.lost_since(first) == set()
    assert numbers.overtaken_since(first) <= OVERTAKEN_AT_MOST


def test_an_agent_that_is_killed_holds_nothing_back(agents: Agents) -> None:
    guest, gateway = agents.settle(), agents["gateway1"]
    numbers = Numbers(agents.net["client"], guest)
    assert hold(gateway, guest)
    eventually(lambda: max(numbers.received) < numbers.sent - 100)
    assert ways_in(gateway) == 1
    gateway.kill()
    after = numbers.sent
    assert DEVICE not in gateway.space.run("ip", "link", "show").stdout
    assert ways_in(gateway) == 0
    # Without any agent: by the route that stood there all the time.
    eventually(lambda: max(numbers.received) > after + 100)
    gateway.start()
    numbers.end()
    # What had waited is gone, and nothing else.
    assert min(numbers.lost_since(0)) > 10
    assert numbers.lost_since(after + 50) == set()
    assert hold(gateway, guest)
    assert hold(gateway, guest, end=True) is False
    assert pings(agents.net["client"], guest.home)


def test_an_agent_that_is_stopped_gives_back_what_waits(agents: Agents) -> None:
    guest, gateway = agents.settle(), agents["gateway1"]
    numbers = Numbers(agents.net["client"], guest)
    assert hold(gateway, guest)
    time.sleep(0.3)
    gateway.stop()
    assert DEVICE not in gateway.space.run("ip", "link", "show").stdout
    numbers.end()
    # In the instant in which the device goes the kernel may have one in it.
    assert len(numbers.lost_since(0)) <= 3


def test_a_device_that_somebody_takes_away_is_made_anew(agents: Agents) -> None:
    guest, gateway = agents.settle(), agents["gateway1"]
    assert hold(gateway, guest)
    gateway.space.ip(f"link del {DEVICE}")
    assert pings(agents.net["client"], guest.home, seconds=5)
    eventually(lambda: counters(gateway)["vms"] == 0)
    assert "the hold device is gone" in gateway.log
    assert hold(gateway, guest)
    assert ways_in(gateway) == 1
    hold(gateway, guest, end=True)
    eventually(lambda: ways_in(gateway) == 0)


def test_nothing_waits_for_a_vm_that_is_not_here(agents: Agents) -> None:
    guest = agents.settle()
    with pytest.raises(Refused, match="not known to this gateway"):
        hold(agents["gateway2"], guest)
    agents.move(guest, "gateway2", 2)
    assert not hold(agents["gateway1"], guest)
    assert pings(agents.net["client"], guest.home)


def test_larger_packets_than_the_tunnel_takes_are_told_of_to_their_sender(agents: Agents) -> None:
    guest, gateway = agents.settle(), agents["gateway1"]
    client = agents.net["client"]
    # At home by its own routing: full packets get there.
    agents.net["router"].ip(f"route replace {guest.home} via {agents.net.ADDRESSES['gateway1']}")
    assert pings(client, guest.home, 1452)
    for anchor in ANCHORS:
        agents[anchor].kill()
    assert hold(gateway, guest)
    guest.plug(None)
    words = ["ping", "-6", "-c1", "-W9", "-s1452", "-Mdo", str(guest.home)]
    told: list[str] = []
    asking = threading.Thread(target=lambda: told.append(client.run(*words, check=False).stdout))
    asking.start()
    eventually(lambda: counters(gateway)["held"] > 0)
    guest.plug("gateway2")
    agents["gateway2"].arrive(guest, 2)
    gateway.depart(guest, to="gateway2")
    asking.join(20)
    agents.net["router"].ip(f"route del {guest.home}")
    assert "Packet too big: mtu=1460" in told[0]


def test_by_routing_alone_what_waits_goes_by_the_tunnel_too(tmp_path: Path) -> None:
    with small_internet() as net:
        agents = Agents(net, tmp_path, announce=True)
        for name in ANCHORS:
            del agents.of[name]
        for agent in agents.of.values():
            agent.settings["peers"] = [peer for peer in agent.settings["peers"] if peer["name"] in GATEWAYS]
        try:
            agents.start()
            # In place of a routing daemon that has not followed yet.
            net["router"].ip(f"route replace {HOME_PREFIX} via {net.ADDRESSES['gateway1']}")
            guest, gateway = net.guest("guest1", "gateway1"), agents["gateway1"]
            gateway.arrive(guest, 1)
            assert pings(net["client"], guest.home)
            numbers = Numbers(net["client"], guest)
            with stopped(gateway, guest, numbers) as first:
                guest.plug("gateway2")
                agents["gateway2"].arrive(guest, 2)
                gateway.depart(guest, to="gateway2")
            numbers.end()
            assert numbers.lost_since(first) == set()
            assert numbers.overtaken_since(first) <= OVERTAKEN_AT_MOST
        finally:
            agents.kill()
