# SPDX-License-Identifier: GPL-3.0-or-later
"""What bridges were before this gateway became their first hop, kept over restarts to be undone."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from mobility_agent.config import ROUTER_MAC
from mobility_agent.durable import write_whole
from mobility_agent.homes import Address

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Former:
    """What the gateway changed: ``mac`` was the bridge's (None: the same), ``addresses`` it did not have,
    ``proxy_arp`` was off. ``given`` is the MAC that it has from the gateway.
    """

    mac: str | None = None
    addresses: list[str] = field(default_factory=list)
    proxy_arp: bool = False
    given: str | None = None

    def before(self, later: Former) -> Former:
        """Both changes, this one made first."""
        addresses = list(dict.fromkeys(self.addresses + later.addresses))
        ours = later.mac in {ROUTER_MAC, self.given}
        mac = self.mac if later.mac is None or ours else later.mac
        return Former(mac, addresses, self.proxy_arp or later.proxy_arp, later.given or self.given)


class FormerBridges:
    """By bridge, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Former] = {}
        try:
            told = json.loads(path.read_bytes())
            self._known = {bridge: Former(**record) for bridge, record in told.items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, AttributeError) as error:
            logger.warning("%s: not read (%s); bridges keep what they have", path, error)

    def note(self, bridge: str, changed: Former) -> None:
        """The gateway changed this of the bridge."""
        known = self._known.get(bridge, Former()).before(changed)
        if known != self._known.get(bridge, Former()):
            self._known[bridge] = known
            self._write()

    def of(self, bridge: str) -> Former:
        """What is to be undone of the bridge."""
        return self._known.get(bridge, Former())

    def outdated(self, bridge: str, configured: Collection[Address]) -> Former:
        """Of what is to be undone, the addresses that the bridge is not to have any more."""
        wanted = {str(address) for address in configured}
        return Former(addresses=[one for one in self.of(bridge).addresses if one not in wanted])

    def forget(self, bridge: str, undone: Former | None = None) -> None:
        """All of it was undone, or only the addresses of ``undone``."""
        known = self._known.pop(bridge, None)
        if known is None:
            return
        if undone is not None:
            left = [address for address in known.addresses if address not in undone.addresses]
            self._known[bridge] = replace(known, addresses=left)
        self._write()

    def _write(self) -> None:
        known = {bridge: asdict(former) for bridge, former in self._known.items()}
        try:
            write_whole(self._path, json.dumps(known).encode())
        except OSError as error:
            logger.warning("%s: not written (%s)", self._path, error)
