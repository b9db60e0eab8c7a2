# SPDX-License-Identifier: GPL-3.0-or-later
"""Modules run in this process, as Ansible would run them."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The checkout, importable under the name that it has once installed."""
    directory = tmp_path_factory.mktemp("collections")
    name = directory / "ansible_collections" / "lifeboat" / "evacuation"
    name.parent.mkdir(parents=True)
    name.symlink_to(ROOT)
    sys.path.insert(0, str(directory))
    yield
    sys.path.remove(str(directory))


@pytest.fixture
def run(collection: None, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run("module", check=False, **options)`` gives what the module says; ``failed`` is always there."""
    from ansible.module_utils.testing import patch_module_args

    def execute(name: str, *, check: bool = False, **options: Any) -> dict[str, Any]:
        module = importlib.import_module(f"ansible_collections.lifeboat.evacuation.plugins.modules.{name}")
        capsys.readouterr()
        with (
            patch_module_args({"_ansible_check_mode": check, "_ansible_diff": True, **options}),
            pytest.raises(SystemExit) as ended,
        ):
            module.main()
        told: dict[str, Any] = json.loads(capsys.readouterr().out)
        told.setdefault("failed", False)
        assert told["failed"] == (ended.value.code != 0)
        return told

    return execute
