# SPDX-License-Identifier: GPL-3.0-or-later
"""What went over a link: raw bytes (payload) and wire bytes (frames before TLS), per class and per label."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from precache_proxy.channel.settings import TrafficClass

_MAXIMUM_LABELS = 4096


@dataclass(slots=True)
class Tally:
    """Bytes of one class or label, both directions."""

    sent_raw_bytes: int = 0
    sent_wire_bytes: int = 0
    received_raw_bytes: int = 0
    received_wire_bytes: int = 0


@dataclass(slots=True)
class LinkCounters:
    """All counters of one link since the process started; both of its sessions count here."""

    classes: dict[TrafficClass, Tally] = field(
        default_factory=lambda: {member: Tally() for member in TrafficClass}
    )
    labels: dict[str, Tally] = field(default_factory=dict)
    link: Tally = field(default_factory=Tally)  # acknowledgements, pings, resets: nobody's payload
    resent_wire_bytes: int = 0
    acknowledged_raw_bytes: int = 0

    def label(self, label: str) -> Tally:
        """The tally of a label; beyond 4096 labels the rest share one, so that memory stays bounded."""
        tally = self.labels.get(label)
        if tally is None:
            if len(self.labels) >= _MAXIMUM_LABELS:
                label = "(others)"
            tally = self.labels.setdefault(label, Tally())
        return tally

    def sent(self, traffic_class: TrafficClass, tally: Tally, raw_bytes: int, wire_bytes: int) -> None:
        """Count a frame of a stream whose label has ``tally``."""
        of_class = self.classes[traffic_class]
        of_class.sent_raw_bytes += raw_bytes
        of_class.sent_wire_bytes += wire_bytes
        tally.sent_raw_bytes += raw_bytes
        tally.sent_wire_bytes += wire_bytes

    def received(self, traffic_class: TrafficClass, tally: Tally, raw_bytes: int, wire_bytes: int) -> None:
        """Count a frame of a stream whose label has ``tally``."""
        of_class = self.classes[traffic_class]
        of_class.received_raw_bytes += raw_bytes
        of_class.received_wire_bytes += wire_bytes
        tally.received_raw_bytes += raw_bytes
        tally.received_wire_bytes += wire_bytes

    def as_dict(self) -> dict[str, Any]:
        """JSON form: ``classes`` by lower-case name, ``labels``, ``link`` and the totals."""
        every = [*self.classes.values(), self.link]
        return {
            "classes": {member.name.lower(): asdict(tally) for member, tally in self.classes.items()},
            "labels": {label: asdict(tally) for label, tally in self.labels.items() if label},
            "link": asdict(self.link),
            "sent_wire_bytes": sum(tally.sent_wire_bytes for tally in every),
            "received_wire_bytes": sum(tally.received_wire_bytes for tally in every),
            "resent_wire_bytes": self.resent_wire_bytes,
            "acknowledged_raw_bytes": self.acknowledged_raw_bytes,
        }
