# SPDX-License-Identifier: GPL-3.0-or-later
"""What tests on the lab share: the lab itself, and both sites set up by the collection's own playbook."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from integration.evacuation_pair import EvacuationPair, installed_pair, running_pair
from integration.mobility_agents import Agents, agents_running
from integration.playbook_runner import INSTALLED, ROOT, PlaybookResult, run_playbook
from lifeboat_lab.errors import LabError
from lifeboat_lab.lab import Lab

INVENTORY = ROOT / "inventories" / "lab"
# Files that run at the same time have labs of their own; commands and playbooks read the name from here.
if WORKER := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["LIFEBOAT_LAB"] = f"{os.environ.get('LIFEBOAT_LAB', 'lab')}-{WORKER}"


def pytest_report_header() -> str | None:
    """Says when the tests run other playbooks than the checkout: who runs one file forgets to build."""
    installed = INSTALLED / "ansible_collections/lifeboat/evacuation"
    older = [
        path
        for room in ("playbooks", "plugins", "roles")
        for path in (ROOT / room).rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and not _same(path, installed / path.relative_to(ROOT))
    ]
    if not older:
        return None
    return f"{INSTALLED} differs from the checkout in {len(older)} files: `make build` to test these"


def _same(path: Path, installed: Path) -> bool:
    return installed.is_file() and filecmp.cmp(path, installed, shallow=False)


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """The running lab; one that is not there is built, and taken down afterwards."""
    lab = Lab(say=print)
    found = lab.built
    try:
        lab.up(owner=None if found else os.getpid())
    except LabError as error:
        pytest.fail(f"no lab: {error}")
    yield lab
    if not found:
        lab.down()


@pytest.fixture(scope="session")
def lab_playbook(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PlaybookResult]:
    """Runs a playbook of the installed collection on the lab: ``lab_playbook("site_setup", check=True)``."""
    work = tmp_path_factory.mktemp("controller")

    def run(playbook: str | list[dict[str, object]], **arguments: object) -> PlaybookResult:
        if isinstance(playbook, str) and "." not in playbook:
            playbook = f"lifeboat.evacuation.{playbook}"
        # The authority goes with the lab: hosts refuse a new one.
        authority = str(lab.settings.state / "pki")
        variables = {"pki_ca_directory": authority, **arguments.pop("variables", {})}  # type: ignore[dict-item]
        wrap = partial(lab.command, "controller")
        return run_playbook(playbook, INVENTORY, work, variables=variables, wrap=wrap, **arguments)  # type: ignore[arg-type]

    return run


@pytest.fixture(scope="session")
def site_setup(lab_playbook: Callable[..., PlaybookResult]) -> PlaybookResult:
    """Both sites set up; the result of that run."""
    return lab_playbook("site_setup").require_success()


@pytest.fixture(scope="module")
def installed(lab: Lab) -> Iterator[EvacuationPair]:
    """Two whole proxies for tests of evacuations, not started."""
    with installed_pair(lab) as pair:
        yield pair


@pytest.fixture
def pair(installed: EvacuationPair) -> Iterator[EvacuationPair]:
    """The same, running. Tests of the rooms `source` and `store` alone bring a pair of their own."""
    with running_pair(installed) as pair:
        yield pair


@pytest.fixture(scope="module")
def shared_agents(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agents]:
    """Two anchors and two gateways in a small internet of their own; no lab is needed."""
    with agents_running(tmp_path_factory.mktemp("agents")) as agents:
        yield agents


@pytest.fixture
def agents(shared_agents: Agents) -> Agents:
    """The same, as they were in the beginning, whatever the test before did to them."""
    shared_agents.restore()
    return shared_agents
