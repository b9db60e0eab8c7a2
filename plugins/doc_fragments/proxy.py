# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What all modules that talk to the precache proxy share."""

from __future__ import annotations


class ModuleDocFragment:
    """Options, requirements and notes."""

    DOCUMENTATION = r"""
options:
  socket:
    description:
      - Control socket of the precache proxy on the host that the task runs on.
    type: path
    default: /run/lifeboat/control.sock
requirements:
  - The precache proxy, as playbook C(lifeboat.evacuation.site_setup) installs it, running on the host.
notes:
  - Needs root or membership in the group C(lifeboat) on the host.
  - A failure brings RV(ignore:cause), a word for programs, and RV(ignore:findings), a list of everything
    that stands in the way.
author:
  - The Lifeboat developers (@lifeboat)
"""

    WAIT = r"""
options:
  wait:
    description:
      - Whether to wait for the end.
    type: bool
    default: false
  wait_timeout:
    description:
      - How many seconds to wait at most. The proxy goes on by itself after that.
    type: int
  wait_sleep:
    description:
      - How many seconds to let pass between two looks.
    type: float
    default: 2.0
"""
