# SPDX-License-Identifier: GPL-3.0-or-later
"""A hand-off between two sides in one process, for a test that reads its system calls.

    hand_off_child.py DIRECTORY

Journals, guards, stores and images are real; :class:`Machines` stands for libvirt, makes the files that
QEMU would make, and syncs what it syncs. What was said to whom is a line on stdout.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).parents[2]))

import libvirt

from precache_proxy import durable
from precache_proxy.blocks import images
from precache_proxy.errors import Finding
from precache_proxy.evacuation import confirm, departure, layers, preflight
from precache_proxy.evacuation.arrival_network import NothingToDo
from precache_proxy.evacuation.arrivals import Arrivals
from precache_proxy.evacuation.departure import Departure
from precache_proxy.evacuation.fence import Fence
from precache_proxy.evacuation.guard import Guard
from precache_proxy.evacuation.job import EvacuationOptions, FrozenDisk, Journal, Step, new_job
from precache_proxy.evacuation.measure import Measure
from precache_proxy.evacuation.reconcile import Life, Presence
from precache_proxy.evacuation.rollback import roll_back
from precache_proxy.evacuation.surroundings import Surroundings
from precache_proxy.hypervisor.domain_xml import Definition, parse_definition
from precache_proxy.hypervisor.qemu_user import QemuUser
from precache_proxy.store.service import Store
from precache_proxy.store.settings import StoreSettings
from precache_proxy.units import KIB
from unit.store.store_driver import VM, Change, Handlers, Source

DISK_BYTES = 512 * KIB
WRITTEN_BYTES = 64 * KIB


def tell(what: str) -> None:
    """A line that the test finds among the system calls."""
    os.write(1, what.encode() + b"\n")


class LibvirtDomain:
    """Overlays as QEMU creates them: flushed before it closes them, their names left to the kernel."""

    def __init__(self, machines: Machines) -> None:
        self._machines = machines

    def snapshotCreateXML(self, xml: str, flags: int) -> None:  # noqa: N802
        for path in self._machines.tops:
            assert str(path) in xml
            if not flags & libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT:
                path.write_bytes(b"QFI\xfb")
                durable.sync_file(path)
            assert path.exists()
        tell(f"layers changed at {self._machines.side}")

    def listAllCheckpoints(self, _flags: int) -> list[Any]:  # noqa: N802
        return []

    def checkpointCreateXML(self, _xml: str, _flags: int) -> None:  # noqa: N802
        tell(f"counted at {self._machines.side}")


class Machines:
    """What libvirt of one side says of the VM."""

    def __init__(self, side: str, presence: Presence) -> None:
        self.side, self.is_there, self.description, self.tops = side, presence, "", list[Path]()

    async def presence(self, _vm: str) -> Presence:
        return self.is_there

    presence_at_source = presence

    async def xml(self, _vm: str, *, inactive: bool) -> str:
        assert inactive in {True, False}
        return self.description

    async def definition(self, _vm: str, *, inactive: bool = False) -> Definition:
        return parse_definition(await self.xml(VM, inactive=inactive))

    async def is_persistent(self, _vm: str) -> bool:
        return True

    async def run_in_turn(self, _vm: str, function: Callable[[Any], Any], **_unused: Any) -> Any:
        return await asyncio.to_thread(function, LibvirtDomain(self))

    async def life(self, _vm: str) -> Life:
        return Life(self.is_there, 7, in_order=True)

    async def shut_down(self, _vm: str) -> None:
        tell(f"asked to shut down at {self.side}")
        self.is_there = Presence.SHUT_OFF

    async def define(self, xml: str, _name: str) -> None:
        tell(f"defined at {self.side}")
        self.description = xml

    async def start(self, _vm: str, *, paused: bool = False) -> bool:
        assert paused
        tell(f"started at {self.side}")
        # what will lie on top of it when it is tracked
        disks = parse_definition(self.description).disks
        self.tops = [Path(disk.path.replace("-arrival.qcow2", ".qcow2")) for disk in disks]
        self.is_there = Presence.ARRIVED
        return True

    async def wait_not_migrating(self, _vm: str, *_unused: object) -> None:
        return None

    async def resume(self, _vm: str) -> None:
        tell(f"resumed at {self.side}")
        self.is_there = Presence.RUNNING

    async def destroy(self, _vm: str) -> None:
        tell(f"ended at {self.side}")

    async def undefine(self, _vm: str) -> None:
        tell(f"undefined at {self.side}")
        self.is_there = Presence.ABSENT


class Link:
    """Carries the source's questions to the destination in the same process."""

    state = "up"
    round_trip_seconds = least_round_trip_seconds = 0.01
    rate_bytes_per_second = expected_bytes_per_second = None

    def __init__(self, arrivals: Arrivals) -> None:
        self._arrivals = arrivals

    def counters(self) -> dict[str, Any]:
        return {}

    async def call(
        self, method: str, parameters: dict[str, Any], *, timeout_seconds: float
    ) -> dict[str, Any]:
        assert timeout_seconds > 0
        what = method.removeprefix("evacuation.")
        tell(f"asked {what}")
        answer: dict[str, Any] = await getattr(self._arrivals, what)("home", parameters)
        tell(f"answered {what}")
        return answer


class Protected:
    """The source's room: that much is asked of it."""

    def status(self, _vm: str) -> Mapping[str, Any]:
        return {"rpo_seconds": 15.0, "priority": 50}

    async def handed_over(self, _vm: str) -> None:
        tell("protection forgotten")

    async def after_rollback(self, _vm: str) -> None:
        tell("protected on")

    async def release(self, _vm: str, _holder: str) -> None:
        return None


async def no_findings(*_arguments: object) -> list[Finding]:
    """What it asks libvirt for is not at stake here."""
    return []


def definition(image: Path) -> str:
    return (
        f"<domain type='qemu'><name>web1</name><uuid>{VM}</uuid><memory unit='MiB'>32</memory><devices>"
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{image}'/>"
        "<target dev='vda' bus='virtio'/></disk></devices></domain>"
    )


def cross(overlay: Path) -> None:
    """What the migration writes at the destination, and does not sync."""
    with overlay.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(bytes(WRITTEN_BYTES))


@dataclass
class Sides:
    """Both homes of a VM, of which the second has its replica at generation 1."""

    image: Path
    kept: Store
    replicas: Store
    there: Machines
    here: Machines
    arrivals: Arrivals
    around: Surroundings

    async def stop(self) -> None:
        await self.arrivals.stop()
        for store in (self.kept, self.replicas):
            await store.stop()


async def sides(
    directory: Path, *, description: str = "", attachments: dict[str, bytes] | None = None
) -> Sides:
    """Make them; ``description``: the VM's definition, which its replica has from then on."""
    preflight.destination_findings = no_findings  # type: ignore[assignment]
    layers.DEFINITIONS_DIRECTORY = directory / "definitions"
    home, backup, run = directory / "home", directory / "backup", directory / "run"
    for path in (home, backup, run, layers.DEFINITIONS_DIRECTORY):
        path.mkdir()
    settings = StoreSettings(keep_generations=1, minimum_free_bytes=0)
    kept = Store(home / "store", run / "home", settings)
    replicas = Store(backup / "store", run / "backup", settings)
    for store in (kept, replicas):
        await store.start()
    image = directory / "web1.qcow2"
    await images.create(image, DISK_BYTES)
    there, here = Machines("backup", Presence.ABSENT), Machines("home", Presence.RUNNING)
    here.description = description or definition(image)
    feeder = Source(Handlers(replicas))
    feeder.resize(vda=DISK_BYTES)
    await feeder.prepare()
    await feeder.seed([Change("vda", 0, os.urandom(WRITTEN_BYTES))])
    await feeder.send(
        [Change("vda", 0, os.urandom(WRITTEN_BYTES))], attachments, header={"definition": here.description}
    )

    guard = Guard(backup, run / "backup")
    guard.prepare_directories()
    arrivals = Arrivals(
        backup, run / "backup", cast(Any, there), guard, cast(Any, replicas), NothingToDo(),
        QemuUser(os.getuid(), os.getgid()), presume_source_dead_after_seconds=None,
    )  # fmt: skip
    arrivals.load()
    around = Surroundings(
        home, run / "home", cast(Any, here), Guard(home, run / "home"), Journal(home / "jobs"),
        {"backup1": Link(arrivals)}, cast(Any, Protected()), cast(Any, kept), NothingToDo(),
        QemuUser(os.getuid(), os.getgid()), 5.0,
    )  # fmt: skip
    around.guard.prepare_directories()
    return Sides(image, kept, replicas, there, here, arrivals, around)


async def story(directory: Path) -> None:
    """One evacuation that is taken back when everything stands there, and one that is not."""
    both = await sides(directory)
    image, there, here, arrivals, around = both.image, both.there, both.here, both.arrivals, both.around

    async def evacuate(number: str) -> Departure:
        """As far as the last byte of what crosses."""
        job = new_job(VM, "web1", "backup1", 2, EvacuationOptions(), 0.0)
        job.id, job.step, job.generation, job.definition = number, Step.RESIDUAL, 1, here.description
        frozen = image.with_name(f"web1.qcow2.lifeboat-{number}")
        frozen.write_bytes(b"QFI\xfb")
        job.disks = {"vda": FrozenDisk(str(image), "qcow2", str(frozen), DISK_BYTES)}
        leaving = Departure(job, around, Measure(job, around.links["backup1"], 0), Fence())
        await departure.prepare(leaving, {})
        arrival = arrivals.records.get(number)
        assert arrival is not None
        there.description, there.tops = arrival.definition, [Path(arrival.disks["vda"].top)]
        cross(Path(arrival.disks["vda"].overlay))
        return leaving

    taken_back = await evacuate("first")
    await roll_back(taken_back, cast(Fence, taken_back.contact), cold=False)
    tell("stayed")

    leaving = await evacuate("second")
    await leaving.enter(Step.MIGRATE)
    there.is_there, here.is_there = Presence.ARRIVED, Presence.SHUT_OFF
    await confirm.confirm(leaving)
    await confirm.release(leaving)
    arrived = arrivals.records.get("second")
    assert arrived is not None
    await arrivals.tracking.begin_while_running(arrived)
    tell(f"tracked from {arrived.checkpoint}")
    tell(f"ended {leaving.job.step} {leaving.job.warning}")
    for item in (taken_back, leaving):
        await cast(Fence, item.contact).stop()
    await both.stop()


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        asyncio.run(story(Path(sys.argv[1])))
