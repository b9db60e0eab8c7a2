# SPDX-License-Identifier: GPL-3.0-or-later
"""Bodies of requests to the control API, read with every fault told at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from precache_proxy.control.answers import Answer
from precache_proxy.control.parts import Parts
from precache_proxy.errors import Finding, InvalidInput, NotFound
from precache_proxy.evacuation.job import EvacuationOptions, Mode
from precache_proxy.typed_reader import REQUIRED, Reader

HIGHEST_PRIORITY = 100
DEFAULT_PRIORITY = 50
DECISIONS = ("source-dead", "keep-at-source")
DOWNTIME_SECONDS_RANGE = (0.001, 60.0)
SHUTDOWN_SECONDS_RANGE = (0.0, 3600.0)
RPO_SECONDS_RANGE = (1.0, 30 * 86400.0)
# The longest that one request may be held; clients ask again.
LONGEST_WAIT_SECONDS = 300.0
_LONGEST_NAME = 200


@dataclass(frozen=True)
class Protection:
    """What PUT /v1/vms/{vm} asks for, gaps filled from what holds already."""

    vm: str
    peer: str
    rpo_seconds: float
    priority: int
    disks: tuple[str, ...] | None
    raw_overlay_consent: bool


async def body(request: web.Request) -> Mapping[str, Any]:
    """The JSON object that a request carries; none is an empty one. Raises InvalidInput."""
    content = await request.read()
    if not content.strip():
        return {}
    try:
        value = json.loads(content)
    except ValueError as error:
        raise InvalidInput(f"request body: not JSON ({error}); nothing was changed") from error
    if not isinstance(value, dict):
        raise InvalidInput("request body: not a JSON object; nothing was changed")
    return value


def reader(values: Mapping[str, Any], findings: list[Finding]) -> Reader:
    """A typed reader of a request's fields."""
    return Reader(values, "request", "", findings, "invalid")


def conclude(told: Reader, findings: list[Finding]) -> None:
    """Raise InvalidInput when anything was wrong with the fields read."""
    told.finish()
    if findings:
        raise InvalidInput(
            "; ".join(str(finding) for finding in findings) + "; nothing was changed", findings
        )


def protection(vm: str, values: Mapping[str, Any], present: Answer | None, parts: Parts) -> Protection:
    """The protection that a request means. Raises InvalidInput; NotFound for a peer we do not have."""
    findings: list[Finding] = []
    told = reader(values, findings)
    present = present or {}
    peer = told.text("peer", "", empty=True) or str(present.get("peer") or "")
    names = [configured.name for configured in parts.config.peers]
    if not peer and len(names) == 1:
        peer = names[0]
    wanted = Protection(
        vm=vm,
        peer=peer,
        rpo_seconds=told.duration(
            "rpo_seconds", present.get("rpo_seconds", parts.config.source.rpo_seconds), *RPO_SECONDS_RANGE
        ),
        priority=told.integer("priority", present.get("priority", DEFAULT_PRIORITY), 0, HIGHEST_PRIORITY),
        disks=told.texts("disks") if "disks" in values else present.get("disks"),
        raw_overlay_consent=told.boolean(
            "raw_overlay_consent", default=bool(present.get("raw_overlay_consent"))
        ),
    )
    listed = ", ".join(names) or "none; add one to the inventory"
    if peer == parts.config.name:
        fact = f"peer {peer} is this proxy itself: a replica here would go down with the VM"
        findings.append(Finding(f"VM {vm}", fact, f"name a peer at another site: {listed}", "invalid"))
    elif not peer:
        findings.append(Finding(f"VM {vm}", "no peer was named", f"name one of: {listed}", "invalid"))
    conclude(told, findings)
    if peer not in names:
        raise NotFound(
            f"peer {peer!r}: {parts.config.name} has no such peer; it has: {listed}; nothing was changed"
        )
    return wanted


def as_plan(wanted: Protection) -> Answer:
    """What would hold after the request."""
    return {
        "state": "protected",
        "peer": wanted.peer,
        "rpo_seconds": wanted.rpo_seconds,
        "priority": wanted.priority,
        "disks": sorted(wanted.disks) if wanted.disks else None,
        "raw_overlay_consent": wanted.raw_overlay_consent,
    }


def present_protection(vm: Answer | None) -> Answer | None:
    """What holds now, in the form of :func:`as_plan`."""
    if vm is None:
        return None
    told = {key: vm.get(key) for key in ("peer", "rpo_seconds", "priority", "raw_overlay_consent")}
    disks = vm.get("disks")
    return {"state": "protected", **told, "disks": sorted(disks) if disks else None}


def mode(told: Reader, findings: list[Finding]) -> Mode:
    """How a VM is to leave; what is wrong with it is added to the findings."""
    named = told.text("mode", Mode.LIVE.value)
    if named in set(Mode):
        return Mode(named)
    findings.append(Finding("request: mode", f"is {named!r}", f"write one of {', '.join(Mode)}", "invalid"))
    return Mode.LIVE


def evacuation(values: Mapping[str, Any]) -> tuple[str, EvacuationOptions]:
    """The VM that a request wants evacuated, and how. Raises InvalidInput."""
    findings: list[Finding] = []
    told = reader(values, findings)
    usual = EvacuationOptions()
    vm = told.text("vm", REQUIRED)
    synchronous = (
        told.boolean("synchronous_writes", default=False) if "synchronous_writes" in values else None
    )
    options = EvacuationOptions(
        peer=told.text("peer", "", empty=True) or None,
        bandwidth_bytes_per_second=told.rate("bandwidth_bytes_per_second"),
        downtime_limit_seconds=told.duration(
            "downtime_limit_seconds", usual.downtime_limit_seconds, *DOWNTIME_SECONDS_RANGE
        ),
        downtime_limit_most_seconds=told.duration(
            "downtime_limit_most_seconds", usual.downtime_limit_most_seconds, *DOWNTIME_SECONDS_RANGE
        ),
        synchronous_writes=synchronous,
        catch_up_passes_limit=told.integer("catch_up_passes_limit", usual.catch_up_passes_limit, 0, 100),
        mode=mode(told, findings),
        shutdown_seconds=told.duration("shutdown_seconds", usual.shutdown_seconds, *SHUTDOWN_SECONDS_RANGE),
        power_off=told.boolean("power_off", default=usual.power_off),
    )
    conclude(told, findings)
    return vm, options


@dataclass(frozen=True)
class Steering:
    """What POST /v1/evacuations/{job}/steer asks for. ``shares``: a share was named, be it null."""

    bandwidth_bytes_per_second: float | None
    shares: bool
    share_bytes_per_second: float | None
    for_seconds: float
    pause_guest: bool


def steering(values: Mapping[str, Any]) -> Steering:
    """What is to be changed about a job under way. Raises InvalidInput."""
    findings: list[Finding] = []
    told = reader(values, findings)
    wanted = Steering(
        bandwidth_bytes_per_second=told.rate("bandwidth_bytes_per_second"),
        shares="share_bytes_per_second" in values,
        share_bytes_per_second=told.rate("share_bytes_per_second"),
        for_seconds=told.duration("for_seconds", 30.0, 1.0, LONGEST_WAIT_SECONDS),
        pause_guest=told.boolean("pause_guest", default=False),
    )
    conclude(told, findings)
    if wanted.bandwidth_bytes_per_second is None and not wanted.shares and not wanted.pause_guest:
        raise InvalidInput(
            "bandwidth_bytes_per_second: is missing; give it, share_bytes_per_second or pause_guest"
        )
    return wanted


def under(values: Mapping[str, Any]) -> tuple[int | None, Mapping[str, Any]]:
    """The epoch of the lease that an order was decided under (None: it names none), and the rest of its body.
    Raises InvalidInput."""
    rest = dict(values)
    epoch = rest.pop("epoch", None)
    if epoch is not None and (isinstance(epoch, bool) or not isinstance(epoch, int)):
        raise InvalidInput(
            f"request: epoch: is {epoch!r}, no whole number; give what /v1/coordinator told, or leave it "
            "out; nothing was changed"
        )
    return epoch, rest


def postponement(values: Mapping[str, Any]) -> float:
    """For how many seconds a VM's periodic passes are to wait. Raises InvalidInput."""
    findings: list[Finding] = []
    told = reader(values, findings)
    seconds = told.optional_duration("for_seconds", 0.0, LONGEST_WAIT_SECONDS)
    conclude(told, findings)
    if seconds is None:
        raise InvalidInput(
            f"request: for_seconds is missing; give 0 to {LONGEST_WAIT_SECONDS:.0f}, 0 for no longer"
        )
    return seconds


@dataclass(frozen=True)
class Coordination:
    """What POST /v1/coordinator asks for."""

    coordinator: str
    who: str
    for_seconds: float
    take_over: bool


def coordination(values: Mapping[str, Any]) -> Coordination:
    """Who wants to coordinate, and for how long. Raises InvalidInput."""
    findings: list[Finding] = []
    told = reader(values, findings)
    coordinator, who = told.text("coordinator", REQUIRED), told.text("who", REQUIRED)
    for key, text in (("coordinator", coordinator), ("who", who)):
        # It stands in other people's terminals and in the journal.
        if len(text) > _LONGEST_NAME or not text.isprintable():
            fact = f"is {text[:20]!r}..., longer than {_LONGEST_NAME} characters or no printable text"
            findings.append(Finding(f"request: {key}", fact, "write a short line", "invalid"))
    seconds = told.optional_duration("for_seconds", 0.0, LONGEST_WAIT_SECONDS)
    take_over = told.boolean("take_over", default=False)
    if seconds is None and "for_seconds" not in values:
        way_out = f"give 0 to {LONGEST_WAIT_SECONDS:.0f}, 0 to give it back"
        findings.append(Finding("request: for_seconds", "is missing", way_out, "invalid"))
    conclude(told, findings)
    return Coordination(coordinator, who, seconds or 0.0, take_over)


def wait_seconds(request: web.Request) -> float:
    """How long the client lets us hold the request. Raises InvalidInput."""
    text = request.query.get("wait_seconds", "0")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= LONGEST_WAIT_SECONDS:
        raise InvalidInput(
            f"wait_seconds {text!r}: give 0 to {LONGEST_WAIT_SECONDS:.0f} and ask again after that"
        )
    return seconds


def flag(request: web.Request, name: str, *, default: bool) -> bool:
    """A true/false query parameter. Raises InvalidInput."""
    text = request.query.get(name)
    if text is None:
        return default
    if text.lower() not in {"true", "false"}:
        raise InvalidInput(f"{name}={text!r}: write true or false")
    return text.lower() == "true"
