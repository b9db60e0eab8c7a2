# SPDX-License-Identifier: GPL-3.0-or-later
"""A start of a VM and the reading of its images, in every order: real images, locks, readers and hook."""

# ruff: noqa: ASYNC110, ASYNC220, PT012

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, cast
from unittest.mock import AsyncMock

import pytest

from precache_proxy.blocks import images
from precache_proxy.blocks.export import open_export
from precache_proxy.blocks.images import ImageReference
from precache_proxy.blocks.launch import open_gate, start_server, start_ticks
from precache_proxy.errors import Conflict, HypervisorError, LifeboatError, TrackingLost, VmStateChanged
from precache_proxy.hypervisor.domain_xml import Disk, Image
from precache_proxy.source import offline
from precache_proxy.source.claims import ImageClaims
from precache_proxy.source.disks import VmDisks
from precache_proxy.source.record import ProtectionRecord
from precache_proxy.source.totals import PassTotals
from precache_proxy.source.tracker import VmReference
from precache_proxy.source.views import ClosedImages
from precache_proxy.units import MIB

HOOK = Path(__file__).parents[3] / "roles/precache_proxy/files/libvirt_hook/lifeboat"
VM = VmReference("11111111-2222-4333-8444-555555555501", "web1")
XML = f"<domain type='qemu'><name>web1</name><uuid>{VM.uuid}</uuid></domain>"


class Host:
    """A run directory, and what libvirt and QEMU do when the VM is started."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.run = directory / "run"
        self.active = False
        self.hook_seconds = 0.0

    async def is_active(self) -> bool:
        return self.active

    def claims(self, is_active: Callable[[], Awaitable[bool]] | None = None) -> ImageClaims:
        return ImageClaims(self.run, VM, is_active or self.is_active)

    async def hook(self) -> None:
        began = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-IS", HOOK, "web1", "prepare", "begin", "-",
            stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env={"LIFEBOAT_STATE_DIRECTORY": str(self.directory), "LIFEBOAT_RUN_DIRECTORY": str(self.run)},
        )  # fmt: skip
        _, errors = await process.communicate(XML.encode())
        self.hook_seconds = time.monotonic() - began
        assert (process.returncode, errors) == (0, b"")

    async def image(self, name: str = "vda") -> Path:
        path = self.directory / f"{name}.qcow2"
        await images.create(path, 4 * MIB)
        return path

    def noted(self, kind: str) -> list[int]:
        path = self.run / kind / f"{VM.uuid}.json"
        return list(json.loads(path.read_text())["pids"]) if path.exists() else []


async def qemu_opens(path: Path) -> str:
    """What QEMU says when it opens an image as it does for a VM; "" where it gets it."""
    process = await asyncio.create_subprocess_exec(
        "qemu-io", "-f", "qcow2", "-c", "write -q 0 64k", path,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await process.communicate()
    return output.decode() if process.returncode else ""


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def orders() -> Iterator[str]:
    """Ours: Note, Ask, Open. The start's: Active, Hook, Qemu opens. Every way to interleave them."""
    for ours in itertools.combinations(range(6), 3):
        both = {True: iter("nao"), False: iter("AHQ")}
        yield "".join(next(both[step in ours]) for step in range(6))


class Play:
    """Lets the steps of both happen in one order."""

    def __init__(self, host: Host, image: Path, order: str, *, asks: bool = True) -> None:
        self.host, self.image = host, image
        self.rest = list(order)
        self.asks = asks
        self.qemu_said: str | None = None

    async def until(self, ours: str) -> None:
        """The start's steps that come before this one of ours."""
        while self.rest:
            step = self.rest.pop(0)
            if step == ours:
                return
            if step == "A":
                self.host.active = True
            elif step == "H":
                await self.host.hook()
            elif step == "Q":
                self.qemu_said = await qemu_opens(self.image)

    async def read(self) -> str:
        """Open a reader. The outcome in a word."""

        async def is_active() -> bool:
            await self.until("a")
            return self.host.active and self.asks

        async def admit(pid: int) -> None:
            await self.until("n")
            await self.host.claims(is_active).admit_reader(pid)
            await self.until("o")

        try:
            export = await open_export(
                self.image, format="qcow2", socket_directory=self.host.directory, admit=admit
            )
        except VmStateChanged:
            outcome = "gave up"
        except (HypervisorError, Conflict):
            outcome = "ended"
        else:
            outcome = "read"
        try:
            await self.until("")
        finally:
            if outcome == "read":
                await export.kill()
        return outcome


@pytest.mark.parametrize("order", list(orders()))
async def test_in_every_order_the_vm_gets_its_image(host: Host, order: str) -> None:
    play = Play(host, await host.image(), order)
    outcome = await play.read()
    assert play.qemu_said == "", f"{order}: the reader {outcome}"
    assert outcome == ("gave up" if order.index("A") < order.index("a") else outcome)
    # far from the second that a start may be kept waiting
    assert host.hook_seconds < 1.0


async def test_a_reader_that_does_not_ask_comes_after_the_hook_and_refuses_the_start(host: Host) -> None:
    """The fault that asking mends, and that QEMU's lock is what this file tests."""
    play = Play(host, await host.image(), "AHnaoQ", asks=False)
    assert await play.read() == "read"
    assert play.qemu_said is not None
    assert 'Failed to get "write" lock' in play.qemu_said


async def test_a_start_between_two_disks_is_seen_and_the_images_are_read_another_time(host: Host) -> None:
    first, second = await host.image("vda"), await host.image("vdb")
    asked = 0

    async def is_active() -> bool:
        nonlocal asked
        asked += 1
        if asked == 2:
            host.active = True
            await host.hook()
        return host.active

    references = {"vda": ImageReference(first, "qcow2", 0), "vdb": ImageReference(second, "qcow2", 0)}
    source = ClosedImages(VM, references, socket_directory=host.directory, claims=host.claims(is_active))
    with pytest.raises(VmStateChanged, match="VM web1: it was started"):
        async with source.open({}, None):
            pytest.fail("the view was opened")
    assert [await qemu_opens(path) for path in (first, second)] == ["", ""]
    assert host.noted("readers") == []

    host.active = False
    async with source.open({}, None) as view:
        assert set(view.readers) == {"vda", "vdb"}
        assert len(host.noted("readers")) == 2
    assert host.noted("readers") == []


async def test_a_start_during_the_reading_is_called_that_and_no_fault(host: Host) -> None:
    image = await host.image()
    source = ClosedImages(
        VM, {"vda": ImageReference(image, "qcow2", 0)}, socket_directory=host.directory, claims=host.claims()
    )
    with pytest.raises(VmStateChanged):
        async with source.open({}, None) as view:
            host.active = True
            await host.hook()
            assert await qemu_opens(image) == ""
            await view.readers["vda"].client.read(0, 4096)
    assert host.noted("readers") == []


async def test_an_error_of_a_vm_that_is_off_stays_what_it_is(host: Host) -> None:
    async def silent() -> bool:
        raise HypervisorError("libvirt did not answer")

    for answers in (host.is_active, silent):
        source = ClosedImages(VM, {}, socket_directory=host.directory, claims=host.claims(answers))
        with pytest.raises(LifeboatError, match="something else"):
            async with source.open({}, None):
                raise LifeboatError("something else")


async def test_a_reader_that_stands_still_is_ended_too(host: Host) -> None:
    image = await host.image()
    export = await open_export(
        image, format="qcow2", socket_directory=host.directory, admit=host.claims().admit_reader
    )
    os.kill(export.pid, 19)
    await host.hook()
    assert host.hook_seconds < 1.0
    assert await qemu_opens(image) == ""
    await export.kill()


OWNER = """
    import asyncio, sys
    from pathlib import Path
    from precache_proxy.blocks.export import open_export
    from precache_proxy.source.claims import ImageClaims
    from precache_proxy.source.tracker import VmReference
    async def main():
        image, run, where, uuid = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
        async def is_active():
            if where == "asking":
                print("there", flush=True)
                await asyncio.sleep(60)
            return False
        async def admit(pid):
            if where == "started":
                print("there", flush=True)
                await asyncio.sleep(60)
            await ImageClaims(run, VmReference(uuid, "web1"), is_active).admit_reader(pid)
        export = await open_export(image, format="qcow2", socket_directory=run, admit=admit)
        print("there", flush=True)
        await asyncio.sleep(60)
    asyncio.run(main())
"""


@pytest.mark.parametrize("where", ["started", "asking", "reading"])
async def test_a_proxy_that_is_killed_leaves_nothing_that_keeps_the_vm_from_starting(
    host: Host, where: str
) -> None:
    image = await host.image()
    host.run.mkdir()
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(OWNER), image, host.run, where, VM.uuid],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert owner.stdout is not None
    assert owner.stdout.readline() == "there\n"
    reader = [int(path.parts[2]) for path in Path("/proc").glob("[0-9]*/stat") if children(path) == owner.pid]
    assert len(reader) == 1
    owner.kill()
    owner.wait()
    owner.stdout.close()
    host.active = True
    await host.hook()
    assert await qemu_opens(image) == ""
    for _ in range(100):
        if start_ticks(reader[0]) is None:
            break
        await asyncio.sleep(0.02)
    assert start_ticks(reader[0]) is None

    # what it left does not keep the VM from being read again
    host.active = False
    source = ClosedImages(
        VM, {"vda": ImageReference(image, "qcow2", 0)}, socket_directory=host.directory, claims=host.claims()
    )
    async with source.open({}, None):
        assert len(host.noted("readers")) == 1
    assert host.noted("readers") == []


def children(status: Path) -> int:
    """The parent of a process, 0 where it is gone."""
    try:
        return int(status.read_text(errors="replace").rpartition(")")[2].split()[1])
    except OSError:
        return 0


async def test_a_server_whose_proxy_died_before_it_could_be_told_ends(tmp_path: Path) -> None:
    """Killed between the fork and the moment from which the kernel tells: the go may be there already."""
    made = tmp_path / "made"
    real = os.getpid
    os.getpid = lambda: 1  # the parent that it expects is not the one that it has
    try:
        process = await start_server("touch", str(made), listener=2, environment=dict(os.environ))
    finally:
        os.getpid = real
    await open_gate(process, None)
    assert await process.wait() == 1
    assert not made.exists()


async def test_a_bitmap_is_not_changed_once_the_vm_starts(host: Host) -> None:
    image = await host.image()
    disks = {"vda": a_disk(image)}
    await offline.replace_bitmaps(host.claims(), disks, "lifeboat-e0-g1")
    host.active = True
    with pytest.raises(VmStateChanged):
        await offline.replace_bitmaps(host.claims(), disks, "lifeboat-e0-g2")
    assert (await images.info(image))[0].bitmaps == ("lifeboat-e0-g1",)
    assert host.noted("changing") == []
    host.active = False
    await offline.replace_bitmaps(host.claims(), disks, "lifeboat-e0-g2")
    assert (await images.info(image))[0].bitmaps == ("lifeboat-e0-g2",)


async def test_a_start_while_libvirt_is_asked_ends_the_change_before_it_began(host: Host) -> None:
    """Libvirt may hold back its answer until its hook has returned: the hook must not wait for the change."""
    image = await host.image()

    async def is_active() -> bool:
        host.active = True
        await host.hook()
        return True

    with pytest.raises(VmStateChanged):
        await offline.replace_bitmaps(host.claims(is_active), {"vda": a_disk(image)}, "lifeboat-e0-g1")
    assert host.hook_seconds < 0.9
    assert (await images.info(image))[0].bitmaps == ()
    assert await qemu_opens(image) == ""


@pytest.mark.parametrize(("takes_seconds", "code"), [(0.4, 0), (60, -9)])
async def test_the_hook_waits_shortly_for_a_change_under_way(
    host: Host, takes_seconds: float, code: int
) -> None:
    tool = host.directory / "qemu-img"
    tool.write_bytes(Path("/bin/sleep").read_bytes())
    tool.chmod(0o755)
    change = await asyncio.create_subprocess_exec(tool, str(takes_seconds))
    while "qemu-img" not in Path(f"/proc/{change.pid}/stat").read_text():
        await asyncio.sleep(0.01)
    await host.claims().admit_change(change.pid)
    await host.hook()
    assert await asyncio.wait_for(change.wait(), 5) == code
    assert min(takes_seconds, 1.0) - 0.2 < host.hook_seconds < 2.5


def a_disk(image: Path) -> Disk:
    return Disk("vda", "disk", "virtio", Image("file", str(image), "qcow2"))


async def test_tracking_that_only_seems_lost_in_a_vm_that_changes_brings_no_resync() -> None:
    disks = VmDisks(ProtectionRecord(VM.uuid, VM.name, "backup1", 15.0), cast(Any, None), PassTotals())
    for active, now in itertools.product((True, False), repeat=2):
        disks.is_active = AsyncMock(return_value=now)  # type: ignore[method-assign]
        with pytest.raises(TrackingLost if active == now else VmStateChanged):
            async with disks.unchanged(active=active):
                raise TrackingLost("the bitmap is in use")
