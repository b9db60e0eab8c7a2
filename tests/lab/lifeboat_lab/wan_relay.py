# SPDX-License-Identifier: GPL-3.0-or-later
"""The WAN itself: a process in the router's namespace that holds every packet between two sites for its delay.

This kernel need not have netem. Each site's traffic to the others is routed into a TUN device of that site;
we write it back to the same device when its time has come, and the router delivers it. With IFF_VNET_HDR and
segmentation offload a "packet" is up to 64 KiB that the kernel never split, which is what lets plain Python
carry 400 Mbit/s. Without a profile the rules that route into the devices go away and nothing passes here.
"""

import fcntl
import gc
import ipaddress
import json
import os
import random
import select
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lifeboat_lab.errors import LabError
from lifeboat_lab.profiles import Profile
from lifeboat_lab.settings import SITE_NUMBERS, site_prefix
from lifeboat_lab.shaper import Path as WanPath
from lifeboat_lab.shell import run

TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 = 0x01, 0x02, 0x04
VNET_HEADER_BYTES = 10
LARGEST_PACKET_BYTES = 65535 + VNET_HEADER_BYTES + 64
# Packets read from one device before those that are due are looked at again.
BATCH = 32
MESSAGE_BYTES = 65536


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
        self._tuns = {site: open_tun(f"wan-{site}") for site in SITE_NUMBERS}
        self._sites = {descriptor: site for site, descriptor in self._tuns.items()}
        source = random.Random(1)
        self._paths = {
            (a, b): WanPath(source) for a in SITE_NUMBERS for b in SITE_NUMBERS if a != b
        }
        # 2001:db8:N::/48 in the destination address, after the virtio and the first 24 bytes of the IPv6 header.
        self._prefixes = {
            ipaddress.ip_network(site_prefix(site)).network_address.packed[:6]: site for site in SITE_NUMBERS
        }
        self._segmentation: bool | None = None
        for site in SITE_NUMBERS:
            run(["ip", "link", "set", f"wan-{site}", "mtu", "1500", "txqueuelen", "5000", "up"])
        self._apply_profile()

    def serve(self) -> None:
        """Relay until told to stop."""
        descriptors = [self._control.fileno(), *self._sites]
        while True:
            now = time.monotonic()
            due = min((d for path in self._paths.values() if (d := path.next_due) is not None), default=None)
            timeout = None if due is None else max(0.0, due - now)
            # select, not poll: its timeout has microseconds.
            readable, _, _ = select.select(descriptors, [], [], timeout)
            profile = self._profile.at(time.monotonic() - self._profile_set_at)
            for descriptor in readable:
                if descriptor in self._sites:
                    self._take_in(descriptor, profile)
                else:
                    self._answer()
            self._give_out()

    def _take_in(self, descriptor: int, profile: Profile) -> None:
        source = self._sites[descriptor]
        for _ in range(BATCH):
            try:
                packet = os.read(descriptor, LARGEST_PACKET_BYTES)
            except BlockingIOError:
                return
            at = VNET_HEADER_BYTES + 24
            path = self._paths.get((source, self._prefixes.get(packet[at : at + 6], source)))
            if path is None:  # not IPv6, or to nowhere in the lab
                continue
            path.offer(packet, len(packet) - VNET_HEADER_BYTES, time.monotonic(), profile)

    def _give_out(self) -> None:
        now = time.monotonic()
        for (source, _), path in self._paths.items():
            while (packet := path.take_due(now)) is not None:
                # A full device queue or a packet that the kernel refuses is a packet lost, as on any WAN.
                with suppress(OSError):
                    os.write(self._tuns[source], packet)
                    path.counters.delivered_bytes += len(packet) - VNET_HEADER_BYTES
                    path.counters.delivered_packets += 1

    # --- control ------------------------------------------------------------------------------------------------

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
                run(["ip", "-6", "rule", "del", *self._cut_rule(source, destination)])
            self._cuts.clear()
        elif command != "status":
            raise ValueError(f"unknown command {command}")
        return {
            "profile": self._profile.to_json(),
            "now": self._profile.at(time.monotonic() - self._profile_set_at).to_json(),
            "cut": [f"{source}-{destination}" for source, destination in sorted(self._cuts)],
            "paths": {f"{a}-{b}": asdict(path.counters) for (a, b), path in self._paths.items()},
            "processor_seconds": time.process_time(),
        }

    def _cut(self, source: str, destination: str) -> None:
        if (source, destination) in self._cuts:
            return
        run(["ip", "-6", "rule", "add", *self._cut_rule(source, destination)])
        self._cuts.add((source, destination))
        self._paths[source, destination].clear()

    @staticmethod
    def _cut_rule(source: str, destination: str) -> list[str]:
        # Silent: a cut cable sends no "unreachable".
        return ["pref", "100", "iif", f"br-{source}", "to", site_prefix(destination), "blackhole"]

    def _apply_profile(self) -> None:
        # Loss must hit single packets of the wire's size, not 64 KiB at once.
        segmentation = not self._profile.loss
        if segmentation != self._segmentation:
            offload = TUN_F_CSUM | (TUN_F_TSO4 | TUN_F_TSO6 if segmentation else 0)
            for descriptor in self._sites:
                fcntl.ioctl(descriptor, TUNSETOFFLOAD, offload)
            self._segmentation = segmentation
        for number, site in enumerate(SITE_NUMBERS, start=101):
            inside = ["pref", "150", "iif", f"br-{site}", "to", site_prefix(site), "lookup", "main"]
            through = ["pref", "200", "iif", f"br-{site}", "lookup", str(number)]
            for rule in (inside, through):
                run(["ip", "-6", "rule", "del", *rule], check=False)
                if self._profile.shaped:
                    run(["ip", "-6", "rule", "add", *rule])
            if self._profile.shaped:
                run(["ip", "-6", "route", "replace", "default", "dev", f"wan-{site}", "table", str(number)])


def main() -> int:
    """`wan_relay SOCKET`: serve on that control socket until SIGTERM."""
    path = Path(sys.argv[1])
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as control:
        # Delay is what we sell: be woken before the guests that take the processors.
        os.nice(-15)
        relay = Relay(control)
        gc.freeze()
        gc.disable()
        control.bind(str(path))
        control.listen(16)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        relay.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
