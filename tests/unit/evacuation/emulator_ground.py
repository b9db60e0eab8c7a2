# SPDX-License-Identifier: GPL-3.0-or-later
"""A process that looks like a VM's QEMU to whoever looks for one, and counts while it is not halted."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

_COUNTS = """
import pathlib, sys, threading, time
path = pathlib.Path(sys.argv[1])
def count(name):
    number = 0
    while True:
        number += 1
        path.with_name(path.name + name).write_text(str(number))
        time.sleep(0.001)
threading.Thread(target=count, args=('.other',), daemon=True).start()
count('.main')
"""


class FakeEmulator:
    """Two threads that count into files; its pid file is where libvirt would have it."""

    def __init__(self, directory: Path, vm: str, name: str = "web1") -> None:
        self.counts = [directory / f"{name}.main", directory / f"{name}.other"]
        arguments = [sys.executable, "-c", _COUNTS, str(directory / name), "-name", "guest=x", "-uuid", vm]
        self.process = subprocess.Popen([*arguments, "-display", "none"])
        self.pid_files = directory / "pids"
        self.pid_files.mkdir(exist_ok=True)
        (self.pid_files / f"{name}.pid").write_text(f"{self.process.pid}\n")
        until = time.monotonic() + 10
        while not all(path.exists() for path in self.counts) and time.monotonic() < until:
            time.sleep(0.01)

    def counting(self) -> bool:
        """Whether both threads count on, on a machine that has other things to do as well."""
        before, until = self._told(), time.monotonic() + 10
        while time.monotonic() < until:
            time.sleep(0.05)
            if all(then != now for then, now in zip(before, self._told(), strict=True)):
                return True
        return False

    def standing(self) -> bool:
        """Whether neither does."""
        before = self._told()
        time.sleep(0.1)
        return before == self._told()

    def _told(self) -> list[str]:
        return [path.read_text() for path in self.counts]

    @property
    def ended(self) -> bool:
        """Whether it is gone."""
        return self.process.poll() is not None

    def clear(self) -> None:
        """End it, halted or not."""
        self.process.kill()
        self.process.wait()
