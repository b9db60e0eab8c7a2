#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Dynamic inventory of the running lab (LIFEBOAT_LAB, default "lab"), as `make lab-up` wrote it down.

Use it from the controller: tests/lab/lab exec controller ansible-playbook -i inventories/lab ...
"""

import json
import os
import sys
from pathlib import Path


def main() -> int:
    """Answer --list; everything about a host is in there already, so --host has nothing to add."""
    if "--host" in sys.argv[1:]:
        print("{}")
        return 0
    name = os.environ.get("LIFEBOAT_LAB") or "lab"
    path = Path("/run/lifeboat-lab") / name / "inventory.json"
    try:
        answer = json.loads(path.read_text())
    except OSError:
        print(f"lab {name}: is not built ({path} cannot be read); run `make lab-up`", file=sys.stderr)
        return 1
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
