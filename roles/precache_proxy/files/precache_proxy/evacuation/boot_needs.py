# SPDX-License-Identifier: GPL-3.0-or-later
"""What QEMU needs of the host itself to run a VM there: files to boot from, firmware, a TPM emulator."""

from __future__ import annotations

import shutil
from pathlib import Path

from precache_proxy.errors import Finding
from precache_proxy.hypervisor.domain_xml import Definition

# libvirt runs the first, makes its state with the second and asks it with the third.
TPM_PROGRAMS = ("swtpm", "swtpm_setup", "swtpm_ioctl")
# Where libvirt's daemon finds programs, whatever our own PATH is.
_PROGRAM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def boot_findings(definition: Definition, program_path: str = _PROGRAM_PATH) -> list[Finding]:
    """What of it is missing on this host, the destination (blocking)."""
    found = [
        Finding(
            f"VM {definition.name}, boot file",
            f"{path} is not there at the destination",
            "copy it there, or have the VM boot from its disk",
            "not-found",
        )
        for path in definition.kernel_files
        if not Path(path).exists()
    ]
    if definition.loader and not Path(definition.loader).exists():
        found.append(
            Finding(
                f"VM {definition.name}, firmware",
                f"{definition.loader} is not there at the destination",
                "install the firmware package of the source there (Debian: ovmf)",
                "not-found",
            )
        )
    if definition.tpm is not None and definition.tpm.kind == "emulator":
        missing = [name for name in TPM_PROGRAMS if shutil.which(name, path=program_path) is None]
        if missing:
            found.append(
                Finding(
                    f"VM {definition.name}, TPM",
                    f"there is no {' nor '.join(missing)} at the destination, which would emulate it",
                    "install them there (Debian: swtpm and swtpm-tools)",
                    "not-found",
                )
            )
    return found
