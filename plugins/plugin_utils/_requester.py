# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What proxies are asked for while VMs move (shares, stops, passes that wait, lags) and nobody waits for."""

from __future__ import annotations

import time
import typing as t
from functools import partial

from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import (
    ProxyError,
    job_path,
    vm_path,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._controller import Controller
from ansible_collections.lifeboat.evacuation.plugins.module_utils._deadline import Watch
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fleet import Eyes
from ansible_collections.lifeboat.evacuation.plugins.module_utils._interval import Observation
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._errands import Done, Errands
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._surveyor import (
    Find,
    Proxy,
    Surveyor,
    Wanted,
    nobody,
)

_SHARE_LEASE_SECONDS = 20.0
_POSTPONE_SECONDS = 30.0
_SAID_AT_THE_NEXT_LOOK = frozenset({"conflict", "not-found", "taken-over", "unreachable"})
# A share that equals none.
_UNKNOWN = float("nan")
# Of so many that stay it is asked with each line of progress what their replicas lack.
_LAGS_ASKED = 6


class Requester(Surveyor):
    """Sends errands to the proxies that it was given."""

    def __init__(
        self,
        wanted: Wanted,
        sources: t.Sequence[Proxy],
        destinations: t.Mapping[str, Proxy],
        deadline: Watch,
        say: t.Callable[[str], None],
        clock: t.Callable[[], float] = time.time,
        find: Find = nobody,
    ) -> None:
        super().__init__(wanted, sources, destinations, deadline, say, clock, find)
        # The job of each VM that counts, by UUIDs.
        self._begun: dict[str, str] = {}
        self._errands = Errands(self._pool)
        # Until when passes were asked to wait, and hosts whose proxy cannot do that.
        self._postponed: dict[str, float] = {}
        self._cannot_postpone: set[str] = set()
        self._to_pause: set[str] = set()
        self._shares: dict[str, tuple[float | None, float]] = {}
        # Under which epoch of its lease each host was when it was looked at last.
        self._epochs: dict[str, int] = {}

    def _order(self, host: str, body: t.Mapping[str, object] | None) -> t.Mapping[str, object] | None:
        """The body of an order that is decided now: it does nothing once another coordinates the host."""
        epoch = self._epochs.get(host)
        return body if epoch is None else {**(body or {}), "epoch": epoch}

    def _pause(self, controller: Controller, uuid: str, eyes: Eyes) -> None:
        def told(_job: t.Any, error: ProxyError | None) -> None:
            if error is None:
                eyes.paused.add(uuid)
            elif error.cause in {"unreachable", "taken-over"}:
                self._to_pause.add(uuid)

        self._ask(controller, uuid, "steer", {"pause_guest": True}, told, key="pause")

    def _share(
        self, controller: Controller, uuid: str, share: float | None, ends_in: float | None, now: float
    ) -> None:
        before, until = self._shares.get(uuid, (None, float("inf")))
        if share is None and before is None:
            return
        if share is not None and before is not None and ends_in is None:
            renewed = until - now > _SHARE_LEASE_SECONDS / 2
            if renewed and abs(share - before) < 0.1 * before:
                return
        lease = _SHARE_LEASE_SECONDS if ends_in is None else ends_in
        if uuid not in self._begun:
            return
        body: dict[str, object] = {
            "share_bytes_per_second": None if share is None else max(share, 16_384.0),
            "for_seconds": lease,
        }

        def told(_job: t.Any, error: ProxyError | None) -> None:
            if error is not None:
                # It may hold and it may not: whatever is wanted at the next look is asked for then.
                self._shares[uuid] = (_UNKNOWN, 0.0)

        self._shares[uuid] = (share, now + lease)
        self._ask(controller, uuid, "steer", body, told, key="share")

    def _postpone(self, controller: Controller, held: t.Collection[str], now: float) -> None:
        """Let the passes of those whose turn is near wait; a lease that ends by itself, as shares do."""
        for uuid in held:
            if self._postponed.get(uuid, 0.0) - now <= _POSTPONE_SECONDS / 2:
                self._postponed[uuid] = now + _POSTPONE_SECONDS
                self._ask_to_postpone(controller.source_of(uuid), uuid, _POSTPONE_SECONDS)
        for uuid in [uuid for uuid in self._postponed if uuid not in held]:
            # Of one that has begun its job holds the passes; one that waits on has them again.
            if self._postponed.pop(uuid) > now and uuid in controller.waiting:
                self._ask_to_postpone(controller.source_of(uuid), uuid, 0.0)

    def _ask_for_lags(self, controller: Controller, seen: Observation) -> None:
        """Of those that stay: what their replicas lack. Of a few; for each of them QEMU is asked."""
        staying = [uuid for uuid in controller.given_up() if uuid not in seen.moves]
        for uuid in staying[:_LAGS_ASKED]:
            host = self.hosts[controller.source_of(uuid)]
            known = next((vm for vm in host.status.get("vms", []) if vm["uuid"] == uuid), None)
            if known is None or host.lost:
                continue

            def told(vm: t.Any, error: ProxyError | None, known: dict[str, t.Any] = known) -> None:
                if error is None:
                    known.update({key: vm.get(key) for key in ("lag_bytes", "lag_seconds", "generation")})

            look = partial(self._sources[host.name].request, "GET", vm_path(uuid))
            self._errands.send(host.name, f"lag {uuid}", look, told)

    def _ask_to_postpone(self, host: str, uuid: str, seconds: float) -> None:
        if host in self._cannot_postpone or self.hosts[host].lost:
            return

        def told(_vm: t.Any, error: ProxyError | None) -> None:
            # Precaching that goes on takes some of the line, and nothing else: no reason to say anything.
            if error is not None and error.cause == "not-found":
                self._cannot_postpone.add(host)

        proxy, body = self._sources[host], self._order(host, {"for_seconds": seconds})
        path = f"{vm_path(uuid)}/postpone"
        self._errands.send(host, f"postpone {uuid}", lambda: proxy.request("POST", path, body), told)

    def _ask(
        self,
        controller: Controller,
        uuid: str,
        what: str,
        body: t.Mapping[str, object] | None,
        told: Done | None = None,
        *,
        key: str = "",
    ) -> None:
        self._steer(controller.source_of(uuid), self._begun.get(uuid, uuid), what, body, told, key=key)

    def _steer(
        self,
        host: str,
        job: str,
        what: str,
        body: t.Mapping[str, object] | None,
        told: Done | None = None,
        *,
        key: str = "",
    ) -> None:
        def over(answer: t.Any, error: ProxyError | None) -> None:
            # It may have ended since we looked, or have been taken over: the next look says.
            if error is not None and error.cause not in _SAID_AT_THE_NEXT_LOOK:
                self._say(f"{host}: {error.message}")
            if told is not None:
                told(answer, error)

        proxy, path, body = self._sources[host], job_path(job, what), self._order(host, body)
        self._errands.send(host, f"{key or what} {job}", lambda: proxy.request("POST", path, body), over)
