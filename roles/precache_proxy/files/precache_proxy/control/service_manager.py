# SPDX-License-Identifier: GPL-3.0-or-later
"""What systemd hears of us: readiness, status, the watchdog's sign of life (sd_notify(3), as datagrams)."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Mapping


class ServiceManager:
    """The service manager that started us; outside of one every call does nothing."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        self._address = environment.get("NOTIFY_SOCKET", "")
        own = environment.get("WATCHDOG_PID", "") in {"", str(os.getpid())}
        self._watchdog_seconds = float(environment.get("WATCHDOG_USEC", "0") or 0) / 1e6 if own else 0.0

    def notify(self, **fields: str | int) -> None:
        """Send fields such as ``READY=1``; a service manager that has gone away is not our trouble."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        message = "\n".join(f"{key}={value}" for key, value in fields.items())
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            try:
                sender.sendto(message.encode(), address)
            except OSError:
                return

    def ready(self, status: str) -> None:
        """We serve."""
        self.notify(READY=1, STATUS=status)

    def reloading(self) -> None:
        """A reload has begun; :meth:`ready` ends it (Type=notify-reload)."""
        self.notify(RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)

    def stopping(self, status: str) -> None:
        """We end in good order."""
        self.notify(STOPPING=1, STATUS=status)

    def extend(self, seconds: float) -> None:
        """Starting or stopping takes this much longer (recovery of many replicas)."""
        self.notify(EXTEND_TIMEOUT_USEC=int(seconds * 1e6))

    async def keep_alive(self) -> None:
        """Tell the watchdog, for ever, that the event loop turns: a third of its patience each time."""
        if not self._watchdog_seconds:
            return
        while True:
            self.notify(WATCHDOG=1)
            await asyncio.sleep(self._watchdog_seconds / 3)
