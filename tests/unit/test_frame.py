# SPDX-License-Identifier: GPL-3.0-or-later
"""What every room of the repository promises to look like."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LICENCE = "SPDX-License-Identifier: GPL-3.0-or-later"
ROLES = sorted(path.parent.parent for path in (ROOT / "roles").glob("*/tasks/main.yml"))


def tracked_files(*patterns: str) -> list[Path]:
    """Files that git knows, absolute; a clone without git history has none to check."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--", *patterns], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout
    return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]


def test_every_source_file_names_its_licence() -> None:
    files = tracked_files("*.py", "*.yml", "*.yaml", "*.mk", "*.sh", "Makefile")
    assert files
    without = [
        path.relative_to(ROOT).as_posix()
        for path in files
        # An empty __init__.py is how a package says that it is one; ansible-test wants some of them empty.
        if path.stat().st_size and LICENCE not in "\n".join(path.read_text().splitlines()[:5])
    ]
    assert without == []


def test_sanity_ignores_nothing() -> None:
    for ignore in (ROOT / "tests" / "sanity").glob("ignore-*.txt"):
        assert ignore.read_text() == "", f"{ignore.name} ignores findings"


def test_make_help_documents_every_public_target() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    documented = {line.split()[0] for line in shown.splitlines() if line.startswith("  ")}
    assert {"venv", "build", "lint", "test-quick", "test", "soak"} <= documented


@pytest.mark.parametrize("role", ROLES, ids=lambda path: path.name)
def test_role_arguments_are_specified_and_prefixed(role: Path) -> None:
    """Every default is specified with the same default, every name bears the role's name."""
    specification = yaml.safe_load((role / "meta" / "argument_specs.yml").read_text())
    entry_points = specification["argument_specs"].values()
    options = {name: option for entry in entry_points for name, option in entry["options"].items()}
    defaults = yaml.safe_load((role / "defaults" / "main.yml").read_text())
    assert all(name.startswith(f"{role.name}_") for name in options)
    assert set(defaults) <= set(options), "defaults that no specification names"
    assert {name for name, option in options.items() if "default" in option} <= set(defaults)
    for name, value in defaults.items():
        assert options[name].get("default") == value, f"{name}: default and specification differ"
    readme = (role / "README.md").read_text()
    assert [name for name in options if not re.search(rf"`{name}`", readme)] == [], "not in README.md"
