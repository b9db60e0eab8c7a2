# SPDX-License-Identifier: GPL-3.0-or-later
"""Put pip into an empty virtual environment from the wheel that Python itself brings.

``ansible-test`` fetches get-pip.py from a server of its own when it makes a virtual environment. This file,
laid where it keeps that download, serves instead, so that only the package index is needed.
Arguments are get-pip's: requirements (``pip==24.2``) and options.
"""

from __future__ import annotations

import subprocess
import sys


def main() -> int:
    """Install pip, then bring it to the version asked for; return the exit code."""
    # get-pip's own switches: ensurepip never installs setuptools or wheel on the Pythons we know.
    arguments = [word for word in sys.argv[1:] if word not in {"--no-setuptools", "--no-wheel"}]
    for command in (["ensurepip"], ["pip", "install", "--quiet", *arguments]):
        done = subprocess.run([sys.executable, "-I", "-m", *command], check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
