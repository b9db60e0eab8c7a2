# SPDX-License-Identifier: GPL-3.0-or-later
"""The checkout, importable under the name that it has once installed, before the tests' own imports."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]
_CHECKOUT = ROOT / "build" / "checkout"
_NAME = _CHECKOUT / "ansible_collections" / "lifeboat" / "evacuation"

# As `make build` does: also where only pytest was run.
if not _NAME.exists():
    _NAME.parent.mkdir(parents=True, exist_ok=True)
    _NAME.symlink_to(ROOT)
if str(_CHECKOUT) not in sys.path:
    sys.path.insert(0, str(_CHECKOUT))
