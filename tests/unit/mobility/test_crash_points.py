# SPDX-License-Identifier: GPL-3.0-or-later
"""A process is killed at the named line, and nowhere else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

PROGRAM = """
from mobility_agent.crash_points import crash_point
for number in range(3):
    crash_point('arrival-routed')
    print(number, flush=True)
"""


def run(crash_at: str) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "LIFEBOAT_CRASH_AT": crash_at}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, check=False, capture_output=True, timeout=60
    )


def test_it_is_killed_when_it_comes_by_so_often() -> None:
    assert (run("arrival-routed").returncode, run("arrival-routed").stdout) == (-signal.SIGKILL, b"")
    third = run("arrival-routed:3")
    assert (third.returncode, third.stdout) == (-signal.SIGKILL, b"0\n1\n")


def test_elsewhere_nothing_happens() -> None:
    for crash_at in ("", "binding-routed"):
        assert run(crash_at).returncode == 0


def test_a_point_that_is_none_is_refused() -> None:
    told = run("nowhere")
    assert told.returncode == 1
    assert b"LIFEBOAT_CRASH_AT=nowhere: no such point" in told.stderr
