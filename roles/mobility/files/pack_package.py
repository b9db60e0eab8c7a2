# SPDX-License-Identifier: GPL-3.0-or-later
"""Pack a Python package into one tar file whose bytes depend on nothing but the package's.

Run on the controller: ``pack_package.py PACKAGE_DIRECTORY TARGET_DIRECTORY``. Prints JSON with ``digest``
(SHA-256 of the archive) and ``path``. One file travels to a host in a second where a hundred take a minute,
and its digest tells whether anything changed.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

# Last in the archive: a package without it was not unpacked to the end.
COMPLETE = ".complete"


def _member(name: str, size_bytes: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size_bytes
    member.mode = 0o644
    return member


def pack(package: Path) -> bytes:
    """The archive of ``package``: its .py files in order of their names, then the mark of completeness.

    Raises FileNotFoundError where there is no package.
    """
    files = sorted(path for path in package.rglob("*.py") if path.is_file())
    if package / "__init__.py" not in files:
        raise FileNotFoundError(f"{package}: no Python package (it has no __init__.py)")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in files:
            content = path.read_bytes()
            name = f"{package.name}/{path.relative_to(package).as_posix()}"
            archive.addfile(_member(name, len(content)), io.BytesIO(content))
        archive.addfile(_member(f"{package.name}/{COMPLETE}", 0))
    return buffer.getvalue()


def main() -> int:
    """Pack, write the archive to the target directory and say where and what it is."""
    package, target = (Path(word) for word in sys.argv[1:])
    archive = pack(package)
    digest = hashlib.sha256(archive).hexdigest()
    path = target / f"{package.name}-{digest[:12]}.tar"
    path.write_bytes(archive)
    print(json.dumps({"digest": digest, "path": str(path)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
