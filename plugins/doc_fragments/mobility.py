# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the modules about home addresses and bindings share."""

from __future__ import annotations


class ModuleDocFragment:
    """Options, requirements and notes."""

    DOCUMENTATION = r"""
options:
  socket:
    description:
      - Control socket of the mobility agent on the host that the task runs on.
    type: path
    default: /run/lifeboat/mobility.sock
requirements:
  - The mobility agent, as role P(lifeboat.evacuation.mobility#role) installs it, running on the host.
notes:
  - Needs root or membership in the group C(lifeboat) on the host.
author:
  - The Lifeboat developers (@lifeboat)
"""

    LIBVIRT = r"""
options:
  libvirt_uri:
    description:
      - Connection to the host's libvirt.
    type: str
    default: qemu:///system
requirements:
  - python3-libvirt on the host
author:
  - The Lifeboat developers (@lifeboat)
"""
