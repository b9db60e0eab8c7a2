# SPDX-License-Identifier: GPL-3.0-or-later
"""What the watchdog goes by: the record of a backup job stays for as long as the job may be open."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import libvirt
import pytest

from precache_proxy.errors import GuestBoots, HypervisorError
from precache_proxy.hypervisor.qemu_user import QemuUser
from precache_proxy.source import backups as backups_module
from precache_proxy.source.backups import Backups
from precache_proxy.source.scratch import PassRecord, ScratchPool
from precache_proxy.source.totals import PassTotals
from precache_proxy.source.tracker import VmReference

VM = VmReference("11111111-2222-4333-8444-555555555501", "web1")


class Tracker:
    """A libvirt that answers, or does not."""

    def __init__(self) -> None:
        self.answers = True
        self.job = ""
        self.number = 1
        self.port = "connected"

    async def on_domain(self, _vm: VmReference, function: Callable[[Any], Any]) -> Any:
        if not self.answers:
            raise HypervisorError("VM web1: libvirt did not answer within 60 s")
        try:
            return function(self)
        except libvirt.libvirtError as error:
            raise HypervisorError(str(error)) from error

    def backupGetXMLDesc(self, _flags: int) -> str:  # noqa: N802
        if not self.job:
            error = libvirt.libvirtError("no backup job")
            error.err = (libvirt.VIR_ERR_NO_DOMAIN_BACKUP, 0, "no backup job", 0, "", "", "", 0, 0)
            raise error
        return self.job

    def backupBegin(self, xml: str, _checkpoint: object, _flags: int) -> None:  # noqa: N802
        self.job = xml

    def ID(self) -> int:  # noqa: N802
        return self.number

    def state(self) -> list[int]:
        return [libvirt.VIR_DOMAIN_RUNNING, 0]

    def XMLDesc(self, _flags: int) -> str:  # noqa: N802
        channel = f"<channel><target type='virtio' state='{self.port}'/></channel>"
        return f"<domain><devices>{channel}</devices></domain>"

    def abortJob(self) -> None:  # noqa: N802
        self.job = ""


@pytest.fixture
def tracker() -> Tracker:
    return Tracker()


@pytest.fixture
def backups(tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backups:
    monkeypatch.setattr(
        backups_module,
        "make_qemu_directory",
        lambda directory, _user: directory.mkdir(parents=True, exist_ok=True),
    )
    (tmp_path / "passes").mkdir()
    pool = ScratchPool(tmp_path / "scratch", pass_limit_bytes=1 << 20, open_pass_limit=1)
    return Backups(cast(Any, tracker), tmp_path, pool, QemuUser(0, 0))


@pytest.mark.parametrize(("answers", "record_stays"), [(True, False), (False, True)])
async def test_the_record_goes_only_when_the_job_was_seen_to_end(
    tracker: Tracker, backups: Backups, tmp_path: Path, answers: bool, record_stays: bool
) -> None:
    path = tmp_path / "passes" / f"{VM.uuid}.json"
    async with backups.open(
        VM, disks=["vda"], absent=[], incremental={}, checkpoint=None, limit_seconds=10, totals=PassTotals()
    ):
        assert PassRecord.read(path) is not None
        tracker.answers = answers
    assert path.exists() is record_stays
    assert bool(tracker.job) is record_stays


async def test_none_is_begun_on_a_guest_that_was_started_since_the_last_and_opens_its_ports(
    tracker: Tracker, backups: Backups, tmp_path: Path
) -> None:
    """The pass had asked while the VM was off, and no event has told of the start."""

    async def begin() -> str:
        async with backups.open(
            VM,
            disks=["vda"],
            absent=[],
            incremental={},
            checkpoint="c",
            limit_seconds=10,
            totals=PassTotals(),
        ):
            return tracker.job

    assert await begin()
    tracker.number, tracker.port = 2, "disconnected"
    with pytest.raises(
        GuestBoots, match="web1: its guest boots and opens its ports; ask again in at most 30 s"
    ):
        await begin()
    assert (tracker.job, list((tmp_path / "passes").iterdir())) == ("", [])
    assert await backups.wait_seconds(VM) > 0, "the next pass does not come so far"
    tracker.port = "connected"
    assert await begin()


async def test_the_record_of_a_job_that_may_still_begin_stays(
    tracker: Tracker, backups: Backups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent(*_unused: object) -> None:
        raise HypervisorError("VM web1: libvirt did not answer within 60 s")

    monkeypatch.setattr(backups, "_begin", silent)
    with pytest.raises(HypervisorError), contextlib.ExitStack():
        async with backups.open(
            VM,
            disks=["vda"],
            absent=[],
            incremental={},
            checkpoint=None,
            limit_seconds=10,
            totals=PassTotals(),
        ):
            raise AssertionError("it was opened")
    assert (tmp_path / "passes" / f"{VM.uuid}.json").exists()


async def test_a_former_process_record_stays_for_the_watchdog_when_libvirt_is_silent(
    tracker: Tracker, backups: Backups, tmp_path: Path
) -> None:
    path = tmp_path / "passes" / f"{VM.uuid}.json"
    PassRecord(VM.uuid, "/run/x.sock", [], 1 << 20, 1e12, proxy_pid=1).write(path)
    tracker.answers = False
    await backups.end_leftovers()
    assert path.exists()
    tracker.answers = True
    await backups.end_leftovers()
    assert not path.exists()
