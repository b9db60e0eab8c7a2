# SPDX-License-Identifier: GPL-3.0-or-later
"""A record that is broken on disk costs its own VM or replica, and says why; all others go on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precache_proxy.channel.channel import Channel
from precache_proxy.errors import Conflict, IntegrityError
from precache_proxy.hypervisor.connection import Hypervisor
from precache_proxy.source.record import DiskRecord, ProtectionRecord, Sealed
from precache_proxy.source.service import Source
from precache_proxy.source.settings import SourceSettings
from precache_proxy.store.record import Layer, ReplicaRecord, SealedGeneration

ONE, TWO = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
T = TypeVar("T")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


def protection_record(uuid: str) -> ProtectionRecord:
    return ProtectionRecord(
        uuid=uuid, name="web1", peer="backup1", rpo_seconds=15, only_disks=["vda"], epoch=2,
        sealed=Sealed(7, "lifeboat-e2-g7", 1.0, 2.0, disks=["vda"]),
        disks={"vda": DiskRecord("/images/vda.qcow2", 1 << 20, chain=["/images/base.qcow2"])},
        return_overlays={"vda": ["/images/overlay.qcow2", "qcow2", 1 << 20]},
    )  # fmt: skip


def replica_record() -> ReplicaRecord:
    layer = Layer("vda/g2-7.qcow2", "qcow2", 2, 7, 1 << 20)
    generation = SealedGeneration(
        epoch=2, generation=7, leads_from=6, checkpoint="lifeboat-e2-g7", digest="", sealed_at=1.0,
        disks={"vda": 1 << 20}, definition="",
    )  # fmt: skip
    return ReplicaRecord(
        vm=ONE, name="web1", peer="home1", epoch=2, disks={"vda": 1 << 20}, layers={"vda": (layer,)},
        generations=(generation,), frozen_epoch=3,
    )  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in a JSON document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, item in inner for place in places(item, (*at, key)))]


def spoilt(document: Any, place: tuple[Any, ...], content: Any) -> Any:
    """The document with another value at one place."""
    if not place:
        return content
    copy = json.loads(json.dumps(document))
    parent = copy
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = content
    return copy


def whole(read: Callable[[], T], path: Path) -> T | None:
    """What is read; None where it is refused with a sentence that names the file."""
    try:
        return read()
    except IntegrityError as error:
        if str(path) not in error.message:
            raise AssertionError(error.message) from error
        return None


@given(st.data())
def test_a_record_with_anything_in_it_is_whole_or_refused(data: st.DataObject) -> None:
    path = Path(f"/records/{ONE}.json")
    good = json.loads(json.dumps(replica_record().as_json()))
    document = spoilt(good, data.draw(st.sampled_from(places(good))), data.draw(JSON))
    record = whole(lambda: ReplicaRecord.from_json(document, path), path)
    if record is not None:
        # all that the room does with a record without looking at files
        assert json.dumps(record.as_json())
        for generation in record.generations:
            for disk in generation.disks:
                record.chain(disk, generation)


@given(st.data())
def test_a_protection_with_anything_in_it_is_whole_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / f"{ONE}.json"
    protection_record(ONE).write(path.parent)
    good = json.loads(path.read_text())
    path.write_text(json.dumps(spoilt(good, data.draw(st.sampled_from(places(good))), data.draw(JSON))))
    record = whole(lambda: ProtectionRecord.read(path), path)
    if record is not None:
        assert record.next_generation >= 1
        record.write(path.parent)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"uuid": 5}', b"\xff\xfe\x00", b'{"half'])
async def test_a_proxy_starts_with_a_broken_record_and_passes_the_others(
    tmp_path: Path, content: bytes
) -> None:
    directory = tmp_path / "source"
    directory.mkdir()
    protection_record(TWO).write(directory)
    (directory / f"{ONE}.json").write_bytes(content)
    hypervisor = Hypervisor("test:///default")
    await hypervisor.start()
    settings = SourceSettings("home1", ("backup1",), scratch_directory=tmp_path / "scratch", qemu_user="root")
    channel = cast(Channel, SimpleNamespace(links={}))
    source = Source(directory, tmp_path / "run", hypervisor, channel, settings)
    await source.start()
    try:
        broken, whole = sorted(source.statuses(), key=lambda status: str(status["uuid"]))
        assert (broken["uuid"], broken["state"], broken["cause"]) == (ONE, "stopped", "integrity")
        assert f"{ONE}.json" in broken["sentence"]
        assert "protect it again" in broken["sentence"]
        assert set(broken) == set(whole)
        assert (whole["name"], whole["generation"]) == ("web1", 7)
        with pytest.raises(IntegrityError, match="its record cannot be read"):
            await source.run_pass(ONE, reason="test")
        with pytest.raises(Conflict, match="keep the replica"):
            await source.unprotect(ONE, keep_replica=False)
        await source.unprotect(ONE, keep_replica=True)
        assert [status["uuid"] for status in source.statuses()] == [TWO]
        assert not (directory / f"{ONE}.json").exists()
    finally:
        await source.stop()
        await asyncio.sleep(0)
        await hypervisor.stop()
