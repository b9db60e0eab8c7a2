# SPDX-License-Identifier: GPL-3.0-or-later
"""The client's end: takes heartbeats (UDP) and acknowledgements (TCP) of guests and notes when each arrived.

Runs in the client's namespace, `python3 -m lifeboat_lab.guests.collector FILE PORT`; one line each:
ARRIVAL_SECONDS TAG beat|ack NUMBER
"""

import itertools
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from lifeboat_lab.control_group import ControlGroup
from lifeboat_lab.errors import LabError
from lifeboat_lab.hosts import wait_for

if TYPE_CHECKING:
    from lifeboat_lab.lab import Lab

PORT = 7000
# 50 heartbeats a second of 8 guests fill this in about ten hours; then nothing more is noted.
LARGEST_FILE_BYTES = 512 << 20
KINDS = ("beat", "ack")


@dataclass(frozen=True)
class Arrival:
    """A heartbeat or an acknowledgement as the client got it."""

    seconds: float
    number: int


class Collector:
    """The handle on the collector of a lab."""

    def __init__(self, lab: "Lab") -> None:
        self._lab = lab
        self._file = lab.settings.runtime / "collector.log"

    def start(self) -> None:
        """Start it; does nothing when it runs."""
        group = ControlGroup(self._lab.settings.control_group("collector"))
        group.create()
        if group.processes():
            return
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        with (self._lab.settings.runtime / "collector.errors").open("ab") as log:
            process = subprocess.Popen(
                [*self._lab.command("client", [sys.executable]), "-m", "lifeboat_lab.guests.collector",
                 str(self._file), str(PORT)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
                preexec_fn=group.enter,
            )  # fmt: skip

        def listening() -> bool:
            if process.poll() is not None:
                raise LabError(f"the client's collector ended with {process.returncode}; see {log.name}")
            return self._file.exists()

        wait_for(listening, 10, 0.05)

    def arrivals(self, tag: str, kind: str, *, since: float = 0.0) -> list[Arrival]:
        """What arrived of one guest (`GuestPlan.tag`) and kind, beat or ack, by the machine's clock."""
        if not self._file.exists():
            return []
        found = []
        for line in self._file.read_text().splitlines():
            words = line.split()
            if len(words) == 4 and words[1] == tag and words[2] == kind and float(words[0]) >= since:
                found.append(Arrival(float(words[0]), int(words[3])))
        return found

    def longest_gap_seconds(self, tag: str, *, since: float = 0.0) -> float:
        """Longest time without a heartbeat of the guest at the client; 0 when fewer than two arrived."""
        times = [arrival.seconds for arrival in self.arrivals(tag, "beat", since=since)]
        return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)


def serve(file: TextIO, port: int) -> None:
    """Note what arrives until the file is full or the process is ended."""
    selector = selectors.DefaultSelector()
    datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    datagrams.bind(("::", port))
    listener = socket.create_server(("::", port), family=socket.AF_INET6, backlog=64)
    for one in (datagrams, listener):
        one.setblocking(False)
        selector.register(one, selectors.EVENT_READ)
    unfinished: dict[socket.socket, bytes] = {}
    while file.tell() < LARGEST_FILE_BYTES:
        for key, _ in selector.select():
            arrived = time.time()
            source = key.fileobj
            assert isinstance(source, socket.socket)
            if source is listener:
                connection, _ = listener.accept()
                selector.register(connection, selectors.EVENT_READ)
                unfinished[connection] = b""
                continue
            try:
                data = source.recv(65536)
            except OSError:
                data = b""
            if source is datagrams:
                note(file, arrived, data)
                continue
            *lines, rest = (unfinished[source] + data).split(b"\n")
            for line in lines:
                note(file, arrived, line)
            unfinished[source] = rest[-256:]
            if not data:
                selector.unregister(source)
                del unfinished[source]
                source.close()
        file.flush()


def note(file: TextIO, arrived: float, line: bytes) -> None:
    """Write one arrival down; what is not a line of ours is left out."""
    words = line.decode(errors="replace").split()
    if len(words) == 3 and words[1] in KINDS and words[2].isdigit():
        file.write(f"{arrived:.6f} {words[0]} {words[1]} {words[2]}\n")


def main() -> int:
    """Serve on the port and write into the file."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with Path(sys.argv[1]).open("a") as file:
        serve(file, int(sys.argv[2]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
