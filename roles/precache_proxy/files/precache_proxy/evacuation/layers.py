# SPDX-License-Identifier: GPL-3.0-or-later
"""Layers of a running VM's disks: put an overlay on, merge layers, drop bitmaps that nobody follows."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import libvirt

from precache_proxy import durable
from precache_proxy.errors import HypervisorError, NotFound
from precache_proxy.evacuation.domain_edit import replaced_paths
from precache_proxy.evacuation.domains import Domains
from precache_proxy.hypervisor.domain_xml import Definition

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
# Where libvirt of a host keeps persistent definitions of QEMU's VMs.
DEFINITIONS_DIRECTORY = Path("/etc/libvirt/qemu")
_SNAPSHOT_FLAGS = (
    libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
)


def _snapshot_xml(overlays: Mapping[str, str], all_targets: Iterable[str]) -> str:
    lines = ["<domainsnapshot><disks>"]
    for target in all_targets:
        if target in overlays:
            lines.append(
                f"<disk name={quoteattr(target)} snapshot='external' type='file'><driver type='qcow2'/>"
                f"<source file={quoteattr(overlays[target])}/></disk>"
            )
        else:
            lines.append(f"<disk name={quoteattr(target)} snapshot='no'/>")
    return "".join([*lines, "</disks></domainsnapshot>"])


async def put_overlays(
    domains: Domains,
    vm: str,
    overlays: Mapping[str, str],
    definition: Definition | None = None,
    *,
    made: bool = False,
) -> None:
    """One atomic external snapshot: from now on each disk of ``overlays`` writes to its overlay.

    The bitmaps of known checkpoints go on in the overlays; what stood before stands still, flushed.
    Their names are durable when this returns, and the definition that names them. ``definition``: where it is
    known already, for the names of its disks. ``made``: the files are there, empty and on the right image.
    Raises HypervisorError; then libvirt has changed nothing.
    """
    definition = definition or await domains.definition(vm)
    targets = [disk.target for disk in definition.disks]
    xml = _snapshot_xml(overlays, targets)
    flags = _SNAPSHOT_FLAGS | (libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT if made else 0)
    await domains.run_in_turn(vm, lambda domain: domain.snapshotCreateXML(xml, flags))
    await asyncio.to_thread(sync_names, overlays.values())


def sync_names(paths: Iterable[str | Path]) -> None:
    """What is in the VM's chain since just now is durably named: the files, and by the definition (blocking).

    QEMU syncs what the guest wrote, never the directory: a power cut could take the file's name.
    """
    durable.sync_parents(paths)
    sync_definitions()


def sync_definitions() -> None:
    """Persistent definitions are as libvirt says they are, power cut or not (blocking). Raises OSError.

    libvirt syncs a definition that it changes, and leaves its new name to the kernel (virFileRewrite). One
    from before a freeze starts the VM without what it wrote since; one from before a merge starts it from a
    layer that is no longer written, or is gone. Images often lie on another file system than definitions:
    what a guest syncs does not bring those to the disk.
    """
    with contextlib.suppress(FileNotFoundError):
        durable.sync_directory(DEFINITIONS_DIRECTORY)


async def name_in_definition(domains: Domains, vm: str, paths: Mapping[str, tuple[str, str]]) -> None:
    """Have the VM's next start use these images (target -> path, format); durable when this returns.

    What runs is left as it is. A VM that has no persistent definition has nothing to start from and is left,
    too. Raises HypervisorError, NotFound, OSError.
    """
    if not await domains.is_persistent(vm):
        return
    edited = replaced_paths(await domains.xml(vm, inactive=True), paths)
    await domains.define(edited, vm)
    await asyncio.to_thread(sync_definitions)


async def forget_definition(domains: Domains, vm: str) -> None:
    """Have libvirt forget the VM's definition for good; files stay. One that is not defined is no error.

    libvirt unlinks without a sync. A definition that a power cut brings back names files that are gone, and
    the VM's next arrival here would be refused for it. Synced also where it was gone before: by a run of this
    that a kill ended in between. Raises HypervisorError, OSError.
    """
    await domains.undefine(vm)

    def sync() -> None:
        sync_definitions()
        # A link that comes back would be the autostart of the next definition of that name.
        with contextlib.suppress(FileNotFoundError):
            durable.sync_directory(DEFINITIONS_DIRECTORY / "autostart")

    await asyncio.to_thread(sync)


async def create_checkpoint(
    domains: Domains, vm: str, name: str, targets: Iterable[str], definition: Definition | None = None
) -> None:
    """Track the VM's writes from this instant under ``name``; one that exists is no error. ``definition``: as
    of :func:`put_overlays`."""
    wanted = set(targets)
    definition = definition or await domains.definition(vm)
    disks = "".join(
        f"<disk name={quoteattr(disk.target)} checkpoint='{'bitmap' if disk.target in wanted else 'no'}'/>"
        for disk in definition.disks
    )
    xml = f"<domaincheckpoint><name>{escape(name)}</name><disks>{disks}</disks></domaincheckpoint>"

    def work(domain: Any) -> None:
        if any(checkpoint.getName() == name for checkpoint in domain.listAllCheckpoints(0)):
            return
        domain.checkpointCreateXML(xml, 0)

    await domains.run_in_turn(vm, work)


async def has_checkpoint(domains: Domains, vm: str, name: str) -> bool:
    """Whether the VM's writes are tracked under ``name``."""
    return await domains.run_in_turn(
        vm, lambda domain: any(checkpoint.getName() == name for checkpoint in domain.listAllCheckpoints(0))
    )


async def drop_stray_bitmaps(domains: Domains, vm: str, names: Mapping[str, Iterable[str]]) -> None:
    """Remove bitmaps (name -> targets that carry it) of which libvirt has no checkpoint, in all layers.

    libvirt forgets checkpoints when a VM moves, but the bitmaps travel along. They are introduced to it again
    as
    checkpoints and deleted with its own means; a bitmap that is on fewer disks than thought only costs a
    warning.
    """
    for name, targets in names.items():

        def work(domain: Any, name: str = name, wanted: frozenset[str] = frozenset(targets)) -> None:
            known = {checkpoint.getName() for checkpoint in domain.listAllCheckpoints(0)}
            if name not in known:
                disks = "".join(
                    f"<disk name={quoteattr(target)} checkpoint='bitmap' bitmap={quoteattr(name)}/>"
                    for target in sorted(wanted)
                )
                xml = (
                    f"<domaincheckpoint><name>{escape(name)}</name><creationTime>1</creationTime>"
                    f"<disks>{disks}</disks>{domain.XMLDesc(0)}</domaincheckpoint>"
                )
                domain.checkpointCreateXML(xml, libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE)
            domain.checkpointLookupByName(name).delete(0)

        try:
            await domains.run_in_turn(vm, work)
        except (HypervisorError, NotFound) as error:
            logger.warning("VM %s: stray bitmap %s stays: %s", vm, name, error)
            await _forget_checkpoint(domains, vm, name)


async def _forget_checkpoint(domains: Domains, vm: str, name: str) -> None:
    def work(domain: Any) -> None:
        domain.checkpointLookupByName(name).delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)

    with contextlib.suppress(HypervisorError, NotFound):
        await domains.run_in_turn(vm, work)


async def commit(
    domains: Domains, vm: str, target: str, *, top: str | None, base: str, bandwidth_bytes_per_second: int = 0
) -> None:
    """Merge the layers from ``top`` (None: the active one) down into ``base`` while the VM runs.

    A job that an earlier attempt left behind is carried on with. Ends when the layer ``base`` has taken their
    place.
    Raises HypervisorError; the chain is then as before or as after, never between.
    """
    active = top is None
    flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_BANDWIDTH_BYTES
    if active:
        flags |= libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE

    def begin(domain: Any) -> None:
        if not domain.blockJobInfo(target, 0):
            domain.blockCommit(target, base, top, bandwidth_bytes_per_second, flags)

    await domains.run_in_turn(vm, begin)
    await _finish_block_job(domains, vm, target)


async def _finish_block_job(domains: Domains, vm: str, target: str) -> None:
    """Wait for the block job on a disk; pivot when it has caught up and is one that needs that."""

    def step(domain: Any) -> bool:
        information = domain.blockJobInfo(target, 0)
        if not information:
            return True
        caught_up = information["end"] > 0 and information["cur"] == information["end"]
        if caught_up and information["type"] in {
            libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT,
            libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COPY,
        }:
            try:
                domain.blockJobAbort(target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
            except libvirt.libvirtError as error:
                # QEMU says "ready" a moment after the figures do: ask again then.
                if error.get_error_code() != libvirt.VIR_ERR_BLOCK_COPY_ACTIVE:
                    raise
                return False
            return True
        return False

    while not await domains.run_in_turn(vm, step, timeout_seconds=120):  # noqa: ASYNC110
        await asyncio.sleep(POLL_SECONDS)


async def cancel_block_jobs(domains: Domains, vm: str, targets: Iterable[str]) -> None:
    """End block jobs (a mirror of a failed migration, a commit of a landing) without taking their result."""
    for target in targets:

        def work(domain: Any, target: str = target) -> None:
            if domain.blockJobInfo(target, 0):
                domain.blockJobAbort(target, 0)

        with contextlib.suppress(HypervisorError, NotFound):
            await domains.run_in_turn(vm, work)


async def wait_for_layer(
    domains: Domains, vm: str, target: str, path: str, timeout_seconds: float = 30
) -> None:
    """Wait until ``path`` is the disk's active layer. Raises HypervisorError when it does not become so."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        definition = await domains.definition(vm)
        disk = definition.disk(target)
        if disk is not None and disk.path == path and not disk.mirror:
            return
        if time.monotonic() > deadline:
            found = "no such disk" if disk is None else disk.path
            raise HypervisorError(
                f"VM {definition.name}, disk {target}: its active layer is {found}, not {path}, "
                f"{timeout_seconds:.0f} s after the merge; see `virsh domblklist` and `virsh blockjob`"
            )
        await asyncio.sleep(POLL_SECONDS)
