# SPDX-License-Identifier: GPL-3.0-or-later
"""What bridges were before this gateway became their first hop, kept over restarts to be undone."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mobility_agent.durable import write_whole

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Former:
    """What the gateway changed: ``mac`` was the bridge's (None: the same), ``addresses`` it did not have,
    ``proxy_arp`` was off.
    """

    mac: str | None = None
    addresses: list[str] = field(default_factory=list)
    proxy_arp: bool = False

    def before(self, later: Former) -> Former:
        """Both changes, this one made first."""
        addresses = list(dict.fromkeys(self.addresses + later.addresses))
        return Former(later.mac or self.mac, addresses, self.proxy_arp or later.proxy_arp)


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

    def take(self, bridge: str) -> Former:
        """What is to be undone; forgotten here."""
        found = self._known.pop(bridge, None)
        if found is not None:
            self._write()
        return found or Former()

    def _write(self) -> None:
        known = {bridge: asdict(former) for bridge, former in self._known.items()}
        try:
            write_whole(self._path, json.dumps(known).encode())
        except OSError as error:
            logger.warning("%s: not written (%s)", self._path, error)
