# SPDX-License-Identifier: GPL-3.0-or-later
"""What the VMs' links are told of where a VM is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ipaddress import IPv6Address, IPv6Network

from mobility_agent.config import Prefix
from mobility_agent.datapath.discovery import Responder
from mobility_agent.gateway.attachments import AWAY, HERE, Attachment, Attachments
from mobility_agent.homes import is_single


class Neighbourhood:
    """Neighbour discovery on every bridge; ``responders`` are known by bridge."""

    def __init__(
        self, prefixes: Sequence[Prefix], attachments: Attachments, responders: Mapping[str, Responder]
    ) -> None:
        self._prefixes = prefixes
        self._attachments = attachments
        self._responders = responders

    def announce(self, attachment: Attachment, *, only: str | None = None) -> None:
        """Tell who is on its links (``only`` this bridge) which MAC it has, or that it is behind us."""
        for (bridge, mac), homes in attachment.places().items():
            responder = self._responders.get(bridge)
            for home in homes if responder is not None and only in {None, bridge} else ():
                if is_single(home) and responder is not None:
                    responder.announce(home.network_address, mac if attachment.state == HERE else None)

    def elsewhere(self, address: IPv6Address, duplicate_detection: bool) -> bool:
        """Whether to answer neighbour discovery for ``address``: it is a home address, and it is not here.

        Where a prefix is native, others may have addresses that no agent knows of: only for VMs that are
        known to be gone. And who asks whether an address is free is told no only for those.
        """
        owner = self._attachments.owner(IPv6Network(address))
        if owner is not None:
            return owner.state == AWAY
        prefix = next((prefix for prefix in self._prefixes if address in prefix.network), None)
        if prefix is None or prefix.native or duplicate_detection:
            return False
        # A whole prefix may be one VM's.
        return not any(home.state == HERE for home in self._attachments.around(address))

    def bridge_came(self, bridge: str) -> None:
        """A bridge is there (again): its VMs are told to their neighbours."""
        for attachment in self._attachments.all():
            self.announce(attachment, only=bridge)
