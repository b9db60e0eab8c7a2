# SPDX-License-Identifier: GPL-3.0-or-later
"""`make bench TABLE=NAME`: measure one table on a lab of its own, print it, write it as JSON."""

import argparse
import sys
import time
from pathlib import Path

from lifeboat_bench import coordination, deadline, evacuation, handover, peacetime, precache, scale
from lifeboat_bench.ground import DESTINATION, SOURCE, TWO_PAIRS, Ground
from lifeboat_bench.result import Table
from lifeboat_lab.errors import LabError

# Measured on a model, in a moment: these build no lab.
WITHOUT_LAB = {"scale": scale.run}
TABLES = {
    "precache": precache.run,
    "evacuation": evacuation.run,
    "peacetime": peacetime.run,
    "handover": handover.run,
    "coordination": coordination.run,
    "deadline": deadline.run,
}

# Tables that need more than one pair of hosts.
HOSTS = {
    "precache": TWO_PAIRS,
    "handover": handover.HOSTS_NEEDED,
    "coordination": TWO_PAIRS,
    "deadline": TWO_PAIRS,
}


def main() -> int:
    """Measure a table; 0 when every figure that was asked for holds, 3 when one was missed."""
    parser = argparse.ArgumentParser(prog="lifeboat_bench", description=__doc__)
    parser.add_argument("table", choices=[*TABLES, *WITHOUT_LAB])
    parser.add_argument("--output", type=Path, required=True, help="directory for TABLE.json")
    options = parser.parse_args()
    began = time.monotonic()

    if options.table in WITHOUT_LAB:
        return _told(WITHOUT_LAB[options.table](), options.output)

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.0f} s] {text}", file=sys.stderr, flush=True)

    ground = Ground(say, HOSTS.get(options.table, (SOURCE, DESTINATION)))
    try:
        ground.build()
        table = TABLES[options.table](ground)
    except LabError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    finally:
        ground.remove()
    return _told(table, options.output)


def _told(table: Table, directory: Path) -> int:
    path = table.write(directory)
    print(table.render())
    print(f"\nwritten to {path}")
    return 0 if table.holds else 3


if __name__ == "__main__":
    sys.exit(main())
