# SPDX-License-Identifier: GPL-3.0-or-later
"""The running proxy's parts, as daemon.py hands them to the control interface."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from precache_proxy.config import Config
from precache_proxy.control.coordinator_lease import CoordinatorLease


@dataclass
class Parts:
    """Everything that a request, a metric or a check may ask; ``config`` changes at a reload."""

    config: Config
    hypervisor: Any
    channel: Any
    store: Any
    source: Any
    evacuation: Any
    state: str = "starting"
    started_at: float = field(default_factory=time.time)
    lease: CoordinatorLease = field(default_factory=CoordinatorLease)
