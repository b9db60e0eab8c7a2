# SPDX-License-Identifier: GPL-3.0-or-later
"""An arrival that boots here: UEFI variables and TPM state in their places, defined, started and paused.

From then on it is like one that came by migration: complete, paused, guarded, and run only when released.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from precache_proxy import durable
from precache_proxy.crash_points import crash_point
from precache_proxy.errors import Conflict, IntegrityError, Unsupported
from precache_proxy.evacuation.arrival import Arrival
from precache_proxy.evacuation.domains import Domains
from precache_proxy.evacuation.guard import Guard
from precache_proxy.hypervisor.domain_xml import Definition, parse_definition
from precache_proxy.source.attachments import NVRAM, TPM_PREFIX

# Who may look into them is libvirt's to say, and it does at every start.
_FILE_MODE = 0o600
_STATE_MODE = 0o700
_PASSED_THROUGH_MODE = 0o711
# libvirt asks the hook within this, or has given up itself.
START_SECONDS = 120.0


async def stand_ready(domains: Domains, guard: Guard, arrival: Arrival, blobs: Mapping[str, Path]) -> None:
    """Make it so; ``blobs``: attachment name -> file with its content, of the last generation.

    Raises IntegrityError, Unsupported, HypervisorError, and Conflict where somebody else has started it: then
    the arrival is to be cleared away.
    """
    await asyncio.to_thread(_place, arrival, dict(blobs))
    crash_point("restart-state-placed")
    await domains.define(arrival.definition, arrival.name)
    crash_point("restart-defined")
    await asyncio.to_thread(guard.let_start, arrival.vm, START_SECONDS)
    try:
        is_ours = await domains.start(arrival.vm, paused=True)
    finally:
        await asyncio.to_thread(guard.arrived, arrival.vm)
    if not is_ours:
        # Its instructions were run before the release; its overlays are thrown away with it.
        raise Conflict(
            f"VM {arrival.name}: somebody started it here while it was made ready, before {arrival.peer} "
            "released it; it is ended here and stays there: start the evacuation again"
        )


def _place(arrival: Arrival, blobs: Mapping[str, Path]) -> None:
    """Write what the source said it has, and nothing that an earlier stay left (blocking)."""
    if arrival.state_is_in_place:
        return
    definition = parse_definition(arrival.definition)
    places = attachment_places(definition, arrival.attachments)
    contents: dict[str, bytes] = {}
    for name, digest in arrival.attachments.items():
        blob = blobs.get(name)
        content = b"" if blob is None else blob.read_bytes()
        if blob is None or hashlib.sha256(content).hexdigest() != digest:
            raise IntegrityError(
                f"VM {arrival.name}: its {name} here is not what {arrival.peer} has; start the evacuation "
                "again, it is sent with the next generation"
            )
        contents[name] = content
    state = _state_path(definition)
    if state is not None and state.is_dir():
        shutil.rmtree(state)
    if definition.nvram is not None and definition.nvram.path.startswith("/") and NVRAM not in contents:
        # Reset at home: libvirt makes new ones from the template.
        durable.remove(Path(definition.nvram.path))
    for name, path in places.items():
        tpm = name.startswith(TPM_PREFIX)
        if tpm:
            durable.make_directory(path.parent.parent, _PASSED_THROUGH_MODE)
        durable.make_directory(path.parent, _STATE_MODE if tpm else _PASSED_THROUGH_MODE)
        durable.write_bytes(path, contents[name], mode=_FILE_MODE)


def attachment_places(definition: Definition, names: Mapping[str, str]) -> dict[str, Path]:
    """Attachment name -> file here. Raises Unsupported for a name that has no place in the definition."""
    places: dict[str, Path] = {}
    state = _state_path(definition)
    for name in names:
        inner = Path(name.removeprefix(TPM_PREFIX))
        if name == NVRAM and definition.nvram is not None and definition.nvram.path.startswith("/"):
            places[name] = Path(definition.nvram.path)
        elif (
            name.startswith(TPM_PREFIX)
            and state is not None
            and inner.parts
            and not inner.is_absolute()
            and ".." not in inner.parts
        ):
            # A TPM whose state is one file has just that, by its own name.
            places[name] = state if _is_the_file(state, names) else state / inner
        else:
            raise Unsupported(
                f"VM {definition.name}: its {name} has no place in its definition; evacuate it live, or take "
                "it out of the definition at its home"
            )
    return places


def _is_the_file(state: Path, names: Mapping[str, str]) -> bool:
    return [name for name in names if name.startswith(TPM_PREFIX)] == [f"{TPM_PREFIX}{state.name}"]


def _state_path(definition: Definition) -> Path | None:
    tpm = definition.tpm
    if tpm is None or not tpm.state_path.startswith("/"):
        return None
    return Path(tpm.state_path)
