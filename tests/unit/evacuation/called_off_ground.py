# SPDX-License-Identifier: GPL-3.0-or-later
"""A host with a job, and a libvirt that moves its VM: told what it is asked for, late to obey if need be."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import libvirt

from precache_proxy.errors import HypervisorError
from precache_proxy.evacuation.departure import Departure
from precache_proxy.evacuation.domains import Domains
from precache_proxy.evacuation.fence import Fence
from precache_proxy.evacuation.guard import Guard
from precache_proxy.evacuation.job import EvacuationOptions, Journal, Step, new_job
from precache_proxy.evacuation.surroundings import Surroundings

VM = "11111111-2222-4333-8444-555555555501"
RUNNING = (libvirt.VIR_DOMAIN_RUNNING, 1)
BY_USER = (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER)
BY_MIGRATION = (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION)


class Domain:
    """A VM in a migration; ``told`` is what was asked of it, with whether our record knew of a stop then."""

    def __init__(self, jobs: Path) -> None:
        self.jobs = jobs
        self.told: list[tuple[str, bool]] = []
        self.now = RUNNING
        self.migrates = True
        self.number = 7
        # the thread of a stop that does not come to its end until it may
        self.hangs: int | None = None
        self.may_stop = threading.Event()
        self.may_stop.set()

    def _note(self, what: str) -> None:
        records = [json.loads(path.read_text()) for path in self.jobs.glob("*.json")]
        self.told.append((what, any(record["stopped_here"] for record in records)))

    def state(self) -> list[int]:
        return list(self.now)

    def jobInfo(self) -> list[int]:  # noqa: N802
        return [libvirt.VIR_DOMAIN_JOB_NONE]

    def jobStats(self, *_unused: int) -> dict[str, Any]:  # noqa: N802
        return {"operation": libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT} if self.migrates else {}

    def suspend(self) -> None:
        self._note("suspend")
        self.hangs = None if self.may_stop.is_set() else threading.get_ident()
        assert self.may_stop.wait(30)
        self.hangs = None
        self.now = BY_MIGRATION if self.migrates else BY_USER

    def resume(self) -> None:
        self._note("resume")
        self.now = RUNNING

    def abortJob(self) -> None:  # noqa: N802
        self._note("abort")

    def isActive(self) -> bool:  # noqa: N802
        return True

    def ID(self) -> int:  # noqa: N802
        return self.number

    def isPersistent(self) -> bool:  # noqa: N802
        return False

    def XMLDesc(self, _flags: int) -> str:  # noqa: N802
        return MIRRORED if self.migrates else PLAIN

    def blockJobInfo(self, _target: str, _flags: int) -> dict[str, int]:  # noqa: N802
        return {"type": libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COPY}

    def blockJobAbort(self, target: str, _flags: int) -> None:  # noqa: N802
        self._note(f"cancel {target}")


PLAIN = f"""<domain type='qemu'><name>web1</name><uuid>{VM}</uuid><devices>
<disk type='file' device='disk'><driver type='qcow2'/><source file='/o'/><target dev='vda' bus='virtio'/>
</disk></devices></domain>"""
MIRRORED = PLAIN.replace(
    "</disk>",
    "<mirror type='network' job='copy'><format type='raw'/><source protocol='nbd'/></mirror></disk>",
)


class Connection:
    """A libvirt that knows one VM. Where it is ``impatient`` a call that hangs is given up, and goes on."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.impatient = False
        self.connection = SimpleNamespace(lookupByUUIDString=lambda _vm: domain)

    async def call(self, work: Callable[[], Any], **_unused: Any) -> Any:
        thread: list[int] = []

        def noted() -> Any:
            thread.append(threading.get_ident())
            return work()

        answer = asyncio.ensure_future(asyncio.to_thread(noted))
        try:
            while self.impatient and not answer.done():
                if self.domain.hangs in thread:
                    answer.cancel()
                    raise HypervisorError("libvirt did not answer")
                await asyncio.sleep(0.01)
            return await answer
        except libvirt.libvirtError as error:
            raise HypervisorError(str(error)) from error

    async def call_in_turn(self, _vm: str, work: Callable[[], Any], **_unused: Any) -> Any:
        return await self.call(work)


class Source:
    async def after_rollback(self, _vm: str) -> None: ...
    async def release(self, _vm: str, _holder: str) -> None: ...
    async def hold(self, _vm: str, _holder: str) -> None: ...


class Place:
    """A host with a job at a step, and its VM."""

    def __init__(self, tmp_path: Path, step: Step = Step.MIGRATE) -> None:
        state, run = tmp_path / "state", tmp_path / "run"
        self.domain = Domain(state / "jobs")
        self.connection = Connection(self.domain)
        self.guard = Guard(state, run)
        self.guard.prepare_directories()
        self.journal = Journal(state / "jobs")
        self.around = Surroundings(
            state, run, Domains(cast(Any, self.connection)), self.guard, self.journal, {},
            cast(Any, Source()), cast(Any, None), cast(Any, None), cast(Any, None), 0.1,
        )  # fmt: skip
        job = new_job(VM, "web1", "backup1", 1, EvacuationOptions(), 0.0)
        job.step = step
        self.departure = self.of(job)
        self.journal.save(job)

    def of(self, job: Any) -> Departure:
        return Departure(job, self.around, cast(Any, None), Fence())

    def started_again(self) -> Departure:
        """What a proxy finds that comes after a kill."""
        (job,) = self.journal.load()
        return self.of(job)


async def soon(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
