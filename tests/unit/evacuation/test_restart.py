# SPDX-License-Identifier: GPL-3.0-or-later
"""VMs that leave by restart: decisions under every fault, the stop, and what is put in place."""

from __future__ import annotations

import asyncio
import hashlib
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from precache_proxy.errors import Cancelled, Conflict, HypervisorError, IntegrityError, Unsupported
from precache_proxy.evacuation import cold_arrival, restart
from precache_proxy.evacuation.arrival import RUNS_HERE, Arrival, ArrivalState, arrival_from_dict
from precache_proxy.evacuation.departure import Departure
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
from precache_proxy.evacuation.reconcile import (
    ArrivalDecision,
    DestinationView,
    Presence,
    SourceDecision,
    decide_at_destination,
    decide_at_source,
)
from precache_proxy.evacuation.surroundings import Surroundings
from precache_proxy.hypervisor.domain_xml import parse_definition

VM = "11111111-2222-4333-8444-555555555501"
OFF = {Presence.SHUT_OFF, Presence.ENDED}
RELEASED_OR_LATER = {Step.RELEASED, Step.FINISH, Step.DONE}


class TwoHosts(RuleBasedStateMachine):
    """A running VM leaves by restart, with kills, reboots, partitions and people in between.

    ``guarded``: a start at the source is refused (from the stop on). Whoever settles by hand is left out: it
    is a person's word.
    """

    def __init__(self) -> None:
        super().__init__()
        self.contact = True
        self.step = Step.CATCH_UP
        self.source = Presence.RUNNING
        self.guarded = False
        self.was_released = False
        self.owes_abort = False
        self.arrival: ArrivalState | None = None
        self.destination = Presence.ABSENT
        self.called_off = False

    # -- the world

    @rule(contact=st.booleans())
    def link(self, contact: bool) -> None:
        self.contact = contact

    @rule()
    def source_host_reboots(self) -> None:
        if self.source is not Presence.ABSENT:
            self.source = Presence.SHUT_OFF

    @rule()
    def destination_host_reboots(self) -> None:
        if self.destination is not Presence.ABSENT:
            self.destination = Presence.SHUT_OFF

    @rule(at_source=st.booleans())
    def somebody_starts_it(self, at_source: bool) -> None:
        if at_source and self.source in OFF and not self.guarded:
            self.source = Presence.RUNNING
        if not at_source and self.destination is Presence.SHUT_OFF and self.arrival in RUNS_HERE:
            self.destination = Presence.RUNNING

    # -- the way forward, each line with a kill after it

    @precondition(lambda self: self.step is Step.CATCH_UP)
    @rule(guest_has_ended=st.booleans())
    def stop(self, guest_has_ended: bool) -> None:
        self.step, self.guarded = Step.STOP, True
        if guest_has_ended:
            self.source = Presence.ENDED

    @precondition(lambda self: self.step is Step.STOP and self.source in OFF)
    @rule()
    def residual(self) -> None:
        self.step = Step.RESIDUAL

    @precondition(lambda self: self.step is Step.RESIDUAL and self.source in OFF and not self.called_off)
    @rule(done=st.sampled_from(["nothing", "recorded", "defined", "standing"]))
    def prepare(self, done: str) -> None:
        self.step, self.owes_abort = Step.PREPARE, True
        if done == "nothing" or not self.contact:
            return
        self.arrival = ArrivalState.PREPARED
        if done == "defined":
            self.destination = Presence.SHUT_OFF
        elif done == "standing":
            self.destination = Presence.ARRIVED

    # -- the proxies

    @precondition(lambda self: self.step in {
        Step.STOP, Step.RESIDUAL, Step.PREPARE, Step.CONFIRM, Step.RELEASED, Step.ROLLBACK, Step.FINISH
    })  # fmt: skip
    @rule(killed_before_released=st.booleans(), killed_before_telling=st.booleans())
    def source_decides(self, killed_before_released: bool, killed_before_telling: bool) -> None:
        view = DestinationView(self.contact, self.arrival if self.contact else None, self.destination)
        decision = decide_at_source(self.step, self.source, view, restarts=True)
        if decision is SourceDecision.CONFIRM:
            self.step, self.guarded = Step.CONFIRM, True
            if killed_before_released or self.source not in OFF:
                return
            self.step, self.was_released = Step.RELEASED, True
            if not killed_before_telling:
                self._release()
        elif decision is SourceDecision.RELEASE:
            self._release()
        elif decision in {SourceDecision.ROLL_BACK, SourceDecision.ROLL_BACK_COLD}:
            self._roll_back()
        elif decision is SourceDecision.FINISH:
            self.guarded, self.source, self.step = True, Presence.ABSENT, Step.DONE

    def _release(self) -> None:
        if not self.contact or self.arrival is None:
            return
        if self.arrival is ArrivalState.PREPARED:
            if self.destination not in {Presence.ARRIVED, Presence.RUNNING}:
                return
            self.arrival = ArrivalState.RELEASED
        if self.arrival is ArrivalState.RELEASED:
            self.destination, self.arrival = Presence.RUNNING, ArrivalState.ACTIVATED
        if self.arrival in RUNS_HERE:
            self.step = Step.FINISH

    def _roll_back(self) -> None:
        """As rollback.py does it: the peer's word must come first only after a release."""
        self.step = Step.ROLLBACK
        if self.owes_abort:
            if self.contact:
                if self.arrival is ArrivalState.RELEASED:
                    self.destination, self.arrival = Presence.RUNNING, ArrivalState.ACTIVATED
                if self.arrival in RUNS_HERE:
                    self.step = Step.FINISH
                    return
                self._clear()
            elif self.was_released:
                return
        self.guarded, self.source, self.step = False, Presence.RUNNING, Step.STAYED

    def _clear(self) -> None:
        self.called_off = True
        if self.arrival is not None:
            self.arrival, self.destination = ArrivalState.ABORTED, Presence.ABSENT
        self.owes_abort = False

    @precondition(lambda self: self.step is Step.STAYED and self.owes_abort and self.contact)
    @rule()
    def source_pays_its_debt(self) -> None:
        assert self.arrival not in RUNS_HERE
        self._clear()

    @precondition(lambda self: self.arrival not in {None, ArrivalState.LANDED, ArrivalState.ABORTED})
    @rule(killed_after_resume=st.booleans())
    def destination_decides(self, killed_after_resume: bool) -> None:
        assert self.arrival is not None
        decision = decide_at_destination(
            self.arrival, self.destination, self.step if self.contact else None, source_reachable=self.contact
        )
        if decision is ArrivalDecision.ABORT:
            assert self.arrival not in RUNS_HERE
            self.arrival, self.destination = ArrivalState.ABORTED, Presence.ABSENT
        elif decision in {ArrivalDecision.ACTIVATE, ArrivalDecision.ACTIVATE_COLD}:
            assert self.arrival is ArrivalState.RELEASED, "only a release, or a person, lets it run"
            self.destination = Presence.RUNNING
            if not killed_after_resume:
                self.arrival = ArrivalState.ACTIVATED
        elif decision is ArrivalDecision.RECORD_ACTIVATED:
            self.arrival = ArrivalState.ACTIVATED

    # -- what must hold

    @invariant()
    def never_runs_twice(self) -> None:
        assert not (self.source is Presence.RUNNING and self.destination is Presence.RUNNING)

    @invariant()
    def never_forgotten_at_both_ends(self) -> None:
        assert not (self.source is Presence.ABSENT and self.arrival not in RUNS_HERE)

    @invariant()
    def released_means_the_source_cannot_run(self) -> None:
        if self.step in RELEASED_OR_LATER:
            assert self.guarded
            assert self.source is not Presence.RUNNING

    def teardown(self) -> None:
        """With contact and without further faults it comes to an end, and the VM is to run in one place."""
        if self.step is Step.CATCH_UP:
            return
        self.contact = True
        for _round in range(6):
            if self.step not in {Step.DONE, Step.STAYED}:
                self.source_decides(killed_before_released=False, killed_before_telling=False)
            if self.arrival not in {None, ArrivalState.LANDED, ArrivalState.ABORTED}:
                self.destination_decides(killed_after_resume=False)
        assert self.step in {Step.DONE, Step.STAYED}
        if self.step is Step.DONE:
            assert self.arrival in RUNS_HERE
        else:
            assert self.arrival in {None, ArrivalState.PREPARED, ArrivalState.ABORTED}


TestTwoHosts = TwoHosts.TestCase
TestTwoHosts.settings = settings(max_examples=120, stateful_step_count=25, deadline=None)


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
    assert (domains.asked, item.job.was_running) == (0, False)
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
    item.cancelled = True
    with pytest.raises(Cancelled):
        await stopping
    domains.ends_after = 3
    assert await restart.presence_for_rollback(item, Presence.RUNNING) is Presence.SHUT_OFF
    # One that went on running is believed once its time is over.
    domains.is_there, domains.ends_after = Presence.RUNNING, None
    began = time.monotonic()
    assert await restart.presence_for_rollback(item, Presence.RUNNING) is Presence.RUNNING
    assert time.monotonic() - began < 5


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
    transient = restart_findings(defined(vda="a"), None)
    assert "it is transient" in transient[0].fact
    facts = [str(item) for item in restart_findings(defined(vda="a", vdb="b"), defined(vda="other", vdc="c"))]
    assert len(facts) == 3
    assert "it runs with /images/a.qcow2 and would boot with /images/other.qcow2" in facts[0]
    assert "would boot with none" in facts[1]
    assert "runs with none" in facts[2]


# -- what is put in place at the destination

FIRMWARE = """<domain type='kvm'><name>web1</name><uuid>{vm}</uuid><os><nvram>{nvram}</nvram></os><devices>
<tpm model='tpm-crb'><backend type='emulator' version='2.0'><source type='{kind}' path='{tpm}'/></backend>
</tpm></devices></domain>"""


def an_arrival(
    tmp_path: Path, contents: dict[str, bytes], kind: str = "dir"
) -> tuple[Arrival, dict[str, Path]]:
    xml = FIRMWARE.format(
        vm=VM, nvram=tmp_path / "nvram" / "web1.fd", tpm=tmp_path / "swtpm" / VM / "tpm2", kind=kind
    )
    arrival = Arrival("j1", VM, "web1", "home1", 1, 7, mode="restart", definition=xml)
    blobs = {}
    for name, content in contents.items():
        digest = hashlib.sha256(content).hexdigest()
        arrival.attachments[name] = digest
        blobs[name] = tmp_path / digest
        blobs[name].write_bytes(content)
    return arrival, blobs


def test_variables_and_tpm_state_are_put_in_place_and_nothing_older_is_left(tmp_path: Path) -> None:
    arrival, blobs = an_arrival(tmp_path, {"nvram": b"variables", "tpm/tpm2-00.permall": b"state"})
    stale = tmp_path / "swtpm" / VM / "tpm2" / "tpm2-00.volatilestate"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an earlier stay")
    for _twice in range(2):
        cold_arrival._place(arrival, blobs)
        assert (tmp_path / "nvram" / "web1.fd").read_bytes() == b"variables"
        state = tmp_path / "swtpm" / VM / "tpm2"
        assert {path.name: path.read_bytes() for path in state.iterdir()} == {"tpm2-00.permall": b"state"}
        assert state.stat().st_mode & 0o777 == 0o700


def test_a_tpm_whose_state_is_one_file(tmp_path: Path) -> None:
    arrival, blobs = an_arrival(tmp_path, {"tpm/tpm2": b"state"}, kind="file")
    cold_arrival._place(arrival, blobs)
    assert (tmp_path / "swtpm" / VM / "tpm2").read_bytes() == b"state"


def test_what_is_not_what_the_source_has_is_refused(tmp_path: Path) -> None:
    arrival, blobs = an_arrival(tmp_path, {"nvram": b"variables"})
    blobs["nvram"].write_bytes(b"older")
    with pytest.raises(IntegrityError, match="its nvram here is not what home1 has"):
        cold_arrival._place(arrival, blobs)
    with pytest.raises(IntegrityError):
        cold_arrival._place(arrival, {})
    assert not (tmp_path / "nvram").exists()


@pytest.mark.parametrize("name", ["tpm/../../escaped", "tpm//etc/shadow", "tpm/", "other"])
def test_a_name_that_has_no_place_is_refused(tmp_path: Path, name: str) -> None:
    arrival, blobs = an_arrival(tmp_path, {name: b"content"})
    with pytest.raises(Unsupported, match="has no place in its definition"):
        cold_arrival._place(arrival, blobs)
