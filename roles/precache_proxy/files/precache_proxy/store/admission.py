# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a peer's VM may have its replica here: everything that stands in the way, at once."""

from __future__ import annotations

from pathlib import Path

from precache_proxy.blocks.images import rounded_size
from precache_proxy.errors import Conflict, Finding, LifeboatError, NoSpace, StaleEpoch
from precache_proxy.store.replica import Replica
from precache_proxy.store.settings import StoreSettings, require_space


def objections(
    replica: Replica | None,
    directory: Path,
    settings: StoreSettings,
    *,
    peer: str,
    name: str,
    epoch: int,
    disks: dict[str, int],
    needed_bytes: int,
) -> list[LifeboatError]:
    """The errors that store.prepare has to answer; none: go ahead. Changes nothing."""
    errors: list[LifeboatError] = []
    if replica is not None and not replica.record.detached:
        errors += _of_replica(replica, peer, epoch, disks)
        # A first copy that was cut goes on: what of it is here needs no room again.
        needed_bytes = max(0, needed_bytes - replica.allocated_bytes(disks))
    elif replica is not None and epoch < replica.record.epoch:
        errors.append(
            StaleEpoch(f"VM {name}: it has arrived here with epoch {replica.record.epoch}, not {epoch}")
        )
    try:
        require_space(f"replica of {name}", directory, needed_bytes, settings.minimum_free_bytes)
    except NoSpace as error:
        errors.append(error)
    return errors


def _of_replica(replica: Replica, peer: str, epoch: int, disks: dict[str, int]) -> list[LifeboatError]:
    errors: list[LifeboatError] = []
    record = replica.record
    try:
        replica.check_writable()
        if epoch < record.epoch:
            replica.check_epoch(epoch, "a VM")
        if epoch == record.epoch:
            replica.check_peer(peer)
    except LifeboatError as error:
        errors.append(error)
    for disk, size in disks.items():
        held = record.layers.get(disk, ())
        lasting = record.sealed is None or disk in record.sealed.disks
        if lasting and held and rounded_size(size) < held[-1].size_bytes:
            errors.append(
                Conflict(
                    f"{replica.disk_subject(disk)}: shrank from {held[-1].size_bytes} to {size} bytes;"
                    " unprotect the VM without keeping the replica and protect it again"
                )
            )
    return errors


def finding(name: str, error: LifeboatError) -> Finding:
    """An error's sentence (thing: fact; way out) as a finding."""
    subject, _unused, rest = error.message.partition(": ")
    fact, _unused, way_out = rest.rpartition("; ")
    return Finding(subject or name, fact or rest, way_out, error.cause)
