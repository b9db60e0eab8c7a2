# SPDX-License-Identifier: GPL-3.0-or-later
"""Names of overlays that a VM runs in are durable, also where a kill came before they were synced."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from precache_proxy import durable
from precache_proxy.evacuation import freeze, layers
from precache_proxy.evacuation.arrival import Arrival, ArrivalDisk
from precache_proxy.evacuation.job import FrozenDisk
from precache_proxy.evacuation.reconcile import Presence
from precache_proxy.evacuation.tracking import Tracking
from precache_proxy.hypervisor.domain_xml import Definition, parse_definition
from precache_proxy.source import raw_overlay

VM = "11111111-2222-4333-8444-555555555501"


def running_in(*paths: Path) -> Definition:
    """A VM whose disks are qcow2 files, vda, vdb and so on."""
    disks = "".join(
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{path}'/>"
        f"<target dev='vd{letter}' bus='virtio'/></disk>"
        for letter, path in zip("abc", paths, strict=False)
    )
    return parse_definition(
        f"<domain id='3'><name>web1</name><uuid>{VM}</uuid><devices>{disks}</devices></domain>"
    )


class Domains:
    """A libvirt with one VM, which runs in overlays already."""

    def __init__(self, definition: Definition) -> None:
        self._definition = definition

    async def definition(self, _vm: str) -> Definition:
        return self._definition

    async def presence(self, _vm: str) -> Presence:
        return Presence.ARRIVED


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Directories whose entries were made durable."""
    directories: list[Path] = []
    really = durable.sync_directory

    def sync(directory: Path) -> None:
        really(directory)
        directories.append(directory)

    monkeypatch.setattr(durable, "sync_directory", sync)
    return directories


@pytest.fixture
def definitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where libvirt keeps its definitions."""
    directory = tmp_path / "definitions"
    directory.mkdir()
    monkeypatch.setattr(layers, "DEFINITIONS_DIRECTORY", directory)
    return directory


@pytest.fixture
def overlays(tmp_path: Path) -> list[Path]:
    """Two files in two directories."""
    paths = [tmp_path / "fast" / "vda.top", tmp_path / "slow" / "vdb.top"]
    for path in paths:
        path.parent.mkdir()
        path.touch()
    return paths


async def test_a_freeze_that_is_repeated_makes_the_names_durable(
    overlays: list[Path], synced: list[Path], definitions: Path
) -> None:
    disks = {
        key: FrozenDisk("/image", "qcow2", str(path), 4096)
        for key, path in zip(("vda", "vdb"), overlays, strict=True)
    }
    await freeze.freeze(cast(Any, Domains(running_in(*overlays))), VM, disks)
    assert sorted(synced) == sorted([*(path.parent for path in overlays), definitions])


async def test_consent_that_is_given_again_makes_the_names_durable(
    tmp_path: Path, synced: list[Path]
) -> None:
    overlay = tmp_path / f"web1.img{raw_overlay.SUFFIX}"
    overlay.touch()
    await raw_overlay.put_on(cast(Any, None), running_in(overlay, tmp_path / "other" / "vdb.qcow2"), None)
    assert synced == [tmp_path]
    gone = tmp_path / "gone" / f"web1.img{raw_overlay.SUFFIX}"
    await raw_overlay.put_on(cast(Any, None), running_in(gone), None)


class Saved:
    """Records that keep what was saved of the last arrival."""

    checkpoints: list[str]

    def __init__(self) -> None:
        self.checkpoints = []

    async def save(self, arrival: Arrival) -> None:
        self.checkpoints.append(arrival.checkpoint)


def arrived(overlays: list[Path]) -> Arrival:
    """It stands here with its top overlays on; its checkpoint is not on record."""
    arrival = Arrival("j1", VM, "web1", "home1", 1, 7)
    for key, path in zip(("vda", "vdb"), overlays, strict=True):
        overlay = path.parent.parent / f"{key}.qcow2"
        overlay.touch()
        arrival.disks[key] = ArrivalDisk("/replica", "qcow2", str(overlay), str(path), 4096)
    return arrival


@pytest.fixture
def tracking(overlays: list[Path], monkeypatch: pytest.MonkeyPatch) -> Tracking:
    """Nothing is put on, for it is on; a checkpoint is made."""

    async def checkpoint(*_arguments: object) -> None:
        return None

    monkeypatch.setattr(layers, "put_overlays", None)
    monkeypatch.setattr(layers, "create_checkpoint", checkpoint)
    return Tracking(cast(Any, Domains(running_in(*overlays))), cast(Any, Saved()))


async def test_tracking_that_is_begun_again_makes_the_tops_names_durable(
    tracking: Tracking, overlays: list[Path], synced: list[Path], definitions: Path
) -> None:
    arrival = arrived(overlays)
    await tracking.begin(arrival)
    assert sorted(synced) == sorted([*(path.parent for path in overlays), definitions])
    assert cast(Any, tracking)._records.checkpoints == ["lifeboat-e1-g8"]


@pytest.mark.parametrize("what", ["sync_directory", "sync_file"])
async def test_a_sync_that_fails_costs_the_way_back_its_bitmap_and_no_more(
    tracking: Tracking, overlays: list[Path], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def fail(_path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(durable, what, fail)
    arrival = arrived(overlays)
    await tracking.begin(arrival)
    assert (arrival.checkpoint, arrival.cause) == ("", "tracking-lost")
    assert "cannot be made durable: [Errno 5]" in arrival.sentence
    assert cast(Any, tracking)._records.checkpoints == [""]


async def test_a_snapshot_whose_names_cannot_be_synced_costs_no_more_either(
    overlays: list[Path], tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def put(*_arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(layers, "put_overlays", put)
    arrival = arrived(overlays)
    bare = Tracking(cast(Any, Domains(running_in())), cast(Any, SimpleNamespace(save=Saved().save)))
    await bare.begin(arrival)
    assert (arrival.checkpoint, arrival.cause) == ("", "tracking-lost")
