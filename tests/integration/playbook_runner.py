# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs playbooks from the installed collection, as a user would, and reads what they changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
INSTALLED = Path(os.environ.get("LIFEBOAT_INSTALLED", ROOT / "build" / "installed"))


@dataclass(frozen=True)
class PlaybookResult:
    """What a run came to; `stats` maps hosts to Ansible's counters (ok, changed, failures...)."""

    return_code: int
    stats: dict[str, dict[str, int]]
    tasks: list[dict[str, Any]]
    output: str

    @property
    def changed(self) -> int:
        """Changes over all hosts."""
        return sum(counters["changed"] for counters in self.stats.values())

    @property
    def changed_tasks(self) -> list[str]:
        """Names of the tasks that changed something, for messages."""
        return [
            entry["task"]["name"]
            for entry in self.tasks
            if any(result.get("changed") for result in entry["hosts"].values())
        ]

    @property
    def messages(self) -> str:
        """What failed tasks said."""
        said = [
            f"{host}: {result.get('msg', result)}"
            for entry in self.tasks
            for host, result in entry["hosts"].items()
            if result.get("failed") or result.get("unreachable")
        ]
        return "\n".join(said)

    def require_success(self) -> PlaybookResult:
        """This result; AssertionError with what went wrong when the run failed."""
        assert self.return_code == 0, self.messages or self.output[-4000:]
        return self


def run_playbook(
    playbook: str | Path | list[dict[str, Any]],
    inventory: str | Path | dict[str, Any],
    work: Path,
    *,
    variables: Mapping[str, Any] | None = None,
    check: bool = False,
    environment: Mapping[str, str] | None = None,
    options: tuple[str, ...] = (),
    wrap: Callable[[list[str]], list[str]] = list,
    timeout_seconds: float = 900,
) -> PlaybookResult:
    """Run a playbook (a path, an FQCN or plays) and parse its JSON result.

    ``wrap`` makes the command line that runs another one where the hosts can be reached.
    """
    work.mkdir(parents=True, exist_ok=True)
    if isinstance(playbook, list):
        path = work / "playbook.yml"
        path.write_text(yaml.safe_dump(playbook))
        playbook = path
    if isinstance(inventory, dict):
        inventory_path = work / "inventory.yml"
        inventory_path.write_text(yaml.safe_dump(inventory))
        inventory = inventory_path
    extra = work / "variables.json"
    extra.write_text(json.dumps(dict(variables or {})))
    ansible_playbook = ROOT / ".venv" / "bin" / "ansible-playbook"
    command = [str(ansible_playbook), "-i", str(inventory), "-e", f"@{extra}", *options, str(playbook)]
    if check:
        command += ["--check", "--diff"]
    done = subprocess.run(
        wrap(command),
        cwd=work,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
        stdin=subprocess.DEVNULL,
        env={
            **os.environ,
            "ANSIBLE_COLLECTIONS_PATH": str(INSTALLED),
            "ANSIBLE_HOME": str(work / "ansible-home"),
            "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
            "ANSIBLE_RETRY_FILES_ENABLED": "false",
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_PIPELINING": "1",
            "ANSIBLE_LOCALHOST_WARNING": "false",
            "PATH": f"{ansible_playbook.parent}:{os.environ['PATH']}",
            **(environment or {}),
        },
    )
    shutil.rmtree(work / "ansible-home", ignore_errors=True)
    start = done.stdout.find("{\n")
    if start < 0:
        return PlaybookResult(done.returncode, {}, [], done.stdout + done.stderr)
    told, _ = json.JSONDecoder().raw_decode(done.stdout[start:])
    tasks = [entry for play in told["plays"] for entry in play["tasks"]]
    return PlaybookResult(done.returncode, told["stats"], tasks, done.stdout + done.stderr)
