# SPDX-License-Identifier: GPL-3.0-or-later
"""Downtime as somebody outside sees it, without a network: when does each heartbeat reach its host?

A guest's own clock stands still while it is moved, so its own times cannot tell; this machine's clock can,
and all hosts share it.
"""

import re
import threading
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

STEP_SECONDS = 0.004
BEAT = re.compile(rb"^beat (\d+) ", re.MULTILINE)


class Watch:
    """Follows a guest's record files on all hosts while the `with` block runs."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = list(files)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="lab-watch", daemon=True)
        self._positions = {file: file.stat().st_size if file.exists() else 0 for file in self._files}
        # Arrival on this machine's monotonic clock, number, index of the file.
        self.beats: list[tuple[float, int, int]] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def longest_gap_seconds(self) -> float:
        """Longest time without a heartbeat from anywhere; 0 when fewer than two came."""
        began, ended = self.longest_gap()
        return ended - began

    def longest_gap(self) -> tuple[float, float]:
        """When it began and when it ended, monotonic seconds; twice the same when fewer than two came."""
        gaps = ((earlier[0], later[0]) for earlier, later in pairwise(self.beats))
        return max(gaps, key=lambda gap: gap[1] - gap[0], default=(0.0, 0.0))

    def _follow(self) -> None:
        while not self._stop.is_set():
            now = time.monotonic()
            for index, file in enumerate(self._files):
                self._read(index, file, now)
            self._stop.wait(STEP_SECONDS)

    def _read(self, index: int, file: Path, now: float) -> None:
        try:
            if file.stat().st_size <= self._positions[file]:
                return
            with file.open("rb") as stream:
                stream.seek(self._positions[file])
                data = stream.read()
        except OSError:  # the host was switched off meanwhile
            return
        # An unfinished line is read again when it is whole.
        whole = data.rfind(b"\n") + 1
        self._positions[file] += whole
        self.beats += [(now, int(match.group(1)), index) for match in BEAT.finditer(data[:whole])]
