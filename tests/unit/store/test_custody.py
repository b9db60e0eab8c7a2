# SPDX-License-Identifier: GPL-3.0-or-later
"""Arrivals on a replica, the way back, full file systems, and a real channel."""

from __future__ import annotations

import asyncio
import hashlib
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from precache_proxy.blocks import images
from precache_proxy.blocks.images import ImageReference
from precache_proxy.channel import StreamReset, TrafficClass
from precache_proxy.errors import Conflict, InvalidInput, NoSpace, StaleEpoch
from precache_proxy.store.records import Record, RecordType
from precache_proxy.store.service import Store
from precache_proxy.store.settings import StoreSettings
from precache_proxy.units import GIB, KIB, MIB
from unit.store.store_driver import PEER, VM, Change, Handlers, Source, files, merged, read_chain

OTHER_VM = VM[:-1] + ("0" if VM[-1] != "0" else "1")


def noise(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


@pytest.fixture
async def source(store: Store) -> Source:
    source = Source(Handlers(store))
    source.resize(vda=2 * MIB)
    await source.prepare()
    await source.send([Change("vda", 0, noise(MIB))])
    return source


async def again(store: Store) -> Store:
    """The store after a restart of the proxy."""
    await store.stop()
    other = Store(store.directory, store.directory.parent / "run", store.settings)
    await other.start()
    return other


async def test_frozen_for_an_arrival_until_thawed(store: Store, source: Source) -> None:
    with pytest.raises(Conflict, match="not the last sealed one"):
        await store.freeze_for_arrival(VM, 7, 2)
    stream, task = source.handlers.open("generation", source.header())
    await source.handlers.send(stream, task, source.messages([Change("vda", 0, noise(4096))])[:1])
    await asyncio.sleep(0.2)
    chain = await store.freeze_for_arrival(VM, 1, 2)
    with pytest.raises(Conflict, match="arrive"):
        await task
    assert not [name for name in files(store) if "g1-2" in name], "the half generation is gone"
    assert chain["vda"] == ImageReference(store.directory / VM / "vda/g1-1.qcow2", "qcow2", 2 * MIB)
    assert dict(await store.freeze_for_arrival(VM, 1, 2)) == dict(chain)
    # a VM may run on it now: a restart of the proxy changes nothing
    overlay = store.directory / VM / "vda/g1-2.qcow2"
    await images.create(overlay, 2 * MIB, backing="g1-1.qcow2")
    other = await again(store)
    assert overlay.exists(), "files of a frozen replica are not judged"
    overlay.unlink()
    source.handlers = Handlers(other)
    for attempt in (source.send(), source.digests("vda"), source.prepare(), other.remove(VM)):
        with pytest.raises(Conflict, match="arrival of epoch 2"):
            await attempt
    with pytest.raises(StaleEpoch):
        await other.freeze_for_arrival(VM, 1, 1)
    assert (await other.status(VM))["state"] == "frozen"
    await other.thaw(VM)
    await source.send([Change("vda", 4096, noise(4096, 2))])
    assert read_chain(other, VM, "vda") == bytes(source.content["vda"])
    await other.stop()


async def test_there_and_back_again(store: Store, source: Source, tmp_path: Path) -> None:
    """The replica lands; what the home site kept becomes a base over there, untouched until allowed."""
    await store.freeze_for_arrival(VM, 1, 2)
    chains = await store.detach(VM)
    assert [reference.path.name for reference in chains["vda"]] == ["g1-1.qcow2"]
    assert (await store.status(VM))["state"] == "detached"
    with pytest.raises(Conflict, match="became the disk"):
        await source.send()
    assert (await store.status(VM))["epoch"] == 2, "the old home asks by this whether the VM has moved"
    for epoch in (0, 1):
        with pytest.raises(StaleEpoch):
            await source.prepare(epoch=epoch)

    kept = tmp_path / "kept by home, 1.qcow2"
    shutil.copy(chains["vda"][0].path, kept)
    before = kept.read_bytes()
    home = Store(tmp_path / "home", tmp_path / "run", store.settings)
    await home.start()
    adopted = {"vda": ImageReference(kept, "qcow2", 2 * MIB)}
    arguments: dict[str, Any] = {
        "name": "web1", "epoch": 2, "generation": 1, "checkpoint": "c", "disks": adopted,
        "definition": "<domain/>",
    }  # fmt: skip
    await home.adopt(VM, **arguments)
    await home.adopt(VM, **arguments)
    with pytest.raises(Conflict, match="is here already"):
        await home.adopt(VM, **(arguments | {"epoch": 3}))
    back = Source(Handlers(home), epoch=2, generation=1, sizes=dict(source.sizes), content=source.content)
    with pytest.raises(StaleEpoch):
        await back.send(header={"epoch": 1})
    for number in range(4):
        await back.send([Change("vda", number * 64 * KIB, noise(64 * KIB, number))])
    await merged(home)
    assert kept.read_bytes() == before, "what home kept stays as it is until the VM has landed"
    assert read_chain(home, VM, "vda") == bytes(back.content["vda"])
    await home.allow_commit(VM)
    await merged(home)
    assert kept.read_bytes() != before
    assert read_chain(home, VM, "vda") == bytes(back.content["vda"])
    assert (await home.status(VM))["disks"]["vda"]["chain_length"] == 3
    await home.remove(VM)
    assert kept.exists(), "a file that was adopted is never deleted"
    await home.stop()
    # and here again: the history makes room for a new replica of the newer epoch
    await store.adopt(VM, **(arguments | {"epoch": 3, "disks": {"vda": chains["vda"][0]}}))
    assert (await store.status(VM))["epoch"] == 3


async def test_adopted_raw_base(store: Store, tmp_path: Path) -> None:
    raw = tmp_path / "home.raw"
    content = noise(MIB + 512)
    raw.write_bytes(content)
    await store.adopt(
        VM, name="web1", epoch=2, generation=5, checkpoint="c", definition="<domain/>", peer=PEER,
        disks={"vda": ImageReference(raw, "raw", len(content))},
    )  # fmt: skip
    source = Source(Handlers(store), epoch=2, generation=5, sizes={"vda": len(content)})
    source.content = {"vda": bytearray(content)}
    source.resize(vda=2 * MIB)
    for number in range(3):
        await source.send([Change("vda", number * 4096, noise(4096, number)), Change("vda", MIB, None, MIB)])
    await store.allow_commit(VM)
    await merged(store)
    assert raw.stat().st_size == 2 * MIB
    assert read_chain(store, VM, "vda") == bytes(source.content["vda"])


async def test_depths_count_what_lies_below_an_adopted_image(store: Store, tmp_path: Path) -> None:
    """Of moves that follow each other too fast for a landing between them."""
    below = ""
    for number in range(4):
        await images.create(tmp_path / f"{number}.qcow2", 2 * MIB, backing=below or None)
        below = str(tmp_path / f"{number}.qcow2")
    await store.adopt(
        VM, name="web1", epoch=2, generation=5, checkpoint="c", definition="<domain/>", peer=PEER,
        disks={"vda": ImageReference(Path(below), "qcow2", 2 * MIB)},
    )  # fmt: skip
    assert await store.depths(VM) == {"vda": 4}
    source = Source(Handlers(store), epoch=2, generation=5, sizes={"vda": 2 * MIB})
    source.content = {"vda": bytearray(2 * MIB)}
    await source.send([Change("vda", 0, noise(4096))])
    assert await store.depths(VM) == {"vda": 5}


async def test_prepare_names_need_and_room_and_all_findings(
    tmp_path: Path, source: Source, store: Store
) -> None:
    demanding = Store(tmp_path / "other", tmp_path / "run2", StoreSettings(2, 10**15))
    await demanding.start()
    refused = Source(Handlers(demanding), sizes={"vda": MIB})
    with pytest.raises(NoSpace, match=r"web1: .* needed .* free on .*other") as error:
        await refused.prepare()
    assert "909" in error.value.message, "the need is in the sentence"
    assert list((tmp_path / "other").iterdir()) == [], "nothing is changed"
    [finding] = (await refused.prepare(check=True))["findings"]
    assert finding["cause"] == "no-space"
    assert all(finding.values())
    with pytest.raises(InvalidInput, match="2 things") as several:
        await source.handlers.calls["store.prepare"](
            "stranger", {"vm": VM, "epoch": 1, "disks": {"vda": 2 * MIB}, "needed_bytes": 10**15}
        )
    assert {finding.cause for finding in several.value.findings} == {"conflict", "no-space"}
    assert (await source.prepare(name="renamed Würfel"))["name"] == "renamed Würfel"


async def test_a_first_copy_that_was_cut_needs_room_for_the_rest_only(
    tmp_path: Path, small_disk: Path
) -> None:
    """48 MiB have room for 40, and after 24 of them, for the other 16."""
    store = Store(small_disk / "store", tmp_path / "run", StoreSettings(2, 4 * MIB))
    await store.start()
    source = Source(Handlers(store))
    source.resize(vda=40 * MIB)
    await source.prepare(needed_bytes=40 * MIB)
    await source.seed([Change("vda", 0, noise(24 * MIB))], {"vda": 24 * MIB})
    held = (await store.status(VM))["disks"]["vda"]["allocated_bytes"]
    assert held >= 24 * MIB
    await source.prepare(needed_bytes=40 * MIB)
    with pytest.raises(NoSpace):
        await source.prepare(needed_bytes=80 * MIB)
    await store.stop()


async def test_what_the_home_was_asked_for_is_kept_with_the_replica(
    tmp_path: Path, source: Source, store: Store
) -> None:
    wish = {"rpo_seconds": 30.0, "priority": 70, "autostart": True}
    assert (await source.prepare())["protection"] == {}
    assert (await source.prepare(protection={**wish, "from_tomorrow": 1}))["protection"] == wish
    assert (await source.prepare())["protection"] == wish, "one that does not say changes nothing"
    for wrong in ([], {"autostart": 1}, {"priority": True}, {"rpo_seconds": "30s"}):
        with pytest.raises(InvalidInput, match="protection"):
            await source.prepare(protection=wrong)
    again = Store(store.directory, tmp_path / "run3", store.settings)
    await again.start()
    assert (await again.status(VM))["protection"] == wish


async def test_full_disk_keeps_the_last_generation_and_heals(tmp_path: Path, small_disk: Path) -> None:
    store = Store(small_disk / "store", tmp_path / "run", StoreSettings(2, 0))
    await store.start()
    handlers = Handlers(store)
    large, small = Source(handlers), Source(handlers, vm=OTHER_VM, name="db1")
    for source in (large, small):
        source.resize(vda=200 * MIB)
        await source.prepare()
        await source.send([Change("vda", 0, noise(MIB))])
    await merged(store)
    kept = files(store)
    with pytest.raises(NoSpace, match=rf"web1.* free .*on {small_disk}"):
        await large.send([Change("vda", 0, noise(60 * MIB))])
    assert files(store) == kept, "the half generation is discarded"
    assert (await store.status(VM))["state"] in {"no-space", "sealed"}  # healed as soon as it was discarded
    assert read_chain_prefix(store, VM) == noise(MIB)[:4096]
    await small.send([Change("vda", 0, noise(MIB, 2))])  # other VMs go on
    await large.send([Change("vda", 0, noise(4096, 3))])
    assert (await store.status(VM))["state"] == "sealed"
    await store.stop()

    store = Store(small_disk / "store", tmp_path / "run", StoreSettings(2, 24 * MIB))
    await store.start()
    large.handlers = Handlers(store)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(24 * MIB))
    with pytest.raises(NoSpace, match=r"24\.0 MiB stay free"):
        await large.send([Change("vda", 0, noise(4096, 4))])
    status = await store.status(VM)
    assert (status["state"], status["cause"]) == ("no-space", "no-space")
    ballast.unlink()
    assert (await store.status(VM))["state"] == "sealed"
    await large.send([Change("vda", 0, noise(4096, 4))])
    await store.stop()


def read_chain_prefix(store: Store, vm: str) -> bytes:
    overlay = store.directory / vm / "vda/g1-1.qcow2"
    out = store.directory.parent / "prefix"
    subprocess.run(
        ["qemu-img", "dd", "-f", "qcow2", "-O", "raw", "bs=4096", "count=1", f"if={overlay}", f"of={out}"],
        check=True,
    )  # fmt: skip
    content = out.read_bytes()
    out.unlink()
    return content


async def test_tens_of_idle_replicas_cost_no_process(store: Store, source: Source) -> None:
    for number in range(30):
        idle = Source(source.handlers, vm=f"{number:08x}{VM[8:]}", sizes={"vda": 10 * GIB})
        await idle.prepare()
    assert len(await store.statuses()) == 31
    children = Path("/proc/self/task").glob("*/children")
    assert not [path for path in children if path.read_text().strip()]


async def test_over_a_real_channel(store: Store, pair: Any) -> None:
    """The same handlers behind mutual TLS, and what the source sees when it is refused."""
    home, backup = await pair(connections=2)
    store.register(backup)
    link = home.links["backup"]
    source = Source(Handlers(store))
    source.resize(vda=8 * MIB)
    parameters = {"vm": VM, "name": "web1", "epoch": 1, "disks": source.sizes, "definition": "<domain/>"}
    assert (await link.call("store.prepare", parameters))["state"] == "seeding"
    changes = [Change("vda", 0, noise(6 * MIB)), Change("vda", MIB, None, 2 * MIB)]
    stream = await link.open_stream("generation", TrafficClass.PRECACHE, source.header(), label=VM)
    for message in source.messages(changes, compress=True):
        await stream.send(message)
    answer = Record.unpack(await stream.receive() or b"")
    assert answer.type is RecordType.SEALED
    await stream.close()
    source.apply(changes)
    assert read_chain(store, VM, "vda") == bytes(source.content["vda"])
    status = await link.call("store.status", {"vm": VM})
    assert status["sealed"]["generation"] == 1
    stream = await link.open_stream("generation", TrafficClass.PRECACHE, source.header(), label=VM)
    await stream.send(b"".join(Record(RecordType.ZERO, 0, 0, 512).pack()))
    await stream.close()
    with pytest.raises(StreamReset) as refused:
        await stream.receive()
    assert refused.value.error.cause == "protocol"
    header = {"vm": VM, "disk": "vda", "offset": 0, "length": 8 * MIB, "generation": 1}
    stream = await link.open_stream("digests", TrafficClass.PRECACHE, header, label=VM)
    await stream.close()
    received = b""
    while (message_ := await stream.receive()) is not None:
        received += message_
    assert len(received) == 128 * 32
    assert received[:32] == hashlib.sha256(source.content["vda"][: 64 * KIB]).digest()
