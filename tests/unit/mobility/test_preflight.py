# SPDX-License-Identifier: GPL-3.0-or-later
"""The role's preflight as it is run, on this machine as the host, which it only reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROLES = Path(__file__).parents[3] / "roles"
SHOWN = """[
  {"ifname": "site0", "addr_info": [{"family": "inet6", "local": "2001:db8:1::b"}]},
  {"ifname": "vmbr0", "addr_info": [{"family": "inet", "local": "192.0.2.7"}]},
  {"ifname": "eno1", "master": "vmbr0", "linkinfo": {"info_slave_kind": "bridge"}, "addr_info": []}
]"""
# A host whose kernel has no seg6, and whose guests' bridge is the one that it is reached by.
IP = f"""#!/bin/sh
case "$*" in
*address*) cat <<'END'
{SHOWN}
END
;;
*) echo "Operation not supported" >&2; exit 2;;
esac
"""


def preflight(directory: Path, **variables: Any) -> str:
    """What the preflight of a gateway says that ends in findings."""
    commands = directory / "bin"
    commands.mkdir()
    (commands / "ip").write_text(IP)
    (commands / "ip").chmod(0o755)
    gateway = {
        "ansible_connection": "local",
        "ansible_host": "192.0.2.7",
        "ansible_python_interpreter": sys.executable,
        "mobility_gateway": True,
        "mobility_address": "2001:db8:1::b",
        "mobility_tunnel_address": "2001:db8:1::d",
        "mobility_prefixes": [{"prefix": "2001:db8:100::/64"}],
        **variables,
    }
    anchor = {
        "mobility_anchor": True,
        "mobility_address": "2001:db8:3::b",
        "mobility_tunnel_address": "2001:db8:3::d",
    }
    inventory = {"mobility": {"hosts": {"kvm1": gateway, "anchor1": anchor}}}
    (directory / "inventory.yml").write_text(yaml.safe_dump(inventory))
    tasks = [{"ansible.builtin.include_role": {"name": "mobility", "tasks_from": "preflight"}}]
    (directory / "play.yml").write_text(
        yaml.safe_dump([{"hosts": "kvm1", "gather_facts": False, "tasks": tasks}])
    )
    environment = {
        **os.environ,
        "ANSIBLE_ROLES_PATH": str(ROLES),
        "ANSIBLE_HOME": str(directory / "home"),
        "ANSIBLE_NOCOLOR": "1",
        "PATH": f"{commands}:{os.environ['PATH']}",
    }
    command = Path(sys.executable).with_name("ansible-playbook")
    done = subprocess.run(
        [str(command), "-i", str(directory / "inventory.yml"), str(directory / "play.yml")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode != 0
    assert "changed=0" in done.stdout
    return " ".join((done.stdout + done.stderr).replace("\\'", "'").split())


KEYS = [{"index": 256, "secret": "00112233445566778899aabbccddeeff"}]


def test_kernel_bridge_and_routing_are_told_at_once(tmp_path: Path) -> None:
    told = preflight(tmp_path, mobility_keys=KEYS, mobility_bgp_as=65001, mobility_uplink="eth7")
    for fact in (
        "kvm1: its kernel has no seg6 (Operation not supported); use one with CONFIG_IPV6_SEG6_LWTUNNEL",
        "kvm1: has mobility_bgp_as 65001, and not both an identifier and a neighbour; set mobility_bgp_rout",
        "use either anchors or a routing daemon",
        "bridge vmbr0: has the address that the host is reached by, 192.0.2.7; make a bridge for the VMs",
        "bridge vmbr0: leads to other hosts by eno1;",
        "kvm1: has no device eth7; set mobility_uplink to one of eno1, site0, vmbr0",
    ):
        assert fact in told, told


@pytest.mark.parametrize(
    ("variables", "fact"),
    [
        ({}, "missing required arguments: mobility_keys"),
        ({"mobility_keys": []}, "holds no key; set mobility_keys (from Ansible vault)"),
    ],
    ids=["undefined", "empty"],
)
def test_missing_keys_are_told_in_one_sentence(tmp_path: Path, variables: dict[str, Any], fact: str) -> None:
    assert fact in preflight(tmp_path, **variables)
