# SPDX-License-Identifier: GPL-3.0-or-later
"""The handle on the WAN: profile, cut, heal, counters, and the check that it is what its profile says."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from lifeboat_lab.control_group import ControlGroup
from lifeboat_lab.errors import LabError
from lifeboat_lab.hosts import wait_for
from lifeboat_lab.network import NAMESPACES
from lifeboat_lab.profiles import Profile, parse_profile
from lifeboat_lab.settings import CLIENT_ADDRESS, HOSTS, SITE_NUMBERS, Settings
from lifeboat_lab.shell import run

ANSWER_SECONDS = 10.0
CHECK_PORT = 5299
DATAGRAM_LIMIT_BITS_PER_SECOND = 100e6
DATAGRAM_BYTES = 1400
PACKET_BYTES = 1500
IP_HEADER_BYTES = {6: 40, 4: 20}
UDP_HEADER_BYTES = 8
# With timestamps.
TCP_HEADER_BYTES = 20 + 12


@dataclass(frozen=True)
class Check:
    """What was measured between two hosts at different sites, beside what the profile promises."""

    profile: str
    round_trip_seconds: float
    expected_round_trip_seconds: float
    goodput_bits_per_second: float
    expected_bits_per_second: float
    relay_processor_share: float

    @property
    def holds(self) -> bool:
        """Round trip within 1 ms, goodput within 5 % of the rate (where there is one)."""
        late = self.round_trip_seconds - self.expected_round_trip_seconds
        full = self.expected_bits_per_second
        return -0.0005 <= late <= 0.001 and (
            not full or 0.95 * full <= self.goodput_bits_per_second <= 1.05 * full
        )


class Wan:
    """The WAN of one lab."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._socket = settings.runtime / "wan.sock"

    @property
    def running(self) -> bool:
        """Does the relay answer?"""
        with suppress(LabError):
            self.status()
            return True
        return False

    def start(self) -> None:
        """Start the relay with no limits; does nothing when it runs."""
        if self.running:
            return
        group = ControlGroup(self._settings.control_group("wan"))
        group.kill()
        group.create()
        namespace = NAMESPACES / self._settings.namespace("router")
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "LC_ALL": "C"}
        with (self._settings.runtime / "wan.log").open("ab") as log:
            process = subprocess.Popen(
                ["nsenter", f"--net={namespace}", "--", sys.executable, "-m", "lifeboat_lab.wan_relay",
                 str(self._socket)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                preexec_fn=group.enter,
            )  # fmt: skip

        def answers() -> bool:
            if process.poll() is not None:
                raise LabError(f"the WAN's relay ended with {process.returncode}; see {log.name}")
            return self.running

        wait_for(answers, 20, 0.05)

    def set(self, profile: Profile | str) -> Profile:
        """Change the profile while running; what is on its way keeps its old delay."""
        profile = parse_profile(profile) if isinstance(profile, str) else profile
        self._ask({"command": "profile", "profile": profile.to_json()})
        return profile

    def cut(self, source: str | None = None, destination: str | None = None) -> None:
        """Cut the WAN silently: all of it, what leaves `source`, what is sent to `destination`, or one
        direction."""
        for site in (source, destination):
            if site is not None and site not in SITE_NUMBERS:
                raise LabError(f"site {site}: not known; use one of {', '.join(SITE_NUMBERS)}")
        pairs = [
            (a, b)
            for a in SITE_NUMBERS
            for b in SITE_NUMBERS
            if a != b and source in {None, a} and destination in {None, b}
        ]
        self._ask({"command": "cut", "pairs": pairs})

    def heal(self) -> None:
        """Join every direction that was cut."""
        self._ask({"command": "heal"})

    def status(self) -> dict[str, Any]:
        """Profile, cuts and the relay's own counters. Raises LabError when the relay does not answer."""
        return self._ask({"command": "status"})

    def counters(self) -> dict[str, dict[str, int]]:
        """IP bytes and packets of each ordered pair of sites since the lab was built.

        `sent_bytes` is what a site gave to the WAN, `delivered_bytes` what came out at the other; counted
        by the router's kernel, with and without a profile. A cut WAN counts nothing as sent. What the kernel
        would split into packets at an interface only is counted with one header: up to 5 % are missing.
        """
        namespace = NAMESPACES / self._settings.namespace("router")
        text = run(
            ["nsenter", f"--net={namespace}", "nft", "-j", "list", "counters", "table", "inet", "lab"]
        ).stdout
        result: dict[str, dict[str, int]] = {}
        for entry in json.loads(text)["nftables"]:
            if "counter" in entry:
                pair, _, kind = entry["counter"]["name"].rpartition("-")
                values = result.setdefault(pair, {})
                values[f"{kind}_bytes"] = int(entry["counter"]["bytes"])
                values[f"{kind}_packets"] = int(entry["counter"]["packets"])
        return result

    def check(self, source: str, destination: str, *, seconds: float = 3) -> Check:
        """Measure between two hosts at different sites: pings while the link is idle, then fill it. By the
        version of IP that the destination is reached at as a peer; the client has IPv6 alone.

        Slow links with datagrams: connections would still be finding out their rate. Fast ones with four
        connections: this machine cannot make so many datagrams beside everything else.
        """
        profile = Profile.from_json(self.status()["now"])
        if destination == "client":
            address = CLIENT_ADDRESS
        else:
            plan = HOSTS[destination]
            address = plan.address if source == "client" else plan.peer_address
        ip_version = ip_address(address).version
        # Neighbours and routes are found by the first packets.
        ping = [*self._inside(source), "ping", "-q", "-W", "3"]
        run([*ping, "-c", "2", "-i", "0.2", address], check=False)
        answer = run([*ping, "-c", "20", "-i", "0.05", address]).stdout
        match = re.search(r"= ([0-9.]+)/([0-9.]+)/", answer)
        if match is None:
            raise LabError(f"ping from {source} to {destination}: no answer: {answer.splitlines()[-2:]}")
        rate = profile.rate_bits_per_second
        if 0 < rate <= DATAGRAM_LIMIT_BITS_PER_SECOND:
            load = ["--udp", "--bitrate", f"{rate * 1.1:.0f}", "--length", str(DATAGRAM_BYTES), "--omit", "1"]
        else:
            load = ["--parallel", "4", "--omit", "8" if profile.round_trip_seconds >= 0.1 else "2"]
        server = subprocess.Popen(
            [*self._inside(destination), "iperf3", "--server", "--one-off", "--port", str(CHECK_PORT)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            time.sleep(0.3)
            before, begun = self.status()["processor_seconds"], time.monotonic()
            command = [
                "iperf3",
                "--client",
                address,
                "--port",
                str(CHECK_PORT),
                "--json",
                "--time",
                f"{seconds:g}",
            ]
            report = json.loads(
                run([*self._inside(source), *command, *load], timeout_seconds=seconds + 60).stdout
            )
            share = (self.status()["processor_seconds"] - before) / (time.monotonic() - begun)
        finally:
            server.terminate()
            server.wait()
        return Check(
            profile=profile.name,
            round_trip_seconds=float(match.group(2)) / 1000,
            expected_round_trip_seconds=profile.round_trip_seconds,
            goodput_bits_per_second=_received(report, ip_version),
            expected_bits_per_second=rate * (1 - profile.loss),
            relay_processor_share=share,
        )

    def _inside(self, member: str) -> list[str]:
        return ["nsenter", f"--net={NAMESPACES / self._settings.namespace(member)}"]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.settimeout(ANSWER_SECONDS)
            try:
                client.connect(str(self._socket))
                client.sendall(json.dumps(request).encode())
                answer: dict[str, Any] = json.loads(client.recv(1 << 20))
            except OSError as error:
                raise LabError(
                    f"the WAN of lab {self._settings.name}: its relay does not answer ({error}); "
                    "run `make lab-up`"
                ) from error
        if "error" in answer:
            raise LabError(f"the WAN of lab {self._settings.name}: {answer['error']}")
        return answer


def carried_share(ip_version: int) -> float:
    """What TCP carries of full packets."""
    return 1 - (IP_HEADER_BYTES[ip_version] + TCP_HEADER_BYTES) / PACKET_BYTES


def _received(report: dict[str, Any], ip_version: int) -> float:
    """Bits per second that the receiver of an iperf3 test got, with the headers that they came with."""
    received = float(report["end"]["sum_received"]["bits_per_second"])
    if "packets" not in report["end"]["sum_received"]:
        return received / carried_share(ip_version)
    header_bytes = IP_HEADER_BYTES[ip_version] + UDP_HEADER_BYTES
    return received * (DATAGRAM_BYTES + header_bytes) / DATAGRAM_BYTES
