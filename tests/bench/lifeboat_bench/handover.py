# SPDX-License-Identifier: GPL-3.0-or-later
"""Table `handover`: what a client of a moved VM notices beyond the migration itself, by the anchor's RTT.

The anchor stands at the home site: the new gateway reaches it in one round trip of the WAN, and so does the
client: the farthest that an anchor can be in this lab. A guest's own downtime is taken from its heartbeats on
a virtual serial port, which need no network: what the client misses beyond it is the network's share.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

from lifeboat_bench.ground import DESTINATION, SOURCE, Ground
from lifeboat_bench.result import Bar, Table
from lifeboat_lab import mobility
from lifeboat_lab.errors import LabError
from lifeboat_lab.guests.guests import Guest
from lifeboat_lab.guests.plan import GuestPlan
from lifeboat_lab.hosts import wait_for
from lifeboat_lab.probes import ECHO_COMMAND, Gap, Probe, Seen
from lifeboat_lab.settings import HOSTS

ANCHOR = "home2"
# A hypervisor has a peer, an anchor that is one too.
HOSTS_NEEDED = (SOURCE, DESTINATION, ANCHOR, "backup2")
PREFIX = HOSTS[SOURCE].guest_prefix
ROUND_TRIPS_MILLISECONDS = (0, 20, 80, 200)
WITHOUT = "none"
# LIFEBOAT_BENCH_ONLY=80,200,none: these rows only (round trips in milliseconds; none: without mobility).
ONLY = "LIFEBOAT_BENCH_ONLY"
MOVES = 3
RATE = "100mbit"
WAN_ATTEMPTS = 5
ALLOWED_SECONDS = 0.1
BOOT_SECONDS, SEED_SECONDS = 240, 300
# How long the client goes on after the VM runs: what it has not got by then it does not get.
WATCHED_SECONDS = 5.0
PLAN = GuestPlan("pattern", workload="idle", ram_mib=96, disk_mib=64, content_mib=4)


@dataclass(frozen=True, slots=True)
class Move:
    """One evacuation as the client saw it; seconds."""

    own_downtime: float
    qemu_downtime: float
    gap: float
    stall: float
    lost_after_resume: int
    lost_in_all: int
    network_seconds: float
    goes_on: bool
    # Where the client's gap went beyond the guest's own: answers missing before the guest stood still and
    # after it ran again, how long the first answer was under way, and how long the probe did not ask.
    before_stop: float
    after_resume: float
    first_round_trip: float
    probe_silence: float

    @property
    def beyond(self) -> float:
        """The network's share of the client's gap."""
        return self.gap - self.own_downtime

    @property
    def stalled_beyond(self) -> float:
        """The same for its connection."""
        return self.stall - self.own_downtime


def run(ground: Ground) -> Table:
    """Measure the table on a fresh lab."""
    rows = _chosen(os.environ.get(ONLY, ""))
    _set_up(ground)
    table = Table("handover")
    for milliseconds in (int(row) for row in rows if row != WITHOUT):
        _set_wan(ground, milliseconds)
        moves = []
        for number in range(MOVES):
            ground.say(f"anchor {milliseconds} ms away: move {number + 1} of {MOVES}")
            moves.append(_move(ground, f"moved{milliseconds}-{number}", keeps_address=True))
        _report(ground, table, milliseconds, moves)
    if WITHOUT in rows:
        _set_wan(ground, 20)
        ground.say("without mobility")
        without = _move(ground, "strange", keeps_address=False)
        table.rows.append(_row("none, 20 ms", [without]))
        ground.say(json.dumps(table.rows[-1]))
        table.summary["without_mobility_the_connection_goes_on"] = without.goes_on
    table.circumstances |= {
        "rows": rows,
        "wan": ground.wan_checks,
        "anchor": f"{ANCHOR}, at the site that is evacuated: one WAN round trip from the new gateway",
        "moves_per_row": MOVES,
        "client_watched_after_resume_seconds": WATCHED_SECONDS,
    }
    return table


def _chosen(text: str) -> list[str]:
    """The rows to measure; all of them where nothing is said. Raises LabError."""
    every = [*map(str, ROUND_TRIPS_MILLISECONDS), WITHOUT]
    asked = [word.strip() for word in text.split(",") if word.strip()] or every
    if unknown := [word for word in asked if word not in every]:
        raise LabError(f"{ONLY}: no row {', '.join(unknown)}; choose some of {', '.join(every)}")
    return asked


def _set_wan(ground: Ground, milliseconds: int) -> None:
    """Without a delay there is no relay either: its own latency would be most of the round trip."""
    profile = f"rate={RATE},rtt={milliseconds}ms" if milliseconds else "none"
    for attempt in range(WAN_ATTEMPTS):
        try:
            ground.set_wan(profile)
        except LabError as error:
            ground.say(str(error))
            if attempt == WAN_ATTEMPTS - 1:
                raise
        else:
            return


def _set_up(ground: Ground) -> None:
    path = ground.controller.work / "mobility.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(mobility.inventory((SOURCE, DESTINATION), (ANCHOR,), [PREFIX])))
    mobility.open_settings(ground.lab, HOSTS_NEEDED)
    ground.controller.playbook("site_setup", options=("-i", str(path))).require_success()
    mobility.lead_prefix_to(ground.lab, PREFIX, ANCHOR)


def _report(ground: Ground, table: Table, milliseconds: int, moves: list[Move]) -> None:
    row = _row(f"{milliseconds} ms", moves)
    table.rows.append(row)
    # A run that is cut short has still said what it measured.
    ground.say(json.dumps(row))
    asked = milliseconds / 1000 + ALLOWED_SECONDS
    for what, figures in (
        ("gap beyond the guest's own downtime", [move.beyond for move in moves]),
        ("TCP stall beyond the guest's own downtime", [move.stalled_beyond for move in moves]),
        ("gap beyond QEMU's own figure", [move.gap - move.qemu_downtime for move in moves]),
        ("TCP stall beyond QEMU's own figure", [move.stall - move.qemu_downtime for move in moves]),
    ):
        measured = statistics.median(figures)
        table.bars.append(Bar(f"anchor {milliseconds} ms away: {what}, median", "<=", asked, measured, "s"))
    if not all(move.goes_on for move in moves):
        table.bars.append(Bar(f"anchor {milliseconds} ms away: connections lost", "<=", 0, 1))


def _row(what: str, moves: list[Move]) -> dict[str, Any]:
    def median(figures: list[float]) -> float:
        return statistics.median(figures)

    alive = all(move.goes_on for move in moves)
    return {
        "anchor_round_trip": what,
        "client_gap_seconds": median([move.gap for move in moves]) if alive else None,
        "tcp_stall_seconds": median([move.stall for move in moves]) if alive else None,
        "guest_downtime_seconds": median([move.own_downtime for move in moves]),
        "qemu_downtime_seconds": median([move.qemu_downtime for move in moves]),
        "gap_beyond_guest_downtime_seconds": median([move.beyond for move in moves]) if alive else None,
        "worst_seconds": max(move.beyond for move in moves) if alive else None,
        "stall_beyond_seconds": median([move.stalled_beyond for move in moves]) if alive else None,
        "packets_lost_after_resume": max(move.lost_after_resume for move in moves),
        # Most of these came while the guest stood still.
        "packets_lost_in_all": [move.lost_in_all for move in moves],
        "agent_seconds": median([move.network_seconds for move in moves]),
        "missing_before_stop_seconds": median([move.before_stop for move in moves]) if alive else None,
        "missing_after_resume_seconds": median([move.after_resume for move in moves]) if alive else None,
        "first_answer_round_trip_seconds": median([move.first_round_trip for move in moves])
        if alive
        else None,
        "probe_silent_seconds": max(move.probe_silence for move in moves),
        "connection_goes_on": alive,
    }


def _move(ground: Ground, name: str, *, keeps_address: bool) -> Move:
    lab = ground.lab
    # A name of its own: what a host remembers of the one before must not stand in this one's way.
    guest = lab.guests.define(SOURCE, replace(PLAN, name=name, uuid=GuestPlan(name).uuid))
    try:
        if keeps_address:
            mobility.keep_address(lab, guest, SOURCE)
        else:
            mobility.lead_prefix_to(lab, PREFIX, SOURCE)
        guest.start()
        guest.wait_ready(BOOT_SECONDS)
        guest.ask(ECHO_COMMAND, SOURCE)
        if keeps_address:
            wait_for(lambda: mobility.holder(lab, ANCHOR, guest.plan.uuid) == SOURCE, 30, 0.2)
        ground.source.protect(guest.name, DESTINATION)
        ground.source.wait_protected(guest.name, timeout_seconds=SEED_SECONDS)
        return _watched(ground, guest)
    finally:
        _forget(ground, guest)
        guest.remove()


def _watched(ground: Ground, guest: Guest) -> Move:
    probe = Probe(ground.lab, guest.address)
    try:
        with guest.watch() as watch:
            job = ground.source.evacuate(guest.name)
            if job["verdict"] != "evacuated":
                raise LabError(f"the move of {guest.name} is {job['verdict']}: {job['sentence']}")
            resumed, network = _arrival(ground, job)
            time.sleep(max(resumed + WATCHED_SECONDS - time.monotonic(), 0.0))
    except BaseException:
        probe.give_up()
        raise
    seen: Seen = probe.end()
    stopped, ran = watch.longest_gap()
    gap = seen.longest_gap() or Gap(stopped, ran, 0.0, 0.0)
    return Move(
        own_downtime=watch.longest_gap_seconds(),
        qemu_downtime=job["progress"]["downtime_milliseconds"] / 1000,
        gap=seen.longest_gap_seconds(),
        stall=seen.longest_stall_seconds(),
        lost_after_resume=seen.lost_since(resumed),
        lost_in_all=seen.lost_since(0.0),
        network_seconds=network,
        # Without mobility what the VM sends still finds its way for a moment, and no answer does.
        goes_on=not seen.failure and seen.arrivals[-1] > resumed + WATCHED_SECONDS / 2,
        before_stop=stopped - gap.began,
        after_resume=gap.ended - ran,
        first_round_trip=gap.first_round_trip_seconds,
        probe_silence=gap.longest_silence_seconds,
    )


def _arrival(ground: Ground, job: dict[str, Any]) -> tuple[float, float]:
    """When the VM was resumed (monotonic), and how long the agent had taken before."""
    for arrival in ground.destination.get("/arrivals")["arrivals"]:
        if arrival["id"] == job["id"]:
            timings = arrival["timings"]
            return float(timings["resumed_monotonic"]), float(timings.get("network_seconds", 0.0))
    raise LabError(f"evacuation {job['id']}: {DESTINATION} knows no such arrival")


def _forget(ground: Ground, guest: Guest) -> None:
    for proxy in (ground.source, ground.destination):
        proxy.unprotect(guest.plan.uuid, keep_replica=False)
