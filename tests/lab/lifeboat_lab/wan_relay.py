# SPDX-License-Identifier: GPL-3.0-or-later
"""The WAN itself: a process in the router's namespace that holds every packet between two sites.

This kernel need not have netem. Each site's traffic to the others is routed into a TUN device of that site;
we write it back to the same device when its time has come, and the router delivers it. With IFF_VNET_HDR and
segmentation offload a "packet" is up to 64 KiB that the kernel never split, which makes the detour cheap.
Without a profile the rules that route into the devices go away and nothing passes here.
"""

import fcntl
import ipaddress
import json
import os
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lifeboat_lab.errors import LabError
from lifeboat_lab.profiles import Profile
from lifeboat_lab.settings import SITE_NUMBERS, site_ipv4_prefix, site_prefix
from lifeboat_lab.shaper import IPV4_PREFIX_BYTES, PREFIX_BYTES, Shaper, Site
from lifeboat_lab.shell import run

TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 = 0x01, 0x02, 0x04
MESSAGE_BYTES = 65536
# How `ip` is told of each of both, and what it knows a site by.
PREFIXES = {"-6": site_prefix, "-4": site_ipv4_prefix}
SITES = list(SITE_NUMBERS)


def open_tun(name: str) -> int:
    """A TUN device of this name in this namespace, non-blocking; it ends with its file descriptor."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    return descriptor


class Relay:
    """Devices, paths and the rules of the router's namespace that lead through them."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._profile = Profile()
        self._profile_set_at = time.monotonic()
        self._cuts: set[tuple[str, str]] = set()
        self._devices = {site: open_tun(f"wan-{site}") for site in SITES}
        self._shaper = Shaper([Site(self._devices[site], *_prefixes(site)) for site in SITES])
        self._segmentation: bool | None = None
        self._routed: bool | None = None
        for site in SITES:
            run(["ip", "link", "set", f"wan-{site}", "mtu", "1500", "txqueuelen", "5000", "up"])
        self._apply_profile()

    def serve(self) -> None:
        """Relay and answer until told to stop."""
        while True:
            now = time.monotonic()
            elapsed = now - self._profile_set_at
            self._shaper.set(self._profile.at(elapsed))
            if self._shaper.run(self._control.fileno(), now + self._profile.seconds_to_next_step(elapsed)):
                self._answer()

    def _answer(self) -> None:
        client, _ = self._control.accept()
        # The request follows the connection at once; whoever is slower than this gets no answer.
        client.settimeout(0.2)
        with client, suppress(OSError):
            request = client.recv(MESSAGE_BYTES)
            try:
                answer: dict[str, Any] = self._execute(json.loads(request))
            except (LabError, KeyError, ValueError) as error:
                answer = {"error": str(error)}
            client.sendall(json.dumps(answer).encode())

    def _execute(self, request: dict[str, Any]) -> dict[str, Any]:
        command = request["command"]
        if command == "profile":
            self._profile = Profile.from_json(request["profile"])
            self._profile_set_at = time.monotonic()
            self._apply_profile()
        elif command == "cut":
            for source, destination in request["pairs"]:
                self._cut(source, destination)
        elif command == "heal":
            for source, destination in sorted(self._cuts):
                for version in PREFIXES:
                    run(["ip", version, "rule", "del", *self._cut_rule(version, source, destination)])
            self._cuts.clear()
        elif command != "status":
            raise ValueError(f"unknown command {command}")
        return {
            "profile": self._profile.to_json(),
            "now": self._profile.at(time.monotonic() - self._profile_set_at).to_json(),
            "cut": [f"{source}-{destination}" for source, destination in sorted(self._cuts)],
            "paths": {
                f"{source}-{destination}": self._shaper.counters(
                    SITES.index(source), SITES.index(destination)
                )
                for source in SITES
                for destination in SITES
                if source != destination
            },
            "processor_seconds": time.process_time(),
        }

    def _cut(self, source: str, destination: str) -> None:
        if (source, destination) in self._cuts:
            return
        for version in PREFIXES:
            run(["ip", version, "rule", "add", *self._cut_rule(version, source, destination)])
        self._cuts.add((source, destination))
        self._shaper.clear(SITES.index(source), SITES.index(destination))

    @staticmethod
    def _cut_rule(version: str, source: str, destination: str) -> list[str]:
        # Silent: a cut cable sends no "unreachable".
        return ["pref", "100", "iif", f"br-{source}", "to", PREFIXES[version](destination), "blackhole"]

    def _apply_profile(self) -> None:
        # Loss must hit single packets of the wire's size, not 64 KiB at once.
        segmentation = not self._profile.loss
        if segmentation != self._segmentation:
            offload = TUN_F_CSUM | (TUN_F_TSO4 | TUN_F_TSO6 if segmentation else 0)
            for descriptor in self._devices.values():
                fcntl.ioctl(descriptor, TUNSETOFFLOAD, offload)
            self._segmentation = segmentation
        if self._profile.shaped == self._routed:
            return
        self._routed = self._profile.shaped
        for number, site in enumerate(SITES, start=101):
            for version, prefix in PREFIXES.items():
                inside = ["pref", "150", "iif", f"br-{site}", "to", prefix(site), "lookup", "main"]
                through = ["pref", "200", "iif", f"br-{site}", "lookup", str(number)]
                for rule in (inside, through):
                    run(["ip", version, "rule", "del", *rule], check=False)
                    if self._profile.shaped:
                        run(["ip", version, "rule", "add", *rule])
                if self._profile.shaped:
                    through_device = ["default", "dev", f"wan-{site}", "table", str(number)]
                    run(["ip", version, "route", "replace", *through_device])


def _prefixes(site: str) -> tuple[bytes, bytes]:
    return (
        ipaddress.IPv6Network(site_prefix(site)).network_address.packed[:PREFIX_BYTES],
        ipaddress.IPv4Network(site_ipv4_prefix(site)).network_address.packed[:IPV4_PREFIX_BYTES],
    )


def main() -> int:
    """`wan_relay SOCKET`: serve on that control socket until SIGTERM."""
    path = Path(sys.argv[1])
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as control:
        # Delay is what we sell: be woken before the guests that take the processors.
        os.nice(-15)
        relay = Relay(control)
        control.bind(str(path))
        control.listen(16)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        relay.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
