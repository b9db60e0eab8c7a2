# SPDX-License-Identifier: GPL-3.0-or-later
"""Small real parts behind a real control API: they keep what they are told, in memory, and nothing more.

For tests of what lies above the rooms (API, command line, modules); the rooms have tests of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import libvirt

from precache_proxy.config import Config, parse
from precache_proxy.control.api import ControlServer
from precache_proxy.control.parts import Parts
from precache_proxy.errors import Conflict, Finding, InvalidInput, LifeboatError, NotFound, PeerUnreachable
from precache_proxy.evacuation.arrival import ArrivalState
from precache_proxy.hypervisor.domain_xml import parse_definition
from precache_proxy.source.layout import raise_findings
from precache_proxy.source.request import vm_findings
from precache_proxy.source.totals import PassTotals

CONFIGURATION = """
name = "home1"
site = "home"
[tls]
certificate = "{directory}/host.crt"
[paths]
state = "{directory}/state"
run = "{directory}/run"
[control]
group = "root"
[hypervisor]
uri = "test:///default"
[[peers]]
name = "backup1"
address = "backup1.example"
rate_bytes_per_second = "400Mbit/s"
[[peers]]
name = "backup2"
address = "backup2.example"
"""

WEB = "11111111-1111-4111-8111-111111111111"
DATABASE = "22222222-2222-4222-8222-222222222222"
DEFINITION = (
    "<domain><name>{name}</name><uuid>{uuid}</uuid><devices><disk type='file' device='disk'>"
    "<driver type='qcow2'/><source file='/nowhere/vda.qcow2'/><target dev='vda'/></disk></devices></domain>"
)
KNOWN = {WEB: "web1", DATABASE: "Datenbank für Köln"}


@dataclass
class Hypervisor:
    """Always there."""

    connected: bool = True
    sentence: str = "connected"

    @functools.cached_property
    def connection(self) -> Any:
        """Libvirt's test driver: its domains are none of ours."""
        return libvirt.open("test:///default")

    async def call(self, function: Callable[[], Any], *, subject: str, timeout_seconds: float) -> Any:
        assert subject
        return await asyncio.wait_for(asyncio.to_thread(function), timeout_seconds)

    # (UUID, name, active)
    domains: list[tuple[str, str, bool]] = field(default_factory=list)

    async def list_domains(self) -> list[tuple[str, str, bool]]:
        return self.domains

    # by UUID; what is not in here has gone since it was listed
    definitions: dict[str, Any] = field(default_factory=dict)

    async def definition(self, uuid: str) -> Any:
        if uuid not in self.definitions:
            raise NotFound(f"VM {uuid}: libvirt knows none such")
        return self.definitions[uuid]


@dataclass
class Link:
    """A link that answers calls with our own clock."""

    peer: str
    state: str = "up"
    cause: str = ""
    sentence: str = ""
    round_trip_seconds: float | None = 0.0402
    rate_bytes_per_second: float | None = None
    clock_offset_seconds: float = 0.0

    def set_rate(self, bytes_per_second: float | None) -> None:
        self.rate_bytes_per_second = bytes_per_second

    def status(self) -> dict[str, Any]:
        keys = ("peer", "state", "cause", "sentence", "round_trip_seconds", "rate_bytes_per_second")
        return {key: getattr(self, key) for key in keys}

    def counters(self) -> dict[str, Any]:
        tally = {
            "sent_raw_bytes": 2_000_000,
            "sent_wire_bytes": 1_000_000,
            "received_raw_bytes": 10,
            "received_wire_bytes": 20,
        }
        return {"classes": {"precache": tally}, "sent_wire_bytes": 1_000_000, "received_wire_bytes": 20}

    async def call(
        self, method: str, parameters: dict[str, Any], *, timeout_seconds: float
    ) -> dict[str, Any]:
        if self.state != "up":
            raise PeerUnreachable(f"peer {self.peer}: {self.sentence}")
        assert method == "control.clock"
        assert timeout_seconds > 0
        return {"time_seconds": time.time() + self.clock_offset_seconds}


@dataclass
class Channel:
    """Two links."""

    links: dict[str, Link] = field(
        default_factory=lambda: {name: Link(name) for name in ("backup1", "backup2")}
    )


@dataclass
class Store:
    """The replicas that it was given."""

    replicas: list[dict[str, Any]] = field(default_factory=list)

    async def statuses(self) -> list[dict[str, Any]]:
        return self.replicas


@dataclass(frozen=True)
class Protected:
    """A protected VM as the source room tells it."""

    uuid: str
    name: str
    peer: str
    rpo_seconds: float
    priority: int
    disks: tuple[str, ...] | None
    raw_overlay_consent: bool
    state: str = "protected"
    cause: str = ""
    sentence: str = ""
    generation: int | None = 7
    epoch: int = 1
    coverage: float = 1.0
    lag_bytes: int = 65536
    lag_seconds: float = 4.2
    last_pass: dict[str, Any] | None = None
    sealed_at: float = 0.0
    passes: dict[str, Any] = field(default_factory=lambda: PassTotals().as_dict())
    start_waits: str = ""
    refused_disks: list[str] = field(default_factory=list)
    scrub: dict[str, Any] = field(
        default_factory=lambda: {"turns": 1, "different_blocks": 0, "recent_different_blocks": 0}
    )


class Source:
    """Protection that is kept in memory; ``changes`` counts what was changed."""

    def __init__(self) -> None:
        self.protected: dict[str, Protected] = {}
        self.changes: list[str] = []
        self.postponed: list[tuple[str, float]] = []
        # what a check could not find out
        self.notes: list[str] = []
        self.equal = True
        self.measured = 0

    @staticmethod
    def identify(vm: str) -> tuple[str, str]:
        for uuid, name in KNOWN.items():
            if vm in {uuid, name}:
                return uuid, name
        raise NotFound(f"VM {vm!r}: libvirt knows none such; see `virsh list --all`")

    def statuses(self) -> list[Protected]:
        return list(self.protected.values())

    async def measure_lags(self) -> None:
        self.measured += 1

    def spoil(self, uuid: str, **changes: Any) -> None:
        """Let a protected VM be less well."""
        self.protected[uuid] = replace(self.protected[uuid], **changes)

    async def check(self, spec: Any) -> list[str]:
        uuid, name = self.identify(spec.vm)
        present = self.protected.get(uuid)
        definition = parse_definition(DEFINITION.format(uuid=uuid, name=name))
        raise_findings(vm_findings(spec, definition, present and present.peer), f"VM {name}")
        return self.notes

    async def protect(self, spec: Any) -> Protected:
        await self.check(spec)
        uuid, name = self.identify(spec.vm)
        wanted = Protected(
            uuid,
            name,
            spec.peer,
            spec.rpo_seconds,
            spec.priority,
            tuple(spec.disks) if spec.disks else None,
            spec.raw_overlay_consent,
        )
        if self.protected.get(uuid) != wanted:
            self.protected[uuid] = wanted
            self.changes.append(f"protect {name}")
        return self.protected[uuid]

    async def unprotect(self, vm: str, *, keep_replica: bool) -> None:
        del self.protected[vm]
        self.changes.append(f"unprotect {KNOWN[vm]} keep_replica={keep_replica}")

    async def run_pass(self, vm: str, *, reason: str) -> dict[str, Any]:
        self.changes.append(f"pass {KNOWN[vm]} {reason}")
        return {"generation": 8, "data_bytes": 65536}

    def postpone(self, vm: str, seconds: float) -> Protected:
        self.postponed.append((KNOWN[vm], seconds))
        return self.protected[vm]

    async def verify(self, vm: str) -> dict[str, Any]:
        return {
            "vm": vm,
            "equal": self.equal,
            "generation": 7,
            "compared_bytes": 1 << 30,
            "total_seconds": 2.5,
        }

    async def resync(self, vm: str) -> dict[str, Any]:
        return {"generation": 9, "data_bytes": 0}


@dataclass(frozen=True)
class Job:
    """An evacuation job as the evacuation room tells it."""

    id: str
    vm: str
    name: str
    peer: str
    step: str
    verdict: str | None = None
    cause: str = ""
    sentence: str = ""
    eviction_seconds: float | None = None
    downtime_seconds: float | None = None

    @property
    def ended(self) -> bool:
        return self.verdict not in {None, "undecided"}


@dataclass(frozen=True)
class Arrived:
    """A VM that runs here from a replica."""

    id: str
    vm: str
    name: str
    peer: str
    generation: int
    state: str = "landed"
    sentence: str = "It runs here."
    epoch: int = 1
    ended: bool = True

    def as_dict(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self)}


class Evacuation:
    """Jobs that take one step each time they are looked at for ``step_seconds``."""

    steps = ("preflight", "catch-up", "freeze", "residual", "prepare", "migrate", "confirm", "done")

    def __init__(self, source: Source) -> None:
        self.source = source
        self.remembered: dict[str, Job] = {}
        self.begun: list[str] = []
        self.options: list[Any] = []
        self.findings: list[Finding] = []
        self.step_seconds = 0.05
        self.verdict = "evacuated"
        self._tasks: set[asyncio.Task[None]] = set()
        self.rate: float | None = None
        self.shares: list[tuple[str, float | None, float]] = []
        self.paused: list[str] = []
        self.checked: list[tuple[str, bool]] = []
        # replicas here, by UUID: what a look at a fail-over tells
        self.outlooks: dict[str, dict[str, Any]] = {}
        self.arrived: list[Any] = []
        # of VMs that run elsewhere
        self.tombstones: list[Any] = []

    async def begin(self, vm: str, *, options: Any) -> Job:
        uuid, name = self.source.identify(vm)
        for job in self.remembered.values():
            if job.vm == uuid and job.verdict in {None, "evacuated", "undecided"}:
                return job
        protected = self.source.protected.get(uuid)
        if protected is None:
            raise InvalidInput(f"VM {name}: not protected; protect it first")
        job = Job(f"job-{len(self.remembered) + 1}", uuid, name, protected.peer, self.steps[0])
        self.remembered[job.id] = job
        self.begun.append(name)
        self.options.append(options)
        task = asyncio.create_task(self._run(job.id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    async def _run(self, identifier: str) -> None:
        for step in self.steps[1:]:
            await asyncio.sleep(self.step_seconds)
            if self.remembered[identifier].verdict:
                return
            self.remembered[identifier] = replace(self.remembered[identifier], step=step)
        self.remembered[identifier] = replace(
            self.remembered[identifier], verdict=self.verdict, eviction_seconds=4.5, downtime_seconds=0.3
        )
        if self.verdict == "evacuated":
            self.source.protected.pop(self.remembered[identifier].vm, None)

    def jobs(self) -> list[Job]:
        return list(self.remembered.values())

    def arrivals(self) -> list[Any]:
        return self.arrived

    async def moved_away(self) -> list[Any]:
        return self.tombstones

    def keep(self, store: Store, vm: str, peer: str, **told: Any) -> None:
        """A replica of a VM is here."""
        name = KNOWN.get(vm, vm)
        store.replicas.append({"vm": vm, "name": name, "peer": peer, "state": "sealed"})
        self.outlooks[vm] = {
            "vm": vm, "name": name, "peer": peer, "is_here": False, "is_running": None, "job": None,
            "epoch": 0, "generation": 7, "sealed_at": time.time() - 14, "age_seconds": 14.0,
            "memory_bytes": 1 << 30, "priority": 50, "home_answers": False, "findings": [], **told,
        }  # fmt: skip

    async def look_at_fail_over(self, vm: str) -> dict[str, Any]:
        for told in self.outlooks.values():
            if vm in {told["vm"], told["name"]}:
                return told
        raise NotFound(f"{vm}: no replica of that VM here; see `precache-proxy status`")

    async def fail_over(self, vm: str, *, source_is_dead: bool) -> Arrived:
        told = await self.look_at_fail_over(vm)
        if not source_is_dead:
            raise InvalidInput(f"VM {told['name']}: it would run here from generation 7; say source_is_dead")
        if told["findings"]:
            raise InvalidInput(f"VM {told['name']} cannot arrive here", told["findings"])
        arrived = Arrived(f"f{len(self.arrived)}", told["vm"], told["name"], told["peer"], told["generation"])
        self.arrived.append(arrived)
        told.update(is_here=True, is_running=True, job=arrived.id)
        return arrived

    def job(self, identifier: str) -> Job:
        for job in self.remembered.values():
            if identifier in {job.id, job.vm, job.name}:
                return job
        raise NotFound(f"job {identifier!r}: none such; see `precache-proxy status`")

    async def cancel(self, identifier: str) -> Job:
        job = self.job(identifier)
        if job.verdict:
            raise Conflict(f"job {job.id}: has ended ({job.verdict}); there is nothing to cancel")
        self.remembered[job.id] = replace(job, step="rollback", verdict="stayed", sentence="cancelled")
        return self.remembered[job.id]

    def undecide(self, identifier: str) -> None:
        """The contact is lost in the middle of confirm."""
        job = self.remembered[identifier]
        self.remembered[identifier] = replace(
            job,
            step="undecided",
            verdict="undecided",
            sentence="no contact with backup1 since it was released",
        )

    async def steer(self, identifier: str, rate: float | None) -> Job:
        self.rate = rate
        return self.job(identifier)

    def share(self, identifier: str, rate: float | None, seconds: float) -> Job:
        self.shares.append((identifier, rate, seconds))
        return self.job(identifier)

    async def pause_guest(self, identifier: str) -> Job:
        self.paused.append(identifier)
        return self.job(identifier)

    async def settle(self, identifier: str, decision: str) -> dict[str, Any]:
        if decision == "source-dead":
            [arrival] = [one for one in self.arrived if identifier in {one.id, one.vm, one.name}]
            arrival.state = ArrivalState.ACTIVATED
            return {"id": arrival.id}
        job = self.job(identifier)
        self.remembered[job.id] = replace(
            job, step="stayed", verdict="stayed", sentence=f"settled: {decision}"
        )
        return {"id": job.id}

    async def check(self, vm: str, *, restarts: bool = False) -> list[Finding]:
        self.checked.append((vm, restarts))
        self.source.identify(vm)
        return self.findings


def small_parts(directory: Path) -> Parts:
    """Parts with everything well, state running."""
    config: Config = parse(CONFIGURATION.format(directory=directory))
    for path in (config.paths.run, config.store.directory, config.source.scratch_directory):
        path.mkdir(parents=True, exist_ok=True)
    source = Source()
    return Parts(config, Hypervisor(), Channel(), Store(), source, Evacuation(source), state="running")


@contextlib.contextmanager
def serving(parts: Parts) -> Iterator[Path]:
    """The real control API for these parts, in a thread with an event loop of its own; gives its socket."""
    loop = asyncio.new_event_loop()
    started, ended = threading.Event(), asyncio.Event()

    async def serve() -> None:
        server = ControlServer(parts)
        await server.start()
        started.set()
        await ended.wait()
        parts.state = "stopping"
        await server.stop()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    if not started.wait(10):
        raise LifeboatError("the control API did not start")
    try:
        yield parts.config.paths.control_socket
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(10)
        loop.close()


def answers(path: Path) -> bool:
    """Whether somebody listens on a socket."""
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.connect(str(path))
        return True
    return False
