#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Run a VM whose home is dead from its replica."""

from __future__ import annotations

DOCUMENTATION = r"""
module: fail_over
short_description: Run a VM whose home is dead from the last sealed generation of its replica
version_added: 0.1.0
description:
  - Runs on the host that has the replica. What the VM's home wrote after that generation is lost to the VM.
  - A home that answers is asked, and refuses while it runs the VM. One that does not answer is told as soon
    as it comes back. It forbids the start then, and ends a copy that runs.
  - A VM that came to this host and is here already is left as it is.
extends_documentation_fragment:
  - lifeboat.evacuation.proxy
  - lifeboat.evacuation.attributes
  - lifeboat.evacuation.attributes.lifeboat_group
attributes:
  check_mode:
    support: full
    details:
      - In check mode it is told from which generation the VM would run, and what stands in the way fails the
        task. O(source_is_dead) is not needed for that.
  diff_mode:
    support: full
options:
  vm:
    description:
      - Name or UUID of the VM.
    type: str
    required: true
  source_is_dead:
    description:
      - The operator's word that the VM's home has lost power, or surely does not run the VM. Nobody can
        check that while the home does not answer, and a wrong word lets the VM run twice.
      - Without it the task fails and tells from which generation the VM would run.
    type: bool
    default: false
seealso:
  - module: lifeboat.evacuation.fail_over_info
  - module: lifeboat.evacuation.evacuation
"""

EXAMPLES = r"""
- name: The home of web1 has burnt down, so run it here
  lifeboat.evacuation.fail_over:
    vm: web1
    source_is_dead: true
"""

RETURN = r"""
fail_over:
  description: What runs, or in check mode would run.
  returned: success
  type: dict
  contains:
    vm:
      description: UUID of the VM.
      type: str
    name:
      description: Name of the VM.
      type: str
    peer:
      description: Its home.
      type: str
    state:
      description: V(here) if the VM is here now, in check mode V(would-start) if it would be started.
      type: str
    job:
      description: Identifier of the arrival; none in check mode.
      type: str
    generation:
      description: Which generation it runs from; none for one that an evacuation brought here.
      type: int
    sealed_at:
      description: When that was sealed, in seconds since 1970; none if that is not known.
      type: float
    age_seconds:
      description: >-
        How old it was when the VM was started from it, or is. What was written between its seal and the death
        of the home is lost; none if that is not known.
      type: float
    sentence:
      description: What holds, for people.
      type: str
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import (
    ProxyClient,
    ProxyError,
    fail,
    fail_over_path,
    in_words,
    proxy_arguments,
)

# It is answered once the VM runs; libvirt alone may take two minutes to start it.
_ANSWER_SECONDS = 600.0
_KEPT = ("vm", "name", "peer", "job", "generation", "sealed_at", "age_seconds")


def fail_over(
    client: ProxyClient, vm: str, *, source_is_dead: bool, check_mode: bool
) -> tuple[bool, dict[str, t.Any]]:
    """Do it; whether anything was (would be) changed, and what runs (would run). Raises ProxyError."""
    path = fail_over_path(vm)
    before = client.get(path)
    told = {key: before.get(key) for key in _KEPT}
    if before["is_here"]:
        off = ", and off" if before.get("is_running") is False else ""
        return False, told | {"state": "here", "sentence": f"VM {before['name']}: it is here already{off}"}
    if check_mode:
        findings = before["findings"]
        if findings:
            sentence = f"VM {before['name']}: cannot run here: {in_words(findings)}"
            raise ProxyError("preflight", sentence, findings)
        sentence = f"VM {before['name']}: it would run here from generation {before['generation']}"
        return True, told | {"state": "would-start", "sentence": sentence}
    arrival = client.request("POST", path, {"source_is_dead": source_is_dead})
    return True, told | {
        "state": "here",
        "job": arrival["id"],
        "generation": arrival["generation"],
        "sentence": arrival.get("sentence") or "",
    }


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec=dict(
            proxy_arguments(),
            vm={"type": "str", "required": True},
            source_is_dead={"type": "bool", "default": False},
        ),
        supports_check_mode=True,
    )
    client = ProxyClient(module.params["socket"], _ANSWER_SECONDS)
    try:
        changed, told = fail_over(
            client,
            module.params["vm"],
            source_is_dead=module.params["source_is_dead"],
            check_mode=module.check_mode,
        )
    except ProxyError as error:
        fail(module, error)
    after = {key: told[key] for key in ("vm", "name", "generation")}
    diff = {"before": {} if changed else after, "after": after}
    module.exit_json(changed=changed, fail_over=told, diff=diff)


if __name__ == "__main__":
    main()
