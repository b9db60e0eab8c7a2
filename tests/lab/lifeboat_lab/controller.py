# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab's controller: playbooks of the installed collection, run over SSH as an operator would."""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lifeboat_lab.errors import LabError
from lifeboat_lab.lab import Lab, silent

ROOT = Path(__file__).parents[3]
INVENTORY = ROOT / "inventories" / "lab"
INSTALLED = Path(os.environ.get("LIFEBOAT_INSTALLED", ROOT / "build" / "installed"))
COLLECTION = "lifeboat.evacuation"


@dataclass(frozen=True)
class Finished:
    """A playbook that came to its end, well or not."""

    return_code: int
    output: str

    def require_success(self) -> "Finished":
        """This; LabError with the end of what was printed when the playbook failed."""
        if self.return_code != 0:
            raise LabError(f"playbook ended with {self.return_code}:\n{self.output[-6000:]}")
        return self


class Controller:
    """Runs what an operator runs, in the controller's network namespace."""

    def __init__(self, lab: Lab, *, inventory: Path = INVENTORY) -> None:
        self._lab = lab
        self._inventories = [inventory]
        self.work = lab.settings.state / "controller"

    def set_host_variables(self, variables: Mapping[str, Mapping[str, Any]]) -> None:
        """Variables of hosts beside those of the lab's inventory, as an operator has them in host_vars."""
        path = self.work / "host-variables.json"
        self.work.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"all": {"hosts": variables}}))
        if path not in self._inventories:
            self._inventories.append(path)

    def environment(self) -> dict[str, str]:
        """What ansible-playbook is run with: the collection as installed, and files of this lab only."""
        self.work.mkdir(parents=True, exist_ok=True)
        return {
            **os.environ,
            "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}",
            "ANSIBLE_COLLECTIONS_PATH": str(INSTALLED),
            "ANSIBLE_HOME": str(self.work / "ansible"),
            "ANSIBLE_RETRY_FILES_ENABLED": "false",
            "ANSIBLE_FORCE_COLOR": "false",
            "LIFEBOAT_LAB": self._lab.settings.name,
            "PYTHONUNBUFFERED": "1",
        }

    def command(
        self, playbook: str, variables: Mapping[str, Any] | None = None, options: tuple[str, ...] = ()
    ) -> list[str]:
        """The command line of a playbook of the collection (`site_setup`) or of a file (`./other.yml`)."""
        if not (INSTALLED / "ansible_collections" / "lifeboat" / "evacuation").is_dir():
            raise LabError("the collection is not installed under build/; run `make build`")
        self.work.mkdir(parents=True, exist_ok=True)
        descriptor, path = tempfile.mkstemp(suffix=".json", dir=self.work)
        with os.fdopen(descriptor, "w") as file:
            json.dump(dict(variables or {}), file)
        name = playbook if "/" in playbook else f"{COLLECTION}.{playbook}"
        inventories = [word for inventory in self._inventories for word in ("-i", str(inventory))]
        return self._lab.command(
            "controller", ["ansible-playbook", *inventories, "-e", f"@{path}", *options, name]
        )

    def playbook(
        self,
        playbook: str,
        variables: Mapping[str, Any] | None = None,
        *,
        options: tuple[str, ...] = (),
        say: Callable[[str], None] = silent,
        timeout_seconds: float = 900,
    ) -> Finished:
        """Run a playbook to its end; every line goes to `say` as it comes."""
        process = subprocess.Popen(
            [
                "timeout",
                "--kill-after=10",
                f"{timeout_seconds:.0f}",
                *self.command(playbook, variables, options),
            ],
            cwd=self.work,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        lines = []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            say(line.rstrip("\n"))
        return Finished(process.wait(), "".join(lines))
