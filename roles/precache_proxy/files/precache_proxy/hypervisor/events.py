# SPDX-License-Identifier: GPL-3.0-or-later
"""libvirt's domain events, carried from libvirt's thread into asyncio."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import libvirt

from precache_proxy.hypervisor.handles import ConnectionHandle, DomainHandle, Opaque

# https://libvirt.org/html/libvirt-libvirt-domain.html#virDomainEventType
_LIFECYCLE_WORDS = {
    libvirt.VIR_DOMAIN_EVENT_DEFINED: "defined",
    libvirt.VIR_DOMAIN_EVENT_UNDEFINED: "undefined",
    libvirt.VIR_DOMAIN_EVENT_STARTED: "started",
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED: "suspended",
    libvirt.VIR_DOMAIN_EVENT_RESUMED: "resumed",
    libvirt.VIR_DOMAIN_EVENT_STOPPED: "stopped",
    libvirt.VIR_DOMAIN_EVENT_SHUTDOWN: "shutdown",
    libvirt.VIR_DOMAIN_EVENT_PMSUSPENDED: "pm-suspended",
    libvirt.VIR_DOMAIN_EVENT_CRASHED: "crashed",
}
_AGENT_WORDS = {1: "connected", 2: "disconnected"}
_BLOCK_JOB_WORDS = {
    libvirt.VIR_DOMAIN_BLOCK_JOB_COMPLETED: "completed",
    libvirt.VIR_DOMAIN_BLOCK_JOB_FAILED: "failed",
    libvirt.VIR_DOMAIN_BLOCK_JOB_CANCELED: "cancelled",
    libvirt.VIR_DOMAIN_BLOCK_JOB_READY: "ready",
}


@dataclass(frozen=True, slots=True)
class DomainEvent:
    """One event.

    ``kind`` is one of: lifecycle (``what``: started, stopped, ...; ``detail``: libvirt's number for the why),
    job-completed (``data``: libvirt's statistics), block-job (``what``: ready, completed, ...; ``data``: disk
    and type), io-error (``what``: libvirt's reason; ``data``: disk), agent, reboot (by its guest),
    device-added and device-removed (``what``: alias), and of the connection itself: connected,
    disconnected (no VM).
    """

    kind: str
    uuid: str = ""
    name: str = ""
    what: str = ""
    detail: int = 0
    data: dict[str, Any] = field(default_factory=dict)


class EventRelay:
    """Registers for the events of one connection and hands them to ``dispatch`` in the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, dispatch: Callable[[DomainEvent], None]) -> None:
        self._loop = loop
        self._dispatch = dispatch
        self._registered: list[int] = []

    def _tell(self, kind: str, domain: DomainHandle, what: str = "", detail: int = 0, **data: object) -> None:
        # called in libvirt's thread; UUID and name are in the object already, this asks nobody
        event = DomainEvent(kind, domain.UUIDString(), domain.name(), what, detail, data)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._dispatch, event)

    def register(self, connection: ConnectionHandle) -> None:
        """Register for all kinds (blocking); kinds that a driver lacks are left out."""

        def lifecycle(
            _connection: ConnectionHandle, domain: DomainHandle, event: int, detail: int, _opaque: Opaque
        ) -> None:
            self._tell("lifecycle", domain, _LIFECYCLE_WORDS.get(event, str(event)), detail)

        def job_completed(
            _connection: ConnectionHandle, domain: DomainHandle, statistics: dict[str, Any], _opaque: Opaque
        ) -> None:
            self._tell("job-completed", domain, **statistics)

        def block_job(
            _connection: ConnectionHandle,
            domain: DomainHandle,
            disk: str,
            kind: int,
            status: int,
            _opaque: Opaque,
        ) -> None:
            self._tell(
                "block-job", domain, _BLOCK_JOB_WORDS.get(status, str(status)), status, disk=disk, type=kind
            )

        def io_error(
            _connection: ConnectionHandle,
            domain: DomainHandle,
            path: str,
            alias: str,
            action: int,
            reason: str,
            _opaque: Opaque,
        ) -> None:
            self._tell("io-error", domain, reason, action, disk=alias, path=path)

        def agent(
            _connection: ConnectionHandle, domain: DomainHandle, state: int, reason: int, _opaque: Opaque
        ) -> None:
            self._tell("agent", domain, _AGENT_WORDS.get(state, str(state)), reason)

        def reboot(_connection: ConnectionHandle, domain: DomainHandle, _opaque: Opaque) -> None:
            self._tell("reboot", domain)

        def device_added(
            _connection: ConnectionHandle, domain: DomainHandle, alias: str, _opaque: Opaque
        ) -> None:
            self._tell("device-added", domain, alias)

        def device_removed(
            _connection: ConnectionHandle, domain: DomainHandle, alias: str, _opaque: Opaque
        ) -> None:
            self._tell("device-removed", domain, alias)

        self._registered = []
        for identifier, callback in (
            (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle),
            (libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, job_completed),
            (libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2, block_job),
            (libvirt.VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON, io_error),
            (libvirt.VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE, agent),
            (libvirt.VIR_DOMAIN_EVENT_ID_REBOOT, reboot),
            (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, device_added),
            (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, device_removed),
        ):
            with contextlib.suppress(libvirt.libvirtError):
                self._registered.append(connection.domainEventRegisterAny(None, identifier, callback, None))

    def unregister(self, connection: ConnectionHandle) -> None:
        """End delivery from this connection (blocking); a dead connection is no error."""
        for identifier in self._registered:
            with contextlib.suppress(libvirt.libvirtError):
                connection.domainEventDeregisterAny(identifier)
        self._registered = []
