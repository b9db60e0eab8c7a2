# SPDX-License-Identifier: GPL-3.0-or-later
"""What a client of several guests notices of their moves: a ping every 10 ms of each, by one process.

Runs in the client's namespace, `python3 -m lifeboat_lab.pings ADDRESS...`, until its input is closed; then it
prints what it saw. Lighter than :mod:`lifeboat_lab.probes`, which keeps a connection under way as well.
"""

import json
import selectors
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lifeboat_lab.client_process import ClientProcess
from lifeboat_lab.probes import INTERVAL_SECONDS, Pings, Seen

if TYPE_CHECKING:
    from lifeboat_lab.lab import Lab

_LONGEST_SECONDS = 900.0
_FIRST_ANSWER_SECONDS = 30.0
_LAST_ANSWERS_SECONDS = 2.0


class PingWatch(ClientProcess):
    """Pings under way: `watch = PingWatch(lab, {name: address}); ...; watch.end()[name]`.

    Raises LabError naming the addresses that do not answer to begin with.
    """

    def __init__(self, lab: "Lab", addresses: Mapping[str, str]) -> None:
        self._addresses = dict(addresses)
        super().__init__(lab, "pings", *self._addresses.values())

    def end(self) -> dict[str, Seen]:
        """Stop, and tell what was seen of each guest."""
        told = self.told()
        return {
            name: Seen(tuple((sent, answered) for sent, answered in told[address]), (), "")
            for name, address in self._addresses.items()
        }


def _run(addresses: list[str]) -> dict[str, list[list[float | None]]]:
    all_pings = {address: Pings(address) for address in addresses}
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    for pings in all_pings.values():
        selector.register(pings.socket, selectors.EVENT_READ, pings)
    began = tick = time.monotonic()
    end = began + _LONGEST_SECONDS
    ready = ending = False
    while (now := time.monotonic()) < end:
        if now >= tick and not ending:
            # What the machine kept us from sending in time is not sent in a burst.
            tick = max(tick + INTERVAL_SECONDS, now)
            for pings in all_pings.values():
                pings.send()
        for key, _ in selector.select(end - now if ending else max(tick - time.monotonic(), 0)):
            if key.data is not None:
                key.data.receive()
            else:
                selector.unregister(sys.stdin)
                ending, end = True, time.monotonic() + _LAST_ANSWERS_SECONDS
        if not ready:
            silent = [a for a, pings in all_pings.items() if not any(at for _, at in pings.probes)]
            ready = not silent
            if ready:
                print("ready", flush=True)
            elif now - began > _FIRST_ANSWER_SECONDS:
                raise SystemExit(f"no answer from {', '.join(silent)} within {_FIRST_ANSWER_SECONDS:g} s")
    return {address: pings.probes for address, pings in all_pings.items()}


if __name__ == "__main__":
    print(json.dumps(_run(sys.argv[1:])))
