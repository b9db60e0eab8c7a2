# SPDX-License-Identifier: GPL-3.0-or-later
"""The checkout, importable under the name that it has once installed, before the tests' own imports."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from small_parts.parts import serving, small_parts

if TYPE_CHECKING:
    from unit.plugins.coordination.world import World

ROOT = Path(__file__).resolve().parents[4]
_CHECKOUT = ROOT / "build" / "checkout"
_NAME = _CHECKOUT / "ansible_collections" / "lifeboat" / "evacuation"

# As `make build` does: also where only pytest was run.
if not _NAME.exists():
    _NAME.parent.mkdir(parents=True, exist_ok=True)
    _NAME.symlink_to(ROOT)
if str(_CHECKOUT) not in sys.path:
    sys.path.insert(0, str(_CHECKOUT))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Two sources with a VM each."""
    from unit.plugins.coordination.world import World

    with ExitStack() as stack:
        hosts = {}
        for name in ("home1", "home2"):
            directory = tmp_path / name
            directory.mkdir()
            parts = small_parts(directory)
            hosts[name] = (parts, stack.enter_context(serving(parts)))
        yield World(hosts)
