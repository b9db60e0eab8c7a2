# SPDX-License-Identifier: GPL-3.0-or-later
"""What an evacuation needs of the rooms beside it. They satisfy this by their shape; tests may stand in for
them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from precache_proxy.source.feeder import Pace
from precache_proxy.store.chains import ReplicaChain
from precache_proxy.store.media import MediaShelf


class ImageLike(Protocol):
    """An image file or device."""

    @property
    def path(self) -> Any: ...
    @property
    def format(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...


class StoreRoom(Protocol):
    """The replicas held here."""

    media: MediaShelf

    async def status(self, vm: str) -> dict[str, Any]:
        """State of a replica."""

    async def statuses(self) -> list[dict[str, Any]]:
        """State of every replica."""

    async def depths(self, vm: str) -> Mapping[str, int]:
        """How many images lie on each other under each of a replica's disks. Raises NotFound."""

    async def sealed_chain(self, vm: str, generation: int) -> ReplicaChain:
        """What :meth:`freeze_for_arrival` would answer; holds nothing still."""

    async def freeze_for_arrival(self, vm: str, generation: int, epoch: int) -> ReplicaChain:
        """Close our writers; the top of each disk's sealed chain, and what goes along beside the disks."""

    async def thaw(self, vm: str) -> None:
        """Take generations again."""

    async def adopt(
        self,
        vm: str,
        *,
        name: str,
        epoch: int,
        generation: int,
        checkpoint: str,
        disks: Mapping[str, Any],
        definition: str,
        peer: str,
    ) -> None:
        """Take images that a VM left behind as the base of a replica, untouched."""

    async def detach(self, vm: str) -> Mapping[str, Sequence[ImageLike]]:
        """Let the replica's files be the VM's own from now on; its chains, topmost first."""


class SourceRoom(Protocol):
    """The protection of the VMs that run here."""

    def status(self, vm: str) -> dict[str, Any]:
        """State of a protection. Raises NotFound."""

    async def run_pass(self, vm: str, *, reason: str, leave_bytes: int = 0) -> Any:
        """One pass, where more than ``leave_bytes`` changed; its PassResult."""

    def libvirt_stands_still(self) -> bool:
        """Whether the end of a pass's backup job is overdue: another one begun now would wait for it."""

    def hold_from_start(self, vm: str, holder: str) -> None:
        """The same for passes that would begin as soon as the room is started; called before that."""

    async def hold(self, vm: str, holder: str) -> None:
        """No periodic passes while held."""

    def pace(self, vm: str, pace: Pace) -> None:
        """What passes and the residual of a held VM may put on the wire, until nobody holds it."""

    async def release(self, vm: str, holder: str) -> None:
        """Periodic passes again."""

    async def send_residual(self, vm: str, frozen: Mapping[str, Any], bitmap: str, definition: str) -> Any:
        """What the frozen images hold beyond the last generation; its PassResult."""

    async def after_rollback(self, vm: str) -> None:
        """The VM runs on here: protect it as before."""

    async def handed_over(self, vm: str) -> None:
        """The VM has left: forget its protection."""

    async def adopt_for_return(self, vm: str, **what: Any) -> Any:
        """Protect a VM that has arrived towards its old home."""
