# SPDX-License-Identifier: GPL-3.0-or-later
"""VMs that leave by restart: how the guest is stopped, and what stands in the way."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from precache_proxy.errors import Cancelled, Conflict, HypervisorError
from precache_proxy.evacuation import restart
from precache_proxy.evacuation.arrival import Arrival, arrival_from_dict
from precache_proxy.evacuation.departure import Departure, cancel
from precache_proxy.evacuation.guard import Guard
from precache_proxy.evacuation.job import (
    EvacuationOptions,
    FrozenDisk,
    Journal,
    Mode,
    Step,
    job_from_dict,
    new_job,
)
from precache_proxy.evacuation.measure import Measure
from precache_proxy.evacuation.preflight import restart_findings, source_findings
from precache_proxy.evacuation.reconcile import Life, Presence
from precache_proxy.evacuation.surroundings import Surroundings
from precache_proxy.hypervisor.domain_xml import parse_definition

VM = "11111111-2222-4333-8444-555555555501"
OFF = {Presence.SHUT_OFF, Presence.ENDED}
RELEASED_OR_LATER = {Step.RELEASED, Step.FINISH, Step.DONE}


# -- the stop


class Domains:
    """A guest that ends ``ends_after`` looks after it was asked; None: never."""

    def __init__(self, ends_after: int | None) -> None:
        self.ends_after = ends_after
        self.is_there = Presence.RUNNING
        self.asked = 0
        self.destroyed = False

    async def presence_at_source(self, _vm: str) -> Presence:
        if self.asked and self.ends_after is not None and self.is_there is Presence.RUNNING:
            self.ends_after -= 1
            if self.ends_after <= 0:
                self.is_there = Presence.ENDED
        return self.is_there

    async def life(self, _vm: str) -> Life:
        on = self.is_there in {Presence.RUNNING, Presence.PAUSED}
        return Life(self.is_there, 7 if on else None, in_order=self.is_there is Presence.ENDED)

    async def xml(self, _vm: str, *, inactive: bool) -> str:
        assert inactive
        return "<domain/>"

    async def shut_down(self, _vm: str) -> None:
        self.asked += 1

    async def destroy(self, _vm: str) -> None:
        self.destroyed, self.is_there = True, Presence.ENDED


def a_departure(tmp_path: Path, domains: Domains, **options: Any) -> Departure:
    guard = Guard(tmp_path / "state", tmp_path / "run")
    guard.prepare_directories()
    source = SimpleNamespace(status=lambda _vm: {"checkpoint": "lifeboat-e0-g3", "epoch": 0, "generation": 3})
    link = SimpleNamespace(counters=dict, state="up")
    surroundings = Surroundings(
        tmp_path / "state", tmp_path / "run", cast(Any, domains), guard, Journal(tmp_path / "state" / "jobs"),
        {"backup1": link}, cast(Any, source), cast(Any, None), cast(Any, None), cast(Any, None), 0.5,
    )  # fmt: skip
    job = new_job(VM, "web1", "backup1", 1, EvacuationOptions(mode=Mode.RESTART, **options), 0.0)
    job.step = Step.CATCH_UP
    return Departure(job, surroundings, Measure(job, link, 0), cast(Any, None))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restart, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(restart, "LATE_SECONDS", 0.1)


async def test_a_guest_is_asked_once_and_waited_for(tmp_path: Path) -> None:
    domains = Domains(ends_after=5)
    item = a_departure(tmp_path, domains, shutdown_seconds=30.0)
    await restart._stop(item)
    assert (domains.asked, domains.destroyed, item.job.powered_off) == (1, False, False)
    on_disk = item.around.journal.load()[0]
    assert on_disk.shutdown_request is not None
    assert on_disk.shutdown_request.domain_number == 7
    assert (on_disk.step, on_disk.was_running, on_disk.definition) == (Step.STOP, True, "<domain/>")
    forbidden = item.around.guard.forbidden(VM)
    assert forbidden is not None
    assert "was shut down here to be started at backup1" in forbidden.sentence
    assert "It was shut down here, and booted there" in restart.sentence(item.job)


async def test_a_guest_that_does_not_end_is_powered_off(tmp_path: Path) -> None:
    domains = Domains(ends_after=None)
    item = a_departure(tmp_path, domains, shutdown_seconds=0.1)
    await restart._stop(item)
    assert (domains.destroyed, item.job.powered_off) == (True, True)
    assert "was powered off" in restart.sentence(item.job)


async def test_a_guest_that_may_not_be_powered_off_is_left_alone(tmp_path: Path) -> None:
    domains = Domains(ends_after=None)
    item = a_departure(tmp_path, domains, shutdown_seconds=0.1, power_off=False)
    with pytest.raises(Conflict, match="not to be powered off; shut it down from inside"):
        await restart._stop(item)
    assert not domains.destroyed


async def test_one_that_is_off_is_not_asked_and_stays_off(tmp_path: Path) -> None:
    domains = Domains(ends_after=None)
    domains.is_there = Presence.SHUT_OFF
    item = a_departure(tmp_path, domains)
    await restart._stop(item)
    assert (domains.asked, item.job.was_running, item.job.shutdown_request) == (0, False, None)
    assert await restart.presence_for_rollback(item, Presence.SHUT_OFF) is Presence.ENDED
    assert restart.sentence(item.job).endswith("shut off as it was here.")


async def test_nothing_is_begun_where_libvirt_does_not_say(tmp_path: Path) -> None:
    domains = Domains(ends_after=None)
    domains.is_there = Presence.UNKNOWN
    item = a_departure(tmp_path, domains)
    with pytest.raises(HypervisorError, match="left as it is"):
        await restart._stop(item)
    assert item.around.guard.forbidden(VM) is None


async def test_cancelled_in_the_stop_a_guest_that_ends_late_is_seen(tmp_path: Path) -> None:
    domains = Domains(ends_after=None)
    item = a_departure(tmp_path, domains, shutdown_seconds=1.0)
    stopping = asyncio.create_task(restart._stop(item))
    while not domains.asked:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await cancel(item)
    assert item.around.journal.load()[0].cancelled, "on disk before it is answered"
    with pytest.raises(Cancelled):
        await stopping
    domains.ends_after = 3
    assert await restart.presence_for_rollback(item, Presence.RUNNING) is Presence.SHUT_OFF
    # One that went on running is believed once its time is over.
    domains.is_there, domains.ends_after = Presence.RUNNING, None
    began = time.monotonic()
    assert await restart.presence_for_rollback(item, Presence.RUNNING) is Presence.RUNNING
    assert time.monotonic() - began < 5


async def test_a_vm_that_ran_is_known_to_have_run_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut during the passes ends it: the rollback has to know that it is to run."""
    domains = Domains(ends_after=None)
    item = a_departure(tmp_path, domains)
    item.job.step = Step.PREFLIGHT

    async def nothing_in_the_way(_item: Departure) -> bool:
        return True

    async def power_cut(item: Departure) -> None:
        await item.enter(Step.CATCH_UP)
        raise HypervisorError("the host loses power here")

    monkeypatch.setattr(restart, "pass_preflight", nothing_in_the_way)
    monkeypatch.setattr(restart, "catch_up", power_cut)
    with pytest.raises(HypervisorError):
        await restart.run_forward(item)
    item.job = item.around.journal.load()[0]
    assert (item.job.step, item.job.was_running) == (Step.CATCH_UP, True)
    domains.is_there = Presence.SHUT_OFF
    assert await restart.presence_for_rollback(item, Presence.SHUT_OFF) is Presence.SHUT_OFF
    # Shut down by its user while passes went on: that is not undone.
    assert await restart.presence_for_rollback(item, Presence.ENDED) is Presence.ENDED
    domains.is_there = Presence.ENDED
    await restart._stop(item)
    assert item.job.was_running is False


def test_records_keep_how_a_vm_leaves() -> None:
    job = new_job(VM, "web1", "backup1", 1, EvacuationOptions(mode=Mode.RESTART, power_off=False), 0.0)
    job.disks["vda"] = FrozenDisk("/images/web1.qcow2", "qcow2", "", 4096)
    again = job_from_dict(job.record())
    assert again == job
    assert (again.restarts, again.rung, again.as_dict()["rung"]) == (True, "restart", "restart")
    live = new_job(VM, "web1", "backup1", 1, EvacuationOptions(), 0.0)
    assert live.rung == "live"
    live.guest_paused = True
    assert live.rung == "paused"
    older = live.record()
    del older["options"]["mode"]
    assert job_from_dict(older).options.mode is Mode.LIVE
    arrival = Arrival("j1", VM, "web1", "home1", 1, 7, mode="restart", boots=False, memory_lost=True)
    assert arrival_from_dict(arrival.record()) == arrival
    assert not arrival.has_lost_memory, "it was not to come along"


# -- what stands in the way

XML = """<domain type='qemu'><name>web1</name><uuid>{vm}</uuid><devices>{disks}</devices></domain>"""
DISK = (
    "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/images/{name}.qcow2'/>"
    "<target dev='{target}' bus='virtio'/></disk>"
)


def defined(**disks: str) -> Any:
    text = "".join(DISK.format(target=target, name=name) for target, name in disks.items())
    return parse_definition(XML.format(vm=VM, disks=text))


def test_a_vm_that_is_off_may_go_by_restart_only() -> None:
    status = {"peer": "backup1", "generation": 3}
    for presence in OFF:
        assert source_findings(defined(vda="a"), presence, status, "backup1", may_be_off=True) == []
        found = source_findings(defined(vda="a"), presence, status, "backup1")
        assert [item.fact for item in found] == ["it does not run"]
        assert "by restart" in found[0].way_out
    paused = source_findings(defined(vda="a"), Presence.PAUSED, status, "backup1", may_be_off=True)
    assert [item.fact for item in paused] == ["it is paused"]


def test_what_a_boot_would_lose_is_found_before() -> None:
    assert restart_findings(defined(vda="a"), defined(vda="a")) == []
    saved = restart_findings(defined(vda="a"), defined(vda="a"), saved=True)
    assert "managed save" in saved[0].fact
    transient = restart_findings(defined(vda="a"), None)
    assert "it is transient" in transient[0].fact
    facts = [str(item) for item in restart_findings(defined(vda="a", vdb="b"), defined(vda="other", vdc="c"))]
    assert len(facts) == 3
    assert "it runs with /images/a.qcow2 and would boot with /images/other.qcow2" in facts[0]
    assert "would boot with none" in facts[1]
    assert "runs with none" in facts[2]
