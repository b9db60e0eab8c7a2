# SPDX-License-Identifier: GPL-3.0-or-later
"""A served control API with small parts behind it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from precache_proxy.control.client import Client
from precache_proxy.control.parts import Parts
from small_parts.parts import serving, small_parts


@dataclass(frozen=True)
class Served:
    """Parts, and a client that reaches them through the socket."""

    parts: Parts
    socket: Path
    client: Client


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    parts = small_parts(tmp_path)
    with serving(parts) as socket:
        yield Served(parts, socket, Client(socket))
