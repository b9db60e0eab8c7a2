# SPDX-License-Identifier: GPL-3.0-or-later
"""One anchor between two gateways that the test speaks for, a data path that only remembers, and its disk."""

from __future__ import annotations

import time
from collections.abc import Iterable
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path
from typing import Any, cast

from mobility_agent.anchor.duty import AnchorDuty
from mobility_agent.config import Peer, parse
from mobility_agent.durable import Journal
from mobility_agent.errors import KernelRefused
from mobility_agent.messages.headers import Message
from mobility_agent.messages.options import HandoffIndicator, Timestamp
from mobility_agent.messages.registration import Registration

VM = "11111111-2222-3333-4444-555555555555"
HOME = IPv6Network("2001:db8:100::5/128")
PREFIX = IPv6Network("2001:db8:100::/64")
KEYS = '[[keys]]\nindex = 256\nsecret = "00112233445566778899aabbccddeeff"\n'
CONFIG = """
name = "anchor1"
address = "2001:db8:a1::2"
tunnel_address = "2001:db8:a1::d"
anchor = true
[paths]
state = "{state}"
[[prefixes]]
prefix = "2001:db8:100::/64"
[[peers]]
name = "home"
address = "2001:db8:1::2"
tunnel_address = "2001:db8:1::d"
gateway = true
[[peers]]
name = "backup"
address = "2001:db8:2::2"
tunnel_address = "2001:db8:2::d"
gateway = true
"""


class Kernel:
    """A data path that refuses when it is told to."""

    def __init__(self) -> None:
        self.remote: dict[IPv6Network, IPv6Address] = {}
        self.refuses = False

    def set_remote(self, homes: Iterable[IPv6Network], care_of: IPv6Address) -> None:
        if self.refuses:
            raise KernelRefused("no")
        self.remote.update(dict.fromkeys(homes, care_of))

    def clear_remote(self, homes: Iterable[IPv6Network]) -> None:
        for home in homes:
            self.remote.pop(home, None)

    def attract(self, _prefixes: Iterable[IPv6Network]) -> None:
        pass


class LoneAnchor:
    """The anchor, restored from its disk, and what it sent; its clock-driven work is not begun."""

    def __init__(self, directory: Path) -> None:
        self.config = parse(CONFIG.format(state=directory), KEYS)
        self.directory = directory
        self.kernel = Kernel()
        self.sent: list[tuple[str, Message]] = []
        self.sequence = 0
        self.duty = self.anew()

    def anew(self) -> AnchorDuty:
        """As it is after a restart."""
        journal = Journal(self.directory / "bindings.journal")
        duty = AnchorDuty(self.config, cast(Any, self.kernel), journal, 1, self._send, {})
        duty.restore()
        return duty

    def _send(self, peer: Peer, message: Message) -> None:
        self.sent.append((peer.name, message))

    def peer(self, name: str) -> Peer:
        """A gateway by its name."""
        found = self.config.peer(name)
        assert found is not None
        return found

    def register(self, name: str, epoch: int, handoff: HandoffIndicator, lifetime_seconds: int) -> None:
        """The VM is registered at this gateway, or withdrawn from it with a lifetime of 0."""
        self.sequence += 1
        ticks = Timestamp.of_seconds(time.time()).ticks + self.sequence
        care_of = self.peer(name).tunnel_address
        asked = Registration(VM, (HOME,), care_of, epoch, ticks, lifetime_seconds, handoff)
        assert self.duty.take(self.peer(name), asked.update(self.sequence))
