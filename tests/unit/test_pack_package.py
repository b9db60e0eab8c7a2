# SPDX-License-Identifier: GPL-3.0-or-later
"""The archive that brings the proxy to a host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "roles" / "precache_proxy" / "files" / "pack_package.py"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of three modules, one in a sub-package, with byte code beside them."""
    root = tmp_path / "thing"
    (root / "inner").mkdir(parents=True)
    (root / "__pycache__").mkdir()
    (root / "__init__.py").write_text('"""Thing."""\n')
    (root / "inner" / "__init__.py").write_text("")
    (root / "inner" / "part.py").write_text("VALUE = 1\n")
    (root / "__pycache__" / "part.cpython-311.pyc").write_bytes(b"\0")
    return root


def pack(package: Path, target: Path) -> dict[str, str]:
    target.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-B", SCRIPT, package, target], capture_output=True, text=True, check=True
    )
    told: dict[str, str] = json.loads(done.stdout)
    return told


def test_same_package_gives_the_same_bytes(package: Path, tmp_path: Path) -> None:
    first = pack(package, tmp_path / "a")
    for path in package.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    assert pack(package, tmp_path / "b")["digest"] == first["digest"]


def test_any_change_gives_another_digest(package: Path, tmp_path: Path) -> None:
    digests = {pack(package, tmp_path / "a")["digest"]}
    (package / "inner" / "part.py").write_text("VALUE = 2\n")
    digests.add(pack(package, tmp_path / "a")["digest"])
    (package / "inner" / "part.py").rename(package / "inner" / "piece.py")
    digests.add(pack(package, tmp_path / "a")["digest"])
    assert len(digests) == 3


def test_mark_of_completeness_comes_last_and_byte_code_stays_home(package: Path, tmp_path: Path) -> None:
    with tarfile.open(pack(package, tmp_path / "a")["path"]) as archive:
        members = archive.getmembers()
    assert [member.name for member in members] == [
        "thing/__init__.py",
        "thing/inner/__init__.py",
        "thing/inner/part.py",
        "thing/.complete",
    ]
    assert {(member.mode, member.uid, member.mtime) for member in members} == {(0o644, 0, 0)}


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-B", SCRIPT, tmp_path, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "no Python package" in done.stderr
