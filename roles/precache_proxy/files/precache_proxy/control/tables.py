# SPDX-License-Identifier: GPL-3.0-or-later
"""Answers of the control API as text for a terminal, 80 columns unless there are more."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from precache_proxy.control.answers import Answer
from precache_proxy.units import format_bytes, format_seconds

_GAP = "  "


def cells(text: str) -> int:
    """Columns that a text takes on a terminal (wide letters two, combining ones none)."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def fit(text: str, width: int) -> str:
    """``text`` cut or padded to ``width`` columns; a cut one ends in an ellipsis."""
    if cells(text) <= width:
        return text + " " * (width - cells(text))
    kept = ""
    for letter in text:
        if cells(kept + letter) > width - 1:
            break
        kept += letter
    return kept + "…" + " " * (width - 1 - cells(kept))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Aligned lines. Columns are as wide as they need; the widest give way when ``width`` is too small."""
    widths = [max(cells(row[index]) for row in [head, *rows]) for index in range(len(head))]
    while sum(widths) + len(_GAP) * (len(widths) - 1) > width and max(widths) > 4:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for row in [head, *rows]:
        lines.append(_GAP.join(fit(text, size) for text, size in zip(row, widths, strict=True)).rstrip())
    return lines


def _amount(number: float | None) -> str:
    return "-" if number is None else format_bytes(number)


def _time(number: float | None) -> str:
    return "-" if number is None else format_seconds(number)


def _share(number: float | None) -> str:
    # Not yet all is never shown as 100 %.
    return "-" if number is None else f"{int(number * 1000) / 10:.1f} %"


def _rate(number: float | None) -> str:
    return "no limit" if number is None else f"{number * 8 / 1e6:g} Mbit/s"


def status(told: Answer, width: int = 80) -> list[str]:
    """``precache-proxy status``."""
    store, scratch = told["store"], told["scratch"]
    lines = [
        f"{told['name']} (site {told['site']}), precache proxy {told['version']}: {told['state']}, "
        f"up {format_seconds(told['uptime_seconds'])}",
        f"libvirt      {told['hypervisor']['sentence']} ({told['hypervisor']['uri']})",
        f"certificate  {told['certificate']['sentence']}",
        f"store        {_amount(store['free_bytes'])} free of {_amount(store['size_bytes'])} "
        f"in {store['directory']}",
        f"scratch      {_amount(scratch['used_bytes'])} used in {scratch['directory']}",
    ]
    coordinator = told.get("coordinator")
    if coordinator:
        heard = format_seconds(coordinator["heard_seconds"])
        lines.append(f"coordinator  {coordinator['who']}, heard of {heard} ago")
    lines = [fit(line, width).rstrip() for line in lines]
    lines += _section("Links", links(told["links"], width), told["links"])
    lines += _section("Protected VMs", vms(told["vms"], width), told["vms"])
    lines += _section("Replicas kept here", replicas(told["replicas"], width), told["replicas"])
    lines += _section("Evacuations", jobs(told["evacuations"], width), told["evacuations"])
    lines += _section("Arrivals", jobs(told["arrivals"], width), told["arrivals"])
    return lines


def _section(title: str, lines: list[str], things: Sequence[Answer]) -> list[str]:
    return ["", title, *(lines if things else ["none"])]


def links(told: Sequence[Answer], width: int) -> list[str]:
    """Links to peers, and why one is not up."""
    head = ("PEER", "STATE", "RTT", "LIMIT", "SENT", "RECEIVED")
    rows = [
        (
            link["peer"],
            link["state"],
            _time(link["round_trip_seconds"]),
            _rate(link["rate_bytes_per_second"]),
            _amount(link["counters"].get("sent_wire_bytes")),
            _amount(link["counters"].get("received_wire_bytes")),
        )
        for link in told
    ]
    return table(head, rows, width) + _reasons(told, "peer", {"up"}, width)


def vms(told: Sequence[Answer], width: int) -> list[str]:
    """Protected VMs; an ``!`` marks a lag over the RPO."""
    head = ("VM", "PEER", "STATE", "COVERED", "GEN", "LAG", "", "RPO")
    rows = [
        (
            vm["name"],
            vm["peer"],
            vm["state"],
            _share(vm.get("coverage")),
            str(vm.get("generation") or "-"),
            _amount(vm.get("lag_bytes")),
            _time(vm.get("lag_seconds")) + (" !" if vm.get("rpo_kept") is False else ""),
            _time(vm["rpo_seconds"]),
        )
        for vm in told
    ]
    starts = [
        {"name": vm["name"], "sentence": f"its start after boot: {vm['start_waits']}"}
        for vm in told
        if vm.get("start_waits")
    ]
    media = [
        {"name": f"{vm['name']} {drive}", **medium}
        for vm in told
        for drive, medium in (vm.get("media") or {}).items()
    ]
    reasons = _reasons(told, "name", {"protected"}, width) + _reasons(media, "name", {"there"}, width)
    return table(head, rows, width) + reasons + _reasons(starts, "name", set(), width)


def replicas(told: Sequence[Answer], width: int) -> list[str]:
    """Replicas of the peers' VMs."""
    head = ("VM", "STATE", "GEN", "EPOCH", "DISKS", "HELD")
    rows = []
    for replica in told:
        disks = replica.get("disks") or {}
        held = sum(disk.get("allocated_bytes") or disk.get("held_bytes") or 0 for disk in disks.values())
        sealed = replica.get("sealed") or {}
        rows.append(
            (
                str(replica.get("name") or replica.get("vm")),
                str(replica.get("state")),
                str(sealed.get("generation", "-")),
                str(replica.get("epoch", "-")),
                ", ".join(disks),
                format_bytes(held),
            )
        )
    return table(head, rows, width) + _reasons(told, "name", {"sealed"}, width)


def jobs(told: Sequence[Answer], width: int) -> list[str]:
    """Evacuation jobs or arrivals."""
    head = ("VM", "PEER", "STEP", "VERDICT", "EVICTION", "DOWNTIME", "JOB")
    rows = [
        (
            str(job.get("name")),
            str(job.get("peer")),
            str(job.get("step") or job.get("state")),
            str(job.get("verdict") or "-"),
            _time(job.get("eviction_seconds")),
            _time(job.get("downtime_seconds")),
            str(job.get("id")),
        )
        for job in told
    ]
    return table(head, rows, width) + _outlooks(told, width) + _reasons(told, "name", set(), width)


def _outlooks(told: Sequence[Answer], width: int) -> list[str]:
    """One line below the table for each VM under way: how far, how fast, until when, and its lag."""
    lines = []
    for job in told:
        ahead = job.get("outlook")
        if not ahead:
            continue
        text = ""
        if ahead["share"] is not None:
            left = ahead["seconds_left"]
            text = (
                f"{_share(ahead['share'])}, {_amount(ahead['remaining_bytes'])} left at "
                f"{ahead['bytes_per_second'] * 8 / 1e6:.1f} Mbit/s, "
                + ("no end in sight; " if left is None else f"{_time(left)} to go; ")
            )
        text += f"lag {_amount(ahead['lag_bytes'])}, {_time(ahead['lag_seconds'])}"
        lines.append(fit(f"  {job.get('name')}: {text}", max(width, 80)).rstrip())
    return lines


def _reasons(told: Sequence[Answer], name: str, good: set[str], width: int) -> list[str]:
    """One line below a table for each thing that is not as it should be and says why."""
    return [
        fit(f"  {thing.get(name)}: {thing['sentence']}", max(width, 80)).rstrip()
        for thing in told
        if thing.get("sentence") and thing.get("state") not in good
    ]
