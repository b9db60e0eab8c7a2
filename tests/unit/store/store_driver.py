# SPDX-License-Identifier: GPL-3.0-or-later
"""The source's side of the store's streams, in memory, for the store's tests and their child processes."""

from __future__ import annotations

import asyncio
import json
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from precache_proxy.errors import LifeboatError
from precache_proxy.store.records import (
    MAX_RAW_BYTES,
    Flag,
    GenerationDigest,
    Record,
    RecordType,
    attachment_records,
    json_record,
)
from precache_proxy.store.service import Store

VM = str(uuid.uuid5(uuid.NAMESPACE_DNS, "web1.example"))
PEER = "home"


class MemoryStream:
    """The store's end of a stream, with the methods of channel.Stream that it uses."""

    def __init__(self, kind: str, header: dict[str, Any], peer: str = PEER) -> None:
        self.kind, self.header, self.peer = kind, header, peer
        self.incoming: asyncio.Queue[bytes | LifeboatError | None] = asyncio.Queue(32)
        self.answers: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def receive(self) -> bytes | None:
        message = await self.incoming.get()
        if isinstance(message, LifeboatError):
            raise message
        return message

    async def send(self, *parts: bytes | bytearray | memoryview) -> None:
        await self.answers.put(b"".join(parts))


class Handlers:
    """Takes the place of a channel in :meth:`Store.register`."""

    def __init__(self, store: Store) -> None:
        self.calls: dict[str, Any] = {}
        self.streams: dict[str, Any] = {}
        store.register(self)  # type: ignore[arg-type]

    def handle_call(self, method: str, handler: Any) -> None:
        self.calls[method] = handler

    def handle_stream(self, kind: str, handler: Any) -> None:
        self.streams[kind] = handler

    def open(
        self, kind: str, header: dict[str, Any], peer: str = PEER
    ) -> tuple[MemoryStream, asyncio.Task[None]]:
        """The stream and the task that serves it."""
        stream = MemoryStream(kind, header, peer)
        return stream, asyncio.ensure_future(self.streams[kind](stream))

    async def send(self, stream: MemoryStream, task: asyncio.Task[None], messages: Sequence[Any]) -> None:
        """Queue messages as long as the handler lives."""
        for message in messages:
            putting = asyncio.ensure_future(stream.incoming.put(message))
            await asyncio.wait({putting, task}, return_when=asyncio.FIRST_COMPLETED)
            if not putting.done():
                putting.cancel()
                return


def pack(record: Record, *, compress: bool = False) -> bytes:
    if compress and record.type is RecordType.DATA:
        return b"".join(record.pack(zstandard.ZstdCompressor(level=1).compress(record.payload), Flag.ZSTD))
    return b"".join(record.pack())


@dataclass
class Change:
    """One write into a disk; ``data`` None makes ``length`` bytes zero."""

    disk: str
    offset: int
    data: bytes | None
    length: int = 0


@dataclass
class Source:
    """What the other side knows: the disks' content, and the numbers."""

    handlers: Handlers
    vm: str = VM
    name: str = "web1"
    epoch: int = 1
    generation: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    content: dict[str, bytearray] = field(default_factory=dict)

    def resize(self, **sizes: int) -> None:
        self.sizes = dict(sizes)
        for disk, size in sizes.items():
            old = self.content.get(disk, bytearray())
            self.content[disk] = old + bytes(size - len(old))
        self.content = {disk: self.content[disk] for disk in sizes}

    async def prepare(self, **parameters: Any) -> dict[str, Any]:
        values = {
            "vm": self.vm, "name": self.name, "epoch": self.epoch, "disks": self.sizes,
            "definition": "<domain/>", "needed_bytes": 0,
        }  # fmt: skip
        answer: dict[str, Any] = await self.handlers.calls["store.prepare"](PEER, values | parameters)
        return answer

    def records(self, changes: Sequence[Change]) -> list[Record]:
        order = list(self.sizes)
        found = []
        for change in changes:
            disk = order.index(change.disk)
            if change.data is None:
                found.append(Record(RecordType.ZERO, disk, change.offset, change.length))
                continue
            for at in range(0, len(change.data), MAX_RAW_BYTES):
                payload = change.data[at : at + MAX_RAW_BYTES]
                found.append(Record(RecordType.DATA, disk, change.offset + at, len(payload), payload))
        return found

    def apply(self, changes: Sequence[Change]) -> None:
        for change in changes:
            data = bytes(change.length) if change.data is None else change.data
            self.content[change.disk][change.offset : change.offset + len(data)] = data

    def header(self, **changes: Any) -> dict[str, Any]:
        return {
            "vm": self.vm, "epoch": self.epoch, "leads_from": self.generation,
            "generation": self.generation + 1,
            "checkpoint": f"lifeboat-e{self.epoch}-g{self.generation + 1}", "disks": self.sizes,
            "definition": f"<domain>{self.generation + 1}</domain>", "residual": False,
        } | changes  # fmt: skip

    def messages(
        self, changes: Sequence[Change], attachments: dict[str, bytes] | None = None, *,
        compress: bool = False, seal: dict[str, Any] | None = None,
    ) -> list[bytes]:  # fmt: skip
        digest = GenerationDigest()
        messages = []
        records = self.records(changes)
        for name, content in (attachments or {}).items():
            records += attachment_records(name, content)
        for number, record in enumerate(records):
            digest.update(record)
            messages.append(pack(record, compress=compress))
            if number == len(records) // 2:
                messages.append(pack(Record(RecordType.SLICE)))
        content_ = {"digest": digest.hexdigest()} | (seal or {})
        messages.append(pack(json_record(RecordType.SEAL, content_)))
        return messages

    async def send(
        self, changes: Sequence[Change] = (), attachments: dict[str, bytes] | None = None, *,
        compress: bool = False, header: dict[str, Any] | None = None, seal: dict[str, Any] | None = None,
        peer: str = PEER,
    ) -> dict[str, Any]:  # fmt: skip
        """One generation, sealed; raises what the store refuses it for."""
        stream, task = self.handlers.open("generation", self.header(**(header or {})), peer)
        await self.handlers.send(
            stream, task, self.messages(changes, attachments, compress=compress, seal=seal)
        )
        await task
        answer = Record.unpack(await stream.answers.get() or b"")
        assert answer.type is RecordType.SEALED
        self.generation += 1
        self.apply(changes)
        return answer.json()

    async def seed(
        self, changes: Sequence[Change], marks: dict[str, int] | None = None, *, end: bool = True,
        sizes: dict[str, int] | None = None,
    ) -> None:  # fmt: skip
        header = {"vm": self.vm, "epoch": self.epoch, "disks": sizes or self.sizes}
        stream, task = self.handlers.open("seed", header)
        messages: list[Any] = [pack(record) for record in self.records(changes)]
        if marks is not None:
            messages.append(pack(json_record(RecordType.MARK, marks)))
        await self.handlers.send(stream, task, messages)
        if marks is not None:
            answer = await asyncio.wait_for(stream.answers.get(), 20)
            marked = Record.unpack(answer or b"")
            assert marked.type is RecordType.MARKED
            assert marked.json() == marks
        self.apply(changes)
        await self.handlers.send(stream, task, [None if end else LifeboatError("the link broke")])
        await task

    async def digests(self, disk: str, /, **header: Any) -> bytes:
        values = {
            "vm": self.vm, "disk": disk, "block_bytes": 65536, "offset": 0, "length": self.sizes[disk],
            "generation": self.generation,
        }  # fmt: skip
        stream, task = self.handlers.open("digests", values | header)
        await task
        found = b""
        while not stream.answers.empty():
            found += stream.answers.get_nowait() or b""
        return found


def read_chain(store: Store, vm: str, disk: str, generation: int | None = None) -> bytes:
    """A disk as ``qemu-img convert`` reads it from the chain of a sealed generation."""
    directory = store.directory / vm
    record = json.loads((directory / "replica.json").read_text())
    sealed = [entry for entry in record["generations"] if generation in {None, entry["generation"]}][-1]
    chain = [
        layer
        for layer in record["layers"][disk]
        if (layer["epoch"], layer["generation"]) <= (sealed["epoch"], sealed["generation"])
    ]
    out = directory.parent / "converted.raw"
    top = str(directory / chain[-1]["file"])
    subprocess.run(["qemu-img", "convert", "-f", chain[-1]["format"], "-O", "raw", top, str(out)], check=True)
    content = out.read_bytes()
    out.unlink()
    return content


async def merged(store: Store) -> None:
    """Wait for the merges in the background."""
    for task in list(store._merging._tasks.values()):
        await task


def files(store: Store, vm: str = VM) -> set[str]:
    directory = Path(store.directory) / vm
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
