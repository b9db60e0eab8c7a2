# SPDX-License-Identifier: GPL-3.0-or-later
"""Modules run in this process, as Ansible would run them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from small_parts.collection import Run, importable, module_runner


@pytest.fixture(scope="session")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The checkout, importable under the name that it has once installed."""
    with importable(tmp_path_factory.mktemp("collections")):
        yield


@pytest.fixture
def run(collection: None, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run("module", check=False, **options)`` gives what the module says."""
    return module_runner(capsys)
