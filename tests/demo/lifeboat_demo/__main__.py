# SPDX-License-Identifier: GPL-3.0-or-later
"""`make demo`: the whole story from an empty machine to a table, with progress on the way."""

import argparse
import sys
import time
from pathlib import Path

from lifeboat_demo.report import render, write
from lifeboat_demo.story import Story
from lifeboat_lab.errors import LabError
from lifeboat_lab.lab import Lab


class Progress:
    """Lines with the time since the start: what is being done now, and what it came to."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self, text: str) -> None:
        elapsed = int(time.monotonic() - self._began)
        print(f"[{elapsed // 60:2}:{elapsed % 60:02}] {text}", flush=True)


def main() -> int:
    """Run the demonstration; 0 when every VM was evacuated and every check passed."""
    parser = argparse.ArgumentParser(prog="lifeboat_demo", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory for report.json")
    parser.add_argument("--profile", default="trans-pacific", help="WAN profile (default: %(default)s)")
    options = parser.parse_args()
    say = Progress()
    try:
        report = Story(Lab(say=say), options.profile, say).tell()
    except LabError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; `make lab-down` removes the lab", file=sys.stderr)
        return 130
    path = write(report, options.output)
    print("\n" + render(report))
    say(f"report: {path}; the lab is still there: `make lab-status`, `make lab-down`")
    return 0 if report.holds else 1


if __name__ == "__main__":
    sys.exit(main())
