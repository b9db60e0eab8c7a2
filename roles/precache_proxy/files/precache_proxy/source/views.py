# SPDX-License-Identifier: GPL-3.0-or-later
"""A VM's disks at one instant, wherever that can be read: a pull backup of a running VM, or closed images."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from precache_proxy.blocks.export import open_export
from precache_proxy.blocks.images import ImageReference
from precache_proxy.blocks.nbd import NbdClient
from precache_proxy.errors import LifeboatError
from precache_proxy.source.backups import EXPORT_BITMAP, Backup, Backups
from precache_proxy.source.claims import ImageClaims
from precache_proxy.source.reader import DiskReader
from precache_proxy.source.totals import PassTotals
from precache_proxy.source.tracker import VmReference


@dataclass
class View:
    """Readers per disk. ``over()``: the slice shall end; ``cut()``: errors of readers mean just that."""

    readers: dict[str, DiskReader]
    over: Callable[[], bool] = field(default=lambda: False)
    cut: Callable[[], bool] = field(default=lambda: False)
    reason: Callable[[], str] = field(default=lambda: "")


class ViewSource(Protocol):
    """Opens one view after another. ``sliced``: a view may end before all was read."""

    sliced: bool

    def open(
        self, since: Mapping[str, str], checkpoint: str | None
    ) -> contextlib.AbstractAsyncContextManager[View]:
        """A view now. ``since``: per disk what changes are counted from; ``checkpoint`` begins with it."""


class RunningVm:
    """Views of a running (or paused) VM by pull backups."""

    sliced = True

    def __init__(
        self,
        backups: Backups,
        vm: VmReference,
        disks: list[str],
        absent: list[str],
        *,
        limit_seconds: float,
        totals: PassTotals,
    ) -> None:
        self._backups = backups
        self._vm = vm
        self._disks = disks
        self._absent = absent
        self._limit_seconds = limit_seconds
        self._totals = totals

    @contextlib.asynccontextmanager
    async def open(self, since: Mapping[str, str], checkpoint: str | None) -> AsyncIterator[View]:
        """See :class:`ViewSource`. Raises TrackingLost, NoSpace, Conflict, HypervisorError."""
        async with (
            self._backups.open(
                self._vm,
                disks=self._disks,
                absent=self._absent,
                incremental=since,
                checkpoint=checkpoint,
                limit_seconds=self._limit_seconds,
                totals=self._totals,
            ) as backup,
            _backup_readers(self._vm, backup) as readers,
        ):
            lease = backup.lease
            yield View(readers, lease.over.is_set, lambda: lease.aborted, lambda: lease.reason)


@contextlib.asynccontextmanager
async def _backup_readers(vm: VmReference, backup: Backup) -> AsyncIterator[dict[str, DiskReader]]:
    async with contextlib.AsyncExitStack() as stack:
        readers: dict[str, DiskReader] = {}
        for disk in backup.disks:
            bitmap = EXPORT_BITMAP if disk in backup.incremental else None
            client = await NbdClient.connect(
                backup.socket, disk, DiskReader.contexts(bitmap), subject=f"{vm} disk {disk}"
            )
            await stack.enter_async_context(client)
            readers[disk] = DiskReader(client, bitmap)
        yield readers


class ClosedImages:
    """Views of images that no QEMU writes to: shut-off VMs, frozen layers. They last until they are read.

    Where QEMU may want to open them for writing, ``claims`` let the libvirt hook end our readers.
    """

    sliced = False

    def __init__(
        self,
        vm: VmReference,
        images: Mapping[str, ImageReference],
        *,
        socket_directory: Path,
        claims: ImageClaims | None = None,
        top_layers: bool = False,
    ) -> None:
        self._vm = vm
        self._images = dict(images)
        self._socket_directory = socket_directory
        self._claims = claims
        # what counts as changed is what the topmost layer of each image holds itself
        self._top_layers = top_layers

    @contextlib.asynccontextmanager
    async def open(self, since: Mapping[str, str], checkpoint: str | None) -> AsyncIterator[View]:
        """See :class:`ViewSource`; ``since`` names bitmaps in the images, ``checkpoint`` is not made here.

        Raises VmStateChanged where the VM was started meanwhile.
        """
        del checkpoint
        claims = self._claims
        try:
            async with contextlib.AsyncExitStack() as stack:
                readers: dict[str, DiskReader] = {}
                for disk, image in self._images.items():
                    readers[disk] = await self._read(stack, disk, image, since.get(disk))
                yield View(readers)
        except LifeboatError:
            if claims is not None:
                await claims.blame_start()
            raise
        finally:
            if claims is not None:
                await claims.forget_ended()

    async def _read(
        self, stack: contextlib.AsyncExitStack, disk: str, image: ImageReference, bitmap: str | None
    ) -> DiskReader:
        export = await open_export(
            image.path,
            format=image.format,
            socket_directory=self._socket_directory,
            bitmap=bitmap,
            allocation_depth=self._top_layers,
            name="read",
            admit=None if self._claims is None else self._claims.admit_reader,
        )
        stack.push_async_callback(export.kill)
        client = await NbdClient.connect(
            export.socket,
            "",
            DiskReader.contexts(bitmap, top_layer=self._top_layers),
            subject=f"{self._vm} disk {disk}",
        )
        await stack.enter_async_context(client)
        return DiskReader(client, bitmap, top_layer=self._top_layers)
