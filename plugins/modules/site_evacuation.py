#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Evacuate a whole site; the work is done by the action plugin of the same name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: site_evacuation
short_description: Evacuate a site, or forecast how that would go
version_added: 0.1.0
description:
  - Sees all hypervisors of a site and their peers at once, decides who goes when, how and with how much of
    the link, and adapts every few seconds.
  - Runs on the controller, once for all hosts (C(run_once)). Talks to the proxies through SSH by paramiko.
  - How VMs may leave that C(lifeboat_vms) says nothing of, C(lifeboat_vm_groups) says of their C(group), else
    the variables C(evacuate_fallback),
    C(evacuate_shutdown_seconds) and C(evacuate_power_off) of their hosts say.
  - Holds no state. When the controller dies the jobs go on in the proxies, and running it again carries on.
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
      - In check mode nothing is started. The report then has the verdicts V(would-start), V(would-fail) and
        V(under-way), by the preflight of each VM and the forecast.
  diff_mode:
    support: none
requirements:
  - paramiko on the controller
  - jinja2 on the controller
options:
  site:
    description:
      - The site to empty, a group of the inventory.
    type: str
    required: true
  hosts:
    description:
      - Only these hypervisors of the site.
    type: list
    elements: str
  vms:
    description:
      - Names or UUIDs of VMs. All that are protected at the site if left out.
        Then a VM that runs there without being protected is told as V(stayed), too.
      - One that no hypervisor knows is refused before anything moves, unless a hypervisor is out of reach.
    type: list
    elements: str
  leave_behind:
    description:
      - Names or UUIDs of VMs that are not protected and may stay at the site.
    type: list
    elements: str
    default: []
  state:
    description:
      - V(evacuated) moves VMs. V(forecast) tells how it would go now, and changes nothing; the
        links are measured for a few seconds unless O(uplink) is given.
    type: str
    choices: [evacuated, forecast]
    default: evacuated
  strategy:
    description:
      - V(feedback), the default, adapts. V(sequential) (one at a time on the site), V(parallel) (all) and
        V(static:N) (N at a time per pair of hypervisors) do not, and do not go down the ladder of fallbacks.
    type: str
  parallel:
    description:
      - How many VMs are on their way at the same time, per pair of hypervisors. The same as
        O(strategy=static:N).
    type: int
  bandwidth:
    description:
      - Rate that each evacuation may use, such as V(50Mbit/s).
    type: str
  deadline:
    description:
      - When the power goes. Seconds from now, V(20m), V(14:30), an ISO 8601 instant,
        or V(ups:NAME@HOST), which is asked for its C(battery.runtime) by C(upsc), again and again.
      - One that has passed is refused unless VMs are under way; then their ends are told, and nothing new
        starts.
      - A time of day wants quotes in YAML, which without them makes seconds of it (14:30 becomes V(870)). The
        first line of the output says how the deadline was understood.
    type: str
  deadline_reserve:
    description:
      - So much of the time is not counted upon.
    type: str
    default: "0"
  uplink:
    description:
      - What the way out of the site carries, such as V(400Mbit/s), where it is known.
    type: str
  progress:
    description:
      - Seconds between two lines of progress, whatever else is told. Each says how to go on.
    type: float
    default: 5.0
  take_over:
    description:
      - Become the coordinator of hypervisors that another run coordinates. That run then ends with a sentence
        that says so, and what it has begun goes on.
      - Without this a second run is refused before anything moves. For a run that died it waits some 15
        seconds, for as long as that one may be alive.
    type: bool
    default: false
  forecast:
    description:
      - File on the controller with the forecast that a rehearsal kept, to be set beside the result in the
        report. That made at the start is, if left out.
    type: path
  report:
    description:
      - File on the controller for the report as JSON. In check mode it is written, too.
    type: path
  page:
    description:
      - File on the controller for the report as one HTML page.
    type: path
seealso:
  - module: lifeboat.evacuation.host_evacuation
"""

EXAMPLES = r"""
- name: Empty a site within 20 minutes
  lifeboat.evacuation.site_evacuation:
    site: home
    deadline: 20m
    report: evacuation-report.json
    page: evacuation-report.html
  run_once: true

- name: Empty a site for as long as the battery lasts, a minute less
  lifeboat.evacuation.site_evacuation:
    site: home
    deadline: ups:rack1@ups.example.org
    deadline_reserve: 60s
  run_once: true
"""

RETURN = r"""
report:
  description: The report, see docs/evacuation-report.md.
  returned: with O(state=evacuated), also in check mode
  type: dict
vms:
  description: What became of each VM, as in the report.
  returned: with O(state=evacuated), also in check mode
  type: list
  elements: dict
forecast:
  description: How it would go now.
  returned: with O(state=forecast)
  type: dict
would_stay:
  description: Names of the VMs that would not get out.
  returned: with O(state=forecast)
  type: list
  elements: str
unreached:
  description: Hypervisors that could not be asked, with the reason.
  returned: success
  type: dict
"""
