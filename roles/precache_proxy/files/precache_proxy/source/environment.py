# SPDX-License-Identifier: GPL-3.0-or-later
"""What all protections of a proxy share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from precache_proxy.channel.channel import Channel
from precache_proxy.channel.link import Link
from precache_proxy.errors import NotFound
from precache_proxy.hypervisor.connection import Hypervisor
from precache_proxy.source.autostart import AfterBoot
from precache_proxy.source.backups import Backups
from precache_proxy.source.gate import PriorityGate
from precache_proxy.source.settings import SourceSettings
from precache_proxy.source.tracker import Tracker
from precache_proxy.store.media import MediaIndex


@dataclass(frozen=True)
class Environment:
    """The proxy's parts as protections use them."""

    directory: Path
    run_directory: Path
    settings: SourceSettings
    hypervisor: Hypervisor
    channel: Channel
    tracker: Tracker
    backups: Backups
    # passes, and what takes long (first copies, resyncs): they may not keep each other out
    passes: PriorityGate
    long_work: PriorityGate
    # media are carried one at a time, beside both
    media: PriorityGate
    media_index: MediaIndex
    after_boot: AfterBoot

    def link(self, peer: str) -> Link:
        """The link to a peer. Raises NotFound."""
        link = self.channel.links.get(peer)
        if link is None:
            raise NotFound(f"peer {peer}: not in this proxy's configuration; add it to [[peers]]")
        return link
