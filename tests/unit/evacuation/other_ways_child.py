# SPDX-License-Identifier: GPL-3.0-or-later
"""A restart with its landing, or a fail-over, between two sides in one process; see hand_off_child.py.

other_ways_child.py restart|fail-over DIRECTORY
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).parents[2]))

from precache_proxy import durable
from precache_proxy.evacuation import confirm, departure, giving_up, restart
from precache_proxy.evacuation.departure import Departure
from precache_proxy.evacuation.fail_over import FailOver
from precache_proxy.evacuation.fence import Fence
from precache_proxy.evacuation.job import EvacuationOptions, Mode, Step, new_job
from precache_proxy.evacuation.landing import Landing
from precache_proxy.evacuation.measure import Measure
from precache_proxy.evacuation.reconcile import Presence
from unit.evacuation.hand_off_child import (
    VM,
    LibvirtDomain,
    Machines,
    Protected,
    Sides,
    definition,
    sides,
    tell,
)

NVRAM = b"variables" * 1000


class Rooms(Protected):
    """The source's room of the side that a VM leaves (``epoch`` 1), and of the one that it came to."""

    def __init__(self, epoch: int = 1) -> None:
        self._epoch = epoch

    def status(self, _vm: str) -> Mapping[str, Any]:
        return {
            "rpo_seconds": 15.0, "priority": 50, "peer": "backup1", "epoch": self._epoch, "generation": 9,
            "checkpoint": "lifeboat-e1-g1",
        }  # fmt: skip

    async def send_residual(self, *_unused: object) -> Any:
        tell("residual sealed")
        return SimpleNamespace(data_bytes=0, generation=1)

    async def adopt_for_return(self, _vm: str, **_told: object) -> None:
        tell("way back protected")

    async def hold(self, _vm: str, _holder: str) -> None:
        return None


class Merging(LibvirtDomain):
    """A block commit: what QEMU writes it syncs; libvirt's definition names the base afterwards."""

    def __init__(self, machines: Machines, chain: list[Path]) -> None:
        super().__init__(machines)
        self._machines, self._chain = machines, chain

    def blockJobInfo(self, *_unused: object) -> dict[str, int]:  # noqa: N802
        return {}

    def blockCommit(self, _target: str, base: str, *_unused: object) -> None:  # noqa: N802
        tell("merging")
        durable.sync_file(Path(base))
        self._chain[:] = [Path(base)]
        self._machines.description = definition(Path(base))


class Landed(Machines):
    """The VM at its new home, with these layers, topmost first."""

    def __init__(self, chain: list[Path]) -> None:
        super().__init__("backup", Presence.RUNNING)
        self.chain = chain

    async def definition(self, _vm: str, *, inactive: bool = False) -> Any:
        top, *below = self.chain
        disk = SimpleNamespace(
            path=str(top), backing=[SimpleNamespace(path=str(path)) for path in below], mirror=""
        )
        return SimpleNamespace(name="web1", disk=lambda key: disk if key == "vda" else None)

    async def run_in_turn(self, _vm: str, function: Any, **_unused: Any) -> Any:
        return await asyncio.to_thread(function, Merging(self, self.chain))


class Home:
    """Carries the questions of the other side to the home in the same process."""

    state = "up"

    def __init__(self, both: Sides) -> None:
        self._both = both

    async def call(self, method: str, told: dict[str, Any], **_unused: Any) -> dict[str, Any]:
        if method == "store.allow_commit":
            tell("asked allow_commit")
            return {}
        assert method == "evacuation.supersede"
        if told.get("only_asked"):
            return {}
        tell("asked supersede")
        await giving_up.refuse_what_is_not_so(self._both.around, [], "backup1", told)
        answer = await giving_up.give_up(self._both.around, [], "backup1", told)
        assert answer == {}
        tell("answered supersede")
        return answer


async def restarted(directory: Path) -> None:
    """A VM with UEFI variables leaves by restart, and its layers are merged where it is then."""
    nvram = directory / "nvram" / "web1.fd"
    nvram.parent.mkdir()
    nvram.write_bytes(NVRAM)
    description = definition(directory / "web1.qcow2").replace(
        "<devices>", f"<os><type>hvm</type><nvram>{nvram}</nvram></os><devices>"
    )
    both = await sides(directory, description=description, attachments={"nvram": NVRAM})
    both.around.source = cast(Any, Rooms())
    job = new_job(VM, "web1", "backup1", 2, EvacuationOptions(mode=Mode.RESTART), 0.0)
    job.id, job.step, job.was_running = "third", Step.CATCH_UP, True
    leaving = Departure(job, both.around, Measure(job, both.around.links["backup1"], 0), Fence())
    await restart._stop(leaving)
    await restart._take_images(leaving)
    await departure.send_residual(leaving)
    await restart._prepare(leaving)
    arrival = both.arrivals.records.get("third")
    assert arrival is not None
    await confirm.confirm(leaving)
    await confirm.release(leaving)
    tell(f"ended {job.step}")
    disk = arrival.disks["vda"]
    replica = Path(disk.replica)
    layers_of_it = [Path(disk.top), Path(disk.overlay), replica, replica.with_name("base.qcow2")]
    landing = Landing(
        both.arrivals.records, cast(Any, Landed(layers_of_it)), cast(Any, Rooms(epoch=2)),
        cast(Any, both.replicas), {"home": Home(both)}, both.arrivals.tracking,
    )  # fmt: skip
    await landing.land(arrival)
    tell(f"landed {arrival.state}")
    await cast(Fence, leaving.contact).stop()
    await both.stop()


async def failed_over(directory: Path) -> None:
    """A VM that is off at its home runs from its last generation, on the operator's word."""
    both = await sides(directory)
    both.here.is_there = Presence.SHUT_OFF
    both.around.source = cast(Any, Rooms())
    [replica] = await both.replicas.statuses()
    failing = FailOver(
        both.arrivals, cast(Any, both.there), cast(Any, both.replicas), {replica["peer"]: Home(both)}
    )
    arrival = await failing.begin(VM, source_is_dead=True)
    tell(f"runs {arrival.state} {arrival.id} {Path(arrival.disks['vda'].top).name}")
    await both.stop()


if __name__ == "__main__":
    asyncio.run({"restart": restarted, "fail-over": failed_over}[sys.argv[1]](Path(sys.argv[2])))
