# SPDX-License-Identifier: GPL-3.0-or-later
"""Running other programs, with errors that name what failed."""

import shlex
import subprocess
from collections.abc import Mapping, Sequence

from lifeboat_lab.errors import LabError

# What a login on a host would have, and nothing of the caller's environment.
HOST_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "USER": "root",
    "LANG": "C.UTF-8",
}


def run(
    command: Sequence[str],
    *,
    check: bool = True,
    stdin: str | None = None,
    timeout_seconds: float = 120,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and return its output as text.

    Raises LabError with the command and the last lines it wrote when it fails (unless `check` is off),
    takes longer than `timeout_seconds`, or is not installed.
    """
    try:
        result = subprocess.run(
            command,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_seconds,
            env=environment,
            check=False,
        )
    except FileNotFoundError as error:
        raise LabError(f"{command[0]}: not installed; run tests/lab/install-dependencies") from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{shlex.join(command)}: still running after {timeout_seconds:g} s") from error
    if check and result.returncode != 0:
        last = "; ".join((result.stderr.strip() or result.stdout.strip()).splitlines()[-6:])
        raise LabError(f"{shlex.join(command)}: ended with {result.returncode}: {last}")
    return result
