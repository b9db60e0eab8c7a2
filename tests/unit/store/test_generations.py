# SPDX-License-Identifier: GPL-3.0-or-later
"""Generations on real chains, read back by qemu-img and compared with a bytearray."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from precache_proxy.errors import (
    Conflict,
    IntegrityError,
    InvalidInput,
    LifeboatError,
    NotFound,
    ProtocolError,
    StaleEpoch,
)
from precache_proxy.store.records import Record, RecordType
from precache_proxy.store.service import Store
from precache_proxy.store.settings import StoreSettings
from precache_proxy.units import KIB, MIB
from unit.store.store_driver import PEER, VM, Change, Handlers, Source, files, merged, pack, read_chain

SIZE = 4 * MIB + 512


@pytest.fixture
async def source(store: Store) -> Source:
    source = Source(Handlers(store))
    source.resize(vda=SIZE, vdb=MIB)
    await source.prepare()
    return source


def noise(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


def equal(store: Store, source: Source) -> None:
    for disk, content in source.content.items():
        read = read_chain(store, source.vm, disk)
        assert hashlib.sha256(read).digest() == hashlib.sha256(content).digest(), disk


async def test_seeding_generations_and_merges(store: Store, source: Source) -> None:
    status = await store.status(VM)
    assert (status["state"], status["sealed"], status["seeding"]) == ("seeding", None, {"vda": 0, "vdb": 0})
    await source.seed(
        [Change("vda", 0, noise(MIB)), Change("vdb", 0, noise(MIB, 2))], {"vda": MIB, "vdb": MIB}
    )
    assert (await store.status(VM))["seeding"] == {"vda": MIB, "vdb": MIB}
    await source.seed([Change("vda", MIB, noise(MIB, 3)), Change("vda", 4 * MIB, noise(512, 4))])
    sealed = await source.send([Change("vda", 100, b"x" * 5000)], compress=True)
    assert sealed["generation"] == 1
    equal(store, source)
    for number in range(2, 7):
        await source.send([
            Change("vda", number * 70000, noise(70000, number)),
            Change("vda", number * 70000 + 30000, None, 130000),
        ])  # fmt: skip
        equal(store, source)
    await merged(store)
    equal(store, source)
    status = await store.status(VM)
    assert status["generations"] == [5, 6]
    assert (status["state"], status["seeding"]) == ("sealed", None)
    assert status["sealed"]["checkpoint"] == "lifeboat-e1-g6"
    assert {name for name in files(store) if name.startswith("vda/")} == {
        "vda/base.qcow2",
        "vda/g1-5.qcow2",
        "vda/g1-6.qcow2",
    }
    assert {name for name in files(store) if name.startswith("vdb/")} == {"vdb/base.qcow2"}
    # the older restore point reads as it was
    assert read_chain(store, VM, "vda", 5) != bytes(source.content["vda"])


async def test_an_idle_generation_costs_no_image(store: Store, source: Source) -> None:
    await source.send()
    await merged(store)
    before = files(store)
    for _ in range(5):
        await source.send()
    await merged(store)
    images = {name for name in files(store) if name.endswith(".qcow2")}
    assert images == {name for name in before if name.endswith(".qcow2")}
    assert len([name for name in files(store) if name.startswith("blobs/")]) == 2, "old definitions were kept"
    equal(store, source)


async def test_zero_records_become_holes_that_mask_the_base(store: Store, source: Source) -> None:
    await source.seed([Change("vda", 0, noise(4 * MIB))])
    await source.send()
    full = (await store.status(VM))["disks"]["vda"]["allocated_bytes"]
    await source.send([Change("vda", 0, None, SIZE)])
    equal(store, source)
    overlay = store.directory / VM / "vda/g1-2.qcow2"
    assert overlay.stat().st_blocks * 512 < MIB, "zeroes were written as blocks"
    for _ in range(2):
        await source.send()
    await merged(store)
    equal(store, source)
    after = (await store.status(VM))["disks"]["vda"]["allocated_bytes"]
    assert after < full // 4, "a merged hole gives its blocks back"


async def test_wrong_digest_and_early_end_leave_nothing(store: Store, source: Source) -> None:
    await source.send([Change("vda", 0, noise(MIB))])
    await merged(store)
    before = files(store)
    with pytest.raises(IntegrityError, match="web1"):
        await source.send([Change("vda", 0, b"y" * 4096)], seal={"digest": "0" * 64})
    assert files(store) == before
    stream, task = source.handlers.open("generation", source.header())
    messages = source.messages([Change("vda", 0, b"z" * 4096)])[:-1]
    await source.handlers.send(stream, task, [*messages, None])
    with pytest.raises(ProtocolError, match="before its seal"):
        await task
    stream, task = source.handlers.open("generation", source.header())
    await source.handlers.send(stream, task, [*messages, LifeboatError("link lost")])
    with pytest.raises(LifeboatError, match="link lost"):
        await task
    assert files(store) == before
    equal(store, source)
    assert (await source.send([Change("vda", 0, b"z" * 4096)]))["generation"] == 2
    equal(store, source)


@pytest.mark.parametrize("messages", [
    [b"garbage"],
    [pack(Record(RecordType.MARK, payload=b"{}", length=2))],
    [pack(Record(RecordType.DATA, 9, 0, 1, b"x"))],
    [pack(Record(RecordType.DATA, 0, SIZE, 512, b"x" * 512))],
    [pack(Record(RecordType.ZERO, 0, 0, SIZE + 512))],
])  # fmt: skip
async def test_bad_records_are_refused(store: Store, source: Source, messages: list[bytes]) -> None:
    before = files(store)
    stream, task = source.handlers.open("generation", source.header())
    await source.handlers.send(stream, task, messages)
    with pytest.raises(ProtocolError):
        await task
    assert files(store) == before


async def test_lost_acknowledgement_is_answered_from_the_record(store: Store, source: Source) -> None:
    change = [Change("vda", 0, noise(9000))]
    first = await source.send(change)
    source.generation -= 1
    assert await source.send(change) == first
    source.generation -= 1
    with pytest.raises(Conflict, match="other content"):
        await source.send([Change("vda", 0, noise(9000, 5))])
    with pytest.raises(Conflict, match="leads from"):
        await source.send(change, header={"generation": 3, "leads_from": 2})


async def test_epochs_and_owners(store: Store, source: Source) -> None:
    source.epoch = 3
    await source.prepare()
    await source.send()
    for epoch in (1, 2):
        with pytest.raises(StaleEpoch):
            await source.send(header={"epoch": epoch})
        with pytest.raises(StaleEpoch):
            await source.prepare(epoch=epoch)
    with pytest.raises(Conflict, match=r"store\.prepare"):
        await source.send(header={"epoch": 4})
    with pytest.raises(Conflict, match="belongs to home"):
        await source.send(peer="stranger")
    with pytest.raises(Conflict, match="belongs to home"):
        await source.handlers.calls["store.prepare"](
            "stranger", {"vm": VM, "name": "web1", "epoch": 3, "disks": source.sizes}
        )
    with pytest.raises(StaleEpoch):
        await source.handlers.calls["store.remove"](PEER, {"vm": VM, "epoch": 2})
    assert await source.handlers.calls["store.remove"](PEER, {"vm": VM, "epoch": 3}) == {"removed": True}
    assert list(store.directory.iterdir()) == []
    assert await source.handlers.calls["store.remove"](PEER, {"vm": VM, "epoch": 3}) == {"removed": False}
    assert (await source.handlers.calls["store.status"](PEER, {"vm": VM}))["exists"] is False


async def test_grown_added_removed_and_returned_disks(store: Store, source: Source) -> None:
    await source.seed([Change("vda", 0, noise(MIB)), Change("vdb", 0, noise(MIB))])
    await source.send()
    source.resize(vda=6 * MIB + 1024, vdb=MIB)
    await source.send()  # grown, and nothing written there
    equal(store, source)
    await source.send([Change("vda", 6 * MIB + 512, noise(512))])
    source.resize(vda=6 * MIB + 1024, vdb=MIB, vdc=3 * MIB)
    await source.send([Change("vdc", MIB, noise(MIB, 9))])
    equal(store, source)
    source.resize(vda=6 * MIB + 1024)
    for number in range(4):
        await source.send([Change("vda", number * 4096, noise(4096, number))])
    await merged(store)
    equal(store, source)
    assert not [name for name in files(store) if name.startswith(("vdb/", "vdc/"))], (
        "removed disks are given up"
    )
    source.resize(vda=6 * MIB + 1024, vdb=512)
    await source.send([Change("vdb", 0, noise(512, 11))])
    equal(store, source)
    source.resize(vda=6 * MIB + 1024)
    await source.send()
    source.resize(vda=6 * MIB + 1024, vdb=2 * MIB)
    await source.send([Change("vdb", 4096, noise(512, 12))])  # comes back while its old chain is still kept
    equal(store, source)
    with pytest.raises(Conflict, match="shrank"):
        await source.send(header={"disks": {"vda": MIB, "vdb": 2 * MIB}})
    with pytest.raises(Conflict, match="shrank"):
        await source.prepare(disks={"vda": MIB})


async def test_a_new_disk_is_seeded_beside_sealed_ones(store: Store, source: Source) -> None:
    await source.send([Change("vda", 0, noise(MIB))])
    source.resize(vda=SIZE, vdb=MIB, vdc=2 * MIB)
    source.sizes = {"vdc": 2 * MIB}
    await source.seed([Change("vdc", 0, noise(MIB, 3))], {"vdc": MIB})
    source.sizes = {"vda": SIZE, "vdb": MIB, "vdc": 2 * MIB}
    assert (await store.status(VM))["seeding"] == {"vdc": MIB}
    await source.send([Change("vdc", MIB, noise(4096, 4))])
    equal(store, source)
    with pytest.raises(Conflict, match="is sealed"):
        await source.seed([Change("vda", 0, noise(512))])


async def test_attachments_and_definition_belong_to_their_generation(store: Store, source: Source) -> None:
    nvram, tpm = noise(540 * KIB, 1), noise(3 * MIB, 2)
    await source.send([], {"nvram": nvram, "tpm/2.permall": tpm, "empty": b""})
    await source.send([], {"nvram": b"new"})
    chain = await store.freeze_for_arrival(VM, 2, 2)
    assert {name: path.read_bytes() for name, path in chain.attachments.items()} == {
        "nvram": b"new", "tpm/2.permall": tpm, "empty": b"",
    }  # fmt: skip
    assert chain.definition == "<domain>2</domain>"
    assert not any("permall" in name for name in files(store)), "names of attachments are not paths"


async def test_digests_of_sealed_generations(store: Store, source: Source) -> None:
    source.resize(vda=40 * MIB + 1536, vdb=MIB)
    await source.seed([Change("vda", 0, noise(3 * MIB)), Change("vda", 20 * MIB, bytes(MIB))])
    await source.send([Change("vda", 39 * MIB, noise(MIB + 1536, 4)), Change("vda", 65536, None, 65536)])
    await source.send([Change("vda", 0, noise(MIB, 5))])

    def expected(content: bytes, block: int) -> bytes:
        found = b""
        for at in range(0, len(content), block):
            part = bytes(content[at : at + block])
            found += hashlib.sha256(part).digest() if any(part) else bytes(32)
        return found

    for block in (4 * KIB, 64 * KIB, MIB):
        assert await source.digests("vda", block_bytes=block) == expected(source.content["vda"], block)
    part = await source.digests("vda", offset=MIB, length=2 * MIB)
    assert part == expected(source.content["vda"], 64 * KIB)[16 * 32 : 48 * 32]
    older = await source.digests("vda", generation=1)
    assert older[16 * 32 :] == expected(source.content["vda"], 64 * KIB)[16 * 32 :]
    assert older != expected(source.content["vda"], 64 * KIB)
    with pytest.raises(NotFound, match="generation 9"):
        await source.digests("vda", generation=9)
    with pytest.raises(InvalidInput, match="block"):
        await source.digests("vda", offset=1000)
    with pytest.raises(InvalidInput, match="power of 2"):
        await source.digests("vda", block_bytes=5000)
    with pytest.raises(NotFound, match="no such disk"):
        await source.digests("vda", disk="vdz")


async def test_a_newer_stream_takes_the_place_of_a_dead_one(store: Store, source: Source) -> None:
    stream, task = source.handlers.open("generation", source.header())
    await source.handlers.send(stream, task, source.messages([Change("vda", 0, noise(MIB))])[:1])
    await asyncio.sleep(0.2)
    await source.send([Change("vda", 0, noise(4096, 6))])
    with pytest.raises(Conflict, match="newer stream"):
        await task
    equal(store, source)


async def test_a_merge_gives_way_to_a_pass(
    store: Store, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("precache_proxy.store.commit._STEP_BYTES", 64 * KIB)
    for number in range(4):
        await source.send([Change("vda", 0, noise(4 * MIB, number))])
    stream, task = source.handlers.open("generation", source.header())
    await source.handlers.send(stream, task, source.messages([Change("vda", 0, noise(4096))])[:1])
    for _ in range(100):
        await asyncio.sleep(0.01)
        if (store.directory / VM / "vda/g1-5.qcow2").exists():
            break
    assert (store.directory / VM / "vda/g1-5.qcow2").exists(), "a merge kept a pass waiting"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await merged(store)
    assert (await store.status(VM))["disks"]["vda"]["chain_length"] == 3
    equal(store, source)


async def test_bad_headers(store: Store, source: Source) -> None:
    with pytest.raises(NotFound, match="no replica"):
        await source.send(header={"vm": VM.replace("a", "b")})
    for bad in (
        {"vm": "../../etc"},
        {"disks": {}},
        {"disks": {"../x": 512}},
        {"disks": {"vda": -1}},
        {"generation": "x"},
    ):
        with pytest.raises(InvalidInput):
            await source.send(header=bad)


async def test_statuses_name_a_damaged_record(store: Store, source: Source, tmp_path: Path) -> None:
    await source.send()
    (store.directory / VM / "replica.json").write_text('{"format": 99}')
    other = Store(store.directory, tmp_path / "run2", store.settings)
    await other.start()
    [status] = await other.statuses()
    assert (status["state"], status["cause"]) == ("damaged", "integrity")
    with pytest.raises(IntegrityError, match="format 99"):
        await other.status(VM)
    with pytest.raises(IntegrityError, match="format 99"):
        await Source(Handlers(other), sizes={"vda": 512}).prepare()


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["vda", "vdb"]), st.integers(0, 600 * KIB), st.integers(1, 200 * KIB),
        st.booleans(), st.integers(0, 9),
    ),
    max_size=6,
)  # fmt: skip


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(CHANGES, st.integers(0, 3), st.sampled_from(["seal", "seal", "cut", "restart"])),
        min_size=1, max_size=6,
    ),
    st.integers(1, 3),
)  # fmt: skip
def test_random_generations_against_a_model(
    steps: list[tuple[list[tuple[str, int, int, bool, int]], int, str]], keep: int
) -> None:
    async def run(directory: Path) -> None:
        options = StoreSettings(keep_generations=keep, minimum_free_bytes=0)
        store = Store(directory / "store", directory / "run", options)
        await store.start()
        source = Source(Handlers(store))
        source.resize(vda=1000 * KIB + 512, vdb=900 * KIB)
        await source.prepare()
        for changes, growth, how in steps:
            former = dict(source.sizes), dict(source.content)
            source.resize(vda=source.sizes["vda"] + growth * 1536, vdb=900 * KIB)
            wanted = [
                Change(disk, offset, None if zero else noise(length, seed), length)
                for disk, offset, length, zero, seed in changes
            ]
            if how == "cut":
                stream, task = source.handlers.open("generation", source.header())
                await source.handlers.send(stream, task, [*source.messages(wanted)[:-1], None])
                with pytest.raises(ProtocolError):
                    await task
                source.sizes, source.content = former
                continue
            await source.send(wanted)
            if how == "restart":
                await store.stop()
                store = Store(directory / "store", directory / "run", options)
                await store.start()
                source.handlers = Handlers(store)
            equal(store, source)
        if source.generation:
            await merged(store)
            record = json.loads((store.directory / VM / "replica.json").read_text())
            assert len(record["generations"]) <= keep
            for disk in source.content:
                assert read_chain(store, VM, disk) == bytes(source.content[disk])
                assert len(await source.digests(disk)) == -(-source.sizes[disk] // 65536) * 32
        await store.stop()

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(run(Path(directory)))
