# SPDX-License-Identifier: GPL-3.0-or-later
"""libvirt's hook for proxies that a test starts by hand, with directories of their own."""

from __future__ import annotations

from pathlib import Path

from lifeboat_lab.lab import Lab

HOOK = Path(__file__).resolve().parents[2] / "roles/precache_proxy/files/libvirt_hook/lifeboat"
# libvirt looks for hooks when it starts or is told to.
LOOK_AGAIN = "systemctl reload-or-restart libvirtd"


def install_hook(lab: Lab, host: str, path: str, *, directory: str, state: str, run: str) -> None:
    """Have libvirt ask our hook before it starts a VM: a copy in ``directory``, called by ``path``."""
    root = lab.host(host).root
    (root / directory.lstrip("/") / "hook").write_bytes(HOOK.read_bytes())
    script = root / path.lstrip("/")
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(
        f"#!/bin/sh\nexport LIFEBOAT_STATE_DIRECTORY={state} LIFEBOAT_RUN_DIRECTORY={run}\n"
        f'exec /usr/bin/python3 -IS {directory}/hook "$@"\n'
    )
    script.chmod(0o755)
    # It listens once its drivers are ready.
    lab.exec(host, "sh", "-c", f"virsh uri >/dev/null; {LOOK_AGAIN}")
