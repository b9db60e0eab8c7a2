# SPDX-License-Identifier: GPL-3.0-or-later
"""What an operator gives to ansible-playbook holds for the coordinator's own SSH."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from unit.plugins.coordination.conftest import ROOT

# In a process of its own: Ansible's loader takes over how collections are imported.
SCRIPT = """
import json, sys
from dataclasses import asdict
from ansible import context
from ansible.playbook.play_context import PlayContext
from ansible.plugins.loader import init_plugin_loader
from ansible.utils.context_objects import CLIArgs
init_plugin_loader()
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._given import completed, given
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._reach import read
asked = json.loads(sys.argv[1])
context.CLIARGS = CLIArgs(asked["command_line"])
play = PlayContext()
for name, value in asked["passwords"].items():
    setattr(play, name, value)
reach, findings = read("home1", completed(asked["variables"], given(play, None)))
print(json.dumps([asdict(reach), [finding.subject for finding in findings]]))
"""


def reach(
    command_line: dict[str, Any],
    variables: dict[str, Any] | None = None,
    *,
    passwords: dict[str, str] | None = None,
    **environment: str,
) -> tuple[dict[str, Any], list[str]]:
    """How home1 is reached, and what cannot be followed."""
    asked = {"command_line": command_line, "variables": variables or {}, "passwords": passwords or {}}
    paths = {"ANSIBLE_COLLECTIONS_PATH": str(ROOT / "build" / "checkout")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(asked)],
        env={**os.environ, **paths, **environment},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told, findings = json.loads(done.stdout)
    return told, findings


def test_user_key_and_passwords_of_the_command_line() -> None:
    told, findings = reach(
        {"remote_user": "admin", "private_key_file": "/keys/one", "timeout": 22},
        passwords={"password": "open", "become_pass": "sesame"},
    )
    assert findings == []
    assert (told["user"], told["password"], told["become_password"]) == ("admin", "open", "sesame")
    assert (told["keys"], told["timeout_seconds"]) == (["/keys/one"], 22.0)


def test_what_a_host_says_itself_comes_first() -> None:
    variables = {"ansible_ssh_user": "root", "ansible_private_key_file": "/keys/two"}
    told, _findings = reach({"remote_user": "admin", "private_key_file": "/keys/one"}, variables)
    assert (told["user"], told["keys"]) == ("root", ["/keys/two"])


def test_settings_of_ansible_hold_and_what_cannot_be_followed_is_refused() -> None:
    told, findings = reach(
        {}, ANSIBLE_HOST_KEY_CHECKING="false", ANSIBLE_SSH_COMMON_ARGS="-J jump.example.org"
    )
    assert (told["check_host_key"], told["jumps"], findings) == (False, ["jump.example.org"], [])
    _told, findings = reach({"become_method": "doas"}, ANSIBLE_SSH_COMMON_ARGS="-o ProxyCommand=nc")
    assert set(findings) == {"home1: ansible_become_method", "home1: SSH option proxycommand"}
