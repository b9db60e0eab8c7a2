# SPDX-License-Identifier: GPL-3.0-or-later
"""What an evacuation asks of libvirt about one domain, as coroutines over the blocking binding."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import libvirt

from precache_proxy.errors import HypervisorError, NotFound
from precache_proxy.evacuation.late_pause import Standing
from precache_proxy.evacuation.reconcile import Life, Presence
from precache_proxy.hypervisor.connection import Hypervisor
from precache_proxy.hypervisor.domain_xml import Definition, parse_definition
from precache_proxy.hypervisor.events import DomainEvent

T = TypeVar("T")

_WANTED_OFF = {libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN, libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED}
_ALIVE = {
    libvirt.VIR_DOMAIN_RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED,
    libvirt.VIR_DOMAIN_PMSUSPENDED,
    libvirt.VIR_DOMAIN_SHUTDOWN,
}
# What a pause of ours is called: in a migration, and where a libvirtd that came anew found its QEMU stopped.
_MAY_BE_OURS = {
    libvirt.VIR_DOMAIN_PAUSED_USER,
    libvirt.VIR_DOMAIN_PAUSED_MIGRATION,
    libvirt.VIR_DOMAIN_PAUSED_UNKNOWN,
}
UNDEFINE_FLAGS = (
    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    # The variable store went along in the migration stream; kept here it is what a return overwrites.
    | libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM
)
_KEEP_TPM = getattr(libvirt, "VIR_DOMAIN_UNDEFINE_KEEP_TPM", 0)


def presence_of(state: int, reason: int, job_type: int) -> Presence:
    """Libvirt's state, reason and kind of job under way, in our words."""
    if state in _ALIVE:
        return Presence.RUNNING
    if state == libvirt.VIR_DOMAIN_PAUSED:
        # An incoming migration that is not over: it vanishes by itself if its source gives up.
        if reason in {libvirt.VIR_DOMAIN_PAUSED_MIGRATION, libvirt.VIR_DOMAIN_PAUSED_STARTING_UP}:
            return Presence.INCOMING
        if job_type not in {libvirt.VIR_DOMAIN_JOB_NONE, libvirt.VIR_DOMAIN_JOB_COMPLETED}:
            return Presence.INCOMING
        return Presence.ARRIVED
    if state in {libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_CRASHED}:
        off_on_purpose = state == libvirt.VIR_DOMAIN_SHUTOFF and reason in _WANTED_OFF
        return Presence.ENDED if off_on_purpose else Presence.SHUT_OFF
    return Presence.UNKNOWN


def _is_migrating(domain: Any) -> bool:
    operation = domain.jobStats().get("operation")
    return bool(operation == libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT)


class Domains:
    """libvirt on this host, as an evacuation needs it. ``vm`` is a UUID everywhere."""

    def __init__(self, hypervisor: Hypervisor) -> None:
        self.hypervisor = hypervisor

    async def run(self, vm: str, function: Callable[[Any], T], *, timeout_seconds: float | None = 60.0) -> T:
        """Run a blocking function on the domain. Raises NotFound, HypervisorError."""
        connection = self.hypervisor.connection

        def work() -> T:
            return function(connection.lookupByUUIDString(vm))

        return await self.hypervisor.call(work, subject=f"VM {vm}", timeout_seconds=timeout_seconds)

    async def run_in_turn(
        self, vm: str, function: Callable[[Any], T], *, timeout_seconds: float | None = 60.0
    ) -> T:
        """:meth:`run` for what touches checkpoints or layers: never beside another such call on the VM."""
        connection = self.hypervisor.connection

        def work() -> T:
            return function(connection.lookupByUUIDString(vm))

        return await self.hypervisor.call_in_turn(
            vm, work, subject=f"VM {vm}", timeout_seconds=timeout_seconds
        )

    async def presence(self, vm: str, *, arrives: bool = True) -> Presence:
        """What libvirt says of the VM here; UNKNOWN when libvirt does not answer.

        ``arrives``: whether a paused one may be an arrival that is not over. Only its QEMU can tell that.
        """

        def ask(domain: Any) -> Presence:
            state, reason = domain.state()
            job_type = libvirt.VIR_DOMAIN_JOB_NONE
            if state == libvirt.VIR_DOMAIN_PAUSED and arrives:
                with contextlib.suppress(libvirt.libvirtError):
                    job_type = domain.jobInfo()[0]
            return presence_of(state, reason, job_type)

        try:
            return await self.run(vm, ask, timeout_seconds=20)
        except NotFound:
            return Presence.ABSENT
        except HypervisorError:
            return Presence.UNKNOWN

    async def life(self, vm: str) -> Life:
        """Which run of the VM this is, and how it ended; UNKNOWN when libvirt does not answer."""

        def ask(domain: Any) -> Life:
            number = int(domain.ID()) if domain.isActive() else None
            # Asked last: how it ended is told though it ends just now.
            state, reason = domain.state()
            off = state == libvirt.VIR_DOMAIN_SHUTOFF
            if number is None and not off:
                return Life(Presence.UNKNOWN)
            in_order = off and reason == libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN
            presence = presence_of(state, reason, libvirt.VIR_DOMAIN_JOB_NONE)
            return Life(presence, None if off else number, in_order)

        try:
            return await self.run(vm, ask, timeout_seconds=20)
        except NotFound:
            return Life(Presence.ABSENT)
        except HypervisorError:
            return Life(Presence.UNKNOWN)

    async def presence_at_source(self, vm: str) -> Presence:
        """:meth:`presence` for the side that the VM leaves: a paused VM there is just a paused one, and its
        QEMU, which may be halted (emulator.py), is not asked."""
        found = await self.presence(vm, arrives=False)
        return Presence.PAUSED if found in {Presence.ARRIVED, Presence.INCOMING} else found

    def on_lifecycle(self, vm: str, tell: Callable[[str, int], None]) -> Callable[[], None]:
        """Have ``tell`` called with the word and the detail (libvirt's number) of each lifecycle event of the
        VM; the answer ends that."""

        def on_event(event: DomainEvent) -> None:
            if event.kind == "lifecycle" and event.uuid == vm:
                tell(event.what, event.detail)

        return self.hypervisor.subscribe(on_event)

    async def migrating(self, vm: str) -> bool:
        """Whether libvirt still has a migration of the VM under way here."""
        with contextlib.suppress(HypervisorError, NotFound):
            return await self.run(vm, _is_migrating, timeout_seconds=20)
        return False

    async def wait_not_migrating(
        self, vm: str, timeout_seconds: float, before_abort: Callable[[], Awaitable[None]]
    ) -> None:
        """Wait until libvirt has ended a migration that is under way; end it ourselves when it takes too
        long."""
        deadline = time.monotonic() + timeout_seconds
        while await self.migrating(vm):
            if time.monotonic() > deadline:
                await before_abort()
                with contextlib.suppress(HypervisorError, NotFound):
                    await self.run(vm, lambda domain: domain.abortJob())
                deadline = time.monotonic() + timeout_seconds
            await asyncio.sleep(0.2)

    async def definition(self, vm: str, *, inactive: bool = False) -> Definition:
        """The VM's definition with what libvirt says of autostart."""
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE if inactive else 0

        def read(domain: Any) -> Definition:
            autostart = bool(domain.isPersistent() and domain.autostart())
            return parse_definition(domain.XMLDesc(flags), autostart=autostart)

        return await self.run(vm, read)

    async def xml(self, vm: str, *, inactive: bool) -> str:
        """The migratable definition with its secrets, live or persistent."""
        flags = libvirt.VIR_DOMAIN_XML_MIGRATABLE | libvirt.VIR_DOMAIN_XML_SECURE
        if inactive:
            flags |= libvirt.VIR_DOMAIN_XML_INACTIVE
        return await self.run(vm, lambda domain: str(domain.XMLDesc(flags)))

    async def resume(self, vm: str) -> None:
        """Let a paused VM run; one that runs already is no error."""
        await self.run(vm, lambda domain: None if domain.state()[0] in _ALIVE else domain.resume())

    async def suspend(
        self, vm: str, *, only_migrating: bool = False, at_order: Callable[[], object] | None = None
    ) -> bool:
        """Pause a running VM (``only_migrating``: while libvirt moves it). Whether it was to be paused.

        ``at_order`` is called, in a thread, just before libvirt is asked.
        """

        def work(domain: Any) -> bool:
            if domain.state()[0] not in _ALIVE or (only_migrating and not _is_migrating(domain)):
                return False
            if at_order is not None:
                at_order()
            domain.suspend()
            return True

        return await self.run(vm, work)

    async def paused_by_user(self, vm: str) -> bool:
        """Whether somebody paused the VM outside of any job of libvirt's: not a migration, not an error."""
        wanted = [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER]
        return await self.run(vm, lambda domain: list(domain.state()) == wanted)

    async def standing(self, vm: str) -> Standing:
        """Which run of the VM this is and whether it stands still, told once libvirt is through with the call
        that changes it at the moment. Raises HypervisorError where that takes longer than libvirt waits."""

        def work(domain: Any) -> Standing:
            if not domain.isActive():
                return Standing(None)
            # Its question waits for a turn (VIR_JOB_QUERY), as that for the state alone does not.
            migrates = _is_migrating(domain)
            state, reason = domain.state()
            paused = state == libvirt.VIR_DOMAIN_PAUSED and reason in _MAY_BE_OURS
            return Standing(int(domain.ID()), paused and not migrates)

        return await self.run(vm, work)

    async def start(self, vm: str, *, paused: bool = False) -> bool:
        """Start a VM that is shut off (the guard and the hook have their say); an active one is no error.

        Whether it was off.
        """
        flags = libvirt.VIR_DOMAIN_START_PAUSED if paused else 0

        def work(domain: Any) -> bool:
            if domain.isActive():
                return False
            domain.createWithFlags(flags)
            return True

        return await self.run(vm, work, timeout_seconds=120)

    async def define(self, xml: str, name: str) -> None:
        """Have libvirt keep the VM; one that it has gets this definition."""
        connection = self.hypervisor.connection
        await self.hypervisor.call(connection.defineXML, xml, subject=f"VM {name}")

    async def has_managed_save(self, vm: str) -> bool:
        """Whether libvirt keeps the VM's memory on disk, to go on from at its next start."""
        return await self.run(vm, lambda domain: bool(domain.hasManagedSaveImage()))

    async def is_persistent(self, vm: str) -> bool:
        """Whether the VM is still known when its QEMU has ended."""
        return await self.run(vm, lambda domain: bool(domain.isPersistent()))

    async def shut_down(self, vm: str) -> None:
        """Ask the guest to end: its agent where it has one, else its power button. One that is off is no
        error. Raises HypervisorError."""
        await self.run(vm, lambda domain: domain.shutdown() if domain.isActive() else None)

    async def destroy(self, vm: str) -> None:
        """End the VM's QEMU process; none there is no error."""

        def work(domain: Any) -> None:
            if domain.isActive():
                with contextlib.suppress(libvirt.libvirtError):
                    domain.abortJob()
                try:
                    domain.destroy()
                except libvirt.libvirtError:
                    # It may just have ended by itself.
                    if domain.isActive():
                        raise

        with contextlib.suppress(NotFound):
            await self.run(vm, work)

    async def undefine(self, vm: str) -> None:
        """Forget the VM's definition; its files stay. One that is not defined is no error."""

        def work(domain: Any) -> None:
            if domain.isPersistent():
                domain.undefineFlags(UNDEFINE_FLAGS | _KEEP_TPM)

        with contextlib.suppress(NotFound):
            await self.run(vm, work)

    async def set_autostart(self, vm: str, autostart: bool) -> None:
        """Whether libvirt starts the VM with the host."""
        await self.run(vm, lambda domain: domain.setAutostart(1 if autostart else 0))
