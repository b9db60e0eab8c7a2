# SPDX-License-Identifier: GPL-3.0-or-later
"""The checkout as the collection that it is once installed, and its modules run in this process."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., dict[str, Any]]


@contextlib.contextmanager
def importable(directory: Path) -> Iterator[None]:
    """The checkout can be imported under its installed name; ``directory`` is for the link to it."""
    name = directory / "ansible_collections" / "lifeboat" / "evacuation"
    name.parent.mkdir(parents=True)
    name.symlink_to(ROOT)
    sys.path.insert(0, str(directory))
    yield
    sys.path.remove(str(directory))


def module_runner(capsys: pytest.CaptureFixture[str], **always: Any) -> Run:
    """Runs modules as Ansible would: ``run("module", check=False, **options)`` gives what the module says;
    ``failed`` is always there. ``always``: options of every run that does not give others."""
    from ansible.module_utils import _internal
    from ansible.module_utils.testing import patch_module_args

    def run(name: str, *, check: bool = False, **options: Any) -> dict[str, Any]:
        module = importlib.import_module(f"ansible_collections.lifeboat.evacuation.plugins.modules.{name}")
        arguments = {"_ansible_check_mode": check, "_ansible_diff": True, **always, **options}
        capsys.readouterr()
        # Other tests of this process may be the controller, where warnings are shown and not returned.
        as_module = patch.object(_internal, "is_controller", new=False)
        with as_module, patch_module_args(arguments), pytest.raises(SystemExit) as ended:
            module.main()
        told: dict[str, Any] = json.loads(capsys.readouterr().out)
        told.setdefault("failed", False)
        assert told["failed"] == (ended.value.code != 0)
        return told

    return run
