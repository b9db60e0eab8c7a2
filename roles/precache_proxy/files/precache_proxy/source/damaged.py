# SPDX-License-Identifier: GPL-3.0-or-later
"""VMs whose records on disk cannot be read: shown with the reason, never worked on."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from precache_proxy.errors import IntegrityError, LifeboatError
from precache_proxy.source.environment import Environment
from precache_proxy.source.protection import Protection
from precache_proxy.source.record import ProtectionRecord

logger = logging.getLogger(__name__)


async def damaged_protection(path: Path, error: Exception, environment: Environment) -> Protection:
    """What stands for the VM of a record that cannot be read. It is not started, and writes no record."""
    uuid = path.stem
    record = ProtectionRecord(uuid=uuid, name=uuid, peer="", rpo_seconds=environment.settings.rpo_seconds)
    with contextlib.suppress(LifeboatError):
        record.name = (await environment.hypervisor.definition(uuid)).name
    fact = error.message if isinstance(error, IntegrityError) else f"{path}: {error}"
    sentence = (
        f"VM {record.name}: its record cannot be read and it is not passed ({fact}); "
        "protect it again with its peer: what differs there is found by digest"
    )
    logger.error("%s", sentence)
    protection = Protection(record, environment)
    protection.refuse("integrity", sentence)
    return protection
