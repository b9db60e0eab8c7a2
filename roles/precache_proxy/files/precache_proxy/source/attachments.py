# SPDX-License-Identifier: GPL-3.0-or-later
"""Small files that belong to a VM beside its disks: UEFI variables and TPM state. Read whole, sent whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

from precache_proxy.errors import NoSpace
from precache_proxy.hypervisor.domain_xml import Definition
from precache_proxy.units import MIB, format_bytes

# A UEFI variable store has some hundred KiB, a TPM some ten: more is not what we take it for.
LARGEST_BYTES = 64 * MIB
NVRAM = "nvram"
TPM_PREFIX = "tpm/"
_TPM_PASSING = {".lock"}


def attachment_files(definition: Definition) -> dict[str, Path]:
    """Attachment name -> file here: ``nvram``, and ``tpm/<path>`` for each file of the TPM's state."""
    files: dict[str, Path] = {}
    if definition.nvram is not None and definition.nvram.path:
        path = Path(definition.nvram.path)
        if path.is_file():
            files[NVRAM] = path
    if definition.tpm is not None and definition.tpm.state_path:
        state = Path(definition.tpm.state_path)
        if state.is_file():
            files[f"{TPM_PREFIX}{state.name}"] = state
        elif state.is_dir():
            for path in sorted(state.rglob("*")):
                if path.is_file() and path.name not in _TPM_PASSING:
                    files[f"{TPM_PREFIX}{path.relative_to(state)}"] = path
    return files


def read_attachments(definition: Definition) -> dict[str, bytes]:
    """Their content (blocking). Raises NoSpace for a file that is far too large for what it claims to be."""
    contents: dict[str, bytes] = {}
    for name, path in attachment_files(definition).items():
        try:
            size_bytes = path.stat().st_size
            if size_bytes > LARGEST_BYTES:
                raise NoSpace(
                    f"VM {definition.name}: {path} has {format_bytes(size_bytes)}, more than the "
                    f"{format_bytes(LARGEST_BYTES)} that go along as {name}; see what wrote it"
                )
            contents[name] = path.read_bytes()
        except FileNotFoundError:
            continue  # the TPM's emulator replaces its files: the next pass takes the new one
    return contents


def changed_attachments(
    contents: dict[str, bytes], known: dict[str, str]
) -> tuple[dict[str, bytes], dict[str, str]]:
    """Those that the peer does not hold yet, and the digests of all."""
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    return {name: contents[name] for name in contents if known.get(name) != digests[name]}, digests
