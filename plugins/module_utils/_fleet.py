# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What proxies say, made into what planner and controller know: pure conversions of JSON."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, field, replace

from ansible_collections.lifeboat.evacuation.plugins.module_utils._fallback import (
    OUTRUNS_BYTES_PER_SECOND,
    Move,
    Phase,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._forecast import DOWNTIME_LIMIT_SECONDS
from ansible_collections.lifeboat.evacuation.plugins.module_utils._interval import Observation, PairView
from ansible_collections.lifeboat.evacuation.plugins.module_utils._packing import Packing
from ansible_collections.lifeboat.evacuation.plugins.module_utils._plan_findings import wished
from ansible_collections.lifeboat.evacuation.plugins.module_utils._processor_wait import ProcessorWait
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import (
    DEFAULT_PACKED_RATIO,
    DEFAULT_PRIORITY,
    QEMU_OVERHEAD_BYTES,
    DestinationSummary,
    PairSummary,
    Rung,
    SiteSummary,
    VmSummary,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._wait import Job, job_out

Json = t.Mapping[str, t.Any]
# Per host what the inventory says of its VMs, by the name or UUID that it gives them.
Wishes = t.Mapping[str, t.Mapping[str, Json]]
Pair = tuple[str, str]

# What a job may have failed of, or a start been refused for, that another try may not meet again.
PASSING = frozenset({
    "unreachable", "stalled", "peer-restarted", "link-lost", "proxy-restarted", "hypervisor", "protocol",
    "error", "state-changed",
})  # fmt: skip
# A host that owes its answer for so long has nothing more that may hold up others.
_SILENT_SECONDS = 10.0
# A mirror that has so little left for so long goes round behind the guest.
_CHASE_SECONDS = 20.0
_CHASE_BYTES = 8e6
_LEAD_IN = frozenset({"preflight", "catch-up", "stop", "freeze", "residual", "prepare"})
_CLOSING = frozenset({"confirm", "released", "finish", "rollback", "undecided"})


@dataclass
class HostState:
    """What a host's proxy said last; ``error``: why it said nothing."""

    name: str
    status: dict[str, t.Any] = field(default_factory=dict)
    workload: dict[str, t.Any] = field(default_factory=dict)
    error: str = ""
    # Running VMs that nobody protects; empty where nobody asked, None where libvirt does not say.
    unprotected: list[dict[str, t.Any]] | None = field(default_factory=list)
    # All VMs that libvirt knows there, as of the survey; as above, and empty where the proxy cannot tell.
    domains: list[dict[str, t.Any]] | None = field(default_factory=list)
    # Asked, and no answer yet: since when. What it said last is not news.
    late_since: float | None = None

    @property
    def lost(self) -> bool:
        """It was not reached, or owes its answer: what it did with what it was asked for is not known."""
        return bool(self.error) or self.late_since is not None

    @property
    def jobs(self) -> list[dict[str, t.Any]]:
        """The newest job of each VM."""
        latest = {str(job["vm"]): job for job in self.status.get("evacuations", [])}
        return list(latest.values())


def site_summary(
    site: str,
    sources: t.Sequence[HostState],
    destinations: t.Mapping[str, HostState],
    wishes: Wishes,
    names: t.Collection[str] | None,
    uplink_bytes_per_second: float | None,
    usual: t.Mapping[str, Json] | None = None,
) -> SiteSummary:
    """Every VM that is to leave: protected at a source, or on its way; ``names`` picks, None picks all.

    ``usual``: per host what holds of what a VM's own wishes leave open.
    """
    vms: list[VmSummary] = []
    links: dict[Pair, Json] = {}
    for host in sources:
        for link in host.status.get("links", []):
            links[host.name, str(link["peer"])] = link
        vms += _vms_of(host, wishes, names, (usual or {}).get(host.name, {}))
    pairs = [_pair(key, links.get(key, {}), site) for key in sorted({vm.pair for vm in vms})]
    return SiteSummary(
        site,
        tuple(vms),
        tuple(pairs),
        tuple(_destination(name, destinations.get(name)) for name in sorted({vm.destination for vm in vms})),
        {site: uplink_bytes_per_second or (pairs[0].bytes_per_second if len(pairs) == 1 else None)},
        tuple(host.name for host in sources),
        {host.name: int(host.workload["processors"]) for host in sources if host.workload.get("processors")},
    )


def wish_for(host: str, vm: Json, wishes: Wishes) -> Json:
    """What the inventory says of a VM: under its host, else under the only other host that lists it.

    Two hosts may have VMs of one name; and a VM may have been moved within its site since it was listed.
    """
    keys = (str(vm["name"]), str(vm["uuid"]))
    own = next((wishes[host][key] for key in keys if key in wishes.get(host, {})), None)
    if own is not None:
        return own
    elsewhere = [
        told[key] for other, told in sorted(wishes.items()) if other != host for key in keys if key in told
    ]
    return elsewhere[0] if len(elsewhere) == 1 else {}


def _vms_of(host: HostState, wishes: Wishes, names: t.Collection[str] | None, usual: Json) -> list[VmSummary]:
    figures = {str(vm["uuid"]): vm for vm in host.workload.get("vms", [])}
    under_way = {str(job["vm"]): job for job in host.jobs if not job.get("ended")}
    told = []
    known = set()
    for vm in host.status.get("vms", []):
        if names is None or vm["name"] in names or vm["uuid"] in names:
            known.add(str(vm["uuid"]))
            wish = {**usual, **{key: value for key, value in wish_for(host.name, vm, wishes).items()
                                if value is not None}}  # fmt: skip
            summary = _vm(host.name, vm, figures.get(str(vm["uuid"]), {}), wish)
            told.append(_less_what_arrived(summary, under_way.get(summary.uuid)))
    for job in host.jobs:
        # Handed over already, and the source about to forget it.
        wanted = names is None or job["name"] in names or job["vm"] in names
        if not job.get("ended") and job["vm"] not in known and wanted:
            told.append(VmSummary(str(job["vm"]), str(job["name"]), host.name, str(job["peer"])))
    return told


def _vm(host: str, vm: Json, figures: Json, wish: Json) -> VmSummary:
    memory = float(figures.get("memory_bytes") or 0.0)
    used = figures.get("memory_used_bytes")
    plain = VmSummary(
        str(vm["uuid"]),
        str(vm["name"]),
        host,
        str(vm["peer"]),
        lag_bytes=float(vm.get("lag_bytes") or 0.0),
        memory_bytes=memory + QEMU_OVERHEAD_BYTES if memory else 0.0,
        memory_used_bytes=memory if used is None else float(used),
        dirty_bytes_per_second=float(figures.get("dirty_bytes_per_second") or 0.0),
        written_bytes_per_second=float(vm.get("written_bytes_per_second") or 0.0),
        packed_ratio=float(figures.get("packed_ratio") or DEFAULT_PACKED_RATIO),
        priority=DEFAULT_PRIORITY if vm.get("priority") is None else int(vm["priority"]),
        running=bool(figures.get("running", True)),
    )
    told = replace(plain, **wished(plain, wish))
    if told.running or set(told.rungs) <= {Rung.STAY}:
        return told
    # One that is shut off goes by restart alone, and is not booted: nothing that it does is broken off.
    return replace(told, rungs=(Rung.RESTART, Rung.STAY))


def _less_what_arrived(vm: VmSummary, job: Job | None) -> VmSummary:
    """What of its memory is at its destination already is not free there any more, and not needed again."""
    if job is None:
        return vm
    if job.get("step") in _CLOSING:
        return replace(vm, memory_bytes=0.0)
    progress = job.get("progress") or {}
    if not progress.get("memory_total_bytes"):
        return vm
    left = float(progress.get("memory_remaining_bytes") or 0.0)
    # Later rounds send again what is there: less is needed, and nobody knows how much.
    if int(progress.get("memory_iteration") or 0) > 1:
        left = 0.0
    return replace(vm, memory_bytes=min(vm.memory_bytes, left))


def _pair(key: Pair, link: Json, site: str) -> PairSummary:
    return PairSummary(
        *key,
        uplink=site,
        bytes_per_second=link.get("rate_bytes_per_second"),
        round_trip_seconds=float(
            link.get("least_round_trip_seconds") or link.get("round_trip_seconds") or 0.0
        ),
        expected_bytes_per_second=link.get("expected_bytes_per_second"),
    )


def _destination(name: str, host: HostState | None) -> DestinationSummary:
    if host is None or not host.status:
        return DestinationSummary(name)
    store = host.status.get("store") or {}
    free, least = store.get("free_bytes"), store.get("minimum_free_bytes") or 0
    return DestinationSummary(
        name,
        str(host.status.get("site") or ""),
        host.workload.get("memory_free_bytes"),
        None if free is None else free - least,
    )


@dataclass
class _Counted:
    at: float
    sent_wire: float


def _rung(job: Job) -> Rung:
    """How a job's VM leaves, as its proxy says."""
    if job.get("guest_paused"):
        return Rung.PAUSED
    return Rung.RESTART if job.get("rung") == Rung.RESTART.value else Rung.LIVE


def _sends(job: Job) -> bool:
    """Whether a job that has not ended is beyond its lead-in."""
    if job.get("step") in _LEAD_IN:
        return False
    return job.get("step") in _CLOSING or bool((job.get("progress") or {}).get("memory_total_bytes"))


class Eyes:
    """Turns what proxies say each interval into an Observation; remembers counters from look to look."""

    def __init__(self, paused: t.Collection[str] = ()) -> None:
        self.paused: set[str] = set(paused)
        # Others wait for hosts to be through with lead-ins: whose memory begins to cross is told at once.
        self.processors_short = False
        # By job: what its VM's memory comes to on the wire.
        self._packing: dict[str, Packing] = {}
        self._vms: dict[str, _Counted] = {}
        self._pairs: dict[Pair, tuple[float, float]] = {}
        self._processors = ProcessorWait()
        self.carried_bytes: dict[str, float] = {}
        self._before = Observation(0.0)
        # By job: when its memory was seen to have begun to cross.
        self._sends_since: dict[str, float] = {}
        # Since when a job mirrors disks and has not come to its memory.
        self._mirroring: dict[str, float] = {}

    def look(
        self,
        hosts: t.Mapping[str, HostState],
        now: float,
        begun: t.Collection[str],
        deadline_at: float | None,
        *,
        between: bool = False,
    ) -> Observation:
        """The observation. ``begun``: identifiers of jobs that count; older ones that failed do not.

        ``between`` two looks only jobs were asked for: rates, and what is left, are those of the last look.
        """
        moves: dict[str, Move] = {}
        pairs: dict[Pair, PairView] = {}
        out: set[str] = set()
        failed: dict[str, bool] = {}
        # At whichever host: one that left here once may have come home to another since.
        protected = {str(vm["uuid"]) for host in hosts.values() for vm in host.status.get("vms", [])}
        for host in hosts.values():
            if not host.status:
                continue
            stale = host.lost
            silent = bool(host.error) or now - (host.late_since or now) >= _SILENT_SECONDS
            labels: dict[str, Json] = {}
            waited = None
            if not (between or stale):
                waited = self._processors.share(host.name, host.status.get("processor_wait"), now)
            for link in host.status.get("links", []):
                key = (host.name, str(link["peer"]))
                if between:
                    pairs[key] = self._before.pairs.get(key, PairView(link.get("state") == "up"))
                    continue
                if stale:
                    # Counters that were not read anew would say that nothing is sent.
                    seen = self._before.pairs.get(key, PairView())
                    got = 0.0 if silent else seen.goodput_bytes_per_second
                    pairs[key] = replace(seen, up=seen.up and not host.error, heard=False,
                                         goodput_bytes_per_second=got)  # fmt: skip
                    continue
                pairs[key] = replace(self._pair(key, link, now), processors_waited=waited)
                labels.update((link.get("counters") or {}).get("labels") or {})
            for job in host.jobs:
                uuid = str(job["vm"])
                if not job.get("ended") and job.get("step") != "undecided":
                    known = self._before.moves.get(uuid) if stale or between else None
                    if known is None and between:
                        known = Move(uuid, Phase.LEAD_IN, _rung(job))
                    if known is not None and between and not stale:
                        known = self._later(host.name, job, known)
                    move = known or self._move(job, labels.get(uuid, {}), now)
                    moves[uuid] = replace(move, silent=silent)
                elif job_out(job) and (job["id"] in begun or uuid not in protected):
                    out.add(uuid)
                elif job["id"] in begun:
                    failed[uuid] = job.get("step") != "undecided" and job.get("cause") in PASSING
        self._before = Observation(now, moves, pairs, out, failed, deadline_at)
        return self._before

    def glance(self, hosts: t.Iterable[HostState], now: float) -> None:
        """Between two looks hosts said how their jobs stand: remember whose memory has begun to cross."""
        for host in hosts:
            for job in host.jobs:
                if not job.get("ended") and _sends(job):
                    self._sends_since.setdefault(str(job["id"]), now)

    def through(self, host: HostState) -> set[tuple[str, str]]:
        """Of a host's newest jobs those that have nothing more to send, or next to nothing, and, where others
        wait for processors, those whose memory has begun to cross: with how far each of them is."""
        told: set[tuple[str, str]] = set()
        for job in host.jobs:
            if job.get("ended"):
                told.add((str(job["id"]), "ended"))
            elif job.get("step") in _CLOSING:
                told.add((str(job["id"]), "closing"))
            else:
                if self.processors_short and _sends(job):
                    told.add((str(job["id"]), "sends"))
                move = self._before.moves.get(str(job["vm"]))
                if move is not None and self._later(host.name, job, move).phase is Phase.LAST:
                    told.add((str(job["id"]), "last"))
        return told

    def _later(self, host: str, job: Job, move: Move) -> Move:
        """A move as it was seen at the last look, with the step that its proxy tells now.

        In its last round its place is another's: what follows are round trips, in which the line would idle.
        Where processors are short hosts have time for the next one's lead-in once its memory crosses; how
        fast it does the next look tells.
        """
        if str(job.get("step")) in _CLOSING:
            return replace(move, phase=Phase.CLOSING)
        progress = job.get("progress") or {}
        packing = self._packing.get(str(job["id"]))
        if move.phase is Phase.LEAD_IN and self.processors_short and _sends(job):
            pages = float(progress.get("memory_remaining_bytes") or 0.0)
            left = pages * (packing.ratio if packing else DEFAULT_PACKED_RATIO)
            left += float(progress.get("disk_remaining_bytes") or 0.0)
            number = int(progress.get("memory_iteration") or 0)
            since = self._sends_since.get(str(job["id"]))
            return replace(move, phase=Phase.BULK, remaining_bytes=left, bytes_per_second=0.0,
                           round_number=number, sends_since=since)  # fmt: skip
        if move.phase is not Phase.BULK or move.rung is not Rung.LIVE or packing is None:
            return move
        left = float(progress.get("memory_remaining_bytes") or 0.0) * packing.ratio
        left += float(progress.get("disk_remaining_bytes") or 0.0)
        # One that came to be served fully within the last interval got little over all of it.
        view = self._before.pairs.get((host, str(job.get("peer"))))
        rate = max(move.bytes_per_second, view.goodput_bytes_per_second if view else 0.0)
        if self._phase(job, progress, left, rate) is Phase.LAST:
            return replace(move, phase=Phase.LAST, remaining_bytes=left, most_remaining_bytes=None)
        return move

    def _pair(self, key: Pair, link: Json, now: float) -> PairView:
        sent = float((link.get("counters") or {}).get("sent_wire_bytes") or 0.0)
        for name, figures in ((link.get("counters") or {}).get("classes") or {}).items():
            self.carried_bytes[f"{key[0]} {key[1]} {name}"] = float(figures.get("sent_wire_bytes") or 0.0)
        before = self._pairs.get(key)
        self._pairs[key] = (now, sent)
        rate = 0.0
        if before is not None and now > before[0]:
            rate = max(0.0, (sent - before[1]) / (now - before[0]))
        trip = float(link.get("round_trip_seconds") or 0.0)
        least = float(link.get("least_round_trip_seconds") or 0.0)
        return PairView(link.get("state") == "up", rate, trip, least_round_trip_seconds=least)

    def _move(self, job: Job, label: Json, now: float) -> Move:
        uuid = str(job["vm"])
        progress = job.get("progress") or {}
        wire = float(label.get("sent_wire_bytes") or 0.0)
        before = self._vms.get(uuid)
        self._vms[uuid] = _Counted(now, wire)
        rate = 0.0
        if before is not None and now > before.at:
            rate = max(0.0, (wire - before.sent_wire) / (now - before.at))
        packing = self._packing.setdefault(str(job["id"]), Packing())
        packing.look(wire, progress)
        if _sends(job):
            self._sends_since.setdefault(str(job["id"]), now)
        left = packing.left_bytes + float(progress.get("disk_remaining_bytes") or 0.0)
        if self._chases_its_disk(job, progress, now):
            return Move(uuid, Phase.BULK, Rung.LIVE, left, rate, OUTRUNS_BYTES_PER_SECOND, hopeless=True)
        return Move(
            uuid,
            self._phase(job, progress, left, rate),
            Rung.PAUSED if uuid in self.paused else _rung(job),
            left,
            rate,
            packing.dirty_bytes_per_second,
            bool(progress.get("hopeless")),
            sent_bytes=packing.sent_bytes,
            round_number=int(progress.get("memory_iteration") or 0),
            sends_since=self._sends_since.get(str(job["id"])),
        )

    def _chases_its_disk(self, job: Job, progress: Json, now: float) -> bool:
        """The mirror of its disk is as good as done and never is: the guest writes as fast as it follows."""
        if job.get("step") != "migrate" or progress.get("memory_total_bytes") or job.get("guest_paused"):
            self._mirroring.pop(str(job["id"]), None)
            return False
        if not progress.get("disk_total_bytes"):
            return False
        since = self._mirroring.setdefault(str(job["id"]), now)
        left = float(progress.get("disk_remaining_bytes") or 0.0)
        return now - since > _CHASE_SECONDS and left < _CHASE_BYTES

    @staticmethod
    def _phase(job: Job, progress: Json, left: float, rate: float) -> Phase:
        if job.get("step") in _CLOSING:
            return Phase.CLOSING
        if not _sends(job):
            return Phase.LEAD_IN
        rounds = int(progress.get("memory_iteration") or 0)
        if rounds > 1 and left <= rate * float(
            progress.get("downtime_limit_seconds") or DOWNTIME_LIMIT_SECONDS
        ):
            return Phase.LAST
        return Phase.BULK
