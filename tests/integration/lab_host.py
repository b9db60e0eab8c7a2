# SPDX-License-Identifier: GPL-3.0-or-later
"""testinfra on the lab's hosts: its commands run inside a host, without ssh in between."""

from __future__ import annotations

import json
from typing import Any

from testinfra.backend.base import BaseBackend, CommandResult
from testinfra.host import Host

from lifeboat_lab.lab import Lab


class LabBackend(BaseBackend):  # type: ignore[misc]
    """Runs commands as root on one host of a lab."""

    NAME = "lab"

    def __init__(self, lab: Lab, name: str) -> None:
        self._lab = lab
        super().__init__(name)

    def run(self, command: str, *args: str, **_kwargs: Any) -> CommandResult:
        """Run a shell command line; ``%s`` in it stands for quoted arguments."""
        line = self.get_command(command, *args)
        words = self._lab.command(self.hostname, ["/bin/sh", "-c", line])
        return self.run_local(" ".join("%s" for _ in words), *words)


def lab_host(lab: Lab, name: str) -> Host:
    """A testinfra host for a host of the lab."""
    return Host(LabBackend(lab, name))


def proxy_status(host: Host) -> dict[str, Any]:
    """What ``precache-proxy status --json`` tells on a host."""
    told: dict[str, Any] = json.loads(host.check_output("precache-proxy status --json"))
    return told
