# SPDX-License-Identifier: GPL-3.0-or-later
"""Mobility agents as real processes in the namespaces of the small internet."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from ipaddress import IPv6Address
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from integration.mobility_net import (
    BRIDGE,
    HOME_PREFIX,
    Guest,
    Namespace,
    Net,
    eventually,
    pings,
    small_internet,
)

ROOT = Path(__file__).parents[2]
SECRET = "00112233445566778899aabbccddeeff"
ANCHORS = ("anchor1", "anchor2")
GATEWAYS = ("gateway1", "gateway2")
# What an anchor has told a gateway in vain it tells again when the holder refreshes, half a lifetime later.
REFRESH_SECONDS = 60


class _UnixConnection(http.client.HTTPConnection):
    """HTTP on a UNIX socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("agent", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(30)
        self.sock.connect(str(self._path))


class Refused(Exception):
    """The agent answered with an error."""

    def __init__(self, status: int, answer: dict[str, Any]) -> None:
        super().__init__(answer.get("message"))
        self.status = status
        self.cause = answer.get("cause")


class Agent:
    """One agent: its files, its process, its control socket."""

    def __init__(self, net: Net, name: str, directory: Path, settings: dict[str, Any], secret: str) -> None:
        self.net = net
        self.name = name
        self.space = net[name]
        self.directory = directory / name
        self.directory.mkdir(parents=True)
        self.settings = settings
        self.process: subprocess.Popen[bytes] | None = None
        self._said_before = 0
        #: Secrets by the number of their key.
        self.keys = {256: secret}
        #: Where its next start shall be killed, by name (crash_points.py).
        self.crash_at: str | None = None

    @property
    def log(self) -> str:
        """What it said since :meth:`turn_page`, or ever."""
        return (self.directory / "log").read_bytes()[self._said_before :].decode()

    def turn_page(self) -> None:
        """Forget what it said so far."""
        self._said_before = (self.directory / "log").stat().st_size

    def counter(self, what: str) -> int:
        """How many messages met this fate."""
        return int(self.ask("GET", "/v1/status")["messages"].get(what, 0))

    def _config(self) -> str:
        settings, lines = self.settings, []
        tables_of = {key: value for key, value in settings.items() if _is_table(value)}
        plain = {key: value for key, value in settings.items() if key not in tables_of}
        lines += [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
        for name, table in tables_of.items():
            for entry in table if isinstance(table, list) else [table]:
                lines.append(f"[[{name}]]" if isinstance(table, list) else f"[{name}]")
                lines += [f"{key} = {json.dumps(value)}" for key, value in entry.items()]
        return "\n".join(lines) + "\n"

    def start(self, *, wait: bool = True) -> None:
        """Start it, and wait until it answers."""
        path = self.directory / "agent.toml"
        path.write_text(self._config())
        keys = (f'[[keys]]\nindex = {index}\nsecret = "{secret}"\n' for index, secret in self.keys.items())
        (self.directory / "mobility_keys.toml").write_text("".join(keys))
        words = [sys.executable, "-m", "mobility_agent", "--config", str(path), "run", "--verbose"]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "roles/mobility/files"), "PYTHONUNBUFFERED": "1"}
        crash_at, self.crash_at = self.crash_at, None
        if crash_at is not None:
            environment["LIFEBOAT_CRASH_AT"] = crash_at
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.space.command(*words), stdout=log, stderr=log, env=environment
            )
        if wait:
            eventually(self.answers, 20)

    def answers(self) -> bool:
        """Whether it serves."""
        assert self.process is not None
        assert self.process.poll() is None, self.log
        with contextlib.suppress(OSError):
            return bool(self.ask("GET", "/v1/status")["state"] == "running")
        return False

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One request to its control interface."""
        connection = _UnixConnection(self.directory / "run" / "mobility.sock")
        with contextlib.closing(connection):
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            answer: dict[str, Any] = json.loads(response.read())
        if response.status >= 400:
            raise Refused(response.status, answer)
        return answer

    def arrive(self, guest: Guest, epoch: int, /, **more: Any) -> dict[str, Any]:
        """The guest is about to run here."""
        addresses = [str(guest.home), *guest.more_homes]
        body = {"addresses": addresses, "mac": guest.mac, "bridge": BRIDGE, "epoch": epoch} | more
        return self.ask("POST", f"/v1/vms/{guest.vm}/arrive", body)

    def depart(self, guest: Guest, **body: Any) -> dict[str, Any]:
        """The guest runs here no more."""
        return self.ask("POST", f"/v1/vms/{guest.vm}/depart", body)

    def vm(self, guest: Guest) -> dict[str, Any]:
        """What this gateway knows of the guest."""
        return self.ask("GET", f"/v1/vms/{guest.vm}")

    def binding(self, guest: Guest) -> dict[str, Any] | None:
        """What this anchor has of the guest."""
        try:
            return self.ask("GET", f"/v1/bindings/{guest.vm}")
        except Refused:
            return None

    def holder(self, guest: Guest) -> str | None:
        """The gateway that this anchor sends the guest's packets to."""
        binding = self.binding(guest)
        return binding["gateway"] if binding and binding["state"] == "bound" else None

    def kill(self) -> None:
        """As a crash: no word to anybody."""
        self._end(signal.SIGKILL)

    def killed_itself(self, seconds: float = 20) -> None:
        """Wait until it has come to where it was to be killed; fails when it does not come there."""
        assert self.process is not None
        try:
            assert self.process.wait(seconds) == -signal.SIGKILL, self.log
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.name} never came to where it was to be killed:\n{self.log}")
        self.process = None

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """It does nothing meanwhile."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """In good order."""
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        if self.process is not None:
            if self.process.poll() is None:
                self.process.send_signal(number)
            self.process.wait(20)
            self.process = None


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and all(isinstance(item, dict) for item in value)
    )


class Agents:
    """Two anchors, two gateways, and the net that they are in."""

    def __init__(self, net: Net, directory: Path, **changes: Any) -> None:
        self.net = net
        self.of: dict[str, Agent] = {}
        secrets = changes.pop("secrets", {})
        everybody = (*ANCHORS, *GATEWAYS)
        for name in everybody:
            settings: dict[str, Any] = {
                "name": name,
                "address": str(net.ADDRESSES[name]),
                "tunnel_address": str(net.tunnel(name)),
                "anchor": name in ANCHORS,
                "gateway": name in GATEWAYS,
                "heartbeat_seconds": 0.2,
                "group": "root",
                **changes,
                "paths": {
                    "state": str(directory / name / "state"),
                    "run": str(directory / name / "run"),
                },
                "prefixes": [{"prefix": str(HOME_PREFIX)}],
                "bridges": [{"name": BRIDGE}] if name in GATEWAYS else [],
                "peers": [
                    {
                        "name": other,
                        "address": str(net.ADDRESSES[other]),
                        "tunnel_address": str(net.tunnel(other)),
                        "anchor": other in ANCHORS,
                        "gateway": other in GATEWAYS,
                    }
                    for other in everybody
                    if other != name and not (name in ANCHORS and other in ANCHORS)
                ],
            }
            self.of[name] = Agent(net, name, directory, settings, secrets.get(name, SECRET))

    def __getitem__(self, name: str) -> Agent:
        return self.of[name]

    def give_own_keys(self, indexes: dict[str, list[int]]) -> None:
        """From the next start on each gateway has keys of its own, and uses the first; anchors have all."""
        for name, agent in self.of.items():
            anchor, gateway = agent.settings["anchor"], agent.settings["gateway"]
            known = set(itertools.chain(*indexes.values())) if anchor else set(indexes[name])
            agent.keys = {index: f"{index:032x}" for index in known}
            if gateway:
                agent.settings |= {"key": indexes[name][0], "accepted_keys": indexes[name]}
            for peer in agent.settings["peers"] if anchor else ():
                if peer["gateway"]:
                    its = indexes[peer["name"]]
                    peer |= {"key": its[0], "accepted_keys": its}

    def start(self) -> None:
        """Start them all and wait until they hear each other."""
        for agent in self.of.values():
            agent.start(wait=False)
        for agent in self.of.values():
            eventually(agent.answers, 30)

    def together(self) -> None:
        """Wait until every gateway hears every anchor."""
        for name in GATEWAYS:
            eventually(
                lambda name=name: all(
                    told["state"] == "up"
                    for told in self[name].ask("GET", "/v1/status")["gateway"]["anchors"].values()
                )
            )

    def settle(self, name: str = "guest1", at: str = "gateway1", epoch: int = 1) -> Guest:
        """A guest that every anchor knows."""
        guest = self.net.guest(name, at)
        answer = self[at].arrive(guest, epoch, wait_seconds=30)
        assert answer["acknowledged"] == [*ANCHORS]
        assert pings(self.net["client"], guest.home)
        return guest

    def move(self, guest: Guest, to: str, epoch: int, *, tell: bool = True) -> None:
        """Move the guest as an evacuation does: away here, arrived there, old gateway told at last."""
        before = guest.at
        guest.plug(None)
        self[to].arrive(guest, epoch)
        guest.plug(to)
        if tell and before is not None and before != to:
            self[before].depart(guest, to=to)

    def restore(self) -> None:
        """As it was in the beginning: all run, no VM is known, every link is up."""
        for name, agent in self.of.items():
            self.net[name].ip("link set up0 up")
            self.net["router"].ip(f"link set {name} up mtu 1500")
            # With its link the default route went.
            self.net[name].ip(f"route replace default via {self.net.ADDRESSES[name] - 1}")
            if agent.process is None:
                agent.start()
            agent.turn_page()
        self.net.attract("anchor1")
        self.net.unplug_guests()
        self.together()
        for name in GATEWAYS:
            for vm in self[name].ask("GET", "/v1/vms")["vms"]:
                self[name].ask("POST", f"/v1/vms/{vm['vm']}/depart", {"withdraw": True})

    def kill(self) -> None:
        """End all that still run."""
        for agent in self.of.values():
            agent.kill()


@contextlib.contextmanager
def agents_running(directory: Path, **changes: Any) -> Iterator[Agents]:
    """The small internet with its agents, for the time of a test."""
    with small_internet() as net:
        agents = Agents(net, directory, **changes)
        try:
            agents.start()
            yield agents
        finally:
            agents.kill()


class Conversation:
    """A TCP connection over which both ends send checksummed records all the time."""

    RECORD_OCTETS = 4096

    def __init__(self, client: Namespace, guest: Guest, address: str | None = None) -> None:
        address = address or str(guest.home)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = guest.space.inside(socket.create_server, (address, 0), family=family)
        port = listener.getsockname()[1]
        self._near: socket.socket = client.inside(socket.create_connection, (address, port), timeout=20)
        self._far, _ = listener.accept()
        listener.close()
        self._ending = threading.Event()
        self.received = {"near": 0, "far": 0}
        self.longest_gap_seconds = {"near": 0.0, "far": 0.0}
        self.failures: list[str] = []
        self._threads = [
            threading.Thread(target=work, args=arguments, daemon=True)
            for work, arguments in (
                (self._send, (self._near, "near")),
                (self._send, (self._far, "far")),
                (self._receive, (self._near, "near")),
                (self._receive, (self._far, "far")),
            )
        ]
        for thread in self._threads:
            thread.start()

    def _record(self, number: int, who: str) -> bytes:
        body = f"{who} {number} ".encode().ljust(self.RECORD_OCTETS - 32, b"x")
        return body + hashlib.sha256(body).digest()

    def _send(self, connection: socket.socket, who: str) -> None:
        number = 0
        try:
            while not self._ending.is_set():
                connection.sendall(self._record(number, who))
                number += 1
                time.sleep(0.005)
            connection.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.failures.append(f"{who} sending: {error}")

    def _receive(self, connection: socket.socket, who: str) -> None:
        other = "far" if who == "near" else "near"
        connection.settimeout(60)
        last = time.monotonic()
        try:
            with connection.makefile("rb") as file:
                while data := file.read(self.RECORD_OCTETS):
                    if data != self._record(self.received[who], other):
                        self.failures.append(f"{who} received a wrong record {self.received[who]}")
                        return
                    self.received[who] += 1
                    now = time.monotonic()
                    self.longest_gap_seconds[who] = max(self.longest_gap_seconds[who], now - last)
                    last = now
        except OSError as error:
            self.failures.append(f"{who} receiving: {error}")

    def goes_on(self, seconds: float = 30.0) -> None:
        """Fails unless records still come through in both directions."""
        before = dict(self.received)
        eventually(
            lambda: self.failures or all(self.received[who] > before[who] + 3 for who in before), seconds
        )
        assert not self.failures

    def end(self) -> None:
        """End it in good order; fails when a record was lost or wrong."""
        self._ending.set()
        for thread in self._threads:
            thread.join(60)
        self._near.close()
        self._far.close()
        assert not self.failures
        assert min(self.received.values()) > 0


def probe_gap(space: Namespace, target: IPv6Address, seconds: float) -> tuple[float, int]:
    """(longest time without an answer in seconds, probes lost) of pings every 10 ms."""
    count = int(seconds * 100)
    told = space.run(
        "ping", "-6", "-D", "-i", "0.01", "-c", str(count), str(target), check=False, timeout=seconds + 30
    )
    times = [float(line[1 : line.index("]")]) for line in told.stdout.splitlines() if line.startswith("[")]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    return max(gaps, default=seconds), count - len(times)
