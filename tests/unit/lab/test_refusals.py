# SPDX-License-Identifier: GPL-3.0-or-later
"""A machine or a wish that cannot carry a lab: one sentence, and nothing begun. Each made for real."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lifeboat_lab.settings import RUNTIME, STATE

LAB = Path(__file__).resolve().parents[2] / "lab"
NAME = f"refused{os.getpid()}"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes mounts and gives up root: needs root")


def lab(
    *command: str, prefix: tuple[str, ...] = (), environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the lab's command line; a prefix may change its world."""
    own = {"PYTHONPATH": str(LAB), "PYTHONDONTWRITEBYTECODE": "1", "LIFEBOAT_LAB": NAME}
    return subprocess.run(
        [*prefix, sys.executable, "-m", "lifeboat_lab", *command],
        env=os.environ | own | (environment or {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def assert_refused(result: subprocess.CompletedProcess[str], sentence: str) -> None:
    """One line on standard error that says so, and nothing of a lab."""
    assert result.returncode == 1, result
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert sentence in lines[0]
    assert not (STATE / NAME).exists()
    assert not (RUNTIME / NAME).exists()


def test_not_root() -> None:
    if not os.access("/", os.X_OK) or "/root/" in sys.executable:
        pytest.skip("the interpreter cannot be reached by others")
    refused = lab("up", prefix=("setpriv", "--reuid", "nobody", "--clear-groups"))
    assert_refused(refused, "run it as root")


def in_world(script: str) -> tuple[str, ...]:
    """A mount namespace in which `script` has run first."""
    return ("unshare", "--mount", "--propagation", "private", "sh", "-ec", f'{script}\nexec "$@"', "world")


def test_not_debian(tmp_path: Path) -> None:
    release = tmp_path / "os-release"
    release.write_text('ID=fedora\nNAME="Fedora"\n')
    result = lab("up", prefix=in_world(f"mount --bind {release} $(readlink -f /etc/os-release)"))
    assert_refused(result, "is not Debian")


def test_no_space() -> None:
    Path("/var/cache/lifeboat-lab").mkdir(exist_ok=True)
    Path("/var/lib/lifeboat-lab").mkdir(exist_ok=True)
    script = "for d in cache lib; do mount -t tmpfs -o size=20m none /var/$d/lifeboat-lab; done"
    result = lab("up", prefix=in_world(script))
    # Both places at once.
    assert_refused(result, "/var/cache/lifeboat-lab: 500 MiB needed, 20 MiB free; free space there; /var/lib")


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("LIFEBOAT_LAB", "No_Such Name", "must be 1 to 21 lower-case letters"),
        (
            "LIFEBOAT_LAB_HOSTS",
            "home1,mars",
            "hosts mars: not known; set LIFEBOAT_LAB_HOSTS to some of home1",
        ),
        ("LIFEBOAT_LAB_SUITE", "sarge", "set LIFEBOAT_LAB_SUITE to one of trixie, bookworm"),
    ],
)
def test_bad_settings(variable: str, value: str, sentence: str) -> None:
    assert_refused(lab("up", environment={variable: value}), sentence)


def test_no_lab() -> None:
    assert_refused(lab("exec", "home1", "true"), f"lab {NAME}: is not built; run `make lab-up`")
    assert_refused(lab("exec", "controller", "true"), "is not built")
    assert_refused(lab("wan", "metro"), "relay does not answer")
    assert lab("down").stdout == f"lab: there is no lab {NAME}\n"
