# SPDX-License-Identifier: GPL-3.0-or-later
"""The parts of a running agent, as the control interface sees them."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv6Address

from mobility_agent.anchor.duty import AnchorDuty
from mobility_agent.config import Config
from mobility_agent.datapath.discovery import Responder
from mobility_agent.datapath.path import DataPath
from mobility_agent.errors import InvalidInput, NotFound
from mobility_agent.gateway.duty import GatewayDuty
from mobility_agent.gateway.hypervisor import Moves
from mobility_agent.gateway.learning import Learner
from mobility_agent.signalling.transport import Transport


@dataclass(slots=True)
class Parts:
    """What the daemon has put together; a duty that is not configured is None."""

    config: Config
    path: DataPath
    transport: Transport
    gateway: GatewayDuty | None = None
    anchor: AnchorDuty | None = None
    moves: Moves | None = None
    learner: Learner | None = None
    responders: dict[str, Responder] = field(default_factory=dict)
    state: str = "starting"

    def the_gateway(self) -> GatewayDuty:
        """The gateway's duty. Raises NotFound on a host that is none."""
        if self.gateway is None:
            raise NotFound(f"{self.config.name}: is no gateway; ask the agent on a hypervisor")
        return self.gateway

    def the_anchor(self) -> AnchorDuty:
        """The anchor's duty. Raises NotFound on a host that is none."""
        if self.anchor is None:
            raise NotFound(f"{self.config.name}: is no anchor; ask one of the anchors")
        return self.anchor

    def tunnel_of(self, peer: str) -> IPv6Address:
        """Where the tunnels to a gateway end, by its name or address. Raises InvalidInput."""
        known = self.config.peer(peer)
        if known is not None:
            return known.tunnel_address
        for other in self.config.peers:
            if peer in {str(other.address), str(other.tunnel_address)}:
                return other.tunnel_address
        names = ", ".join(other.name for other in self.config.peers if other.gateway)
        raise InvalidInput(f"gateway {peer!r}: not one of the peers; use one of {names}")
