# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""How the sources are asked how they stand, at a look and between two: who is slow holds up nobody."""

from __future__ import annotations

import contextlib
import time
import typing as t
from concurrent.futures import Future, wait

from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import ProxyError
from ansible_collections.lifeboat.evacuation.plugins.module_utils._deadline import Watch
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fleet import Eyes
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._leases import Leases
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._requester import Requester
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._surveyor import (
    Find,
    Proxy,
    Wanted,
    ask,
    nobody,
)

# How long a host may take to say how it stands; so long it is late, and then it is not reached.
_ANSWER_SECONDS = 15.0
# How long the last look waits for whoever is late.
_PATIENT_SECONDS = 30.0
# Between two looks nobody is waited for for longer.
_GLANCE_ANSWER_SECONDS = 0.5


class Lookout(Requester):
    """Knows who was asked and owes an answer, and since when a host is not reached."""

    def __init__(
        self,
        wanted: Wanted,
        sources: t.Sequence[Proxy],
        destinations: t.Mapping[str, Proxy],
        deadline: Watch,
        say: t.Callable[[str], None],
        clock: t.Callable[[], float] = time.time,
        sleep: t.Callable[[float], None] = time.sleep,
        find: Find = nobody,
    ) -> None:
        super().__init__(wanted, sources, destinations, deadline, say, clock, find)
        self._sleep = sleep
        self._leases = Leases(wanted.site, self._sources, wanted.who, self._pool, say, clock, sleep)
        self._pending: dict[str, Future[tuple[dict[str, t.Any], int | None]]] = {}
        self._lost_at: dict[str, float] = {}
        self._silent: frozenset[str] = frozenset()

    def _ask_destinations_again(self) -> None:
        asked = {
            name: self._pool.submit(ask, proxy, "GET", "/v1/status", None, _ANSWER_SECONDS)
            for name, proxy in self._destinations.items()
        }
        wait(asked.values(), 2 * _ANSWER_SECONDS)
        for name, answer in asked.items():
            with contextlib.suppress(ProxyError, TimeoutError):
                self.there[name].status = answer.result(timeout=0)

    def _look(self, interval: float, *, patient: bool = False) -> None:
        """Ask the sources how they stand; one that is slow or gone holds up nobody."""
        for name, proxy in self._sources.items():
            # One that never answered has VMs that nobody plans with: it is told as not reached.
            if name not in self._pending and name not in self._silent:
                self._pending[name] = self._pool.submit(self._poll, proxy, whole=patient)
        until = time.monotonic() + (_PATIENT_SECONDS if patient else max(1.0, interval * 0.75))
        # Who was late at the last look is not waited for at this one.
        for name in sorted(self._pending, key=lambda name: self.hosts[name].late_since is not None):
            future = self._pending[name]
            late = self.hosts[name].late_since is not None and not patient
            try:
                status, epoch = future.result(timeout=0.0 if late else max(0.0, until - time.monotonic()))
            except TimeoutError:
                if self.hosts[name].late_since is None:
                    self.hosts[name].late_since = self._clock()
                continue
            except ProxyError as error:
                del self._pending[name]
                self.hosts[name].late_since = None
                if not self.hosts[name].error:
                    self._say(f"{name}: {error.message.removeprefix(f'{name}: ')}")
                self.hosts[name].error = error.message
                self._lost_at.setdefault(name, self._clock())
                continue
            del self._pending[name]
            if self.hosts[name].error:
                self._say(f"{name}: answers again")
            self.hosts[name].status, self.hosts[name].error = status, ""
            if epoch is not None:
                self._epochs[name] = epoch
            self.hosts[name].late_since = None
            self._lost_at.pop(name, None)

    def _poll(self, proxy: Proxy, *, whole: bool) -> tuple[dict[str, t.Any], int | None]:
        """A host's state, and the epoch of the lease that it was asked under.

        Not all of it while VMs move: that asks QEMU for every lag, and takes long.
        """
        before = self.hosts[proxy.name].status
        self._leases.renew(proxy.name)
        epoch = self._leases.epoch(proxy.name)
        if whole or not before:
            return dict(ask(proxy, "GET", "/v1/status", None, _ANSWER_SECONDS)), epoch
        told = {
            **before,
            **ask(proxy, "GET", "/v1/evacuations", None, _ANSWER_SECONDS),
            **ask(proxy, "GET", "/v1/links", None, _ANSWER_SECONDS),
        }
        return told, epoch

    def _glance(self, hosts: t.Collection[str], eyes: Eyes) -> tuple[bool, set[str]]:
        """Ask hosts after their jobs alone: whether any of those is through since that was told last, and who
        has not answered at once. Those are heard of at the next look, as ever."""
        asked = {
            name: self._pool.submit(ask, self._sources[name], "GET", "/v1/evacuations", None, _ANSWER_SECONDS)
            for name in hosts
        }
        wait(asked.values(), _GLANCE_ANSWER_SECONDS)
        news = False
        for name, answer in asked.items():
            if answer.done():
                with contextlib.suppress(ProxyError):
                    host, before = self.hosts[name], eyes.through(self.hosts[name])
                    host.status = {**host.status, **answer.result()}
                    eyes.glance([host], self._clock())
                    news = news or eyes.through(host) != before
        return news, {name for name, answer in asked.items() if not answer.done()}
