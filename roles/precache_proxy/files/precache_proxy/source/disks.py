# SPDX-License-Identifier: GPL-3.0-or-later
"""A protected VM's disks as they are now: which go along, how large they are, how they are read."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Mapping

from precache_proxy.blocks import images
from precache_proxy.blocks.images import ImageReference
from precache_proxy.errors import TrackingLost, VmStateChanged
from precache_proxy.hypervisor.domain_xml import Definition, Disk
from precache_proxy.hypervisor.handles import DomainHandle
from precache_proxy.source import offline
from precache_proxy.source.claims import ImageClaims
from precache_proxy.source.environment import Environment
from precache_proxy.source.layout import Layout, plan_layout
from precache_proxy.source.media import MediaCourier
from precache_proxy.source.record import DiskRecord, ProtectionRecord
from precache_proxy.source.totals import PassTotals
from precache_proxy.source.tracker import VmReference, says_if_undefined
from precache_proxy.source.views import ClosedImages, RunningVm, ViewSource

logger = logging.getLogger(__name__)


class VmDisks:
    """Looks at one VM. ``refused``: disks that could not be protected when it was last looked at."""

    def __init__(self, record: ProtectionRecord, environment: Environment, totals: PassTotals) -> None:
        self.refused: list[str] = []
        self.media = MediaCourier(environment, record)
        self._record = record
        self._environment = environment
        self._totals = totals

    @property
    def vm(self) -> VmReference:
        """The VM for libvirt and for people."""
        return VmReference(self._record.uuid, self._record.name)

    @property
    def claims(self) -> ImageClaims:
        """What our processes need that open images of the VM while it is off."""
        return ImageClaims(self._environment.run_directory, self.vm, self.is_active)

    async def is_active(self) -> bool:
        """Whether the VM has a QEMU process."""
        async with self._domain() as domain:
            return await self._environment.hypervisor.is_active(domain, subject=str(self.vm))

    @contextlib.asynccontextmanager
    async def unchanged(self, *, active: bool) -> AsyncIterator[None]:
        """Tracking may only seem to be lost where the VM was started or shut off since it was looked at: that
        raises VmStateChanged then, and no resync follows."""
        try:
            yield
        except TrackingLost as error:
            if await self.is_active() != active:
                what = "shut off" if active else "started"
                raise VmStateChanged(f"{self.vm}: it was {what} while it was looked at; ask again") from error
            raise

    @contextlib.asynccontextmanager
    async def _domain(self) -> AsyncIterator[DomainHandle]:
        with says_if_undefined(self.vm):
            yield await self._environment.hypervisor.lookup(self._record.uuid)

    async def look(self) -> tuple[Definition, Layout, bool]:
        """The VM's definition, which disks go along, and whether it runs; a new name is taken over."""
        async with self._domain() as domain:
            definition = await self._environment.hypervisor.definition_of(domain, subject=str(self.vm))
        if definition.name != self._record.name:
            logger.info("%s is called %s now", self.vm, definition.name)
            self._record.name = definition.name
            await self._record.save(self._environment.directory)
        layout = plan_layout(definition, self._record.only_disks)
        self.refused = layout.refused
        self.media.look(layout.static)
        return definition, layout, bool(definition.running_id)

    def check_images(self, layout: Layout) -> None:
        """Raise TrackingLost where an image is not the one whose changes were counted."""
        for target, disk in layout.tracked.items():
            known = self._record.disks.get(target)
            if known is None:
                continue
            below = {image.path for image in disk.backing}
            swapped = disk.path != known.path and known.path not in below and disk.path not in known.chain
            replaced = disk.path == known.path and known.inode not in {0, offline.inode(disk.path)}
            if swapped or replaced:
                now = "another file under the same name" if replaced else disk.path
                raise TrackingLost(
                    f"{self.vm} disk {target}: its image was {known.path} and is {now} now; "
                    "what differs is found by digest"
                )

    def source(self, layout: Layout, *, active: bool) -> ViewSource:
        """Where the tracked disks are read: from QEMU while it has them, else from the images."""
        if active:
            return RunningVm(
                self._environment.backups,
                self.vm,
                list(layout.tracked),
                layout.absent,
                limit_seconds=self._environment.settings.pass_limit_seconds,
                totals=self._totals,
            )
        return self.closed(layout.tracked)

    def closed(self, disks: Mapping[str, Disk]) -> ClosedImages:
        """Images that no QEMU writes to; the libvirt hook can end their readers."""
        run = self._environment.run_directory
        references = {
            target: ImageReference(offline.path(disk.path), disk.format, 0) for target, disk in disks.items()
        }
        return ClosedImages(
            self.vm,
            references,
            socket_directory=run / "nbd",
            claims=self.claims,
        )

    def records(self, layout: Layout, sizes: Mapping[str, int]) -> dict[str, DiskRecord]:
        """What the protection's record says of the disks as they are now."""
        return {
            target: DiskRecord(
                disk.path,
                sizes.get(target, 0),
                inode=offline.inode(disk.path),
                chain=[image.path for image in disk.backing],
            )
            for target, disk in layout.tracked.items()
        }

    async def sizes(
        self, definition: Definition, disks: Mapping[str, Disk], *, active: bool
    ) -> dict[str, int]:
        """Sizes in bytes as the guest sees the disks."""
        hypervisor = self._environment.hypervisor
        sizes: dict[str, int] = {}
        live = [target for target, disk in disks.items() if active and disk.device == "disk"]
        if live:
            domain = await hypervisor.lookup(definition.uuid)

            def ask() -> dict[str, int]:
                return {target: int(domain.blockInfo(target)[0]) for target in live}

            sizes = await hypervisor.call(ask, subject=str(self.vm))
        for target, disk in disks.items():
            if target not in sizes:
                described = await images.info(offline.path(disk.path), disk.format, in_use=True)
                sizes[target] = described[0].size_bytes
        return sizes

    @staticmethod
    async def first_copy_bytes(layout: Layout, sizes: Mapping[str, int]) -> int:
        """What the first copy of all tracked disks takes at most."""
        return sum(
            [await offline.first_copy_bytes(disk, sizes[target]) for target, disk in layout.tracked.items()]
        )

    async def transferable_xml(self) -> str:
        """The persistent definition as another host takes it."""
        async with self._domain() as domain:
            return await self._environment.hypervisor.transferable_xml(domain, subject=str(self.vm))
