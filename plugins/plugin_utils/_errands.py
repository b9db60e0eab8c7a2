# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Requests that nobody stands and waits for: one after the other per host, all hosts at the same time.

A host that is dead keeps what it is asked for up to half a minute. The loop that serves all others hands such
requests over and hears of each when it is done, in its own thread.
"""

from __future__ import annotations

import queue
import threading
import time
import typing as t
from collections import deque
from concurrent.futures import Executor
from dataclasses import dataclass

from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import ProxyError

Done = t.Callable[[t.Any, ProxyError | None], None]


@dataclass
class _Errand:
    host: str
    key: str
    request: t.Callable[[], t.Any]
    done: Done
    # Once it is on its way nobody can change it any more.
    result: t.Any = None
    error: ProxyError | None = None


class Errands:
    """Takes requests (callables that may raise ProxyError) and tells their outcomes in ``settle``."""

    def __init__(self, pool: Executor) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._queued: dict[str, deque[_Errand]] = {}
        self._at_work: dict[str, _Errand] = {}
        self._over: queue.SimpleQueue[_Errand] = queue.SimpleQueue()
        # How many of each host are not told of yet.
        self._outstanding: dict[str, int] = {}

    def send(self, host: str, key: str, request: t.Callable[[], t.Any], done: Done) -> None:
        """Ask soon. One of the same ``key`` that still waits for its turn gives way to this one."""
        with self._lock:
            line = self._queued.setdefault(host, deque())
            kept = [errand for errand in line if errand.key != key]
            given_way = len(line) - len(kept)
            line.clear()
            line.extend([*kept, _Errand(host, key, request, done)])
            self._outstanding[host] = self._outstanding.get(host, 0) + 1 - given_way
            if host not in self._at_work:
                self._at_work[host] = line[0]
                self._pool.submit(self._work, host)

    def settle(self, seconds: float, late: t.Collection[str] = ()) -> None:
        """Tell what has been answered; wait for the rest, but no longer than this, nor for ``late`` hosts."""
        until = time.monotonic() + seconds
        while True:
            with self._lock:
                awaited = any(count > 0 for host, count in self._outstanding.items() if host not in late)
            try:
                errand = self._over.get(timeout=max(0.0, until - time.monotonic()) if awaited else 0.0)
            except queue.Empty:
                return
            with self._lock:
                self._outstanding[errand.host] -= 1
            errand.done(errand.result, errand.error)

    def _work(self, host: str) -> None:
        while True:
            with self._lock:
                line = self._queued[host]
                if not line:
                    del self._at_work[host]
                    return
                errand = self._at_work[host] = line.popleft()
            try:
                errand.result = errand.request()
            except ProxyError as error:
                errand.error = error
            except Exception as error:  # noqa: BLE001
                # Nobody looks at what this thread raises: an outcome there must be, or all wait for it.
                errand.error = ProxyError("error", f"{host}: {error!r}")
            self._over.put(errand)
