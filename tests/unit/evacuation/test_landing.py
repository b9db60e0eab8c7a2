# SPDX-License-Identifier: GPL-3.0-or-later
"""After the hand-off: nothing of the layers that were merged is left, whenever the proxy was killed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from precache_proxy.evacuation.arrival import Arrival, ArrivalDisk, ArrivalState
from precache_proxy.evacuation.arrival_records import ArrivalRecords
from precache_proxy.evacuation.landing import Landing
from precache_proxy.evacuation.reconcile import Presence

VM = "11111111-2222-4333-8444-555555555501"


class Machine:
    """A libvirt whose VM has one disk with these layers, topmost first."""

    def __init__(self, layers: list[Path]) -> None:
        self.layers = layers

    async def presence(self, _vm: str) -> Presence:
        return Presence.RUNNING

    async def definition(self, _vm: str) -> Any:
        top, *below = self.layers
        disk = SimpleNamespace(path=str(top), backing=[SimpleNamespace(path=str(path)) for path in below])
        return SimpleNamespace(disk=lambda key: disk if key == "vda" else None)


class Source:
    """A protection whose old home has sealed what arrived."""

    def __init__(self) -> None:
        self.held: list[str] = []

    def status(self, _vm: str) -> dict[str, Any]:
        return {"generation": 8, "epoch": 1}

    async def hold(self, _vm: str, holder: str) -> None:
        self.held.append(holder)

    async def release(self, _vm: str, holder: str) -> None:
        self.held.remove(holder)


class Link:
    def __init__(self) -> None:
        self.asked: list[str] = []

    async def call(self, method: str, _parameters: object) -> dict[str, Any]:
        self.asked.append(method)
        return {}


@pytest.fixture
def layers(tmp_path: Path) -> list[Path]:
    found = [tmp_path / name for name in ("top.qcow2", "arrival.qcow2", "g7.qcow2", "base.qcow2")]
    for path in found:
        path.touch()
    return found


async def landed(
    tmp_path: Path, layers: list[Path], machine: Machine, monkeypatch: Any
) -> tuple[Arrival, Link]:
    async def commit(domains: Machine, *_unused: object, base: str, **_more: object) -> None:
        domains.layers = [Path(base)]

    async def nothing(*_unused: object) -> None:
        return None

    monkeypatch.setattr("precache_proxy.evacuation.layers.commit", commit)
    monkeypatch.setattr("precache_proxy.evacuation.layers.wait_for_layer", nothing)
    records = ArrivalRecords(tmp_path / "arrivals")
    arrival = Arrival("j1", VM, "web1", "home1", 1, 7, ArrivalState.ACTIVATED, landing="way-back-protected")
    arrival.disks["vda"] = ArrivalDisk(
        str(layers[2]), "qcow2", str(layers[1]), str(layers[0]), 4096, str(layers[3])
    )
    if machine.layers == layers[3:]:
        arrival.disks["vda"].merged = [str(path) for path in layers[:3]]
    await records.save(arrival)
    records.load()
    (kept,) = records.all()
    source, link = Source(), Link()
    landing = Landing(
        records, cast(Any, machine), cast(Any, source), cast(Any, None), {"home1": link}, cast(Any, None)
    )
    landing.begin(kept)
    async with asyncio.timeout(5):
        while kept.state is not ArrivalState.LANDED or landing._tasks:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert source.held == [], "its passes go on"
    return kept, link


async def test_layers_are_merged_and_removed_and_the_old_home_is_told(
    tmp_path: Path, layers: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrival, link = await landed(tmp_path, layers, Machine(layers), monkeypatch)
    assert [path.exists() for path in layers] == [False, False, False, True]
    assert arrival.disks["vda"].merged == [str(path) for path in layers[:3]], "on record before the merge"
    assert link.asked == ["store.allow_commit"]


async def test_a_landing_that_is_ended_while_it_waits_for_a_pass_holds_nothing(
    tmp_path: Path, layers: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evacuation began: should it be refused, the VM's passes have to go on."""
    held = asyncio.Event()

    class Busy(Source):
        async def hold(self, _vm: str, holder: str) -> None:
            self.held.append(holder)
            held.set()
            await asyncio.sleep(60)

    async def nothing(*_unused: object) -> None:
        return None

    monkeypatch.setattr("precache_proxy.evacuation.layers.cancel_block_jobs", nothing)
    records = ArrivalRecords(tmp_path / "arrivals")
    arrival = Arrival("j1", VM, "web1", "home1", 1, 7, ArrivalState.ACTIVATED, landing="way-back-protected")
    await records.save(arrival)
    records.load()
    (kept,) = records.all()
    source = Busy()
    landing = Landing(
        records, cast(Any, Machine(layers)), cast(Any, source), cast(Any, None), {"home1": Link()},
        cast(Any, None),
    )  # fmt: skip
    landing.begin(kept)
    await asyncio.wait_for(held.wait(), 5)
    await landing.leave(VM)
    assert source.held == []


async def test_layers_that_a_kill_left_after_the_merge_are_removed(
    tmp_path: Path, layers: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    await landed(tmp_path, layers, Machine(layers[3:]), monkeypatch)
    assert [path.exists() for path in layers] == [False, False, False, True]
