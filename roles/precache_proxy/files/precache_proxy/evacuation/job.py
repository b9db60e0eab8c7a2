# SPDX-License-Identifier: GPL-3.0-or-later
"""The record of one evacuation at its source, and which step may follow which.

The record is durable before the step that it names is begun: after a crash it says at least as much as was
done.
"""

from __future__ import annotations

import copy
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from precache_proxy import durable
from precache_proxy.errors import Conflict, Finding, IntegrityError


class Step(StrEnum):
    """Where an evacuation stands. DONE and STAYED are its two ends; UNDECIDED waits for the other side."""

    PREFLIGHT = "preflight"
    CATCH_UP = "catch-up"
    STOP = "stop"
    FREEZE = "freeze"
    RESIDUAL = "residual"
    PREPARE = "prepare"
    MIGRATE = "migrate"
    CONFIRM = "confirm"
    RELEASED = "released"
    FINISH = "finish"
    DONE = "done"
    ROLLBACK = "rollback"
    UNDECIDED = "undecided"
    STAYED = "stayed"


class Mode(StrEnum):
    """How a VM leaves: LIVE keeps its memory, RESTART ends the guest here and boots it there."""

    LIVE = "live"
    RESTART = "restart"


class Verdict(StrEnum):
    """What became of the VM."""

    EVACUATED = "evacuated"
    ALREADY_THERE = "already-there"
    RESTARTED_FROM_REPLICA = "restarted-from-replica"
    STAYED = "stayed"
    UNDECIDED = "undecided"
    FAILED = "failed"


FOLLOWING: Final[Mapping[Step, frozenset[Step]]] = {
    Step.PREFLIGHT: frozenset({Step.CATCH_UP, Step.DONE, Step.STAYED}),
    Step.CATCH_UP: frozenset({Step.FREEZE, Step.STOP, Step.ROLLBACK}),
    Step.STOP: frozenset({Step.RESIDUAL, Step.ROLLBACK}),
    Step.FREEZE: frozenset({Step.RESIDUAL, Step.ROLLBACK}),
    Step.RESIDUAL: frozenset({Step.PREPARE, Step.ROLLBACK}),
    # Without a migration what stands whole there is confirmed at once.
    Step.PREPARE: frozenset({Step.MIGRATE, Step.CONFIRM, Step.ROLLBACK, Step.UNDECIDED, Step.FINISH}),
    Step.MIGRATE: frozenset({Step.CONFIRM, Step.ROLLBACK, Step.UNDECIDED, Step.FINISH}),
    # Released before told: from RELEASED on only the destination's word, or the operator's, leads back.
    Step.CONFIRM: frozenset({Step.RELEASED, Step.ROLLBACK, Step.UNDECIDED, Step.FINISH}),
    Step.RELEASED: frozenset({Step.FINISH, Step.UNDECIDED, Step.ROLLBACK}),
    Step.UNDECIDED: frozenset({Step.CONFIRM, Step.RELEASED, Step.FINISH, Step.ROLLBACK}),
    # A VM that was activated on the operator's word while we rolled back: the newer epoch is right.
    Step.ROLLBACK: frozenset({Step.STAYED, Step.UNDECIDED, Step.FINISH}),
    Step.FINISH: frozenset({Step.DONE}),
    Step.DONE: frozenset(),
    Step.STAYED: frozenset(),
}
ENDS: Final = frozenset({Step.DONE, Step.STAYED})
# After so much of the time after which the destination presumes the source dead it stops its VM: noticing and
# stopping must fit in the rest.
FENCE_SHARE: Final = 0.5
# The guest's writes go to overlays of ours from FREEZE on.
BEFORE_FREEZE: Final = frozenset({Step.PREFLIGHT, Step.CATCH_UP})


@dataclass(frozen=True, slots=True)
class EvacuationOptions:
    """What the operator may ask of one evacuation.

    ``synchronous_writes`` None: decided by the forecast. ``bandwidth_bytes_per_second`` None: no limit of
    ours. QEMU begins with ``downtime_limit_seconds`` and is allowed up to ``downtime_limit_most_seconds``
    where the guest dirties its memory as fast as the channel carries it.

    With ``mode`` RESTART the guest is asked to shut down and has ``shutdown_seconds`` for it; after that it
    is powered off, or where ``power_off`` is False the VM stays.
    """

    peer: str | None = None
    bandwidth_bytes_per_second: float | None = None
    downtime_limit_seconds: float = 0.3
    downtime_limit_most_seconds: float = 60.0
    synchronous_writes: bool | None = None
    catch_up_passes_limit: int = 5
    mode: Mode = Mode.LIVE
    shutdown_seconds: float = 60.0
    power_off: bool = True


@dataclass(slots=True)
class FrozenDisk:
    """A disk since the freeze: the image that stands still and the overlay that takes the writes.

    Of a VM that was shut down ``overlay`` is "": nobody writes.
    """

    image: str
    format: str
    overlay: str
    size_bytes: int


@dataclass(slots=True)
class ShutdownRequest:
    """The guest was asked to shut down here: when (seconds since 1970, and since which boot), and which of
    its runs, by libvirt's number.

    ``given_up_boottime_seconds``: since when nobody waits for it and the VM is watched instead
    (late_stop.py), until there is an ``outcome``.
    """

    asked_at: float
    boottime_seconds: float
    boot: str
    domain_number: int
    given_up_boottime_seconds: float | None = None
    outcome: str = ""


@dataclass(slots=True)
class StepTime:
    """When a step was begun and ended, seconds since 1970 by this host's clock."""

    step: str
    started_at: float
    ended_at: float | None = None


@dataclass(slots=True)
class Job:
    """One evacuation, at its source. ``epoch`` is the one that the hand-off raises the VM to."""

    id: str
    vm: str
    name: str
    peer: str
    epoch: int
    step: Step = Step.PREFLIGHT
    steps: list[StepTime] = field(default_factory=list)
    options: EvacuationOptions = field(default_factory=EvacuationOptions)
    commanded_at: float = 0.0
    ended_at: float | None = None
    verdict: Verdict | None = None
    cause: str = ""
    sentence: str = ""
    findings: list[dict[str, str]] = field(default_factory=list)
    autostart: bool = False
    disks: dict[str, FrozenDisk] = field(default_factory=dict)
    # the persistent definition at the freeze: what stays here is kept with it
    definition: str = field(default="", repr=False)
    checkpoint: str = ""
    generation: int = 0
    # the step that was left for UNDECIDED: says what may still be assumed
    undecided_from: Step | None = None
    # the destination was asked to prepare and has not yet said that it cleaned up
    owes_abort: bool = False
    # the boot of this host in which it was begun: after another one its VM may have been taken for lost
    boot: str = ""
    # the operator's word (settle), durable before it is acted upon
    settled: str = ""
    # the operator's word to stop, durable before it is answered
    cancelled: bool = False
    # the destination activates by itself after that long without us (its operator's setting), or None
    presumed_dead_after_seconds: float | None = None
    # when that destination last surely heard of us: seconds since boot (suspended time counted), which boot
    heard_boottime_seconds: float | None = None
    heard_boot: str = ""
    # the guest was stopped in the middle of its migration, so that its memory crosses only once
    guest_paused: bool = False
    # we have paused the guest here, or were about to: only such a one goes on with a rollback
    stopped_here: bool = False
    # it stayed, and libvirt has not answered a pause of ours: that may still come (late_pause.py)
    pause_unanswered: bool = False
    # for how long it stood still while its move was ended before its end
    stood_still_seconds: float | None = None
    # the VM had to be started anew against all plans: its memory is lost, its disks are whole
    memory_lost: bool = False
    # it ran when it was to be restarted: it is started again wherever it ends up; durable with step CATCH_UP,
    # and judged anew with step STOP
    was_running: bool = False
    # durable before it is made, for it cannot be taken back
    shutdown_request: ShutdownRequest | None = None
    # its guest did not shut down in time
    powered_off: bool = False
    # what preflight said against its addresses' following it
    address_findings: list[str] = field(default_factory=list)
    # it went well, but the operator should know this
    warning: str = ""
    eviction_seconds: float | None = None
    downtime_seconds: float | None = None
    # what QEMU says of its own switch-over
    qemu_downtime_seconds: float | None = None
    bytes: dict[str, Any] = field(default_factory=dict)
    bound: dict[str, Any] = field(default_factory=dict)
    forecast: dict[str, Any] = field(default_factory=dict)
    # changes all the time and is not worth a sync: written along with the next step
    progress: dict[str, Any] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Nothing more will be done by this job."""
        return self.step in ENDS

    @property
    def effective_step(self) -> Step:
        """The step whose promises still bind us: that before UNDECIDED, else the current one."""
        if self.step is Step.UNDECIDED and self.undecided_from is not None:
            return self.undecided_from
        return self.step

    @property
    def restarts(self) -> bool:
        """The guest ends here and boots there: no memory crosses."""
        return self.options.mode is Mode.RESTART

    @property
    def rung(self) -> str:
        """How far down the ladder it went: live, paused or restart."""
        if self.restarts:
            return Mode.RESTART.value
        return "paused" if self.guest_paused else Mode.LIVE.value

    def began(self, step: Step) -> float | None:
        """When a step was begun for the first time, None if never: seconds since 1970."""
        return next((item.started_at for item in self.steps if item.step == step.value), None)

    def advance(self, step: Step, now: float) -> None:
        """Go on to ``step``. Raises Conflict where it may not follow; then nothing was changed."""
        if step not in FOLLOWING[self.step]:
            raise Conflict(
                f"evacuation {self.id} of {self.name}: step {step.value} cannot follow {self.step.value}; "
                "this is a defect: report it with the job's record"
            )
        if step is Step.UNDECIDED:
            self.undecided_from = self.step
        if self.steps and self.steps[-1].ended_at is None:
            self.steps[-1].ended_at = now
        self.step = step
        if step in ENDS:
            self.ended_at = now
        else:
            self.steps.append(StepTime(step.value, now))

    def explain(self, cause: str, sentence: str, findings: tuple[Finding, ...] = ()) -> None:
        """Say why the job is where it is."""
        self.cause, self.sentence = cause, sentence
        self.findings = [asdict(finding) for finding in findings]

    def warn(self, sentence: str) -> None:
        """Say one thing more that the operator should know of it; said again it stays as it is."""
        if sentence not in self.warning:
            self.warning = f"{self.warning.rstrip('.')}. {sentence}" if self.warning else sentence

    def record(self) -> dict[str, Any]:
        """All of it, as the file holds it."""
        return asdict(self)

    def as_dict(self) -> dict[str, Any]:
        """What the control API shows: all but the definition, which may hold secrets of the VM."""
        shown = {key: value for key, value in asdict(self).items() if key != "definition"}
        return {**shown, "rung": self.rung}


def new_job(vm: str, name: str, peer: str, epoch: int, options: EvacuationOptions, now: float) -> Job:
    """A job at its first step."""
    job = Job(uuid.uuid4().hex[:12], vm, name, peer, epoch, options=options, commanded_at=now)
    job.steps.append(StepTime(Step.PREFLIGHT.value, now))
    return job


def job_from_dict(data: Mapping[str, Any]) -> Job:
    """What :meth:`Job.record` gave. Unknown keys (of a newer version) are dropped. Raises IntegrityError."""
    known = {item.name for item in fields(Job)}
    values = {key: value for key, value in data.items() if key in known}
    try:
        values["step"] = Step(values["step"])
        values["steps"] = [StepTime(**item) for item in values.get("steps", [])]
        options = dict(values.get("options", {}))
        options["mode"] = Mode(options.get("mode", Mode.LIVE))
        values["options"] = EvacuationOptions(**options)
        values["disks"] = {key: FrozenDisk(**disk) for key, disk in values.get("disks", {}).items()}
        if values.get("shutdown_request") is not None:
            values["shutdown_request"] = ShutdownRequest(**values["shutdown_request"])
        if values.get("verdict") is not None:
            values["verdict"] = Verdict(values["verdict"])
        if values.get("undecided_from") is not None:
            values["undecided_from"] = Step(values["undecided_from"])
        return Job(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"evacuation record {data.get('id', '?')}: not understood ({error}); it was written by another "
            f"version: "
            "install that one again, or move the record away once you know where the VM runs"
        ) from error


class Journal:
    """The jobs of this host, one durable file each in ``directory``."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.time) -> None:
        self.directory = directory
        self.clock = clock

    def path(self, job_id: str) -> Path:
        """Where the record of a job is."""
        return self.directory / f"{job_id}.json"

    def save(self, job: Job) -> None:
        """Make the record durable (blocking)."""
        durable.make_directory(self.directory, 0o750)
        durable.write_json(self.path(job.id), job.record())

    def enter(self, job: Job, *steps: Step) -> None:
        """Advance and make that durable; only then may the step be begun (blocking).

        Where it cannot be made durable (a full disk) the job stays at its step: nobody may act upon the next.
        """
        before = copy.deepcopy((job.step, job.steps, job.undecided_from, job.ended_at))
        for step in steps:
            job.advance(step, self.clock())
        try:
            self.save(job)
        except OSError:
            job.step, job.steps, job.undecided_from, job.ended_at = before
            raise

    def remove(self, job_id: str) -> None:
        """Forget one for good (blocking)."""
        durable.remove(self.path(job_id))

    def load(self) -> list[Job]:
        """Every job on record, oldest first."""
        if not self.directory.is_dir():
            return []
        records = (durable.read_json(path) for path in sorted(self.directory.glob("*.json")))
        return sorted(
            (job_from_dict(record) for record in records if record), key=lambda job: job.commanded_at
        )
