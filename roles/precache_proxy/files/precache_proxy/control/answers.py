# SPDX-License-Identifier: GPL-3.0-or-later
"""What the control API says about the proxy and its parts: plain JSON values, units in the names."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

from precache_proxy import __version__
from precache_proxy.control.certificate import expires_at
from precache_proxy.control.outlook import outlook
from precache_proxy.control.parts import Parts
from precache_proxy.errors import LifeboatError, NotFound
from precache_proxy.evacuation.job import Job
from precache_proxy.source.scratch import allocated_bytes

Answer = dict[str, Any]


def as_json(value: Any) -> Any:
    """A value as JSON has it: records become objects, enumerations words, sets sorted lists."""
    if is_dataclass(value) and not isinstance(value, type):
        told = {
            field.name: as_json(getattr(value, field.name)) for field in fields(value) if field.name[0] != "_"
        }
        return told
    if isinstance(value, LifeboatError):
        return value.as_dict()
    if isinstance(value, IntEnum):
        return value.name.lower()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(as_json(key)): as_json(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(as_json(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def vm_answer(status: Any) -> Answer:
    """A protected VM, with ``rpo_kept`` (None before the first generation) and the generation's age."""
    told: Answer = as_json(status)
    sealed_at = told.get("sealed_at")
    told["generation_age_seconds"] = None if sealed_at is None else max(time.time() - sealed_at, 0.0)
    lag, rpo = told.get("lag_seconds"), told.get("rpo_seconds")
    told["rpo_kept"] = None if lag is None or not rpo or not told.get("generation") else lag <= rpo
    return told


def vms_answer(parts: Parts) -> list[Answer]:
    """Every VM that is protected here, by name."""
    return sorted(
        (vm_answer(status) for status in parts.source.statuses()), key=lambda vm: str(vm.get("name"))
    )


async def unprotected_answer(parts: Parts) -> list[Answer] | None:
    """Running VMs of this host that are not protected, by name: an evacuation leaves them behind.

    None: libvirt does not answer. One that is just arriving belongs to its evacuation.
    """
    try:
        domains = await parts.hypervisor.list_domains()
    except LifeboatError:
        return None
    known = {str(vm["uuid"]) for vm in vms_answer(parts)}
    known |= {str(arrival["vm"]) for arrival in arrivals_answer(parts) if not arrival.get("ended")}
    left = [(name, uuid) for uuid, name, active in domains if active and uuid not in known]
    return [{"name": name, "uuid": uuid} for name, uuid in sorted(left)]


def find_vm(parts: Parts, vm: str) -> Answer:
    """The protected VM of that name or UUID. Raises NotFound with those that there are."""
    known = vms_answer(parts)
    for told in known:
        if vm in {told.get("uuid"), told.get("name")}:
            return told
    names = ", ".join(str(told.get("name")) for told in known) or "none"
    raise NotFound(f"VM {vm!r}: not protected on {parts.config.name}; protected here: {names}")


def link_answer(parts: Parts, peer: str) -> Answer:
    """The link to one peer. Raises NotFound."""
    link = parts.channel.links.get(peer)
    if link is None:
        names = ", ".join(sorted(parts.channel.links)) or "none"
        raise NotFound(
            f"peer {peer!r}: {parts.config.name} has no such peer; it has: {names}; "
            "add it to the inventory and run site_setup"
        )
    told: Answer = {**as_json(link.status()), "counters": as_json(link.counters())}
    return told


def links_answer(parts: Parts) -> list[Answer]:
    """The links to all peers, by name."""
    return [link_answer(parts, peer) for peer in sorted(parts.channel.links)]


async def replicas_answer(parts: Parts) -> list[Answer]:
    """Every replica that is kept here."""
    return [as_json(status) for status in await parts.store.statuses()]


def job_answer(job: Any) -> Answer:
    """A job or an arrival, with ``ended``: whether anything more will be done by it."""
    told: Answer = as_json(job)
    told["ended"] = bool(job.ended)
    if isinstance(job, Job):
        told["rung"] = job.rung
    # A definition may hold a console's password, and nobody reads it here.
    told.pop("definition", None)
    return told


def find_job(parts: Parts, identifier: str) -> Answer:
    """The latest job, or else arrival, of that identifier, VM or UUID. Raises NotFound."""
    for told in reversed([*arrivals_answer(parts), *jobs_answer(parts)]):
        if identifier in {told["id"], told["vm"], told["name"]}:
            return dict(told)
    raise NotFound(
        f"evacuation {identifier!r}: neither job nor arrival of that number or VM on {parts.config.name}; "
        "see `precache-proxy status`"
    )


def jobs_answer(parts: Parts) -> list[Answer]:
    """Every evacuation job that is remembered here, oldest first, with what is ahead of those under way."""
    known = {str(vm.get("uuid")): vm for vm in vms_answer(parts)}
    told = [job_answer(job) for job in parts.evacuation.jobs()]
    return [{**job, "outlook": outlook(job, known.get(str(job["vm"])))} for job in told]


def arrivals_answer(parts: Parts) -> list[Answer]:
    """Every arrival of a VM that is remembered here."""
    return [job_answer(arrival) for arrival in parts.evacuation.arrivals()]


def certificate_answer(parts: Parts) -> Answer:
    """Until when this proxy's certificate is good; ``seconds_left`` is None for one that cannot be read."""
    path = parts.config.tls.certificate
    try:
        end = expires_at(path)
    except LifeboatError as error:
        return {"path": str(path), "expires_at": None, "seconds_left": None, "sentence": error.message}
    left = end - time.time()
    sentence = f"good for {left / 86400:.0f} more days" if left > 0 else "has expired"
    return {"path": str(path), "expires_at": end, "seconds_left": left, "sentence": sentence}


def _space(directory: Path) -> Answer:
    try:
        usage = shutil.disk_usage(directory)
    except OSError:
        return {"directory": str(directory), "size_bytes": None, "free_bytes": None}
    return {"directory": str(directory), "size_bytes": usage.total, "free_bytes": usage.free}


def store_space(parts: Parts) -> Answer:
    """The store's directory, its room, and what must stay free of that."""
    store = _space(parts.config.store.directory)
    store["minimum_free_bytes"] = parts.config.store.minimum_free_bytes
    return store


def scratch_files(parts: Parts) -> list[Path]:
    """Files in the scratch directory."""
    try:
        return sorted(path for path in parts.config.source.scratch_directory.iterdir() if path.is_file())
    except OSError:
        return []


def _disk_answers(parts: Parts) -> tuple[Answer, Answer, Answer]:
    """Store, scratch and certificate: all touch a disk, hence in a thread."""
    store = store_space(parts)
    scratch = _space(parts.config.source.scratch_directory)
    files = scratch_files(parts)
    # Sparse files: what they take, not what they could take.
    scratch["used_bytes"] = allocated_bytes(files)
    scratch["files"] = len(files)
    scratch["limit_bytes"] = parts.config.source.scratch_limit_bytes
    return store, scratch, certificate_answer(parts)


async def proxy_answer(parts: Parts) -> Answer:
    """The whole proxy: GET /v1/status."""
    store, scratch, certificate = await asyncio.to_thread(_disk_answers, parts)
    return {
        "version": __version__,
        "name": parts.config.name,
        "site": parts.config.site,
        "state": parts.state,
        "started_at": parts.started_at,
        "uptime_seconds": time.time() - parts.started_at,
        "hypervisor": {
            "uri": parts.config.hypervisor.uri,
            "connected": parts.hypervisor.connected,
            "sentence": parts.hypervisor.sentence,
        },
        "certificate": certificate,
        "store": store,
        "scratch": scratch,
        "links": links_answer(parts),
        "vms": vms_answer(parts),
        "replicas": await replicas_answer(parts),
        "evacuations": jobs_answer(parts),
        "arrivals": arrivals_answer(parts),
        "coordinator": parts.lease.told(),
    }
