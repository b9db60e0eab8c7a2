# SPDX-License-Identifier: GPL-3.0-or-later
"""What this host's libvirt and QEMU can do: the one place where versions are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import libvirt
from lxml import etree

from precache_proxy.errors import Finding
from precache_proxy.hypervisor.handles import ConnectionHandle


def format_version(number: int) -> str:
    """A packed version (major * 1,000,000 + minor * 1,000 + release) as ``11.3.0``."""
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


@dataclass(frozen=True, slots=True)
class Features:
    """Facts about one libvirt connection. Versions are packed as libvirt packs them."""

    driver: str
    libvirt_version: int
    hypervisor_version: int
    backup: bool

    @property
    def unix_migration(self) -> bool:
        """``unix:`` URIs for RAM and disks of a migration (libvirt 6.8.0)."""
        return self.libvirt_version >= 6_008_000

    @property
    def non_shared_incremental_broken(self) -> bool:
        """The libvirt 7.3 - 7.5 copied nothing with VIR_MIGRATE_NON_SHARED_INC."""
        return 7_003_000 <= self.libvirt_version < 7_006_000

    @property
    def checkpoint_redefine_validate(self) -> bool:
        """VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE (libvirt 6.10.0)."""
        return self.libvirt_version >= 6_010_000

    def as_dict(self) -> dict[str, Any]:
        """For the status of the proxy."""
        return {
            "driver": self.driver,
            "libvirt_version": format_version(self.libvirt_version),
            "hypervisor_version": format_version(self.hypervisor_version),
            "backup": self.backup,
            "unix_migration": self.unix_migration,
        }

    def findings(self) -> list[Finding]:
        """What keeps this host from protecting and evacuating VMs, all at once."""
        found: list[Finding] = []
        subject = f"libvirt {format_version(self.libvirt_version)}"
        if not self.backup:
            found.append(
                Finding(
                    subject,
                    "its QEMU driver offers no incremental backup",
                    "install libvirt 7.2 or newer with QEMU 4.2 or newer",
                    "unsupported",
                )
            )
        if not self.unix_migration:
            found.append(
                Finding(
                    subject,
                    "it cannot migrate over UNIX sockets",
                    "install libvirt 6.8 or newer",
                    "unsupported",
                )
            )
        if self.non_shared_incremental_broken:
            found.append(
                Finding(
                    subject,
                    "its incremental storage migration copies nothing (known defect of 7.3 to 7.5)",
                    "install libvirt 7.6 or newer",
                    "unsupported",
                )
            )
        return found


def _backup_supported(capabilities: str) -> bool:
    root = etree.fromstring(capabilities.encode())
    element = root.find("features/backup")
    return element is not None and element.get("supported") == "yes"


def read_features(connection: ConnectionHandle) -> Features:
    """Ask libvirt (blocking). A driver without domain capabilities (``test``) has no backup."""
    try:
        backup = _backup_supported(connection.getDomainCapabilities(None, None, None, None, 0))
    except libvirt.libvirtError:
        backup = False
    return Features(
        driver=str(connection.getType()),
        libvirt_version=int(connection.getLibVersion()),
        hypervisor_version=int(connection.getVersion()),
        backup=backup,
    )
