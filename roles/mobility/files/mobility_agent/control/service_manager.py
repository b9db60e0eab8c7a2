# SPDX-License-Identifier: GPL-3.0-or-later
"""What systemd hears of us: readiness, status, the watchdog's sign of life (sd_notify(3), as datagrams)."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


class ServiceManager:
    """The service manager that started us; outside of one every call does nothing."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        self._address = environment.get("NOTIFY_SOCKET", "")
        own = environment.get("WATCHDOG_PID", "") in {"", str(os.getpid())}
        #: How often the watchdog must be fed; 0: there is none.
        self.watchdog_seconds = float(environment.get("WATCHDOG_USEC", "0") or 0) / 1e6 if own else 0.0

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
