# SPDX-License-Identifier: GPL-3.0-or-later
"""The user that libvirt runs QEMU as: directories where QEMU binds sockets belong to it."""

from __future__ import annotations

import grp
import os
import pwd
import re
from dataclasses import dataclass
from pathlib import Path

from precache_proxy.errors import ConfigurationError

QEMU_CONF = Path("/etc/libvirt/qemu.conf")
# Debian and its kin; Fedora and its kin
_DISTRIBUTION_USERS = ("libvirt-qemu", "qemu")
_SETTING = re.compile(r'^\s*(user|group)\s*=\s*"?\+?([^"\s#]+)"?', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class QemuUser:
    """User and group numbers."""

    uid: int
    gid: int


def _user_entry(name: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
    except KeyError as error:
        raise ConfigurationError(
            f"QEMU's user {name!r}: there is no such user on this host; set hypervisor.qemu_user to the one "
            f"that {QEMU_CONF} names"
        ) from error


def find_qemu_user(configured: str | None = None, qemu_conf: Path = QEMU_CONF) -> QemuUser:
    """The configured user, else libvirt's own setting, else what the distribution uses.

    Raises ConfigurationError where none of them exists here.
    """
    settings: dict[str, str] = {}
    if configured is None and qemu_conf.is_file():
        settings = dict(_SETTING.findall(qemu_conf.read_text(errors="replace")))
    name = configured or settings.get("user")
    if name is None:
        known = {entry.pw_name for entry in pwd.getpwall()}
        name = next((user for user in _DISTRIBUTION_USERS if user in known), None)
    if name is None:
        raise ConfigurationError(
            f"QEMU's user: none of {', '.join(_DISTRIBUTION_USERS)} exists here; set hypervisor.qemu_user"
        )
    entry = _user_entry(name)
    gid = entry.pw_gid
    group = settings.get("group")
    if group is not None:
        gid = int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
    return QemuUser(entry.pw_uid, gid)


def make_qemu_directory(path: Path, user: QemuUser) -> Path:
    """A directory that QEMU may create sockets in, and nobody else but root."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if (status.st_uid, status.st_gid) != (user.uid, user.gid):
        os.chown(path, user.uid, user.gid)
    path.chmod(0o700)
    return path
