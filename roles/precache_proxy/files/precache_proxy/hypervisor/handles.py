# SPDX-License-Identifier: GPL-3.0-or-later
"""Names for libvirt's objects: its Python binding has no types, these say what is meant."""

from __future__ import annotations

from typing import Any, TypeAlias

# libvirt.virConnect
ConnectionHandle: TypeAlias = Any
# libvirt.virDomain
DomainHandle: TypeAlias = Any
# libvirt.virDomainCheckpoint
CheckpointHandle: TypeAlias = Any
# what libvirt hands through to a callback and we do not use
Opaque: TypeAlias = Any
