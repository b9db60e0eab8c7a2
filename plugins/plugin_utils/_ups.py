# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a UPS has left, asked of Network UPS Tools on the controller."""

from __future__ import annotations

import subprocess

from ansible_collections.lifeboat.evacuation.plugins.module_utils._deadline import UpsError, runtime_of

_PATIENCE_SECONDS = 5.0


def read_runtime(ups: str, program: str = "upsc") -> float:
    """Seconds that the battery carries the load for, by ``upsc``. Raises UpsError."""
    try:
        done = subprocess.run(
            [program, ups, "battery.runtime"],
            capture_output=True,
            text=True,
            timeout=_PATIENCE_SECONDS,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except FileNotFoundError as error:
        raise UpsError(
            f"UPS {ups}: {program} is not installed on the controller; install nut-client, "
            "or give the deadline as a time"
        ) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UpsError(
            f"UPS {ups}: {program} gave no answer ({error}); see that upsd runs and is reached"
        ) from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["no reason given"]
        fact = said[-1].removeprefix("Error: ")
        if "not supported" in fact.lower():
            raise UpsError(
                f"UPS {ups}: tells no battery.runtime ({fact}); give the deadline as a time, "
                "or set override.battery.runtime in ups.conf"
            )
        raise UpsError(f"UPS {ups}: {fact}; see that upsd runs there and knows this name (`upsc -l HOST`)")
    return runtime_of(done.stdout, ups)
