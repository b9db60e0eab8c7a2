#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Evacuate VMs of one host; the work is done by the action plugin of the same name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_evacuation
short_description: Evacuate VMs of one host, some at a time, with visible progress
version_added: 0.1.0
description:
  - Evacuates VMs of a host, a fixed number at a time, and prints a line at each step of each VM and at a
    steady pace in between.
  - Holds no state. When the controller or the task dies the jobs go on in the proxies, and running it
    again carries on.
  - A VM that does not get out does not fail this task, so that a report can be made of all. Look at the
    verdicts.
extends_documentation_fragment:
  - lifeboat.evacuation.proxy
  - lifeboat.evacuation.attributes
  - lifeboat.evacuation.attributes.lifeboat_group
attributes:
  check_mode:
    support: full
    details:
      - In check mode only the preflight of each VM is run. Verdicts are then V(would-start) and
        V(would-fail).
  diff_mode:
    support: none
options:
  vms:
    description:
      - Names or UUIDs of VMs. Those that this host neither protects nor has evacuated are left to
        other hosts.
      - All protected VMs if left out. Then a VM that runs on the host without being protected is told
        as V(stayed), too.
    type: list
    elements: str
  parallel:
    description:
      - How many VMs are on their way at the same time.
    type: int
    default: 2
  progress:
    description:
      - Seconds between two lines of progress when nothing else is to be told.
    type: float
    default: 5.0
  bandwidth:
    description:
      - Rate that each evacuation may use, such as V(50Mbit/s).
    type: str
  leave_behind:
    description:
      - Names or UUIDs of VMs that are not protected and may stay at the site.
    type: list
    elements: str
    default: []
seealso:
  - module: lifeboat.evacuation.evacuation
"""

EXAMPLES = r"""
- name: Evacuate everything that is protected on this host
  lifeboat.evacuation.host_evacuation:
    parallel: 3
  register: out
"""

RETURN = r"""
vms:
  description: What became of each VM.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Name of the VM.
      type: str
    verdict:
      description: >-
        V(evacuated), V(already-there), V(restarted-from-replica), V(stayed), V(undecided) or
        V(failed).
      type: str
    cause:
      description: Word for why.
      type: str
    sentence:
      description: The same for people.
      type: str
    findings:
      description: Everything that stood in the way.
      type: list
      elements: dict
    eviction_seconds:
      description: Command to the source may lose power.
      type: float
    downtime_seconds:
      description: How long the guest did not run.
      type: float
"""
