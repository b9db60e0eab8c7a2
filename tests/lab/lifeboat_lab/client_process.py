# SPDX-License-Identifier: GPL-3.0-or-later
"""A module of this package as a process in the client's namespace, which looks until it is told to end."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lifeboat_lab.errors import LabError

if TYPE_CHECKING:
    from lifeboat_lab.lab import Lab

_LAST_WORDS_SECONDS = 60.0


class ClientProcess:
    """Says "ready" once there is something to interrupt; when its input is closed it prints JSON and ends."""

    def __init__(self, lab: "Lab", module: str, *words: str) -> None:
        """Raises LabError with the process's own words where it does not become ready."""
        self._module = module
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        self._process = subprocess.Popen(
            lab.command("client", [sys.executable, "-m", f"lifeboat_lab.{module}", *words]),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            _, said = self._process.communicate(timeout=_LAST_WORDS_SECONDS)
            raise self._failed(said)

    def told(self) -> Any:
        """End it; what it printed. Raises LabError."""
        text, said = self._process.communicate("\n", timeout=_LAST_WORDS_SECONDS)
        if self._process.returncode != 0:
            raise self._failed(said)
        return json.loads(text)

    def give_up(self) -> None:
        """End it, whatever it saw."""
        self._process.kill()
        self._process.communicate()

    def _failed(self, said: str) -> LabError:
        return LabError(f"{self._module}: {said.strip()[-300:]}")
