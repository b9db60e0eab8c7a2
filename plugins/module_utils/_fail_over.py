# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which VMs of a dead site are started where, in which order, and all that speaks against it.

Pure: from what hypervisors of other sites say of their replicas, and from how the site's own hosts (do not)
answer. That they are dead is the operator's word; what says otherwise is a finding, and then nothing is done.
"""

from __future__ import annotations

import re
import typing as t
from dataclasses import asdict, dataclass, field, replace

from ansible_collections.lifeboat.evacuation.plugins.module_utils._fleet import wish_for
from ansible_collections.lifeboat.evacuation.plugins.module_utils._inventory import peers_of
from ansible_collections.lifeboat.evacuation.plugins.module_utils._order import order
from ansible_collections.lifeboat.evacuation.plugins.module_utils._plan_findings import (
    wish_findings,
    wished,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import (
    DEFAULT_PRIORITY,
    VmSummary,
)

Json = t.Mapping[str, t.Any]

STARTED = "restarted-from-replica"
HERE = "already-there"
FAILED = "failed"
WOULD_START = "would-start"
_GOOD = frozenset({STARTED, HERE, WOULD_START})

# What ssh says when somebody is there and does not let us in. Silence says nothing.
_SOMEBODY = re.compile(
    r"permission denied|host key verification failed|identification has changed|connection refused"
    r"|too many authentication failures|no matching [a-z ]+ found|connection reset by",
    re.IGNORECASE,
)

_DISREGARD = "; where something else answers at its address, or it surely does not run these VMs, say so"


def evidence_of_life(tried: Json) -> str:
    """What a try to run anything on a host says against its being dead, "" for nothing."""
    said = " ".join(str(tried.get(key) or "") for key in ("msg", "stderr")).strip()
    if tried.get("unreachable"):
        found = _SOMEBODY.search(said)
        return f"its SSH answers ({found.group(0)})" if found else ""
    # A task that ran out of its time has met nobody.
    return "" if tried.get("timedout") else "Ansible reaches it"


@dataclass
class Plan:
    """``waves``: one after the other; in each, per home, VMs in their order. ``here``: outcomes of those to
    whom nothing is to be done or can be done."""

    findings: list[str] = field(default_factory=list)
    waves: list[dict[str, list[dict[str, t.Any]]]] = field(default_factory=list)
    here: list[dict[str, t.Any]] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    # the hosts of ``unreached``, whose names may have colons
    silent: list[str] = field(default_factory=list)


def make_plan(
    asked: t.Sequence[Json],
    homes: t.Mapping[str, Json],
    names: t.Collection[str] | None = None,
    leave_behind: t.Collection[str] = (),
    neighbours: t.Collection[str] = (),
) -> Plan:
    """``asked``: results of fail_over_info in a loop over places; ``homes``: per dead host ``tried`` and its
    ``variables``. ``names`` picks VMs by name or UUID, None all; ``leave_behind`` are not started.
    ``neighbours``, hosts of the same site, may be silent: they were asked for what has moved to them."""
    # A name that is all digits is a number in YAML.
    names = None if names is None else {str(name) for name in names}
    leave_behind = {str(name) for name in leave_behind}
    plan = Plan()
    answers: dict[str, Json] = {}
    for result in asked:
        place = str(result.get("item"))
        if not (result.get("failed") or result.get("unreachable")):
            answers[place] = result
            if "running" not in result or result["running"] is not None:
                continue
            why = "its libvirt does not say which VMs run there"
        elif place in neighbours:
            continue
        else:
            why = str(result.get("msg") or "was not reached").strip()
        plan.unreached.append(f"{place}: {why}")
        plan.silent.append(place)
    wishes = {home: _wishes(told["variables"]) for home, told in homes.items()}
    every: list[Json] = [
        {**vm, "place": place, "home": vm.get("peer")}
        for place, answer in answers.items()
        for vm in answer.get("vms", [])
    ]
    told = [vm for vm in every if vm["home"] in homes or vm["home"] is None]
    # A record that is damaged does not tell the name that others know.
    called: dict[str, set[str]] = {}
    for vm in told:
        called.setdefault(str(vm["vm"]), set()).update({str(vm["vm"]), str(vm["name"])})
    _take_those_there(plan, told, every, answers, called, names, leave_behind)
    there = {outcome["vm"] for outcome in plan.here}
    wanted = [vm for vm in told if not vm["is_here"] and vm["vm"] not in there]
    wanted = [vm for vm in _newest(wanted) if _is_meant(called[str(vm["vm"])], names, leave_behind)]
    silent = set(plan.silent)
    for vm in wanted:
        plan.findings += [
            f"{vm['place']}: {finding['subject']}: {finding['fact']}; {finding['way_out']}"
            for finding in vm["findings"]
        ]
        plan.findings += _of_a_newer_one(vm, homes, wishes, silent)
    plan.findings += _of_homes(wanted, homes)
    plan.findings += _of_memory(wanted, answers)
    meant = {str(vm[key]) for vm in wanted for key in ("vm", "name")}
    for home in sorted(homes):
        for name, wish in wishes[home].items():
            # What is wrong about others keeps nobody here from running.
            plan.findings += map(str, wish_findings(name, wish)) if name in meant else ()
    _tell_missing(plan, told, wishes, names, leave_behind)
    _tell_mistaken(plan, told, homes, wishes, leave_behind)
    if not plan.findings:
        plan.waves = _waves(wanted, wishes)
    return plan


def _wishes(variables: Json) -> dict[str, Json]:
    return {str(wish.get("name")): wish for wish in variables.get("lifeboat_vms") or []}


def _is_meant(called: set[str], names: t.Collection[str] | None, leave_behind: t.Collection[str]) -> bool:
    return (names is None or bool(called & set(names))) and not called & set(leave_behind)


def _take_those_there(
    plan: Plan,
    told: t.Sequence[Json],
    every: t.Sequence[Json],
    answers: t.Mapping[str, Json],
    called: t.Mapping[str, set[str]],
    names: t.Collection[str] | None,
    leave_behind: t.Collection[str],
) -> None:
    """Whoever is somewhere already: by an arrival, from whichever host it came last, or by other means."""
    arrived: dict[str, Json] = {}
    for vm in every:
        # Two may have it where it went on; one that runs is the one that counts.
        if vm["is_here"] and (str(vm["vm"]) not in arrived or _runs(vm)):
            arrived[str(vm["vm"])] = vm
    running: dict[str, str] = {}
    for place, answer in answers.items():
        running.update({str(vm["vm"]): place for vm in answer.get("running") or ()})
    ours: dict[str, Json] = {str(vm["vm"]): vm for vm in told}
    for uuid, vm in ours.items():
        if not _is_meant(called[uuid], names, ()) or not (uuid in arrived or uuid in running):
            continue
        vm = {**arrived.get(uuid, vm), "home": vm["home"]}
        if uuid in running and not (vm["is_here"] and _runs(vm)):
            there = {**vm, "place": running[uuid], "generation": None, "age_seconds": None}
            plan.here.append(_outcome(there, HERE, "it has come to run there by other means"))
        elif _runs(vm) or called[uuid] & set(leave_behind):
            plan.here.append(_outcome(vm, HERE, ""))
        else:
            sentence = (
                f"it has come to {vm['place']} and is off there; start it there "
                f"(`virsh start {vm['name']}`), or name it in fail_over_leave_behind"
            )
            plan.here.append(_outcome(vm, FAILED, sentence))


def _runs(vm: Json) -> bool:
    return vm.get("is_running") is not False


def _newest(vms: t.Sequence[Json]) -> list[Json]:
    """One replica of each VM: it may have an older one where it was protected once. One that could not be
    looked at may be the newest."""

    def rank(vm: Json) -> tuple[bool, int, float, str]:
        epoch = vm.get("epoch")
        return (epoch is None, epoch or 0, vm.get("sealed_at") or 0.0, vm["place"])

    best: dict[str, Json] = {}
    for vm in sorted(vms, key=rank):
        best[str(vm["vm"])] = vm
    return list(best.values())


def _of_a_newer_one(
    vm: Json, homes: t.Mapping[str, Json], wishes: t.Mapping[str, t.Mapping[str, Json]], silent: set[str]
) -> list[str]:
    """A replica may be an old one where another may be newer; the VM may even run from that by now."""
    home = vm["home"]
    if home not in homes:
        return []
    wish = wishes[home].get(str(vm["name"])) or wishes[home].get(str(vm["vm"])) or {}
    peers = {str(wish["peer"])} if wish.get("peer") else set(peers_of(homes[home]["variables"]))
    # Where the inventory names no peer it may be protected anywhere.
    newer = ", ".join(sorted(((peers or silent) - {vm["place"]}) & silent))
    if not newer:
        return []
    return [
        f"VM {vm['name']}: its replica at {vm['place']} may be an old one: {newer}, where it is or may be "
        "protected, does not answer; wait for that, or leave the VM out (fail_over_leave_behind) and, where "
        f"you know better, run it at {vm['place']} (`precache-proxy fail-over`)"
    ]


def _of_homes(wanted: t.Sequence[Json], homes: t.Mapping[str, Json]) -> list[str]:
    found: list[str] = []
    for home in sorted({str(vm["home"]) for vm in wanted} & set(homes)):
        hearing = sorted({str(vm["place"]) for vm in wanted if vm["home"] == home and vm.get("home_answers")})
        facts = [evidence_of_life(homes[home]["tried"])]
        facts.append(f"its proxy answers {', '.join(hearing)}" if hearing else "")
        if any(facts):
            found.append(
                f"{home}: it is not dead: {' and '.join(fact for fact in facts if fact)}; evacuate it "
                "(evacuate.yml), or start those of the others (--limit)"
                + (f"{_DISREGARD} (fail_over_disregard_ssh={home})" if facts[0] else "")
            )
    return found


def _of_memory(wanted: t.Sequence[Json], answers: t.Mapping[str, Json]) -> list[str]:
    found: list[str] = []
    for place, answer in sorted(answers.items()):
        free = answer.get("memory_free_bytes")
        mine = [vm for vm in wanted if vm["place"] == place]
        needed = sum(float(vm.get("memory_bytes") or 0.0) for vm in mine)
        # What a single one lacks its proxy tells.
        if free is not None and len(mine) > 1 and needed > float(free):
            found.append(
                f"{place}: {needed / 2**30:.1f} GiB of memory needed for {len(mine)} VMs, "
                f"{float(free) / 2**30:.1f} GiB free; end something there, or leave some out "
                "(fail_over_leave_behind)"
            )
    return found


def _tell_missing(
    plan: Plan,
    told: t.Sequence[Json],
    wishes: t.Mapping[str, t.Mapping[str, Json]],
    names: t.Collection[str] | None,
    leave_behind: t.Collection[str],
) -> None:
    """Whom nobody has: a finding where it was asked for and everybody answered, else an outcome."""
    known = {str(vm[key]) for vm in told for key in ("vm", "name")}
    for name in sorted(set(names or ()) - known):
        if plan.unreached:
            plan.here.append(_nowhere(name, None, plan))
        else:
            plan.findings.append(
                f"VM {name}: no hypervisor of another site has a replica of it whose home is at this one; "
                "take it out of fail_over_vms"
            )
    for home, listed in sorted(wishes.items()) if names is None else ():
        for name in sorted(set(listed) - known - set(leave_behind)):
            plan.here.append(_nowhere(name, home, plan))


def _tell_mistaken(
    plan: Plan,
    told: t.Sequence[Json],
    homes: t.Collection[str],
    wishes: t.Mapping[str, t.Mapping[str, Json]],
    leave_behind: t.Collection[str],
) -> None:
    """Somebody misspelt would be started against the operator's word."""
    if plan.unreached:
        return
    known = {str(vm[key]) for vm in told for key in ("vm", "name")}
    known.update(name for listed in wishes.values() for name in listed)
    plan.findings += [
        f"VM {name}: it is to be left behind, and nobody has a replica of a VM of that name or UUID whose "
        f"home is {' or '.join(sorted(homes))}; write it as `precache-proxy status` does, or take it "
        "out of fail_over_leave_behind"
        for name in sorted(set(leave_behind) - known)
    ]


def _nowhere(name: str, home: str | None, plan: Plan) -> dict[str, t.Any]:
    silent = ", ".join(plan.silent)
    sentence = "no hypervisor that answered has a replica of it" + (f"; {silent} did not" if silent else "")
    return {
        "name": name, "vm": None, "home": home, "place": None, "verdict": FAILED, "generation": None,
        "age_seconds": None, "sentence": sentence,
    }  # fmt: skip


def _waves(
    wanted: t.Sequence[Json], wishes: t.Mapping[str, t.Mapping[str, Json]]
) -> list[dict[str, list[dict[str, t.Any]]]]:
    """Homes go side by side, each VM by VM; one that waits for a VM of another home is of a later wave."""
    summaries: list[VmSummary] = []
    for vm in wanted:
        priority = DEFAULT_PRIORITY if vm.get("priority") is None else int(vm["priority"])
        plain = VmSummary(str(vm["vm"]), str(vm["name"]), vm["home"], vm["place"], priority=priority)
        wish = wish_for(vm["home"], {"name": vm["name"], "uuid": vm["vm"]}, wishes)
        summaries.append(replace(plain, **wished(plain, wish)))
    # Each is started within seconds, whatever its size.
    ordered = order(summaries, {vm.uuid: 1.0 for vm in summaries})
    by_uuid = {str(vm["vm"]): vm for vm in wanted}
    wave_of: dict[str, int] = {}
    last: dict[str, int] = {}
    waves: list[dict[str, list[dict[str, t.Any]]]] = []
    for summary in ordered:
        before = [
            wave_of[other.uuid] + (other.source != summary.source)
            for other in ordered
            if other.uuid in wave_of and {other.uuid, other.name} & set(summary.after)
        ]
        number = max([last.get(summary.source, 0), *before])
        wave_of[summary.uuid] = last[summary.source] = number
        while len(waves) <= number:
            waves.append({})
        kept = ("vm", "name", "home", "place", "generation", "age_seconds")
        waves[number].setdefault(summary.source, []).append(
            {key: by_uuid[summary.uuid].get(key) for key in kept}
        )
    return waves


def outcomes(plan: Json, results: t.Sequence[Json]) -> list[dict[str, t.Any]]:
    """What became of each VM: of those there, and of the module's runs (results of loops over the waves)."""
    told = list(plan["here"])
    for result in results:
        vm: Json = result["item"]
        after: Json = result.get("fail_over") or {}
        if result.get("failed") or result.get("unreachable"):
            told.append(_outcome(vm, FAILED, str(result.get("msg") or f"{vm['place']} was not reached")))
        elif after.get("state") == "would-start":
            told.append(_outcome({**vm, **_known(after)}, WOULD_START, ""))
        else:
            verdict = STARTED if result.get("changed") else HERE
            told.append(_outcome({**vm, **_known(after)}, verdict, ""))
    return told


def _known(told: Json) -> dict[str, t.Any]:
    return {key: told[key] for key in ("generation", "age_seconds") if told.get(key) is not None}


def _outcome(vm: Json, verdict: str, sentence: str) -> dict[str, t.Any]:
    kept = {key: vm.get(key) for key in ("name", "vm", "home", "place", "generation", "age_seconds")}
    return {**kept, "verdict": verdict, "sentence": sentence}


def bad(told: t.Sequence[Json]) -> list[str]:
    """Names of those that do not run, and will not."""
    return [str(outcome["name"]) for outcome in told if outcome["verdict"] not in _GOOD]


def age(seconds: float | None) -> str:
    """How old a generation is, as people say it."""
    if seconds is None:
        return "not known"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


_HEAD = ("VM", "HOME", "AT", "VERDICT", "GENERATION", "SEALED AGO")


def table(told: t.Sequence[Json]) -> list[str]:
    """Lines for people: a row for each VM, and below them why some do not run."""
    rows = [_HEAD]
    for outcome in told:
        number = outcome.get("generation")
        # One that an evacuation brought has lost nothing.
        ago = "-" if number is None else age(outcome.get("age_seconds"))
        cells = (outcome["name"], outcome.get("home"), outcome.get("place"), outcome["verdict"], number, ago)
        rows.append(tuple("-" if cell is None else str(cell) for cell in cells))  # type: ignore[arg-type]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    reasons = [f"{outcome['name']}: {outcome['sentence']}" for outcome in told if outcome.get("sentence")]
    return lines + ([""] if reasons else []) + reasons


def as_json(plan: Plan) -> dict[str, t.Any]:
    """The plan as Ansible's templates have it."""
    return asdict(plan)
