# SPDX-License-Identifier: GPL-3.0-or-later
"""Table `deadline`: the power of a site fails while it is emptied; what is out by then, and what of the rest?

The site's hosts lose their power at the deadline, for every strategy. Then each VM is looked for: it runs at
the destination, or stands there with all of its memory, or can be started there from a sealed generation.
One of which none is true is lost in flight.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from lifeboat_bench.crowd import VMS, Crowd, Playing, wait_until
from lifeboat_bench.ground import PEERS, TWO_PAIRS, Ground
from lifeboat_bench.result import Bar, Table
from lifeboat_lab.errors import LabError
from lifeboat_lab.guests.plan import GuestPlan

WAN = "trans-pacific"
FEEDBACK, FIFO, PARALLEL = "feedback", "FIFO", "parallel"
SHARES = (0.25, 0.5, 0.75, 1.0)
# From the command to when the playbook has seen the site and begins: not part of the time that it is given.
LEAD_SECONDS = 8.0
# What is on its way between *released* and *activated* when the power fails ends within this.
SETTLE_SECONDS = 15.0
STORE = "/var/lib/lifeboat/store"
# Which shares to measure, in percent, joined by commas (all: about 40 minutes).
ONLY = "LIFEBOAT_BENCH_ONLY"


@dataclass(frozen=True)
class Run:
    """What was where after the power failed. ``expected_share`` is E: the share that is out, in the mean over
    the time up to the deadline.
    """

    strategy: str
    share_of_full_time: float
    deadline_seconds: float
    out: int
    held: int
    restartable: int
    lost: tuple[str, ...]
    expected_share: float


def run(ground: Ground) -> Table:
    """Measure the table on a fresh lab of four hosts. Raises LabError where a VM ran twice."""
    wanted = [float(word) / 100 for word in os.environ.get(ONLY, "").split(",") if word]
    table = Table("deadline")
    crowd = Crowd(ground, _plans())
    crowd.build()
    ground.set_wan(WAN)
    full_seconds = _full_seconds(crowd)
    ground.say(f"without a deadline all are out after {full_seconds:.1f} s")
    runs = []
    for share in wanted or SHARES:
        for strategy in (FIFO, PARALLEL, FEEDBACK):
            found = _cut(crowd, strategy, share, share * full_seconds)
            ground.say(
                f"{strategy}, power lost after {found.deadline_seconds:.1f} s: {found.out} out, {found.held} "
                f"held, {found.restartable} restartable, lost: {', '.join(found.lost) or 'none'}; "
                f"E {found.expected_share:.3f}"
            )
            runs.append(found)
    _report(table, runs)
    table.summary["full_seconds"] = full_seconds
    table.circumstances |= {"vms": VMS, "pairs": PEERS, "wan": WAN, "wan_checks": ground.wan_checks}
    return table


def _plans() -> list[GuestPlan]:
    # The big ones first, as the inventory may have them: an order by size is worth something.
    sizes = [(160, 40), (160, 40), (144, 32), (144, 32), (112, 16), (112, 16), (96, 8), (96, 8)]
    return [
        GuestPlan(
            f"vm{number}", ram_mib=ram, disk_mib=64, content_mib=content,
            workload="fsync-log,page-cache" if number % 4 < 2 else "page-cache", records_per_second=2,
        )
        for number, (ram, content) in enumerate(sizes)
    ]  # fmt: skip


def _full_seconds(crowd: Crowd) -> float:
    crowd.wait_protected()
    playing = crowd.begin({"evacuate_strategy": FEEDBACK})
    playing.end().require_success()
    crowd.at_home = False
    crowd.check()
    longest = max(float(vm["out_seconds"]) for vm in crowd.reported().values())
    _bring_home(crowd)
    return longest


def _cut(crowd: Crowd, strategy: str, share: float, seconds: float) -> Run:
    """Evacuate, cut the power of the site after ``seconds``, look, and put everything back as it was."""
    crowd.wait_protected()
    crowd.ground.say(f"{strategy}: the power fails {seconds:.0f} s after the playbook begins")
    names = list(crowd.guests)
    fifo = strategy == FIFO
    crowd.wish(dict(zip(names[1:], names, strict=False)) if fifo else {})
    deadline = time.time() + LEAD_SECONDS + seconds
    playing = crowd.begin(
        {
            "evacuate_strategy": "sequential" if fifo else strategy,
            "evacuate_deadline": datetime.fromtimestamp(deadline, UTC).isoformat(),
        }
    )
    with _seen_running(crowd) as seen:
        time.sleep(max(0.0, deadline - time.time()))
        _at_once(crowd.ground.lab.kill_host, PEERS)
        time.sleep(SETTLE_SECONDS)
    if playing.began_at is None:
        raise LabError(f"{strategy}: the playbook needed more than {LEAD_SECONDS:g} s to begin")
    horizon = deadline - playing.began_at
    crowd.ground.say("what is left is looked at")
    found = _look(crowd, seen, playing.began_at, horizon, strategy, share)
    _recover(crowd, playing)
    return found


def _at_once(work: Callable[[str], object], names: Iterable[str]) -> None:
    """Do it for each at the same time. Raises what the first of them raised."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(work, names))


@contextmanager
def _seen_running(crowd: Crowd) -> Iterator[dict[str, float]]:
    """When each VM was first seen to run at the destination, by time.time(); looked at twice a second."""
    seen: dict[str, float] = {}
    over = threading.Event()
    names = {guest.plan.uuid: name for name, guest in crowd.guests.items()}

    def watch() -> None:
        while not over.wait(0.5):
            for host in PEERS.values():
                told = crowd.ground.lab.exec(host, "virsh", "list", "--uuid", "--state-running", check=False)
                for uuid in told.stdout.split():
                    if uuid in names:
                        seen.setdefault(names[uuid], time.time())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def _look(
    crowd: Crowd, seen: Mapping[str, float], began_at: float, horizon: float, strategy: str, share: float
) -> Run:
    out: list[str] = []
    held: list[str] = []
    restartable: list[str] = []
    lost: list[str] = []

    def look(name: str) -> None:
        guest, backup = crowd.guests[name], PEERS[crowd.homes[name]]
        state = guest.states().get(backup)
        if state == "running":
            out.append(name)
        elif state == "paused" and _arrival(crowd, backup, guest.plan.uuid) in {"released", "activated"}:
            held.append(name)
        elif finding := _not_restartable(crowd, name, backup):
            lost.append(f"{name} ({finding})")
        else:
            restartable.append(name)

    _at_once(look, crowd.guests)
    before = [max(0.0, horizon - (seen.get(name, began_at + horizon) - began_at)) for name in out]
    return Run(
        strategy, share, horizon, len(out), len(held), len(restartable), tuple(lost),
        sum(before) / (len(crowd.guests) * horizon),
    )  # fmt: skip


def _arrival(crowd: Crowd, host: str, uuid: str) -> str | None:
    told = [one for one in crowd.proxy(host).get("/arrivals")["arrivals"] if one["vm"] == uuid]
    state: str | None = told[-1]["state"] if told else None
    return state


def _not_restartable(crowd: Crowd, name: str, host: str) -> str:
    """Why a VM could not be started from the newest sealed generation of its replica, '' if it could.

    The disks are read as of that generation, their file systems and files checked; its definition is there.
    """
    guest = crowd.guests[name]
    root = f"{STORE}/{guest.plan.uuid}"
    told = crowd.ground.lab.exec(host, "cat", f"{root}/replica.json", check=False)
    if told.returncode != 0:
        return "no replica"
    record: dict[str, Any] = json.loads(told.stdout)
    if not record["generations"]:
        return "no sealed generation"
    sealed = record["generations"][-1]
    until = (sealed["epoch"], sealed["generation"])
    images = {}
    for disk, layers in record["layers"].items():
        layer = [one for one in layers if (one["epoch"], one["generation"]) <= until][-1]
        path = layer["file"] if layer["file"].startswith("/") else f"{root}/{layer['file']}"
        images[disk] = (path, layer["format"])
    definition = crowd.ground.lab.exec(
        host, "test", "-s", f"{root}/blobs/{sealed['definition']}", check=False
    )
    if definition.returncode != 0:
        return "its definition is not there"
    return "; ".join(guest.verify(host, images=images, acknowledged=0, one_instant=True).findings)


def _recover(crowd: Crowd, playing: Playing) -> None:
    """The power is back: those that stayed are started at home, those that left come home."""
    lab = crowd.ground.lab
    crowd.ground.say("the power is back")
    lab.wan.set("none")
    _at_once(lab.start_host, PEERS)
    wait_until(lambda: all(_settled(crowd, host) for host in TWO_PAIRS), "all jobs have an end")
    crowd.ground.say("all jobs have an end")
    booted = []
    for name, guest in crowd.guests.items():
        runners = guest.running_on()
        if len(runners) > 1:
            raise LabError(f"{name}: runs on {' and '.join(runners)}")
        if not runners:
            guest.start(crowd.homes[name])
        if runners in ([], [crowd.homes[name]]):
            # Booted anew, by us or by the proxy that took its move back: what it had in memory is gone.
            booted.append(name)
    for name in booted:
        crowd.guests[name].wait_ready()
        crowd.canaries[name] = crowd.guests[name].canary()
    crowd.ground.say(f"{len(booted)} VMs were booted at home")
    # What it says of VMs whose hosts were dead is the coordinator's tests' matter.
    playing.end()
    _bring_home(crowd)
    crowd.ground.say("everything is at home")


def _settled(crowd: Crowd, host: str) -> bool:
    try:
        proxy = crowd.proxy(host)
        jobs = proxy.get("/evacuations")["evacuations"]
        arrivals = proxy.get("/arrivals")["arrivals"]
        links = [
            link for link in proxy.get("/links")["links"] if PEERS.get(host, link["peer"]) == link["peer"]
        ]
    except (LabError, OSError):
        return False
    return (
        all(job["ended"] for job in jobs)
        and all(one["state"] in {"landed", "aborted"} for one in arrivals)
        and any(link["state"] == "up" for link in links)
    )


def _bring_home(crowd: Crowd) -> None:
    lab = crowd.ground.lab
    lab.wan.set("none")
    if any(guest.running_on() == [PEERS[crowd.homes[name]]] for name, guest in crowd.guests.items()):
        crowd.wish({})
        crowd.at_home = False
        names = {
            guest.plan.uuid
            for name, guest in crowd.guests.items()
            if guest.running_on() == [PEERS[crowd.homes[name]]]
        }
        wait_until(lambda: names <= crowd.protected(), "those that left are protected at their home")
        crowd.begin({}).end().require_success()
    crowd.at_home = True
    crowd.check()
    crowd.wait_protected()
    lab.wan.set(WAN)


def _report(table: Table, runs: list[Run]) -> None:
    for one in runs:
        table.rows.append(
            {
                "strategy": one.strategy,
                "share_of_full_time": one.share_of_full_time,
                "deadline_seconds": one.deadline_seconds,
                "out": one.out,
                "share_out": one.out / VMS,
                "held": one.held,
                "restartable": one.restartable,
                "lost": len(one.lost),
                "expected_share": one.expected_share,
            }
        )
    table.bars.append(
        Bar("VMs lost in flight, all runs", "<=", 0.0, float(sum(len(one.lost) for one in runs)))
    )
    for strategy in (FIFO, PARALLEL):
        for share in sorted({one.share_of_full_time for one in runs}):
            ours, theirs = (
                next(one for one in runs if one.strategy == name and one.share_of_full_time == share)
                for name in (FEEDBACK, strategy)
            )
            table.bars.append(
                Bar(f"out at {share:.0%} of the full time, beyond {strategy}", ">=", 0.0,
                    float(ours.out - theirs.out), "VMs")
            )  # fmt: skip
            table.bars.append(
                Bar(f"E at {share:.0%} of the full time, beyond {strategy}", ">=", 0.0,
                    ours.expected_share - theirs.expected_share)
            )  # fmt: skip
    for strategy in (FIFO, PARALLEL, FEEDBACK):
        shares = [one.expected_share for one in runs if one.strategy == strategy]
        table.summary[f"expected_share_mean_{strategy}"] = statistics.mean(shares)
