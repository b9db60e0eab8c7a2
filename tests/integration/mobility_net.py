# SPDX-License-Identifier: GPL-3.0-or-later
"""A small internet of network namespaces for the mobility tests: made in a second, gone with the test.

    client ---- router ---- anchor1, anchor2      2001:db8:c::2, ...:a1::2, ...:a2::2
                   |  +---- gateway1 --+          2001:db8:b1::2
                   +------- gateway2 --+-- cable -- guests with home addresses in 2001:db8:100::/64

Each guest hangs on a cable namespace that leads to one gateway's bridge at a time: moving a guest changes
what its frames reach, and the guest itself sees nothing of it, as with a live migration.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest

T = TypeVar("T")
HOME_PREFIX = IPv6Network("2001:db8:100::/64")
ROUTER_MAC = "00:00:5e:00:52:13"
FIRST_HOP = IPv6Address("fe80::1")
BRIDGE = "vmbr0"
_CLONE_NEWNET = 0x40000000
_numbers = itertools.count()
_libc = ctypes.CDLL(None, use_errno=True)


def _enter(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(descriptor, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {path}")
    finally:
        os.close(descriptor)


class Namespace:
    """One network namespace, with a thread of ours inside."""

    def __init__(self, name: str) -> None:
        self.name = name
        _shell(["ip", "netns", "add", name])
        self._thread = ThreadPoolExecutor(1, initializer=_enter, initargs=(f"/run/netns/{name}",))
        self.ip("link set lo up")
        # Links that go down and come up again in a test keep their addresses.
        self.sysctl(all__keep_addr_on_down=1, default__keep_addr_on_down=1)

    def inside(self, function: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
        """Call ``function`` in the namespace."""
        return self._thread.submit(function, *arguments, **keywords).result(60)

    def ip(self, *lines: str) -> None:
        """Run ``ip`` commands in the namespace."""
        text = "\n".join(lines) + "\n"
        subprocess.run(
            ["ip", "-6", "-n", self.name, "-batch", "-"], input=text, text=True, check=True, timeout=30
        )

    def command(self, *words: str) -> list[str]:
        """The command line that runs ``words`` here."""
        return ["ip", "netns", "exec", self.name, *words]

    def run(self, *words: str, check: bool = True, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a program here."""
        return subprocess.run(
            self.command(*words), capture_output=True, text=True, check=check, timeout=timeout
        )

    def show(self, *words: str) -> list[dict[str, Any]]:
        """What ``ip -json`` says."""
        text = _shell(["ip", "-n", self.name, "-json", "-6", *words])
        return list(json.loads(text or "[]"))

    def forwards(self, port: str) -> bool:
        """Whether a bridge's port forwards."""
        (link,) = self.show("-details", "link", "show", "dev", port)
        return bool(link["linkinfo"]["info_slave_data"]["state"] == "forwarding")

    def sysctl(self, **values: str | int) -> None:
        """Set settings of the kernel; in names, ``__`` stands for a slash."""
        for name, value in values.items():
            self.inside(Path(f"/proc/sys/net/ipv6/conf/{name.replace('__', '/')}").write_text, str(value))

    def answer_late(self, centiseconds: int) -> None:
        """How long the kernel may take before it answers for an address that it is a proxy of."""
        self.inside(Path("/proc/sys/net/ipv6/neigh/up0/proxy_delay").write_text, str(centiseconds))

    def remove(self) -> None:
        """Take it away."""
        self._thread.shutdown(wait=False)
        subprocess.run(["ip", "netns", "del", self.name], check=False, timeout=30, capture_output=True)


def _shell(words: Sequence[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class Guest:
    """A VM as the network sees it: a MAC, a home address, a default router, a cable."""

    def __init__(self, net: Net, name: str, number: int) -> None:
        self.net = net
        self.name = name
        self.number = number
        self.vm = f"{number:08x}-1111-2222-3333-444444444444"
        self.home = HOME_PREFIX.network_address + 0x1000 + number
        self.mac = f"52:54:00:00:00:{number:02x}"
        self.space = net.space(name)
        self.cable = net.space(f"{name}c")
        self.at: str | None = None
        #: Home addresses beside ``home``, as they are written.
        self.more_homes: list[str] = []
        net.wire(self.space, "eth0", self.cable, "guest")
        self.space.ip(f"link set eth0 address {self.mac}")
        self.cable.ip("link add cable type bridge", "link set cable up", "link set guest master cable")
        for gateway in ("gateway1", "gateway2"):
            port = self._port(gateway)
            net.wire(self.cable, port, net[gateway], port)
            self.cable.ip(f"link set {port} down", f"link set {port} master cable")
            net[gateway].ip(f"link set {port} master {BRIDGE}")
        self.space.ip(
            f"address add {self.home}/64 dev eth0 nodad", f"route add default via {FIRST_HOP} dev eth0"
        )

    def plug(self, gateway: str | None) -> None:
        """The guest's frames reach this gateway's bridge, and no other, from now on."""
        for other in ("gateway1", "gateway2"):
            state = "up" if other == gateway else "down"
            self.cable.ip(f"link set {self._port(other)} {state}")
        if gateway is not None:
            # A veth's carrier takes the kernel up to a second to notice.
            for space in (self.cable, self.net[gateway]):
                eventually(lambda space=space: space.forwards(self._port(gateway)))
        self.at = gateway

    def _port(self, gateway: str) -> str:
        return f"v{self.number}{gateway[-1]}"

    def pings(self, target: IPv6Address, size: int = 56, seconds: int = 10) -> bool:
        """Whether ``target`` answers this guest."""
        return pings(self.space, target, size, seconds)


def pings(space: Namespace, target: IPv6Address, size: int = 56, seconds: int = 10) -> bool:
    """Whether a ping that is not fragmented is answered within so many seconds."""
    words = ["ping", "-6", "-c", "1", "-W", "1", "-s", str(size), "-M", "do", str(target)]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if space.run(*words, check=False).returncode == 0:
            return True
        time.sleep(0.1)
    return False


def stream(sender: Namespace, receiver: Namespace, address: IPv6Address, octets: int) -> int:
    """Send so many octets by TCP to ``address``, checked by SHA-256; the segment size it ended with."""
    listener = receiver.inside(socket.create_server, ("::", 0), family=socket.AF_INET6)
    content = os.urandom(1 << 20)
    rounds = max(octets >> 20, 1)

    def send() -> int:
        with socket.create_connection((str(address), listener.getsockname()[1]), timeout=20) as connection:
            for _ in range(rounds):
                connection.sendall(content)
            return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)

    def receive() -> bytes:
        listener.settimeout(20)
        connection, _ = listener.accept()
        connection.settimeout(20)
        digest = hashlib.sha256()
        with connection:
            while data := connection.recv(1 << 20):
                digest.update(data)
        return digest.digest()

    with listener, ThreadPoolExecutor(2) as threads:
        received = threads.submit(receiver.inside, receive)
        segment = threads.submit(sender.inside, send).result()
        assert received.result() == hashlib.sha256(content * rounds).digest()
    return segment


class Net:
    """The namespaces and what connects them."""

    ADDRESSES: ClassVar = {
        "client": IPv6Address("2001:db8:c::2"),
        "anchor1": IPv6Address("2001:db8:a1::2"),
        "anchor2": IPv6Address("2001:db8:a2::2"),
        "gateway1": IPv6Address("2001:db8:b1::2"),
        "gateway2": IPv6Address("2001:db8:b2::2"),
    }

    def __init__(self) -> None:
        self.prefix = f"lbm{os.getpid() % 100000}x{next(_numbers)}"
        self._spaces: dict[str, Namespace] = {}
        self._guests = 0
        self.guests: list[Guest] = []
        router = self.space("router")
        router.sysctl(all__forwarding=1)
        for name, address in self.ADDRESSES.items():
            space = self.space(name)
            self.wire(router, name, space, "up0")
            gateway = address - 1
            router.ip(f"address add {gateway}/64 dev {name} nodad")
            space.ip(f"address add {address}/64 dev up0 nodad", f"route add default via {gateway}")
            if name != "client":
                space.sysctl(all__forwarding=1, up0__proxy_ndp=1)
                space.answer_late(centiseconds=0)
        for name in ("gateway1", "gateway2"):
            self[name].ip(f"link add {BRIDGE} type bridge", f"link set {BRIDGE} up")
        self.attract("anchor1")

    @staticmethod
    def tunnel(name: str) -> IPv6Address:
        """Where the tunnels to this anchor or gateway end."""
        return Net.ADDRESSES[name] - 2 + 0xD

    def __getitem__(self, name: str) -> Namespace:
        return self._spaces[name]

    def space(self, name: str) -> Namespace:
        """A new namespace."""
        self._spaces[name] = Namespace(f"{self.prefix}-{name}")
        return self._spaces[name]

    @staticmethod
    def wire(one: Namespace, one_device: str, other: Namespace, other_device: str) -> None:
        """A veth pair between two namespaces, up."""
        one.ip(f"link add {one_device} type veth peer name {other_device} netns {other.name}")
        one.ip(f"link set {one_device} up")
        other.ip(f"link set {other_device} up")

    def attract(self, anchor: str) -> None:
        """The router sends the home prefix to this anchor."""
        address = self.ADDRESSES[anchor]
        self["router"].ip(f"route replace {HOME_PREFIX} via {address}")

    def guest(self, name: str, at: str) -> Guest:
        """A guest plugged in at a gateway."""
        self._guests += 1
        guest = Guest(self, f"{name}n{self._guests}", self._guests)
        self.guests.append(guest)
        guest.plug(at)
        return guest

    def unplug_guests(self) -> None:
        """No guest is anywhere any more."""
        for guest in self.guests:
            guest.plug(None)

    def remove(self) -> None:
        """Take everything away."""
        for space in self._spaces.values():
            space.remove()


@contextlib.contextmanager
def small_internet() -> Iterator[Net]:
    """The namespaces for the time of a test."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    net = Net.__new__(Net)
    try:
        net.__init__()  # type: ignore[misc]
        yield net
    finally:
        net.remove()


def eventually(condition: Callable[[], T], seconds: float = 30.0, pause: float = 0.05) -> T:
    """The first truth that ``condition`` gives; fails when there is none in time."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"not within {seconds} s: {condition}"
        time.sleep(pause)
