# SPDX-License-Identifier: GPL-3.0-or-later
"""Modules run in this process, as Ansible would run them, against a served control API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from precache_proxy.control.parts import Parts
from small_parts.collection import Run, importable, module_runner
from small_parts.parts import serving, small_parts


@pytest.fixture(scope="session", autouse=True)
def collection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The checkout, importable under the name that it has once installed."""
    with importable(tmp_path_factory.mktemp("collections")):
        yield


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return small_parts(tmp_path)


@pytest.fixture
def socket(parts: Parts) -> Iterator[Path]:
    with serving(parts) as path:
        yield path


@pytest.fixture
def run(socket: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run("module", check=False, **options)`` gives what the module says to that socket."""
    return module_runner(capsys, socket=str(socket))
