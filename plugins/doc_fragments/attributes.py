# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Attributes of modules."""

from __future__ import annotations


class ModuleDocFragment:
    """What modules can and cannot do."""

    DOCUMENTATION = r"""
attributes:
  check_mode:
    description: Can run in C(check_mode) and tell what would change without changing it.
  diff_mode:
    description: Tells what changed, or in C(check_mode) would change, when run with C(--diff).
"""

    INFO = r"""
attributes:
  check_mode:
    description: Can run in C(check_mode) and tell what would change without changing it.
    support: full
    details:
      - This module only reads.
  diff_mode:
    description: Tells what changed, or in C(check_mode) would change, when run with C(--diff).
    support: N/A
    details:
      - This module only reads.
"""

    LIFEBOAT_GROUP = r"""
attributes:
  action_group:
    description: >-
      Use C(group/lifeboat.evacuation.lifeboat) in C(module_defaults) to set defaults for this module.
    support: full
    membership:
      - lifeboat.evacuation.lifeboat
"""
