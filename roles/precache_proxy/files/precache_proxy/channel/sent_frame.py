# SPDX-License-Identifier: GPL-3.0-or-later
"""What was sent and may have to be sent again."""

from __future__ import annotations

from precache_proxy.channel.frames import FrameType
from precache_proxy.channel.settings import TrafficClass


class SentFrame:
    """A numbered frame, held until the peer acknowledges it."""

    __slots__ = ("connection", "flags", "kind", "length", "resent", "sequence", "traffic_class", "views")

    def __init__(
        self, kind: FrameType, flags: int, sequence: int, views: list[memoryview], length: int
    ) -> None:
        self.kind = kind
        self.flags = flags
        self.sequence = sequence
        self.views = views
        self.length = length
        self.traffic_class = TrafficClass.CONTROL
        self.connection: object | None = None
        self.resent = False
