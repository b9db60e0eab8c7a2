# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Where replicas go when nobody says so: by memory and space at the peers, and by what is there already.

Pure: from what hypervisors said of themselves. The same answers give the same places, in whatever order they
came. Who is protected stays where it is; who names a peer is obeyed and not judged.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, field

from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import QEMU_OVERHEAD_BYTES

Json = t.Mapping[str, t.Any]

# Reason words.
KEPT = "kept"
NAMED = "named"
ONLY_PEER = "only-peer"
ONLY_FIT = "only-one-with-room"
MOST_ROOM = "most-room"
WITH_GROUP = "with-its-group"


@dataclass
class _Room:
    """What a hypervisor has left for others' VMs; None: it does not say, and is not judged by that."""

    memory_total: float | None
    memory_left: float | None
    store_size: float | None
    store_left: float | None

    def fits(self, memory: float, disks: float) -> bool:
        return not (
            (self.memory_left is not None and memory > self.memory_left)
            or (self.store_left is not None and disks > self.store_left)
        )

    def take(self, memory: float, disks: float) -> None:
        if self.memory_left is not None:
            self.memory_left -= memory
        if self.store_left is not None:
            self.store_left -= disks

    def share_left_after(self, memory: float, disks: float) -> float:
        """What would be left: shares of memory and space multiplied, so that neither hides the other."""
        share = 1.0
        if self.memory_left is not None and self.memory_total:
            share *= max(0.0, self.memory_left - memory) / self.memory_total
        if self.store_left is not None and self.store_size:
            share *= max(0.0, self.store_left - disks) / self.store_size
        return share

    def __str__(self) -> str:
        return f"{_gib(self.memory_left)} of memory and {_gib(self.store_left)} of store left"


@dataclass(frozen=True, slots=True)
class _Wanted:
    host: str
    name: str
    group: str
    memory: float
    disks: float
    candidates: tuple[str, ...]
    # Why other peers of its host are none: sentences.
    passed_over: tuple[str, ...] = ()
    obeyed: bool = False


@dataclass
class Placement:
    """``peers`` by host and VM, as the VM was named; a sentence for each that was chosen; what cannot be."""

    peers: dict[str, dict[str, str]] = field(default_factory=dict)
    reasons: dict[str, dict[str, str]] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    def note(self, host: str, vm: str, peer: str, reason: str) -> None:
        """A VM has its place."""
        self.peers.setdefault(host, {})[vm] = peer
        self.reasons.setdefault(host, {})[vm] = reason


def place(wishes: t.Mapping[str, Json], rooms: t.Mapping[str, Json]) -> Placement:
    """A place for every VM that names no peer.

    ``wishes``: per host ``vms`` as the inventory lists them, and ``candidates``, the names of its peers
    (none: all that its proxy has at other sites). ``rooms``: per hypervisor what ``GET /v1/hypervisor`` said,
    or ``{"error": sentence}``.
    """
    told = Placement()
    known = {name: _room(room) for name, room in rooms.items() if not room.get("error")}
    _count_what_is_there(rooms, known)
    groups: dict[str, str] = {}
    waiting: list[_Wanted] = []
    for host in sorted(wishes):
        waiting += _judge(host, wishes[host], rooms, known, groups, told)
    # Those without a choice before all others, who would be promised the same room. Then the largest first:
    # what is left over suits the small ones (first-fit decreasing).
    for wanted in sorted(
        waiting, key=lambda one: (not one.obeyed, -one.memory, -one.disks, one.host, one.name)
    ):
        _choose(wanted, known, groups, told)
    return told


def _room(said: Json) -> _Room:
    store = said.get("store") or {}
    free, least = store.get("free_bytes"), store.get("minimum_free_bytes") or 0
    return _Room(
        said.get("memory_total_bytes"),
        said.get("memory_free_bytes"),
        store.get("size_bytes"),
        None if free is None else free - least,
    )


def _needs(domain: Json) -> tuple[float, float]:
    """Memory and space that a VM takes at its peer, bytes; what is not known counts as nothing."""
    memory = domain.get("memory_bytes")
    return (memory + QEMU_OVERHEAD_BYTES if memory else 0.0), float(domain.get("disk_bytes") or 0.0)


def _domains(said: Json) -> t.Sequence[Json]:
    return said.get("domains") or []


def _count_what_is_there(rooms: t.Mapping[str, Json], known: t.Mapping[str, _Room]) -> None:
    """Who is protected to a hypervisor will want its memory, and the rest of a first copy its space."""
    for said in rooms.values():
        for domain in _domains(said):
            peer = str(domain.get("peer") or "")
            if peer in known:
                memory, disks = _needs(domain)
                coverage = domain.get("coverage")
                known[peer].take(memory, disks * (1.0 - (0.0 if coverage is None else coverage)))


def _judge(
    host: str,
    wish: Json,
    rooms: t.Mapping[str, Json],
    known: t.Mapping[str, _Room],
    groups: dict[str, str],
    told: Placement,
) -> list[_Wanted]:
    """Those of a host that are to be placed; the others have their place, or are a finding."""
    said = rooms.get(host, {"error": "it was not asked"})
    named = [str(peer) for peer in wish.get("candidates") or []]
    only = _only_peer(said, named)
    waiting = []
    for vm in wish.get("vms") or []:
        name, group = str(vm.get("name")), str(vm.get("group") or "")
        domain = next((one for one in _domains(said) if name in (one["name"], one["uuid"])), None)
        needs = (0.0, 0.0) if domain is None else _needs(domain)
        if vm.get("peer"):
            _settle(told, host, name, str(vm["peer"]), NAMED, group, groups)
            if domain is not None and not domain.get("peer") and vm["peer"] in known:
                known[vm["peer"]].take(*needs)
        elif domain is not None and domain.get("peer"):
            _settle(told, host, name, str(domain["peer"]), KEPT, group, groups)
        elif only:
            # There is nothing to choose: whether it may be protected its proxy judges.
            waiting.append(_Wanted(host, name, group, *needs, (only,), obeyed=True))
        elif domain is None:
            told.findings.append(f"VM {name} of {host}: {_unknown(said)}")
        elif missing := [what for what in ("memory", "disk") if domain.get(f"{what}_bytes") is None]:
            told.findings.append(f"VM {name} of {host}: {_not_measured(name, missing)}")
        else:
            candidates, passed_over = _candidates(host, said, named, rooms)
            waiting.append(_Wanted(host, name, group, *needs, candidates, passed_over))
    return waiting


def _only_peer(said: Json, named: t.Sequence[str]) -> str:
    """The one peer that the operator left, "" where there are several, or the proxy knows nothing of it."""
    configured = [str(peer["name"]) for peer in said.get("peers") or []]
    peers = named or configured
    return peers[0] if len(peers) == 1 and (said.get("error") or peers[0] in configured) else ""


def _not_measured(name: str, missing: t.Sequence[str]) -> str:
    sizes = {"memory": "how much memory it has", "disk": "how large its images are"}
    return (
        f"its host does not know {' and '.join(sizes[what] for what in missing)}; see `virsh dumpxml {name}` "
        "and that its images are there, or name its peer, which is obeyed as it is"
    )


def _unknown(said: Json) -> str:
    if said.get("error"):
        return f"its host did not say what it has ({said['error']}); mend that first"
    if said.get("domains") is None:
        return "libvirt there does not answer; see `virsh list` there"
    return "is not defined there; see `virsh list --all` there"


def _settle(
    told: Placement, host: str, name: str, peer: str, reason: str, group: str, groups: dict[str, str]
) -> None:
    told.note(host, name, peer, reason)
    if group:
        groups.setdefault(group, peer)


def _candidates(
    host: str, said: Json, named: t.Sequence[str], rooms: t.Mapping[str, Json]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The peers that may be chosen, and a sentence for each that may not."""
    configured = [str(peer["name"]) for peer in said.get("peers") or []]
    may, over = [], []
    for name in named or configured:
        there = rooms.get(name, {"error": "it was not asked"})
        if name not in configured:
            over.append(f"{name} is no peer of {host}'s proxy (run site_setup)")
        elif there.get("error"):
            over.append(f"{name} did not say what room it has ({there['error']})")
        elif there.get("site") and there["site"] == said.get("site"):
            if named:
                over.append(f"{name} stands at the same site")
        else:
            may.append(name)
    return tuple(dict.fromkeys(may)), tuple(over)


def _choose(wanted: _Wanted, known: t.Mapping[str, _Room], groups: dict[str, str], told: Placement) -> None:
    fitting = [
        name for name in wanted.candidates if name in known and known[name].fits(wanted.memory, wanted.disks)
    ]
    if wanted.obeyed:
        chosen, reason = wanted.candidates[0], ONLY_PEER
    elif not fitting:
        told.findings.append(_fits_nowhere(wanted, known))
        return
    elif groups.get(wanted.group) in fitting:
        chosen, reason = groups[wanted.group], WITH_GROUP
    else:
        chosen = max(
            sorted(fitting),
            key=lambda name: known[name].share_left_after(wanted.memory, wanted.disks),
        )
        reason = ONLY_FIT if len(fitting) == 1 else MOST_ROOM
    _settle(told, wanted.host, wanted.name, chosen, reason, wanted.group, groups)
    left = ""
    if chosen in known:
        known[chosen].take(wanted.memory, wanted.disks)
        left = f"; {known[chosen]} there"
    told.told.append(f"VM {wanted.name} of {wanted.host}: to {chosen} ({reason}){left}")


def _fits_nowhere(wanted: _Wanted, known: t.Mapping[str, _Room]) -> str:
    facts = [f"{name} has {known[name]}" for name in wanted.candidates if name in known]
    facts += wanted.passed_over
    told = "; ".join(facts) or "none stands at another site"
    return (
        f"VM {wanted.name} of {wanted.host}: needs {_gib(wanted.memory)} of memory and "
        f"{_gib(wanted.disks)} of store, and no peer has both ({told}); "
        "free room there, name more in lifeboat_peers, or name its peer, which is obeyed as it is"
    )


def _gib(count: float | None) -> str:
    return "an unknown amount" if count is None else f"{count / 2**30:.1f} GiB"
