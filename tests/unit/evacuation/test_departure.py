# SPDX-License-Identifier: GPL-3.0-or-later
"""The source's side of a job where libvirt or the link does not do as it should."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import libvirt
import pytest

from precache_proxy.errors import (
    Cancelled,
    Conflict,
    Finding,
    GuestBoots,
    HypervisorError,
    InvalidInput,
    NoSpace,
    PeerUnreachable,
)
from precache_proxy.evacuation import confirm, crossing
from precache_proxy.evacuation import departure as departure_module
from precache_proxy.evacuation import rollback as rollback_module
from precache_proxy.evacuation.arrival import ArrivalState
from precache_proxy.evacuation.departure import Departure, cancel
from precache_proxy.evacuation.departures import Departures
from precache_proxy.evacuation.fence import Fence
from precache_proxy.evacuation.guard import TOMBSTONE, Guard
from precache_proxy.evacuation.job import EvacuationOptions, Journal, Mode, Step, Verdict, new_job
from precache_proxy.evacuation.measure import Measure
from precache_proxy.evacuation.reconcile import (
    DestinationView,
    Presence,
    SourceDecision,
    decide_at_source,
)
from precache_proxy.evacuation.relay import RelayCounters
from precache_proxy.evacuation.surroundings import Look, Surroundings

VM = "11111111-2222-4333-8444-555555555501"


class SlowDomain:
    """A domain whose migration becomes a job only a while after it was asked for."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.has_job = False
        self.aborted = threading.Event()

    def migrateSetMaxDowntime(self, *_unused: int) -> None: ...  # noqa: N802

    def migrateToURI3(self, *_unused: object) -> None:  # noqa: N802
        self.asked.set()
        time.sleep(0.5)
        self.has_job = True
        assert self.aborted.wait(5), "the migration ran to its end"
        raise libvirt.libvirtError("operation aborted: migration out job: canceled by client")

    def abortJob(self) -> None:  # noqa: N802
        if not self.has_job:
            raise libvirt.libvirtError("no job is active on the domain")
        self.aborted.set()

    def jobStats(self, *_unused: int) -> dict[str, Any]:  # noqa: N802
        return {}


class Domains:
    def __init__(self, domain: Any) -> None:
        self.domain = domain
        self.is_there = Presence.RUNNING

    async def run(self, _vm: str, function: Callable[[Any], Any], **_unused: Any) -> Any:
        try:
            return await asyncio.to_thread(function, self.domain)
        except libvirt.libvirtError as error:
            raise HypervisorError(str(error)) from error

    async def xml(self, _vm: str, *, inactive: bool) -> str:
        return f"<domain inactive='{inactive}'/>"

    async def presence_at_source(self, _vm: str) -> Presence:
        return self.is_there

    def on_lifecycle(self, _vm: str, _tell: Callable[[str, int], None]) -> Callable[[], None]:
        return lambda: None


@pytest.fixture(autouse=True)
def of_one_version(monkeypatch: pytest.MonkeyPatch) -> None:
    async def version(*_unused: object, **_further: object) -> int:
        return 10_000_007

    monkeypatch.setattr("precache_proxy.evacuation.mirroring.emulator_version", version)


class Link:
    state = "up"
    least_round_trip_seconds: float | None = 0.1
    round_trip_seconds: float | None = 0.1
    rate_bytes_per_second = None
    answer: Any = None

    def counters(self) -> dict[str, Any]:
        return {}

    async def call(self, _method: str, _parameters: object, *, timeout_seconds: float) -> dict[str, Any]:
        if self.answer is None:
            await asyncio.sleep(timeout_seconds)
        return dict(self.answer)


class Source:
    def __init__(self) -> None:
        self.holders: set[str] = set()

    async def hold(self, _vm: str, holder: str) -> None:
        self.holders.add(holder)

    async def release(self, _vm: str, holder: str) -> None:
        self.holders.discard(holder)


class Contact:
    def heard(self, departure: Departure, asked_at: float) -> None: ...
    def watch(self, departure: Departure) -> None: ...


def around(tmp_path: Path, domains: Any = None, source: Any = None) -> Surroundings:
    guard = Guard(tmp_path / "state", tmp_path / "run")
    guard.prepare_directories()
    user = SimpleNamespace(uid=0, gid=0)
    return Surroundings(
        tmp_path / "state", tmp_path / "run", domains, guard, Journal(tmp_path / "state" / "jobs"),
        {"backup1": Link()}, source, cast(Any, None), cast(Any, None), cast(Any, user), 0.5,
    )  # fmt: skip


def a_departure(surroundings: Surroundings, step: Step) -> Departure:
    job = new_job(VM, "web1", "backup1", 1, EvacuationOptions(), 0.0)
    job.step = step
    return Departure(job, surroundings, Measure(job, surroundings.links["backup1"], 0), Contact())


async def test_what_is_said_against_its_addresses_stops_no_evacuation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    definition = cast(Any, SimpleNamespace(autostart=False))
    silent = Finding("VM web1", "its addresses would not follow it", "start the agent", "network")
    paused = Finding("VM web1", "it is paused", "resume it", "conflict")
    found = [silent]

    async def look(*_unused: object, restarts: bool) -> Look:
        return Look(definition, found)

    monkeypatch.setattr(departure_module, "look", look)
    source = SimpleNamespace(status=lambda _vm: {})
    item = a_departure(around(tmp_path, source=source), Step.PREFLIGHT)
    assert await departure_module.pass_preflight(item)
    assert item.job.address_findings == [str(silent)]
    found.append(paused)
    with pytest.raises(InvalidInput, match="it is paused") as refused:
        await departure_module.pass_preflight(item)
    assert refused.value.findings == (paused,)


async def test_a_cancel_before_libvirt_has_a_job_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crossing, "destination_xml", lambda xml, *_places: xml)
    monkeypatch.setattr("os.chown", lambda *_unused: None)
    domain = SlowDomain()
    item = a_departure(around(tmp_path, Domains(domain)), Step.PREPARE)
    migrating = asyncio.create_task(crossing.cross(item, {"vda": "/overlay"}))
    assert await asyncio.to_thread(domain.asked.wait, 5)
    assert item.job.step is Step.MIGRATE
    await cancel(item)
    assert not domain.aborted.is_set(), "libvirt has nothing to abort yet"
    with pytest.raises(Cancelled):
        await asyncio.wait_for(migrating, 10)


async def test_a_cancel_is_on_disk_before_it_is_answered(tmp_path: Path) -> None:
    surroundings = around(tmp_path, Domains(None))
    item = a_departure(surroundings, Step.PREPARE)
    await cancel(item)
    assert surroundings.journal.load()[0].cancelled
    # Where it cannot be put there, that is said; it is stopped all the same.
    full = a_departure(surroundings, Step.PREPARE)

    def no_space(_job: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    surroundings.journal.save = no_space  # type: ignore[method-assign]
    with pytest.raises(NoSpace, match="a proxy that is killed now would forget it"):
        await cancel(full)
    with pytest.raises(Cancelled):
        full.check_cancelled()


@pytest.mark.parametrize("mode", [Mode.LIVE, Mode.RESTART])
async def test_a_cancel_in_prepare_is_heard_before_the_confirmation(tmp_path: Path, mode: Mode) -> None:
    """A guest that only stands booted there is wanted back; memory that is there is not taken back."""
    domains = Domains(None)
    domains.is_there = Presence.SHUT_OFF
    surroundings = around(tmp_path, domains)
    item = a_departure(surroundings, Step.PREPARE)
    item.job.options = EvacuationOptions(mode=mode)
    await cancel(item)
    again = surroundings.journal.load()[0]
    whole = DestinationView(True, ArrivalState.PREPARED, Presence.ARRIVED)
    decision = decide_at_source(
        again.step, Presence.SHUT_OFF, whole, restarts=again.restarts, cancelled=again.cancelled
    )
    if mode is Mode.RESTART:
        assert decision is SourceDecision.ROLL_BACK_COLD, "also by a proxy that was started again"
        with pytest.raises(Cancelled):
            await confirm.confirm(item)
        assert surroundings.guard.forbidden(VM) is None
        assert item.job.step is Step.CONFIRM
    else:
        assert decision is SourceDecision.CONFIRM
        await confirm.confirm(item)
        assert item.job.step is Step.RELEASED
        assert "was not taken back" in item.job.warning


async def test_the_tombstone_stays_where_libvirt_does_not_say_that_it_has_ended(tmp_path: Path) -> None:
    domains = Domains(None)
    domains.is_there = Presence.UNKNOWN
    surroundings = around(tmp_path, domains)
    item = a_departure(surroundings, Step.MIGRATE)
    with pytest.raises(HypervisorError, match="does not say whether it has ended"):
        await confirm.confirm(item)
    forbidden_by = surroundings.guard.forbidden(VM)
    assert forbidden_by is not None
    assert (forbidden_by.cause, item.job.step) == (TOMBSTONE, Step.CONFIRM)
    domains.is_there = Presence.RUNNING
    with pytest.raises(Conflict, match="it is running here"):
        await confirm.confirm(item)
    assert surroundings.guard.forbidden(VM) is None


class Passing(Source):
    """Sends a pass that takes all that it is allowed to."""

    def __init__(self) -> None:
        super().__init__()
        self.pace_of: Any = None
        self.sending = asyncio.Event()
        self.stands_still = False

    def libvirt_stands_still(self) -> bool:
        return self.stands_still

    def pace(self, _vm: str, pace: Any) -> None:
        self.pace_of = pace

    async def run_pass(self, _vm: str, *, reason: str, leave_bytes: int = 0) -> Any:
        assert (reason, leave_bytes) == ("evacuation", 0)
        self.sending.set()
        for _message in range(3):
            await self.pace_of.wait(1_000_000)
        return SimpleNamespace(data_bytes=3_000_000)


async def test_no_pass_is_begun_whose_end_libvirt_would_not_see(tmp_path: Path) -> None:
    source = Passing()
    source.stands_still = True
    item = a_departure(around(tmp_path, Domains(None), source), Step.PREFLIGHT)
    await asyncio.wait_for(departure_module.catch_up(item), 5)
    assert not source.sending.is_set()
    assert source.holders == {item.job.id}, "nobody else's pass is begun either"


async def test_a_guest_that_boots_is_evacuated_without_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Passing()

    async def refuse(_vm: str, **_unused: Any) -> Any:
        raise GuestBoots("VM web1: its guest boots and opens its ports")

    monkeypatch.setattr(source, "run_pass", refuse)
    item = a_departure(around(tmp_path, Domains(None), source), Step.PREFLIGHT)
    await departure_module.catch_up(item)
    assert source.holders == {item.job.id}


async def test_a_bandwidth_holds_for_passes_and_is_changed_under_way(tmp_path: Path) -> None:
    source = Passing()
    surroundings = around(tmp_path, Domains(None), source)
    item = a_departure(surroundings, Step.PREFLIGHT)
    item.job.options = EvacuationOptions(bandwidth_bytes_per_second=20_000.0)
    passing = asyncio.create_task(departure_module.catch_up(item))
    await source.sending.wait()
    await asyncio.sleep(0.3)
    assert not passing.done(), "20 KB/s for 3 MB"
    with pytest.raises(InvalidInput, match="give 16384 or more"):
        await departure_module.steer(item, 1000.0)
    await departure_module.steer(item, 1e9)
    await asyncio.wait_for(passing, 5)
    assert surroundings.journal.load()[0].options.bandwidth_bytes_per_second == 1e9
    item.job.step = Step.CONFIRM
    with pytest.raises(Conflict, match="nothing is sent any more"):
        await departure_module.steer(item, 2e9)


async def test_a_bandwidth_at_which_nothing_gets_on_is_refused_before_anything(tmp_path: Path) -> None:
    proxy = Departures(around(tmp_path, Domains(None)), cast(Any, None))
    with pytest.raises(InvalidInput, match="bandwidth 5 bytes per second"):
        await proxy.begin("web1", options=EvacuationOptions(bandwidth_bytes_per_second=5.0))
    assert proxy.jobs() == []


async def test_a_cancel_before_the_migration_is_asked_for_asks_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crossing, "destination_xml", lambda xml, *_places: xml)
    monkeypatch.setattr("os.chown", lambda *_unused: None)
    domain = SlowDomain()
    item = a_departure(around(tmp_path, Domains(domain)), Step.PREPARE)

    async def cancelled_meanwhile(_vm: str, *, inactive: bool) -> str:
        with contextlib.suppress(Exception):
            await cancel(item)
        return f"<domain inactive='{inactive}'/>"

    monkeypatch.setattr(item.around.domains, "xml", cancelled_meanwhile)
    with pytest.raises(Cancelled):
        await crossing.cross(item, {"vda": "/overlay"})
    assert not domain.asked.is_set()


async def test_a_question_over_a_dead_link_is_given_up_before_its_time(tmp_path: Path) -> None:
    item = a_departure(around(tmp_path), Step.CONFIRM)
    item.link.state = "down"
    began = time.monotonic()
    with pytest.raises(PeerUnreachable, match="asked to release"):
        await item.call("release", {}, 60)
    assert time.monotonic() - began < 10
    item.link.state, item.link.answer = "up", {"state": "activated"}
    assert await item.call("release", {}, 60) == {"state": "activated"}


async def test_the_lease_is_on_disk_before_anything_stands_there(tmp_path: Path) -> None:
    """The answer to `prepare` may be lost: a source that knew of no limit would not stop its VM in time."""
    source = SimpleNamespace(status=lambda _vm: {"rpo_seconds": 15.0})
    item = a_departure(around(tmp_path, Domains(None), source), Step.RESIDUAL)
    fence = Fence(boot="this one")
    item.contact = fence
    item.job.presumed_dead_after_seconds = 300.0
    on_disk: dict[str, Any] = {}

    async def asked(method: str, _parameters: object, *, timeout_seconds: float) -> dict[str, Any]:
        if method.endswith("prepare"):
            on_disk.update(json.loads((tmp_path / "state" / "jobs" / f"{item.job.id}.json").read_text()))
        raise PeerUnreachable("the link is gone")

    item.link.call = asked
    try:
        with pytest.raises(PeerUnreachable):
            await departure_module.prepare(item, {})
        assert on_disk["step"] == "prepare"
        assert on_disk["presumed_dead_after_seconds"] == 300.0
        assert on_disk["heard_boot"] == "this one"
        assert 0 < fence.seconds_left(item) <= 150.0
    finally:
        await fence.stop()


async def test_a_destination_that_has_presumed_us_dead_grants_no_time(tmp_path: Path) -> None:
    """Its word holds, though contact is lost again before it can be asked to give the VM back."""
    item = a_departure(around(tmp_path), Step.ROLLBACK)
    fence = Fence(boot="this one")
    item.contact = fence
    item.job.owes_abort, item.job.presumed_dead_after_seconds = True, 300.0
    for state, is_due in (("released", True), ("activated", True), ("prepared", False)):
        item.link.answer = {"known": True, "state": state, "vm": "running"}
        await item.call("status", {}, 5)
        assert fence.is_due(item) is is_due, state


@pytest.mark.parametrize("step", [Step.PREPARE, Step.ROLLBACK])
async def test_nothing_is_undone_while_libvirt_does_not_say_whether_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: Step
) -> None:
    item = a_departure(around(tmp_path, Domains(None)), step)

    async def unknown(_vm: str) -> Presence:
        return Presence.UNKNOWN

    async def nothing(*_unused: object, **_unused_too: object) -> None: ...

    monkeypatch.setattr(item.around.domains, "presence_at_source", unknown)
    monkeypatch.setattr(rollback_module, "clear_local_leftovers", nothing)
    monkeypatch.setattr(rollback_module.freeze, "merge_back", forbidden)
    with pytest.raises(HypervisorError, match="does not say whether it runs"):
        await rollback_module.roll_back(item, Fence(), cold=False)
    assert item.job.step is Step.ROLLBACK
    assert item.job.verdict is None


async def forbidden(*_unused: object, **_unused_too: object) -> None:
    raise AssertionError("it was merged as if it were off")


def test_downtime_is_from_the_stop_here_to_the_run_there() -> None:
    """A round trip of 0.1 s: stopped at 10.0, told of at 12.0; it runs there since 0.3 s when it answers."""
    now = 9.0
    job = new_job(VM, "web1", "backup1", 1, EvacuationOptions(), 0.0)
    measure = Measure(job, Link(), 0, clock=lambda: now)
    measure.changed_here("suspended")
    measure.changed_here("resumed")
    now = 10.0
    measure.changed_here("suspended")
    now = 10.5
    measure.changed_here("suspended")
    now = 11.0
    measure.migrated(RelayCounters(), {"downtime_milliseconds": 200})
    now = 12.0
    measure.activated({"running_seconds": 0.3})
    assert job.downtime_seconds == pytest.approx(12.0 - 0.05 - 0.3 - 10.0)
    assert job.qemu_downtime_seconds == 0.2
    assert job.eviction_seconds == 3.0


async def test_a_lost_memory_is_told_though_the_answer_to_the_release_was_lost(tmp_path: Path) -> None:
    surroundings = around(tmp_path, Domains(None))
    item = a_departure(surroundings, Step.RELEASED)
    item.link.answer = {"known": True, "state": "activated", "vm": "running", "memory_lost": True}
    view = await Departures(surroundings, cast(Any, None))._ask_destination(item)
    assert view.state is ArrivalState.ACTIVATED
    assert item.job.memory_lost


async def test_a_job_found_in_preflight_after_a_restart_holds_nothing(tmp_path: Path) -> None:
    source = Source()
    surroundings = around(tmp_path, Domains(None), source)
    job = new_job(VM, "web1", "backup1", 1, EvacuationOptions(), 0.0)
    surroundings.journal.save(job)
    again = Departures(surroundings, cast(Any, None))
    again.load()
    await again.hold_all()
    assert source.holders == {job.id}
    await again.tend_all()
    ended = await again.wait(job.id, 5)
    assert (ended.step, ended.verdict) == (Step.STAYED, Verdict.STAYED)
    assert source.holders == set(), "its passes go on"
    await again.stop()
