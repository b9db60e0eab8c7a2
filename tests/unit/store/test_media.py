# SPDX-License-Identifier: GPL-3.0-or-later
"""Media: carried once, whatever ends in between; never under a name that is not their content's."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path
from typing import Any

import pytest

from precache_proxy.blocks.images import stamp
from precache_proxy.errors import IntegrityError, NoSpace, ProtocolError, StaleEpoch
from precache_proxy.evacuation.media_places import find_places
from precache_proxy.hypervisor.domain_xml import parse_definition
from precache_proxy.store.media import MediaIndex, MediaShelf, Medium, file_digest
from precache_proxy.store.records import Record, RecordType, json_record
from precache_proxy.store.service import Store
from precache_proxy.units import MIB
from unit.store.store_driver import VM, Handlers, MemoryStream, pack

OTHER_VM = str(uuid.uuid5(uuid.NAMESPACE_DNS, "web2.example"))
CONTENT = os.urandom(MIB) + bytes(MIB) + os.urandom(MIB // 2)
MEDIUM = Medium(hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), "/srv/iso/seed.iso")
PIECE = MIB // 2


def records(start: int = 0, content: bytes = CONTENT) -> list[bytes]:
    """A medium as its home sends it: zeroes as holes."""
    made = []
    for offset in range(start, len(content), PIECE):
        piece = content[offset : offset + PIECE]
        kind = RecordType.DATA if any(piece) else RecordType.ZERO
        payload = piece if any(piece) else b""
        made.append(pack(Record(kind, 0, offset, len(piece), payload), compress=True))
    return [*made, pack(json_record(RecordType.SEAL, {"digest": MEDIUM.digest}))]


async def declare(handlers: Handlers, *media: Medium, vm: str = VM, epoch: int = 1) -> list[str]:
    told = {
        f"sd{number}": {
            "digest": one.digest,
            "size_bytes": one.size_bytes,
            "path": one.path,
            "plain": one.plain,
        }
        for number, one in enumerate(media)
    }
    answer = await handlers.calls["media.declare"]("home", {"vm": vm, "epoch": epoch, "media": told})
    return list(answer["missing"])


def header(**changed: Any) -> dict[str, Any]:
    return {"vm": VM, "digest": MEDIUM.digest, "size_bytes": MEDIUM.size_bytes, **changed}


async def offset(stream: MemoryStream) -> int:
    message = await stream.answers.get()
    assert message is not None
    return int(Record.unpack(message).json()["offset"])


def shelf_file(store: Store) -> Path:
    return store.media.directory / f"{MEDIUM.digest}.img"


async def test_a_medium_comes_once_and_holes_stay_holes(store: Store) -> None:
    handlers = Handlers(store)
    assert await declare(handlers, MEDIUM) == [MEDIUM.digest]
    stream, task = handlers.open("medium", header())
    assert await offset(stream) == 0
    await handlers.send(stream, task, records())
    await task
    assert shelf_file(store).read_bytes() == CONTENT
    assert shelf_file(store).stat().st_blocks * 512 < len(CONTENT)
    assert await declare(handlers, MEDIUM, vm=OTHER_VM) == [], "another VM that has it needs nothing"
    stream, task = handlers.open("medium", header(vm=OTHER_VM))
    assert await offset(stream) == MEDIUM.size_bytes
    await task


async def test_what_was_cut_goes_on_where_it_stood(store: Store) -> None:
    handlers = Handlers(store)
    await declare(handlers, MEDIUM)
    stream, task = handlers.open("medium", header())
    assert await offset(stream) == 0
    await handlers.send(stream, task, [*records()[:3], None])
    with pytest.raises(ProtocolError, match="it ended after"):
        await task
    assert not shelf_file(store).exists()
    stream, task = handlers.open("medium", header())
    start = await offset(stream)
    assert start == MIB, "whole MiB of what came"
    await handlers.send(stream, task, records(start))
    await task
    assert shelf_file(store).read_bytes() == CONTENT


async def test_other_content_is_not_taken_under_the_name(store: Store) -> None:
    handlers = Handlers(store)
    await declare(handlers, MEDIUM)
    stream, task = handlers.open("medium", header())
    await offset(stream)
    await handlers.send(stream, task, records(content=CONTENT[:-1] + b"?"))
    with pytest.raises(IntegrityError, match="it is sent anew"):
        await task
    assert list(store.media.directory.glob("*.img")) == list(store.media.directory.glob(".*.part")) == []


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (pack(Record(RecordType.DATA, 0, MIB, 4, b"gaps")), "at 1048576, not at 0"),
        (pack(Record(RecordType.ZERO, 0, 0, len(CONTENT) + 512)), "more than its"),
        (pack(Record(RecordType.SLICE)), "record SLICE"),
        (pack(json_record(RecordType.SEAL, {})), "0 of"),
    ],
    ids=["gap", "too-long", "other-record", "too-short"],
)
async def test_what_no_home_sends_is_refused(store: Store, message: bytes, told: str) -> None:
    handlers = Handlers(store)
    await declare(handlers, MEDIUM)
    stream, task = handlers.open("medium", header())
    await offset(stream)
    await handlers.send(stream, task, [message])
    with pytest.raises(ProtocolError, match=told):
        await task


async def test_no_space_is_told_before_anything_is_sent(tmp_path: Path) -> None:
    shelf = MediaShelf(tmp_path, MediaIndex(tmp_path / "index"), minimum_free_bytes=2**60)
    stream = MemoryStream("medium", header())
    with pytest.raises(NoSpace, match="stay free"):
        await shelf._receive(stream)  # type: ignore[arg-type]


async def test_an_image_at_the_same_place_is_used_and_kept_apart_from_ours(
    store: Store, tmp_path: Path
) -> None:
    handlers = Handlers(store)
    library = tmp_path / "library.iso"
    library.write_bytes(CONTENT)
    here = Medium(MEDIUM.digest, MEDIUM.size_bytes, str(library))
    assert await declare(handlers, here) == []
    assert store.media.locate(MEDIUM.digest) == library
    library.write_bytes(CONTENT[:-1] + b"?")
    assert store.media.locate(MEDIUM.digest) is None, "it is another one now"
    assert await declare(handlers, here) == [MEDIUM.digest]
    assert library.exists()


async def test_a_medium_that_no_vm_has_any_more_goes_and_an_older_home_has_no_say(store: Store) -> None:
    handlers = Handlers(store)
    await declare(handlers, MEDIUM)
    await declare(handlers, MEDIUM, vm=OTHER_VM)
    shelf_file(store).write_bytes(CONTENT)
    await declare(handlers)
    assert shelf_file(store).exists(), "the other VM has it still"
    store.media.claim(OTHER_VM, 2)
    with pytest.raises(StaleEpoch, match="its home has moved"):
        await declare(handlers, vm=OTHER_VM)
    assert shelf_file(store).exists()
    await declare(handlers, vm=OTHER_VM, epoch=2)
    assert not shelf_file(store).exists()


async def test_halves_that_nobody_waits_for_go_at_the_next_start(store: Store) -> None:
    await declare(Handlers(store), MEDIUM)
    waited, forgotten = (store.media.directory / f".{name}.part" for name in (MEDIUM.digest, "0" * 64))
    waited.touch()
    forgotten.touch()
    await store.media.start()
    assert waited.exists()
    assert not forgotten.exists()


def test_index_knows_a_file_until_it_changes(tmp_path: Path) -> None:
    index, path = MediaIndex(tmp_path / "index"), tmp_path / "a.iso"
    path.write_bytes(b"x" * 700)
    digest = file_digest(path)
    assert digest == hashlib.sha256(b"x" * 700 + bytes(324)).hexdigest(), "a guest reads whole sectors"
    medium = Medium(digest, 1024, str(path))
    index.remember(str(path), medium, stamp(path))
    assert index.medium(str(path)) == medium
    assert index.plain_file(digest) == path
    path.write_bytes(b"y" * 700)
    assert index.medium(str(path)) is None
    assert index.plain_file(digest) is None


async def test_preflight_tells_what_is_not_there(store: Store) -> None:
    xml = (
        f"<domain type='qemu'><name>web1</name><uuid>{VM}</uuid><devices>"
        "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='/srv/iso/seed.iso'/>"
        "<target dev='sd0' bus='sata'/><readonly/></disk></devices></domain>"
    )
    definition = parse_definition(xml)
    handlers = Handlers(store)
    assert "has not been carried there" in find_places(definition, store.media).findings[0].fact
    await declare(handlers, MEDIUM)
    assert "still on its way" in find_places(definition, store.media).findings[0].fact
    shelf_file(store).write_bytes(CONTENT)
    assert find_places(definition, store.media).paths == {"sd0": str(shelf_file(store))}
    other = parse_definition(xml.replace("seed.iso", "other.iso"))
    assert "was put in after /srv/iso/seed.iso" in find_places(other, store.media).findings[0].fact
