# SPDX-License-Identifier: GPL-3.0-or-later
"""A replica's chain as other rooms get it and give it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from precache_proxy.blocks.images import ImageReference


class ImageLike(Protocol):
    """An image file or device."""

    @property
    def path(self) -> Any: ...
    @property
    def format(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...


@dataclass(frozen=True)
class ReplicaChain(Mapping[str, ImageReference]):
    """The top of each disk's sealed chain, by disk key, and what else a VM needs to start from it."""

    tops: dict[str, ImageReference]
    generation: int
    epoch: int
    definition: str
    attachments: dict[str, Path]

    def __getitem__(self, disk: str) -> ImageReference:
        return self.tops[disk]

    def __iter__(self) -> Any:
        return iter(self.tops)

    def __len__(self) -> int:
        return len(self.tops)
