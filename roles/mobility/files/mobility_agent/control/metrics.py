# SPDX-License-Identifier: GPL-3.0-or-later
"""Numbers for Prometheus, in its text format."""

from __future__ import annotations

from mobility_agent.control.parts import Parts
from mobility_agent.gateway.attachments import HERE


def _line(name: str, value: float, **labels: str) -> str:
    told = ",".join(f'{key}="{text}"' for key, text in labels.items())
    return f"lifeboat_mobility_{name}{{{told}}} {value:g}" if told else f"lifeboat_mobility_{name} {value:g}"


def render(parts: Parts) -> str:
    """All metrics of this agent."""
    lines = [
        "# HELP lifeboat_mobility_messages_total Mobility messages by what became of them.",
        "# TYPE lifeboat_mobility_messages_total counter",
    ]
    lines += [
        _line("messages_total", count, what=what) for what, count in sorted(parts.transport.counters.items())
    ]
    if parts.anchor is not None:
        status = parts.anchor.status()
        lines += [
            "# HELP lifeboat_mobility_bindings Home addresses' VMs bound to a gateway.",
            "# TYPE lifeboat_mobility_bindings gauge",
            _line("bindings", status["bindings"]),
            "# HELP lifeboat_mobility_refusals_total Registrations refused, by cause.",
            "# TYPE lifeboat_mobility_refusals_total counter",
        ]
        lines += [_line("refusals_total", count, cause=cause) for cause, count in status["refusals"].items()]
    if parts.gateway is not None:
        status = parts.gateway.status()
        here = sum(known.state == HERE for known in parts.gateway.attachments.all())
        lines += [
            "# HELP lifeboat_mobility_vms VMs with home addresses at this gateway.",
            "# TYPE lifeboat_mobility_vms gauge",
            _line("vms", here, state="here"),
            _line("vms", len(parts.gateway.attachments) - here, state="away"),
            "# HELP lifeboat_mobility_registrations_pending Claims and withdrawals without an answer.",
            "# TYPE lifeboat_mobility_registrations_pending gauge",
            _line("registrations_pending", status["registrations_pending"]),
            "# HELP lifeboat_mobility_holds VMs being moved from here, for which packets wait.",
            "# TYPE lifeboat_mobility_holds gauge",
            _line("holds", status["holds"]["vms"]),
            "# HELP lifeboat_mobility_held_packets_total Packets that came for VMs being moved, by fate.",
            "# TYPE lifeboat_mobility_held_packets_total counter",
            *(
                _line("held_packets_total", status["holds"][what], what=what)
                for what in ("held", "sent_on", "dropped")
            ),
            "# HELP lifeboat_mobility_anchor_up Whether the anchor answers heartbeats.",
            "# TYPE lifeboat_mobility_anchor_up gauge",
        ]
        for name, told in status["anchors"].items():
            lines.append(_line("anchor_up", told["state"] == "up", anchor=name))
        lines += [
            "# HELP lifeboat_mobility_anchor_round_trip_seconds Round trip to the anchor.",
            "# TYPE lifeboat_mobility_anchor_round_trip_seconds gauge",
        ]
        for name, told in status["anchors"].items():
            if told["round_trip_seconds"] is not None:
                lines.append(_line("anchor_round_trip_seconds", told["round_trip_seconds"], anchor=name))
    return "\n".join(lines) + "\n"
