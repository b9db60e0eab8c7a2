# SPDX-License-Identifier: GPL-3.0-or-later
"""The store: all replicas kept on this host, and what peers and the other rooms may ask of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from precache_proxy import durable
from precache_proxy.blocks import images
from precache_proxy.blocks.images import ImageReference, rounded_size
from precache_proxy.channel import Channel, Stream
from precache_proxy.errors import (
    Conflict,
    InvalidInput,
    LifeboatError,
    NotFound,
    StaleEpoch,
)
from precache_proxy.store.admission import finding, objections
from precache_proxy.store.chains import ImageLike, ReplicaChain
from precache_proxy.store.digests import serve_digests
from precache_proxy.store.generations import receive_generation
from precache_proxy.store.media import MediaIndex, MediaShelf
from precache_proxy.store.merging import Merging
from precache_proxy.store.record import (
    Layer,
    ReplicaRecord,
    SealedGeneration,
    check_disks,
    check_protection,
    check_vm,
)
from precache_proxy.store.replica import RECORD_NAME, Replica
from precache_proxy.store.seeding import receive_seed
from precache_proxy.store.settings import StoreSettings, free_bytes

logger = logging.getLogger(__name__)

# Beside the replicas' directories, which bear UUIDs.
MEDIA_NAME = "media"


class Store:
    """``start`` recovers what a crash left; ``register`` answers peers; the rest is for the rooms beside."""

    def __init__(
        self,
        directory: Path,
        run_directory: Path,
        settings: StoreSettings,
        *,
        media_index: MediaIndex | None = None,
    ) -> None:
        self.directory = directory
        self.media = MediaShelf(
            directory / MEDIA_NAME,
            media_index or MediaIndex(directory / MEDIA_NAME / "index"),
            minimum_free_bytes=settings.minimum_free_bytes,
        )
        self.settings = settings
        self._socket_directory = run_directory / "nbd"
        self._replicas: dict[str, Replica] = {}
        self._damaged: dict[str, LifeboatError] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._merging = Merging()

    # -- life --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load every replica and put away what a crash left. A broken record is reported, not touched."""
        await asyncio.to_thread(durable.make_directory, self.directory, 0o711)
        await self.media.start()
        for directory in sorted(self.directory.iterdir()):
            if not directory.is_dir() or directory.name == MEDIA_NAME:
                continue
            try:
                replica = await asyncio.to_thread(
                    Replica.load, directory, self._socket_directory, self.settings
                )
                if replica is None:
                    continue
                await replica.recover()
            except (LifeboatError, OSError) as error:
                logger.error("replica in %s: %s", directory, error)
                self._damaged[directory.name] = (
                    error if isinstance(error, LifeboatError) else LifeboatError(str(error))
                )
                continue
            if (directory / RECORD_NAME).exists():
                self._replicas[directory.name] = replica
                self._merging.begin(replica)

    async def stop(self) -> None:
        """End all streams and merges; half generations are discarded."""
        await self._merging.stop()
        for replica in self._replicas.values():
            await replica.end_streams({"generation", "seed", "digests"}, "the store is stopping")

    def register(self, channel: Channel) -> None:
        """Answer peers on ``channel``."""
        self.media.register(channel)
        channel.handle_call("store.status", self._answer_status)
        channel.handle_call("store.prepare", self.prepare)
        channel.handle_call("store.remove", self._answer_remove)
        channel.handle_call("store.allow_commit", self._answer_allow_commit)
        channel.handle_stream("generation", self._serve("generation", self._take_generation))
        channel.handle_stream("seed", self._serve("seed", receive_seed))
        channel.handle_stream("digests", self._serve("digests", serve_digests))

    def _serve(
        self, kind: str, handler: Callable[[Replica, Stream], Awaitable[None]]
    ) -> Callable[[Stream], Awaitable[None]]:
        async def serve(stream: Stream) -> None:
            replica = self._replica(stream.header.get("vm"))
            async with replica.stream_task(kind, alone=kind != "digests"):
                await handler(replica, stream)

        return serve

    async def _take_generation(self, replica: Replica, stream: Stream) -> None:
        sealed = await receive_generation(replica, stream)
        if sealed is not None:
            logger.info(
                "%s: sealed generation %d", replica.subject, sealed.generation,
                extra={"vm": replica.record.vm, "generation": sealed.generation},
            )  # fmt: skip
            self._merging.begin(replica)

    # -- asked by peers ----------------------------------------------------------------------------

    def _replica(self, vm: object) -> Replica:
        key = check_vm(vm)
        if key in self._damaged:
            raise self._damaged[key]
        replica = self._replicas.get(key)
        if replica is None:
            raise NotFound(f"VM {key}: no replica of it is here; protect it to make one")
        return replica

    def _lock(self, vm: str) -> asyncio.Lock:
        return self._locks.setdefault(vm, asyncio.Lock())

    async def _answer_status(self, _peer: str, parameters: dict[str, Any]) -> dict[str, Any]:
        return await self._told_status(check_vm(parameters.get("vm")))

    async def _told_status(self, vm: str) -> dict[str, Any]:
        if vm not in self._replicas and vm not in self._damaged:
            return {"vm": vm, "exists": False, "free_bytes": free_bytes(self.directory)}
        return await self.status(vm)

    async def prepare(self, peer: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """Create the replica, or accept the one that is there; answers its status.

        With ``check`` true nothing is changed and the answer is ``{"findings": [...]}``. Otherwise one
        finding is raised as its own error, several as InvalidInput with all of them.
        """
        vm = check_vm(parameters.get("vm"))
        name = str(parameters.get("name") or vm)
        disks = check_disks(parameters.get("disks"))
        try:
            epoch, needed = int(parameters["epoch"]), int(parameters.get("needed_bytes", 0))
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"VM {name}: store.prepare without a whole number for {error}") from error
        # None: a home of a release that does not say.
        protection = check_protection(parameters["protection"]) if "protection" in parameters else None
        async with self._lock(vm):
            errors = [self._damaged[vm]] if vm in self._damaged else []
            if not errors:
                errors = objections(
                    self._replicas.get(vm), self.directory, self.settings,
                    peer=peer, name=name, epoch=epoch, disks=disks, needed_bytes=needed,
                )  # fmt: skip
            findings = [finding(name, error) for error in errors]
            if parameters.get("check"):
                # How it stands, too: who goes on to protect the VM need not ask for that once more.
                stands = {} if vm in self._damaged else {"status": await self._told_status(vm)}
                return {"findings": [asdict(found) for found in findings], **stands}
            if len(errors) == 1:
                raise errors[0]
            if errors:
                raise InvalidInput(f"VM {name}: {len(errors)} things stand in the way", findings)
            present = replica = self._replicas.get(vm)
            if replica is None or replica.record.detached:
                replica = await self._create(peer, vm, name, epoch, disks)
            async with replica.changing:
                definition = await replica.keep_blob(str(parameters.get("definition", "")).encode())
                record = replace(replica.record, name=name, epoch=epoch, peer=peer, definition=definition)
                if protection is not None:
                    record = replace(record, protection=protection)
                if record != replica.record:
                    await replica.save(record)
            return {**await self.status(vm), "created": replica is not present}

    async def _create(self, peer: str, vm: str, name: str, epoch: int, disks: dict[str, int]) -> Replica:
        record = ReplicaRecord(
            vm=vm, name=name, peer=peer, epoch=epoch, disks=disks, seeding={}, layers={}
        )  # fmt: skip
        return await self._establish(record)

    async def _establish(self, record: ReplicaRecord) -> Replica:
        directory = self.directory / record.vm
        directory.mkdir(mode=0o711, exist_ok=True)
        await asyncio.to_thread(durable.sync_directory, self.directory)
        replica = Replica(directory, self._socket_directory, self.settings, record)
        await replica.save(record)
        self._replicas[record.vm] = replica
        return replica

    async def _answer_remove(self, peer: str, parameters: dict[str, Any]) -> dict[str, Any]:
        vm = check_vm(parameters.get("vm"))
        if vm not in self._replicas and vm not in self._damaged:
            return {"removed": False}
        replica = self._replica(vm)
        replica.check_peer(peer)
        if int(parameters.get("epoch", -1)) < replica.record.epoch:
            replica.check_epoch(int(parameters.get("epoch", -1)), "removing it")
        await self.remove(vm)
        return {"removed": True}

    async def _answer_allow_commit(self, peer: str, parameters: dict[str, Any]) -> dict[str, Any]:
        vm = check_vm(parameters.get("vm"))
        replica = self._replica(vm)
        replica.check_peer(peer)
        replica.check_epoch(int(parameters.get("epoch", -1)), "its landing")
        await self.allow_commit(vm)
        return {"commit_allowed": True}

    # -- asked by the other rooms ------------------------------------------------------------------

    async def status(self, vm: str) -> dict[str, Any]:
        """State of one replica. Raises NotFound, and IntegrityError on a broken record."""
        return await asyncio.to_thread(self._replica(vm).status)

    async def statuses(self) -> list[dict[str, Any]]:
        """All replicas, the damaged ones with state ``damaged``."""
        found = [await asyncio.to_thread(replica.status) for replica in list(self._replicas.values())]
        found += [
            {
                "vm": vm, "exists": True, "name": vm, "state": "damaged", "cause": error.cause,
                "sentence": error.message, "sealed": None, "seeding": None, "disks": {}, "generations": [],
            }
            for vm, error in self._damaged.items()
        ]  # fmt: skip
        return found

    async def depths(self, vm: str) -> dict[str, int]:
        """How many images lie on each other under each disk of the last sealed generation, below what was
        adopted, too; {} before the first one. Raises NotFound."""
        replica = self._replica(vm)
        record, sealed = replica.record, replica.record.sealed
        found: dict[str, int] = {}
        if sealed is None:
            return found
        for disk in sealed.disks:
            layers = record.chain(disk, sealed)
            base = layers[0]
            # What a VM left behind here may stand on more; nobody rewrites those meanwhile.
            below = (
                len(await images.info(replica.path(base.file), base.format, in_use=True)) - 1
                if base.foreign
                else 0
            )
            found[disk] = len(layers) + below
        return found

    async def remove(self, vm: str) -> None:
        """Delete a replica for good. Raises Conflict while an arrival uses it."""
        async with self._lock(vm):
            replica = self._replica(vm)
            if replica.record.frozen_epoch is not None:
                replica.check_writable()
            await self._merging.end(vm)
            await replica.end_streams({"generation", "seed", "digests"}, "the replica is being removed")
            async with replica.chain_lock.writing(), replica.changing:
                await replica.remove()
            del self._replicas[vm]

    async def freeze_for_arrival(self, vm: str, generation: int, epoch: int) -> ReplicaChain:
        """Hold the replica still at its last sealed generation, which must be ``generation``.

        Ends our own writers and readers, and refuses new ones until :meth:`thaw`, also after a restart.
        ``epoch`` is the one with which the VM arrives. Raises NotFound, StaleEpoch or Conflict.
        """
        async with self._lock(vm):
            replica = self._replica(vm)
            record = replica.record
            if record.detached or record.removing:
                replica.check_writable()
            if epoch < record.epoch or (record.frozen_epoch is not None and epoch < record.frozen_epoch):
                raise StaleEpoch(
                    f"{replica.subject}: an arrival of epoch {epoch}, it is of epoch {record.epoch}"
                )
            sealed = record.sealed
            if sealed is None or sealed.generation != generation:
                raise Conflict(
                    f"{replica.subject}: generation {generation} is not the last sealed one"
                    f" ({sealed.generation if sealed else 'none'}); send it first"
                )
            await self._merging.end(vm)
            await replica.end_streams({"generation", "seed", "digests"}, "the VM is about to arrive here")
            async with replica.chain_lock.writing(), replica.changing:
                if replica.record.sealed is not sealed:
                    raise Conflict(f"{replica.subject}: another generation was sealed meanwhile; ask again")
                await replica.save(replace(replica.record, frozen_epoch=epoch))
            return self._chain(replica, sealed)

    async def sealed_chain(self, vm: str, generation: int) -> ReplicaChain:
        """What a VM could be started from as it is now, which must be ``generation``. Raises NotFound,
        Conflict."""
        replica = self._replica(vm)
        sealed = replica.record.sealed
        if sealed is None or sealed.generation != generation:
            raise Conflict(
                f"{replica.subject}: generation {generation} is not the last sealed one; ask again"
            )
        return await asyncio.to_thread(self._chain, replica, sealed)

    def _chain(self, replica: Replica, sealed: SealedGeneration) -> ReplicaChain:
        tops = {disk: replica.reference(replica.record.chain(disk, sealed)[-1]) for disk in sealed.disks}
        attachments = {name: replica.directory / "blobs" / blob for name, blob in sealed.attachments.items()}
        definition = replica.blob(sealed.definition).decode()
        return ReplicaChain(tops, sealed.generation, sealed.epoch, definition, attachments)

    async def thaw(self, vm: str) -> None:
        """The arrival was rolled back: take generations again."""
        async with self._lock(vm):
            replica = self._replica(vm)
            async with replica.changing:
                if replica.record.frozen_epoch is not None:
                    await replica.save(replace(replica.record, frozen_epoch=None))
            await replica.recover()
            self._merging.begin(replica)

    async def adopt(
        self,
        vm: str,
        *,
        name: str,
        epoch: int,
        generation: int,
        checkpoint: str,
        disks: Mapping[str, ImageLike],
        definition: str,
        peer: str = "",
    ) -> None:
        """Make images that the VM left behind the bases of a replica at ``generation``. They stay untouched
        until :meth:`allow_commit`. Repeating is no error; any other replica of the VM is (Conflict)."""
        vm = check_vm(vm)
        check_disks({disk: image.size_bytes for disk, image in disks.items()})
        async with self._lock(vm):
            former = self._replicas.get(vm)
            if former is not None and not former.record.detached:
                if former.record.epoch == epoch and former.record.find(generation) is not None:
                    return
                raise Conflict(
                    f"{former.subject}: is here already (epoch {former.record.epoch}); remove it first"
                )
            layers: dict[str, tuple[Layer, ...]] = {
                disk: (
                    Layer(
                        str(Path(image.path).absolute()), image.format, epoch, generation,
                        rounded_size(image.size_bytes),
                    ),
                )
                for disk, image in disks.items()
            }  # fmt: skip
            sizes = {disk: image.size_bytes for disk, image in disks.items()}
            replica = Replica(
                self.directory / vm, self._socket_directory, self.settings,
                ReplicaRecord(vm=vm, name=name, peer=peer, epoch=epoch, disks=sizes),
            )  # fmt: skip
            replica.directory.mkdir(mode=0o711, exist_ok=True)
            blob = await replica.keep_blob(definition.encode())
            sealed = SealedGeneration(
                epoch=epoch, generation=generation, leads_from=generation, checkpoint=checkpoint, digest="",
                sealed_at=0.0, disks=sizes, definition=blob,
            )  # fmt: skip
            await self._establish(
                replace(
                    replica.record,
                    layers=layers,
                    generations=(sealed,),
                    definition=blob,
                    commit_allowed=False,
                )
            )

    async def allow_commit(self, vm: str) -> None:
        """The VM has landed at its other home: what it left behind may be written now."""
        async with self._lock(vm):
            replica = self._replica(vm)
            async with replica.changing:
                if not replica.record.commit_allowed:
                    await replica.save(replace(replica.record, commit_allowed=True))
            self._merging.begin(replica)

    async def detach(self, vm: str) -> dict[str, tuple[ImageReference, ...]]:
        """The replica is the VM's disk from now on: its record is history, its files are no longer ours.

        Returns each disk's chain, topmost first.
        """
        async with self._lock(vm):
            replica = self._replica(vm)
            record = replica.record
            sealed = record.sealed
            if sealed is None:
                raise Conflict(f"{replica.subject}: nothing is sealed, no VM can run on it")
            await self._merging.end(vm)
            await replica.end_streams({"generation", "seed", "digests"}, "the VM has landed here")
            if not record.detached:
                async with replica.chain_lock.writing(), replica.changing:
                    # The old home asks by this whether the VM has moved: before it starts or protects it.
                    epoch = max(replica.record.epoch, replica.record.frozen_epoch or 0)
                    await replica.save(replace(replica.record, detached=True, frozen_epoch=None, epoch=epoch))
            return {
                disk: tuple(replica.reference(layer) for layer in reversed(record.chain(disk, sealed)))
                for disk in sealed.disks
            }
