# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What cannot be meant, or cannot work, told before anything moves: all of it, each with its way out."""

from __future__ import annotations

import difflib
import re
import typing as t

from ansible_collections.lifeboat.evacuation.plugins.module_utils._order import cycles
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import (
    LADDER,
    Finding,
    Rung,
    SiteSummary,
    VmSummary,
)

STRATEGIES = ("feedback", "sequential", "parallel", "static:N")
_STATIC = re.compile(r"^static:([1-9]\d{0,3})$")


# What lifeboat_vms may say of a VM, to all that read it: a slip would count for nothing, in silence.
_KEYS = frozenset({
    "name", "peer", "rpo", "priority", "group", "after", "fallback", "shutdown_seconds", "power_off", "disks",
    "raw_overlay_consent", "addresses", "cards",
})  # fmt: skip

_RATE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*?)\s*(?:/s|ps)?\s*$")
# "Mbps" is bits to most people, and would be eight times too much.
_BITS_OR_BYTES = re.compile(r"\d\s*[kKmMgG]?b(/s|ps)?\s*$")
_RATE_UNITS = {
    "": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9,
    "k": 2.0**10, "kib": 2.0**10, "m": 2.0**20, "mib": 2.0**20, "g": 2.0**30, "gib": 2.0**30,
    "bit": 1 / 8, "kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8,
}  # fmt: skip


def read_rate(what: str, text: str | None) -> tuple[float | None, list[Finding]]:
    """Bytes per second of ``400Mbit/s`` or ``50MB/s``, as proxies understand them; None: none is given."""
    if not text or not text.strip():
        return None, []
    if _BITS_OR_BYTES.search(text):
        way_out = "write Mbit/s or MB/s"
        return None, [Finding(f"{what} {text!r}", "may be meant in bits or in bytes", way_out)]
    match = _RATE.match(text)
    factor = _RATE_UNITS.get(match.group(2).lower()) if match else None
    if match is None or factor is None:
        return None, [Finding(f"{what} {text!r}", "is no rate", "write one, such as 400Mbit/s")]
    if float(match.group(1)) <= 0:
        way_out = "give one above 0, or none for no limit"
        return None, [Finding(f"{what} {text!r}", "nothing could be sent", way_out)]
    return float(match.group(1)) * factor, []


def strategy_findings(strategy: object) -> list[Finding]:
    """An unknown strategy."""
    text = str(strategy)
    if text in STRATEGIES[:3] or _STATIC.match(text):
        return []
    way_out = f"use one of {', '.join(STRATEGIES)} (N from 1 to 9999)"
    return [Finding(f"strategy {text!r}", "is not known", way_out)]


def wish_findings(vm: str, wish: t.Mapping[str, t.Any]) -> list[Finding]:
    """What the inventory says about one VM: priority, group, after, fallback."""
    found: list[Finding] = []
    priority = wish.get("priority")
    if priority is not None and _priority(priority) is None:
        found.append(
            Finding(f"VM {vm}: priority {priority!r}", "is no number from 0 to 100", "write one, such as 50")
        )
    group = wish.get("group")
    if group is not None and (not isinstance(group, str) or not group.strip()):
        found.append(Finding(f"VM {vm}: group {group!r}", "is no name", "write a word, or leave it out"))
    after = wish.get("after")
    if after is not None and not _is_names(after):
        found.append(
            Finding(f"VM {vm}: after {after!r}", "is no list of VMs", "write a list, such as [database1]")
        )
    rungs = wish.get("fallback")
    if rungs is not None:
        words = [rung.value for rung in LADDER]
        unknown = sorted({str(rung) for rung in rungs if rung not in words}) if _is_names(rungs) else None
        if unknown is None:
            found.append(
                Finding(f"VM {vm}: fallback {rungs!r}", "is no list", f"choose of {', '.join(words)}")
            )
        elif unknown:
            found.append(
                Finding(f"VM {vm}: fallback {', '.join(unknown)}", "is not known", f"use {', '.join(words)}")
            )
        elif not rungs:
            found.append(Finding(f"VM {vm}: fallback", "is empty", f"choose of {', '.join(words)}"))
    return found


def leaving_findings(vm: str, wish: t.Mapping[str, t.Any]) -> list[Finding]:
    """What the inventory says about one VM that only its leaving asks for, and what nobody reads."""
    found: list[Finding] = []
    seconds = wish.get("shutdown_seconds")
    if seconds is not None and _seconds(seconds) is None:
        found.append(
            Finding(
                f"VM {vm}: shutdown_seconds {seconds!r}",
                "is no number from 0 to 3600",
                "write one, such as 90",
            )
        )
    power_off = wish.get("power_off")
    if power_off is not None and _yes_or_no(power_off) is None:
        found.append(Finding(f"VM {vm}: power_off {power_off!r}", "is neither", "write true or false"))
    for key in sorted(set(map(str, wish)) - _KEYS):
        near = difflib.get_close_matches(key, _KEYS, 1)
        meant = f"write {near[0]} if that was meant" if near else f"known are {', '.join(sorted(_KEYS))}"
        found.append(Finding(f"VM {vm}: {key}", "is nothing that lifeboat_vms knows", meant))
    return found


def usual_wish(host: str, variables: t.Mapping[str, t.Any]) -> tuple[dict[str, t.Any], list[Finding]]:
    """What a host's variables (its own, its group's, its site's) say for VMs that do not say it themselves.

    ``evacuate_fallback`` may be a text with commas, as on the command line.
    """
    told: dict[str, t.Any] = {}
    for key in ("fallback", "shutdown_seconds", "power_off"):
        value = variables.get(f"evacuate_{key}")
        if value is None or value == "":
            continue
        if key == "fallback" and isinstance(value, str):
            value = [rung.strip() for rung in value.split(",") if rung.strip()]
        told[key] = value
    found = wish_findings(host, told) + leaving_findings(host, told)
    return told, [
        Finding(f"{host}: evacuate_{item.subject.partition(': ')[2]}", item.fact, item.way_out)
        for item in found
    ]


def _is_names(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) and item for item in value)


def _seconds(value: object) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(str(value))
    except ValueError:
        return None
    return number if 0 <= number <= 3600 else None


def _yes_or_no(value: object) -> bool | None:
    return {"true": True, "yes": True, "false": False, "no": False}.get(str(value).strip().lower())


def _priority(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        number = int(str(value))
    except ValueError:
        return None
    return number if 0 <= number <= 100 else None


def wished(vm: VmSummary, wish: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """What a wish without findings changes of a summary, as keywords of ``replace``."""
    changed: dict[str, t.Any] = {}
    if wish.get("priority") is not None:
        changed["priority"] = _priority(wish["priority"])
    if wish.get("group"):
        changed["group"] = str(wish["group"])
    if wish.get("after"):
        changed["after"] = tuple(wish["after"])
    if wish.get("fallback"):
        rungs = {*map(Rung, wish["fallback"]), Rung.STAY}
        changed["rungs"] = tuple(rung for rung in LADDER if rung in rungs)
    if wish.get("shutdown_seconds") is not None:
        changed["shutdown_seconds"] = _seconds(wish["shutdown_seconds"])
    if wish.get("power_off") is not None:
        changed["power_off"] = _yes_or_no(wish["power_off"])
    del vm
    return changed


def site_findings(site: SiteSummary) -> list[Finding]:
    """Everything about the VMs together: destinations, groups, dependencies, one VM named twice."""
    found = _destination_findings(site) + _group_findings(site) + _ambiguous_findings(site)
    for ring in cycles(site.vms):
        found.append(
            Finding(
                f"VM {ring[0]}",
                "waits for itself: " + " after ".join([*ring, ring[0]]),
                "take one `after` out of the inventory",
            )
        )
    sources: dict[str, list[str]] = {}
    for vm in site.vms:
        sources.setdefault(vm.uuid, []).append(vm.source)
    for uuid, hosts in sorted(sources.items()):
        if len(hosts) > 1:
            name = next(vm.name for vm in site.vms if vm.uuid == uuid)
            found.append(
                Finding(
                    f"VM {name} ({uuid})",
                    f"is protected on several hosts: {', '.join(sorted(hosts))}",
                    "find out where it runs, and unprotect it on the others",
                )
            )
    return found


def _destination_findings(site: SiteSummary) -> list[Finding]:
    sites = {item.name: item.site for item in site.destinations}
    sources = {*site.hosts, *(vm.source for vm in site.vms)}
    found = []
    for name in sorted({vm.destination for vm in site.vms}):
        if name in sources or (sites.get(name) and sites[name] == site.site):
            names = sorted(vm.name for vm in site.vms if vm.destination == name)
            found.append(
                Finding(
                    f"destination {name}",
                    f"stands at {site.site}, the site to be emptied; it holds the replicas of "
                    f"{', '.join(names)}",
                    "protect them to a hypervisor at another site, or name them out with evacuate_vms",
                )
            )
    return found


def _ambiguous_findings(site: SiteSummary) -> list[Finding]:
    """Who waits for a name that two hosts have a VM of."""
    named: dict[str, set[str]] = {}
    for vm in site.vms:
        named.setdefault(vm.name, set()).add(vm.uuid)
    return [
        Finding(
            f"VM {vm.name} of {vm.source}",
            f"is to leave after {name}, and there are {len(named[name])} VMs of that name",
            "write its UUID under `after`",
        )
        for vm in site.vms
        for name in vm.after
        if len(named.get(name, ())) > 1
    ]


def unknown_leaders(
    site: SiteSummary,
    known: t.Callable[[], t.Collection[str]],
    listed: t.Callable[[], t.Collection[str]],
) -> list[Finding]:
    """Who waits for a VM that nobody has, had or lists: a slip, for which nobody would wait.

    ``known``: names and UUIDs that hosts say, those that are out already among them; ``listed``: those of the
    inventory. Each is asked for only where somebody waits for one who is not to leave.
    """
    leaving = {name for vm in site.vms for name in (vm.name, vm.uuid)}
    open_ones = {name for vm in site.vms for name in vm.after} - leaving
    if open_ones:
        open_ones -= set(known())
    if open_ones:
        open_ones -= set(listed())
    return [
        Finding(f"VM {vm.name}: after {name}", "is a VM that no host has and the inventory does not list",
                "mend the name, or take it out")
        for vm in site.vms
        for name in vm.after
        if name in open_ones
    ]  # fmt: skip


def _group_findings(site: SiteSummary) -> list[Finding]:
    free = {item.name: item.memory_free_bytes for item in site.destinations}
    groups: dict[str, dict[str, float]] = {}
    for vm in site.vms:
        if vm.group:
            needed = groups.setdefault(vm.group, {})
            needed[vm.destination] = needed.get(vm.destination, 0.0) + vm.memory_bytes
    found = []
    for group, needed in sorted(groups.items()):
        for destination, bytes_needed in sorted(needed.items()):
            room = free.get(destination)
            if room is not None and bytes_needed > room:
                found.append(
                    Finding(
                        f"group {group}",
                        f"needs {bytes_needed / 2**30:.1f} GiB of memory on {destination}, "
                        f"{room / 2**30:.1f} GiB are free",
                        "free memory there, place replicas elsewhere, or take VMs out of the group",
                    )
                )
    return found


def placement_findings(site: SiteSummary) -> list[Finding]:
    """Destinations that cannot hold all VMs whose replicas they have: no error, but rehearsal says so."""
    found = []
    for item in sorted(site.destinations, key=lambda one: one.name):
        coming = [vm for vm in site.vms if vm.destination == item.name]
        needed = sum(vm.memory_bytes for vm in coming)
        if item.memory_free_bytes is not None and needed > item.memory_free_bytes:
            found.append(
                Finding(
                    f"destination {item.name}",
                    f"has {item.memory_free_bytes / 2**30:.1f} GiB of memory free and replicas of VMs that "
                    f"need {needed / 2**30:.1f} GiB",
                    "free memory there or place replicas elsewhere; the last in the order would stay",
                )
            )
        # What is still to be sealed there before they can start.
        lags = sum(vm.lag_bytes for vm in coming)
        if item.store_free_bytes is not None and lags > max(0.0, item.store_free_bytes):
            found.append(
                Finding(
                    f"destination {item.name}",
                    f"has {max(0.0, item.store_free_bytes) / 2**20:.0f} MiB of store left, what must stay "
                    f"free not counted, and {lags / 2**20:.0f} MiB of changes are to come",
                    "free space there or place replicas elsewhere; the last in the order would stay",
                )
            )
    return found
