# SPDX-License-Identifier: GPL-3.0-or-later
"""A role must stand alone, so what two roles need is in both: these copies may not drift apart."""

from __future__ import annotations

from pathlib import Path

ROLES = Path(__file__).parents[3] / "roles"


def test_both_roles_pack_their_daemon_in_the_same_way() -> None:
    ours = (ROLES / "mobility/files/pack_package.py").read_bytes()
    assert ours == (ROLES / "precache_proxy/files/pack_package.py").read_bytes()
