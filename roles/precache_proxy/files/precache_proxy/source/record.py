# SPDX-License-Identifier: GPL-3.0-or-later
"""The durable record of a protected VM: /var/lib/lifeboat/source/<uuid>.json."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from precache_proxy import durable
from precache_proxy.errors import IntegrityError, NoSpace
from precache_proxy.well_formed import require_well_formed

FORMAT_VERSION = 1


@dataclass
class DiskRecord:
    """A disk whose changes are counted. ``inode`` tells an image that was swapped under the same name."""

    path: str
    size_bytes: int
    inode: int = 0
    # the images below it then: the disk may come to live in one of them, when layers are merged
    chain: list[str] = field(default_factory=list)


@dataclass
class Sealed:
    """The generation that the peer holds for sure, and the checkpoint that counts from its instant."""

    generation: int
    checkpoint: str
    sealed_at: float
    # when its instant was, by this host's clock
    source_time: float
    digest: str = ""
    # disks that the checkpoint covers
    disks: list[str] = field(default_factory=list)


@dataclass
class ProtectionRecord:
    """What must survive a restart of the proxy. Written whole at every change of meaning."""

    uuid: str
    name: str
    peer: str
    rpo_seconds: float
    priority: int = 0
    epoch: int = 0
    # None: all disks, whichever the VM has
    only_disks: list[str] | None = None
    raw_overlay_consent: bool = False
    autostart: bool = False
    # seeding: the checkpoint that counts since before the first block was read
    seeding_checkpoint: str = ""
    seeding_offsets: dict[str, int] = field(default_factory=dict)
    # resync: why tracking was lost, "" where it was not
    resync_cause: str = ""
    sealed: Sealed | None = None
    disks: dict[str, DiskRecord] = field(default_factory=dict)
    attachments: dict[str, str] = field(default_factory=dict)
    # a shut-off VM: what its images looked like when they were last passed
    passed_off: dict[str, str] = field(default_factory=dict)
    scrub_offsets: dict[str, int] = field(default_factory=dict)
    scrub_turns: int = 0
    # blocks that differed: ever, in this turn, in the last whole one
    scrub_differences: int = 0
    scrub_turn_differences: int = 0
    scrub_last_turn_differences: int = 0
    # the way back, until its first generation is sealed: per disk the image (path, format, bytes) whose own
    # clusters are that generation, the generation that the old home kept, and what counts since
    return_overlays: dict[str, list[Any]] = field(default_factory=dict)
    return_generation: int = 0
    return_checkpoint: str = ""
    format: int = FORMAT_VERSION

    @property
    def next_generation(self) -> int:
        """The number of the generation that the next pass makes."""
        return 1 if self.sealed is None else self.sealed.generation + 1

    def write(self, directory: Path) -> None:
        """Make it durable (blocking). Raises NoSpace; then the record is what it was."""
        path = directory / f"{self.uuid}.json"
        try:
            durable.write_json(path, asdict(self))
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            raise NoSpace(
                f"VM {self.name}: no space left on {directory} for the record of its protection; "
                "free space there: until then it is not passed"
            ) from error

    async def save(self, directory: Path) -> None:
        """:meth:`write`, in a thread and to its end: a record that is removed after that stays removed."""
        await durable.to_its_end(partial(self.write, directory))

    def remove(self, directory: Path) -> None:
        """Forget it for good (blocking)."""
        durable.remove(directory / f"{self.uuid}.json")

    @classmethod
    def read(cls, path: Path) -> ProtectionRecord | None:
        """The record in ``path`` or None. Raises IntegrityError where it is none of ours."""
        value = durable.read_json(path)
        if value is None:
            return None
        try:
            record = cls.from_dict(value)
            require_well_formed(record, str(path))
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise IntegrityError(f"{path}: not a record of this release ({error})") from error
        if record.format != FORMAT_VERSION or record.uuid != path.stem:
            found = f"format {record.format}" if record.uuid == path.stem else f"of VM {record.uuid}"
            raise IntegrityError(f"{path}: not a record of this release ({found})")
        return record

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ProtectionRecord:
        """From the JSON form; keys of newer versions are dropped."""
        known = {item.name for item in fields(cls)}
        data = {key: content for key, content in value.items() if key in known}
        if data.get("sealed") is not None:
            data["sealed"] = Sealed(**data["sealed"])
        names = {item.name for item in fields(DiskRecord)}
        data["disks"] = {
            key: DiskRecord(**{name: content[name] for name in names & content.keys()})
            for key, content in data.get("disks", {}).items()
        }
        return cls(**data)
