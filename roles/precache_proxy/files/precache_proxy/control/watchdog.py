# SPDX-License-Identifier: GPL-3.0-or-later
"""The process that ``precache-proxy watchdog`` is: the watchdog of open passes, until SIGTERM."""

from __future__ import annotations

import signal
import threading

from precache_proxy.config import Config
from precache_proxy.control import journal
from precache_proxy.source.watchdog import Watchdog


def run(config: Config) -> int:
    """Watch until told to end."""
    journal.set_up("info")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    Watchdog(config.paths.run, config.hypervisor.uri).run(stop)
    return 0
