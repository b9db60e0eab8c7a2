# SPDX-License-Identifier: GPL-3.0-or-later
"""The epoch that a VM had here, kept beyond its protection: peers refuse older ones, and rightly."""

from __future__ import annotations

from pathlib import Path

from precache_proxy import durable
from precache_proxy.errors import IntegrityError


def _path(directory: Path, uuid: str) -> Path:
    return directory / "epochs" / f"{uuid}.json"


def last_epoch(directory: Path, uuid: str) -> int:
    """The VM's epoch, 0 where it never moved (blocking). Raises IntegrityError on a broken file."""
    path = _path(directory, uuid)
    kept = durable.read_json(path)
    try:
        return 0 if kept is None else int(kept["epoch"])
    except (TypeError, KeyError, ValueError) as error:
        raise IntegrityError(f"{path}: tells no epoch ({error}); see what wrote it") from error


def keep_epoch(directory: Path, uuid: str, epoch: int) -> None:
    """Make it durable (blocking); the first epoch need not be kept."""
    if epoch:
        path = _path(directory, uuid)
        durable.make_directory(path.parent, 0o750)
        durable.write_json(path, {"epoch": epoch})
