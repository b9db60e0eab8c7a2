# SPDX-License-Identifier: GPL-3.0-or-later
"""One VM's replica: its record, its files, and what a crash left of them."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from precache_proxy import durable
from precache_proxy.blocks import images
from precache_proxy.blocks.images import ImageReference
from precache_proxy.crash_points import crash_point
from precache_proxy.errors import Conflict, LifeboatError, NoSpace, NotFound, StaleEpoch
from precache_proxy.store.chain_lock import ChainLock
from precache_proxy.store.record import Layer, ReplicaRecord, SealedGeneration
from precache_proxy.store.settings import StoreSettings, free_bytes, require_space
from precache_proxy.units import format_bytes

logger = logging.getLogger(__name__)

RECORD_NAME = "replica.json"
_GENERATION_FILE = re.compile(r"^g(\d+)-(\d+)\.qcow2$")


def generation_file(disk: str, epoch: int, generation: int) -> str:
    """The name of a generation's overlay, relative to the replica's directory."""
    return f"{disk}/g{epoch}-{generation}.qcow2"


class Replica:
    """What the handlers of this store share about one VM. No process and no descriptor while idle."""

    def __init__(
        self, directory: Path, socket_directory: Path, settings: StoreSettings, record: ReplicaRecord
    ) -> None:
        self.directory = directory
        self.socket_directory = socket_directory
        self.settings = settings
        self.record = record
        self.chain_lock = ChainLock()
        self.changing = asyncio.Lock()
        self.no_space: str | None = None
        self.commit_failure: str | None = None
        self.receiving = False
        # those that this process knows to be durable, names and all
        self._blobs: set[str] = set()
        self._streams: dict[asyncio.Task[Any], str] = {}
        self._ended: dict[asyncio.Task[Any], str] = {}

    @property
    def subject(self) -> str:
        """What errors call it."""
        return f"replica of {self.record.name}"

    def disk_subject(self, disk: str) -> str:
        """What errors call one of its disks."""
        return f"replica of {self.record.name}/{disk}"

    def path(self, file: str) -> Path:
        """Where a layer's file is."""
        return self.directory / file

    # -- the record --------------------------------------------------------------------------------

    async def save(self, record: ReplicaRecord) -> None:
        """Make ``record`` the replica's: first on disk, then here. Not to be cancelled half way.

        After an error, memory has what the disk has: files that a renamed record names may not be discarded.
        """
        path = self.directory / RECORD_NAME
        try:
            await durable.to_its_end(partial(durable.write_json, path, record.as_json()))
        except asyncio.CancelledError:
            self.record = record
            raise
        except Exception:
            value = await asyncio.to_thread(durable.read_json, path)
            if value is not None:
                self.record = ReplicaRecord.from_json(value, path)
            raise
        self.record = record

    @classmethod
    def load(cls, directory: Path, socket_directory: Path, settings: StoreSettings) -> Replica | None:
        """The replica in ``directory`` or None. Raises IntegrityError on a broken record."""
        path = directory / RECORD_NAME
        value = durable.read_json(path)
        if value is None:
            return None
        return cls(directory, socket_directory, settings, ReplicaRecord.from_json(value, path))

    # -- who may do what ---------------------------------------------------------------------------

    def check_epoch(self, epoch: int, what: str) -> None:
        """Raises StaleEpoch, or Conflict where the record is behind."""
        if epoch < self.record.epoch:
            raise StaleEpoch(
                f"{self.subject}: {what} of epoch {epoch} is refused, the VM's home has moved since (epoch"
                f" {self.record.epoch}); the sender must not run this VM any more"
            )
        if epoch > self.record.epoch:
            raise Conflict(
                f"{self.subject}: {what} of epoch {epoch}, the record is of epoch {self.record.epoch};"
                " store.prepare has to come first"
            )

    def check_peer(self, peer: str) -> None:
        """Raises Conflict when the replica belongs to another host's VM."""
        if self.record.peer and peer != self.record.peer:
            raise Conflict(
                f"{self.subject}: it belongs to {self.record.peer}, not to {peer};"
                f" unprotect the VM at {self.record.peer} first"
            )

    def check_writable(self) -> None:
        """Raises Conflict while an arrival uses the replica, or after it became a VM's own disk."""
        if self.record.removing:
            raise NotFound(f"{self.subject}: is being removed; protect the VM again to make a new one")
        if self.record.detached:
            raise Conflict(
                f"{self.subject}: became the disk of the VM that runs here; nothing may be written into it"
            )
        if self.record.frozen_epoch is not None:
            raise Conflict(
                f"{self.subject}: is held for the arrival of epoch {self.record.frozen_epoch};"
                " it takes generations again when that is rolled back"
            )

    def check_space(self, needed_bytes: int = 0) -> None:
        """Raises NoSpace, and has the state say so until there is room again."""
        try:
            require_space(self.subject, self.directory, needed_bytes, self.settings.minimum_free_bytes)
        except LifeboatError as error:
            self.no_space = error.message
            raise
        self.no_space = None

    def full(self, error: NoSpace) -> NoSpace:
        """What to say, and to have the state say, when room was lacking: which file system it is, too."""
        if str(self.directory) not in error.message:  # a write found it full between two looks of ours
            fact = error.message.partition(";")[0]
            error = NoSpace(f"{fact}; free space on {self.directory} or set [store] directory")
        self.no_space = error.message
        return error

    @asynccontextmanager
    async def stream_task(self, kind: str, *, alone: bool) -> AsyncIterator[None]:
        """Run a stream's handler as one that :meth:`end_streams` can end. ``alone`` ends earlier writers."""
        task = asyncio.current_task()
        assert task is not None
        if alone:
            # The sender came back before its old stream was found dead: the newer one is right.
            await self.end_streams({"generation", "seed"}, "a newer stream of the same VM took its place")
        self._streams[task] = kind
        try:
            yield
        except asyncio.CancelledError:
            why = self._ended.get(task)
            if why is None:
                raise
            # Ended by us, for a reason that the other side shall read: the task goes on to tell it.
            task.uncancel()
            raise Conflict(f"{self.subject}: {why}") from None
        finally:
            del self._streams[task]
            self._ended.pop(task, None)

    async def end_streams(self, kinds: set[str], why: str) -> None:
        """Cancel handlers and wait until they have cleaned up behind them."""
        mine = asyncio.current_task()
        ending = [task for task, kind in self._streams.items() if kind in kinds and task is not mine]
        for task in ending:
            logger.info("%s: %s stream ended: %s", self.subject, self._streams[task], why)
            self._ended[task] = why
            task.cancel()
        if ending:
            await asyncio.wait(ending)

    # -- chains and blobs --------------------------------------------------------------------------

    def sealed_generation(self, generation: int) -> SealedGeneration:
        """Raises NotFound when it was never sealed, or is no longer kept."""
        found = self.record.find(generation)
        if found is None:
            kept = ", ".join(str(entry.generation) for entry in self.record.generations) or "none"
            raise NotFound(f"{self.subject}: generation {generation} is not kept here; sealed are: {kept}")
        return found

    def reference(self, layer: Layer) -> ImageReference:
        """A layer as QEMU opens it."""
        return ImageReference(self.path(layer.file), layer.format, layer.size_bytes)

    def backing_chain(self, layers: Iterable[Layer]) -> list[tuple[Path, str]]:
        """(path, format), topmost first, of layers given base first."""
        return [(self.path(layer.file), layer.format) for layer in reversed(tuple(layers))]

    async def keep_blob(self, content: bytes) -> str:
        """Store a small file durably under its digest; returns the digest.

        Under ``changing`` until the record names it, or it may be swept away.
        """
        digest = hashlib.sha256(content).hexdigest()
        path = self.directory / "blobs" / digest
        if digest not in self._blobs or not path.exists():
            path.parent.mkdir(exist_ok=True)
            if path.exists():
                # Its content was synced before it got its name; a kill may have come before that was.
                await asyncio.to_thread(durable.sync_directory, path.parent)
            else:
                await asyncio.to_thread(durable.write_bytes, path, content)
            await asyncio.to_thread(durable.sync_directory, self.directory)
            self._blobs.add(digest)
        return digest

    def blob(self, digest: str) -> bytes:
        """Content kept by :meth:`keep_blob`."""
        return (self.directory / "blobs" / digest).read_bytes() if digest else b""

    def _sweep_blobs(self) -> None:
        used = {self.record.definition}
        for entry in self.record.generations:
            used |= {entry.definition, *entry.attachments.values()}
        if (self.directory / "blobs").is_dir():
            for path in (self.directory / "blobs").iterdir():
                if path.name not in used:
                    path.unlink()
                    self._blobs.discard(path.name)

    # -- leftovers ---------------------------------------------------------------------------------

    async def empty_garbage(self) -> None:
        """Delete the files that the record has given up, but for those that something still has open."""
        if self.record.removing:
            return
        await asyncio.to_thread(self._sweep_blobs)
        if not self.record.garbage:
            return
        files = {self.path(file): file for file in self.record.garbage}
        in_use = await asyncio.to_thread(images.open_elsewhere, list(files))
        for path in files:
            if path not in in_use:
                await asyncio.to_thread(durable.remove, path)
                crash_point("store-recovering")
        kept = tuple(file for path, file in files.items() if path in in_use)
        for path in in_use:
            logger.warning("%s: %s is superseded but still open; it is kept for now", self.subject, path)
        await self.save(replace(self.record, garbage=kept))

    def unsealed_files(self) -> list[Path]:
        """Overlays that the record proves to be of generations that were never sealed."""
        sealed = self.record.sealed.order if self.record.sealed else (0, 0)
        known = {self.path(layer.file) for chain in self.record.layers.values() for layer in chain}
        known |= {self.path(file) for file in self.record.garbage}
        found = []
        for path in sorted(self.directory.glob("*/g*.qcow2")):
            match = _GENERATION_FILE.match(path.name)
            if match is None or path in known:
                continue
            if (int(match.group(1)), int(match.group(2))) > sealed:
                found.append(path)
            else:
                logger.warning("%s: %s is not of its record; it is left alone", self.subject, path)
        return found

    async def recover(self) -> None:
        """Put away what a crash left: half generations and files that were given up."""
        if self.record.removing:
            await self.remove()
            return
        if self.record.detached or self.record.frozen_epoch is not None:
            return  # a VM may run on these files: nothing of theirs is ours to judge
        half = self.unsealed_files()
        in_use = await asyncio.to_thread(images.open_elsewhere, half)
        for path in half:
            if path in in_use:
                logger.warning("%s: %s was never sealed but is open; it is kept for now", self.subject, path)
                continue
            logger.info("%s: discarding half a generation: %s", self.subject, path.name)
            await asyncio.to_thread(durable.remove, path)
            crash_point("store-recovering")
        await self.empty_garbage()

    async def remove(self) -> None:
        """Delete the replica, whatever is left of it: files first, the record last. Repeatable."""
        if not self.record.removing:
            await self.save(replace(self.record, removing=True))
        crash_point("store-removing")
        await asyncio.to_thread(self._delete_files)

    def _delete_files(self) -> None:
        for chain in self.record.layers.values():
            for layer in chain:
                if not layer.foreign and not self.record.detached:
                    self.path(layer.file).unlink(missing_ok=True)
        for file in self.record.garbage:
            self.path(file).unlink(missing_ok=True)
        if not self.record.detached:
            for path in self.unsealed_files():
                path.unlink(missing_ok=True)
        for path in (self.directory / "blobs").glob("*"):
            path.unlink()
        durable.remove(self.directory / RECORD_NAME)
        for directory in [*(self.directory / key for key in self.record.layers), self.directory / "blobs"]:
            if directory.is_dir() and not any(directory.iterdir()):
                directory.rmdir()
        if not any(self.directory.iterdir()):
            self.directory.rmdir()
            durable.sync_directory(self.directory.parent)

    # -- what others see ---------------------------------------------------------------------------

    def _state(self) -> tuple[str, str, str]:
        record = self.record
        if self.no_space is not None and self._free_bytes() >= self.settings.minimum_free_bytes:
            self.no_space = None  # room was made: the next generation is welcome
        if record.detached:
            return "detached", "landed", "its files are the disks of the VM that runs here"
        if record.frozen_epoch is not None:
            return "frozen", "arrival", f"held still for the arrival of epoch {record.frozen_epoch}"
        if self.no_space is not None:
            return "no-space", "no-space", self.no_space
        if record.sealed is None:
            return "seeding", "seeding", "no generation is sealed yet: nothing can be started from it"
        sentence = f"generation {record.sealed.generation} is sealed"
        if self.receiving:
            return "receiving", "", f"{sentence}, the next one is coming in"
        if self.commit_failure is not None:
            return "sealed", "commit-failed", f"{sentence}; merging older ones failed: {self.commit_failure}"
        return "sealed", "", sentence

    def status(self) -> dict[str, Any]:
        """The answer of store.status (blocking: looks at the files)."""
        record = self.record
        state, cause, sentence = self._state()
        sealed = record.sealed
        unsealed = [disk for disk in record.disks if sealed is None or disk not in sealed.disks]
        disks = {}
        for disk, size in record.disks.items():
            chain = record.layers.get(disk, ())
            disks[disk] = {
                "size_bytes": size,
                "held_bytes": size if sealed and disk in sealed.disks else record.seeding.get(disk, 0),
                "allocated_bytes": self.allocated_bytes([disk]),
                "chain_length": len(chain),
            }
        return {
            "vm": record.vm,
            "exists": not record.removing,
            "name": record.name,
            "peer": record.peer,
            "epoch": record.epoch,
            "state": state,
            "cause": cause,
            "sentence": sentence,
            "sealed": sealed
            and {
                "generation": sealed.generation,
                "epoch": sealed.epoch,
                "checkpoint": sealed.checkpoint,
                "sealed_at": sealed.sealed_at,
                "digest": sealed.digest,
            },
            "seeding": {disk: record.seeding.get(disk, 0) for disk in unsealed} or None,
            "disks": disks,
            "attachments": sorted(sealed.attachments) if sealed else [],
            "free_bytes": self._free_bytes(),
            "generations": [entry.generation for entry in record.generations],
            "protection": record.protection,
        }

    def _free_bytes(self) -> int:
        """What can be written beside it; of one whose directory is just removed, in the store."""
        try:
            return free_bytes(self.directory)
        except FileNotFoundError:
            return free_bytes(self.directory.parent)

    def allocated_bytes(self, disks: Iterable[str]) -> int:
        """What these disks take here (blocking: looks at the files)."""
        layers = [layer for disk in disks for layer in self.record.layers.get(disk, ())]
        return sum(_allocated(self.path(layer.file)) for layer in layers)

    def space_text(self) -> str:
        """For log lines."""
        return f"{format_bytes(self._free_bytes())} free on {self.directory}"


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0
