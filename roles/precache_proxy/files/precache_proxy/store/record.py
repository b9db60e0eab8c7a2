# SPDX-License-Identifier: GPL-3.0-or-later
"""replica.json: what is durable about a replica. Pure data; docs/on-disk-formats.md describes every key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from precache_proxy.errors import IntegrityError, InvalidInput
from precache_proxy.well_formed import require_well_formed

FORMAT = 1
_DISK_KEY = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,31}$")
_VM = re.compile(r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
_LARGEST_DISK_BYTES = 2**62


def check_vm(vm: object) -> str:
    """The UUID as it names a directory. Raises InvalidInput on anything else."""
    text = str(vm).lower()
    if not _VM.match(text):
        raise InvalidInput(f"VM {vm!r}: not a UUID; replicas are named by the VM's UUID")
    return text


def check_disks(disks: object) -> dict[str, int]:
    """Disk keys and sizes as another host sent them. Raises InvalidInput."""
    if not isinstance(disks, Mapping) or not 0 < len(disks) <= 1024:
        raise InvalidInput("disks: a map of 1 to 1024 disk keys to sizes was expected")
    for key, size in disks.items():
        if not isinstance(key, str) or not _DISK_KEY.match(key):
            raise InvalidInput(f"disk {key!r}: not a disk's target name such as vda")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= _LARGEST_DISK_BYTES:
            raise InvalidInput(f"disk {key}: size {size!r} is not a number of bytes")
    return dict(disks)


_PROTECTION: dict[str, tuple[type, ...]] = {
    "rpo_seconds": (int, float),
    "priority": (int,),
    "autostart": (bool,),
}


def check_protection(protection: object) -> dict[str, Any]:
    """What a home says that it was asked for; keys of newer releases are dropped. Raises InvalidInput."""
    if not isinstance(protection, Mapping):
        raise InvalidInput("protection: a map of rpo_seconds, priority and autostart was expected")
    told = {key: protection[key] for key in _PROTECTION if key in protection}
    for key, value in told.items():
        if not isinstance(value, _PROTECTION[key]) or isinstance(value, bool) is not (key == "autostart"):
            raise InvalidInput(f"protection: {key} {value!r} is not what it should be")
    return told


@dataclass(frozen=True, slots=True)
class Layer:
    """One image of a disk's chain. ``file`` is relative to the replica's directory, or absolute where the
    image is not the store's own. ``epoch`` and ``generation`` say up to when it holds changes; 0: fuzzy."""

    file: str
    format: str
    epoch: int
    generation: int
    size_bytes: int

    @property
    def foreign(self) -> bool:
        """Left behind by a VM and adopted: never deleted, written only after `allow_commit`."""
        return self.file.startswith("/")

    @property
    def order(self) -> tuple[int, int]:
        """Later layers compare greater."""
        return self.epoch, self.generation


@dataclass(frozen=True, slots=True)
class SealedGeneration:
    """``definition`` and ``attachments`` name blobs by their SHA-256."""

    epoch: int
    generation: int
    leads_from: int
    checkpoint: str
    digest: str
    sealed_at: float
    disks: dict[str, int]
    definition: str
    attachments: dict[str, str] = field(default_factory=dict)
    residual: bool = False
    data_bytes: int = 0
    zero_bytes: int = 0
    records: int = 0

    @property
    def order(self) -> tuple[int, int]:
        """Later generations compare greater."""
        return self.epoch, self.generation


@dataclass(frozen=True, slots=True)
class ReplicaRecord:
    """Never changed in place: a changed copy becomes the record once it is durable."""

    vm: str
    name: str
    peer: str
    epoch: int
    disks: dict[str, int]
    layers: dict[str, tuple[Layer, ...]] = field(default_factory=dict)
    generations: tuple[SealedGeneration, ...] = ()
    seeding: dict[str, int] = field(default_factory=dict)
    definition: str = ""
    garbage: tuple[str, ...] = ()
    frozen_epoch: int | None = None
    commit_allowed: bool = True
    detached: bool = False
    removing: bool = False
    # what its home asked for, should it never ask again: rpo_seconds, priority, autostart; {}: not said
    protection: dict[str, Any] = field(default_factory=dict)

    @property
    def sealed(self) -> SealedGeneration | None:
        """The newest sealed generation."""
        return self.generations[-1] if self.generations else None

    def find(self, generation: int) -> SealedGeneration | None:
        """A sealed generation that is still kept, by its number; the newest epoch's where two have it."""
        return next((entry for entry in reversed(self.generations) if entry.generation == generation), None)

    def chain(self, disk: str, at: SealedGeneration) -> tuple[Layer, ...]:
        """The layers, base first, that are the disk at a sealed generation."""
        return tuple(layer for layer in self.layers.get(disk, ()) if layer.order <= at.order)

    def without_disk(self, disk: str) -> ReplicaRecord:
        """The record when a disk's chain is given up, with the generations that are nothing without it."""
        layers = {key: chain for key, chain in self.layers.items() if key != disk}
        garbage = [layer.file for layer in self.layers.get(disk, ()) if not layer.foreign]
        return replace(
            self,
            layers=layers,
            generations=tuple(entry for entry in self.generations if disk not in entry.disks),
            seeding={key: offset for key, offset in self.seeding.items() if key != disk},
            garbage=(*self.garbage, *garbage),
        )

    def as_json(self) -> dict[str, Any]:
        """The content of replica.json."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, value: object, path: Path) -> ReplicaRecord:
        """Raises IntegrityError, naming the file, on what this release did not write."""
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            found = value.get("format") if isinstance(value, dict) else None
            raise IntegrityError(
                f"{path}: format {found!r}, this release knows {FORMAT}; install the release that wrote it"
            )
        try:
            data = {key: content for key, content in value.items() if key != "format"}
            data["layers"] = {
                check_key(disk): tuple(Layer(**layer) for layer in chain)
                for disk, chain in data["layers"].items()
            }
            data["generations"] = tuple(SealedGeneration(**entry) for entry in data["generations"])
            data["garbage"] = tuple(data["garbage"])
            record = cls(**data)
            require_well_formed(record, str(path))
            check_vm(record.vm)
        except (KeyError, TypeError, AttributeError, InvalidInput) as error:
            raise IntegrityError(
                f"{path}: not a replica's record ({error}); move it away and look into it"
            ) from error
        return record


def check_key(disk: str) -> str:
    """A disk key that may name a directory. Raises InvalidInput."""
    return next(iter(check_disks({disk: 1})))
