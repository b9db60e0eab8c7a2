# SPDX-License-Identifier: GPL-3.0-or-later
"""Every process of a lab lives in a control group of that lab.

Membership is inherited and cannot be left by accident, so ending "what the lab started" needs no names and
no process ids that might have been used again for something else.
"""

import errno
import os
import time
from pathlib import Path

from lifeboat_lab.errors import LabError
from lifeboat_lab.shell import run

OWN_MOUNT = Path("/run/lifeboat-lab/cgroup2")


def hierarchy() -> Path:
    """Where the unified control group hierarchy is mounted; mounts it where the machine has none."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        kind = fields[fields.index("-") + 1]
        if kind == "cgroup2" and fields[3] == "/":
            return Path(fields[4])
    OWN_MOUNT.mkdir(parents=True, exist_ok=True)
    run(["mount", "-t", "cgroup2", "cgroup2", str(OWN_MOUNT)])
    return OWN_MOUNT


class ControlGroup:
    """One group of processes, by its path below the hierarchy, such as `lifeboat-lab/lab/home1`."""

    def __init__(self, name: str) -> None:
        self.path = hierarchy() / name

    def create(self) -> None:
        """Make the group and its parents; a group that exists is left as it is."""
        self.path.mkdir(parents=True, exist_ok=True)

    def enter(self, pid: int | None = None) -> None:
        """Move a process (default: this one) into the group; its future children follow."""
        (self.path / "cgroup.procs").write_text(str(pid if pid is not None else os.getpid()))

    def processes(self) -> list[int]:
        """Process ids in the group and all groups below it."""
        found: list[int] = []
        for directory, _, _ in os.walk(self.path):
            try:
                text = (Path(directory) / "cgroup.procs").read_text()
            except OSError:  # the group ended between the walk and the read
                continue
            found += [int(pid) for pid in text.split()]
        return found

    def kill(self, timeout_seconds: float = 30) -> None:
        """SIGKILL the whole tree at once, wait until it is gone, and remove the groups.

        Raises LabError when something does not end, which only a process stuck in the kernel does.
        """
        if not self.path.is_dir():
            return
        (self.path / "cgroup.kill").write_text("1")
        deadline = time.monotonic() + timeout_seconds
        while not self._removed():
            if time.monotonic() > deadline:
                raise LabError(
                    f"control group {self.path}: processes {self.processes()} do not end; see dmesg for why"
                )
            time.sleep(0.02)

    def _removed(self) -> bool:
        """Remove the group and those below it; False while a process in one of them is still ending."""
        for directory, _, _ in os.walk(self.path, topdown=False):
            try:
                Path(directory).rmdir()
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                return False
        return True
