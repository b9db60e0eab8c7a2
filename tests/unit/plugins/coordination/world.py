# SPDX-License-Identifier: GPL-3.0-or-later
"""Two sources behind served control APIs, for a coordinator that is told what may go wrong with them."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import ProxyClient
from ansible_collections.lifeboat.evacuation.plugins.module_utils._deadline import Watch
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._bridge import Unreachable
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._coordinator import Coordinator, Wanted

from precache_proxy.control.parts import Parts


class Near:
    """A proxy whose socket is here."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self._client = ProxyClient(str(path), 20.0)
        self.dead = False
        # Requests hang so long and are lost then; after the survey, if it is set there.
        self.hangs_seconds = 0.0
        # From the first start on it has one request after the other hang, until it is let go.
        self.hangs_at_start = self.started = False
        self.let_go = threading.Event()
        self.loses_answers_to: str | None = None
        self.dies_with_that = False

    def request(
        self, method: str, path: str, body: Mapping[str, object] | None = None, timeout_seconds: float = 30.0
    ) -> Any:
        if self.dead:
            raise Unreachable(f"{self.name}: not reached")
        if self.hangs_seconds:
            time.sleep(self.hangs_seconds)
            raise Unreachable(f"{self.name}: no answer")
        if self.hangs_at_start and (self.started or (method, path) == ("POST", "/v1/evacuations")):
            first, self.started = not self.started, True
            # That one is given up first, as a bridge serves one after the other.
            self.let_go.wait(1.0 if first else 20.0)
            raise Unreachable(f"{self.name}: no answer")
        answer = self._client.request(method, path, body)
        if method == "POST" and path == self.loses_answers_to:
            self.loses_answers_to, self.dead = None, self.dies_with_that
            raise Unreachable(f"{self.name}: SSH lost")
        return answer

    def close(self) -> None:
        pass


class World:
    """Two sources with a VM each, and what the coordinator said."""

    def __init__(self, hosts: Mapping[str, tuple[Parts, Path]]) -> None:
        self.parts = {name: parts for name, (parts, _path) in hosts.items()}
        self.paths = {name: path for name, (_parts, path) in hosts.items()}
        self.proxies = {name: Near(name, path) for name, (_parts, path) in hosts.items()}
        self.said: list[str] = []

    def protect(self, host: str, vm: str, peer: str = "backup1") -> None:
        self.proxies[host].request("PUT", f"/v1/vms/{vm}", {"peer": peer})

    def coordinator(self, strategy: str = "feedback", watch: Watch | None = None, **how: Any) -> Coordinator:
        wanted = Wanted("home", None, strategy, 1.0, how.pop("wishes", {}), **how)
        return Coordinator(
            wanted, list(self.proxies.values()), {}, watch or Watch(None, lambda _ups: 0.0), self.said.append,
            sleep=lambda seconds: time.sleep(min(seconds, 0.2)),
        )  # fmt: skip
