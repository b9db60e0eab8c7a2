# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""How hosts are reached where their own variables do not say: command line, passwords asked for, ansible.cfg.

The coordinator speaks SSH itself; what an operator gives to ``ansible-playbook`` must hold for it as well.
"""

from __future__ import annotations

import os
import typing as t
from collections import ChainMap

from ansible import constants, context
from ansible.plugins.loader import connection_loader

# Where the value of an option of Ansible's ssh connection goes, and by which other names a host may say it.
_OPTIONS = {
    "private_key_file": ("ansible_private_key_file", "ansible_ssh_private_key_file"),
    "ssh_args": ("ansible_ssh_args",),
    "ssh_common_args": ("ansible_ssh_common_args",),
    "ssh_extra_args": ("ansible_ssh_extra_args",),
    "timeout": ("ansible_timeout", "ansible_ssh_timeout"),
    "host_key_checking": ("ansible_host_key_checking", "ansible_ssh_host_key_checking"),
}
_USER = ("ansible_user", "ansible_ssh_user")
_PASSWORD = ("ansible_password", "ansible_ssh_password", "ansible_ssh_pass")
_BECOME_PASSWORD = ("ansible_become_password", "ansible_become_pass", "ansible_sudo_pass")

Given = dict[tuple[str, ...], t.Any]


def given(play_context: t.Any, remote_user: str | None) -> Given:
    """Values by the names of the variables that override them; ``remote_user`` is the task's."""
    told: Given = {
        _USER: remote_user or context.CLIARGS.get("remote_user") or constants.DEFAULT_REMOTE_USER,
        _PASSWORD: getattr(play_context, "password", None),
        _BECOME_PASSWORD: getattr(play_context, "become_pass", None),
        ("ansible_become_method",): context.CLIARGS.get("become_method") or constants.DEFAULT_BECOME_METHOD,
    }
    plugin = connection_loader.get("ansible.builtin.ssh", play_context, os.devnull)
    plugin.set_options()
    for option, names in _OPTIONS.items():
        told[names] = plugin.get_option(option)
    return {names: value for names, value in told.items() if value not in (None, "")}


def completed(variables: t.Mapping[str, t.Any], told: Given) -> t.Mapping[str, t.Any]:
    """A host's variables, and what was given where it says nothing itself."""
    missing = {
        names[0]: value
        for names, value in told.items()
        if not any(variables.get(name) is not None for name in names)
    }
    return ChainMap(missing, t.cast(t.MutableMapping[str, t.Any], variables))
