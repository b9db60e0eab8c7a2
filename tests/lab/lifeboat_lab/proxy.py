# SPDX-License-Identifier: GPL-3.0-or-later
"""A host's precache proxy, asked over its control socket from outside the host."""

import http.client
import json
import os
import socket
import time
from typing import Any

from lifeboat_lab.errors import LabError
from lifeboat_lab.hosts import Host

SOCKET = "run/lifeboat/control.sock"
# A first copy of which more than this is covered ends soon.
_NEARLY = 0.97


class _Connection(http.client.HTTPConnection):
    def __init__(self, host: Host, timeout_seconds: float) -> None:
        super().__init__("proxy", timeout=timeout_seconds)
        self._host = host

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        path = self._host.root / SOCKET
        # Longer than an address of this family may be; a descriptor's name never is.
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
        try:
            self.sock.connect(f"/proc/self/fd/{directory}/{path.name}")
        finally:
            os.close(directory)


class Proxy:
    """Answers are decoded JSON; an error of the proxy is a LabError with its sentence."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def request(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout_seconds: float = 120
    ) -> dict[str, Any]:
        """One request below /v1."""
        connection = _Connection(self._host, timeout_seconds)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, f"/v1{path}", text, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            told = json.loads(answer.read() or b"{}")
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise LabError(f"proxy of {self._host.name}: {method} {path}: {error}") from error
        finally:
            connection.close()
        if answer.status >= 400:
            raise LabError(f"proxy of {self._host.name}: {method} {path}: {told.get('message', told)}")
        return dict(told)

    def get(self, path: str) -> dict[str, Any]:
        """Ask."""
        return self.request("GET", path)

    def vm(self, name: str) -> dict[str, Any]:
        """How the protection of a VM stands."""
        return self.get(f"/vms/{name}")

    def link(self, peer: str) -> dict[str, Any]:
        """How the link to a peer stands."""
        return next(link for link in self.get("/links")["links"] if link["peer"] == peer)

    def protect(self, name: str, peer: str, **options: Any) -> dict[str, Any]:
        """Protect a VM at a peer; returns at once."""
        return self.request("PUT", f"/vms/{name}", {"peer": peer, **options})

    def wait_protected(
        self,
        name: str,
        *,
        timeout_seconds: float,
        step_seconds: float = 0.2,
        last_step_seconds: float | None = None,
    ) -> dict[str, Any]:
        """Wait until a VM's first generation is sealed; LabError with its state when it takes longer.

        ``last_step_seconds``: look so often once it is nearly there; each look costs the proxy time.
        """
        last_step_seconds = step_seconds if last_step_seconds is None else last_step_seconds
        deadline = time.monotonic() + timeout_seconds
        while True:
            told = self.vm(name)
            if told["generation"] and told["state"] == "protected":
                return told
            if time.monotonic() > deadline:
                raise LabError(f"VM {name}: {told['state']} ({told['sentence']}) after {timeout_seconds:g} s")
            time.sleep(last_step_seconds if told["coverage"] > _NEARLY else step_seconds)

    def unprotect(self, uuid: str, *, keep_replica: bool, timeout_seconds: float = 240) -> None:
        """Forget a VM, if this proxy protects it or is about to; LabError with what it says after that long.

        One that has arrived is protected for its way back a few seconds later, and held until its layers are
        merged.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            # In this order: it is protected before it counts as landing.
            arriving, listed = self._is_arriving(uuid), self._protects(uuid)
            if not (arriving or listed):
                return
            try:
                if listed:
                    self.request("DELETE", f"/vms/{uuid}?keep_replica={str(keep_replica).lower()}")
                    return
                if time.monotonic() > deadline:
                    raise LabError(f"proxy of {self._host.name}: VM {uuid} has arrived and does not land")
            except LabError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.5)

    def _protects(self, uuid: str) -> bool:
        return any(vm["uuid"] == uuid for vm in self.get("/vms")["vms"])

    def _is_arriving(self, uuid: str) -> bool:
        return any(
            arrival["vm"] == uuid and arrival["state"] == "activated" and not arrival["landing"]
            for arrival in self.get("/arrivals")["arrivals"]
        )

    def evacuate(self, name: str, *, timeout_seconds: float = 600, **options: Any) -> dict[str, Any]:
        """Evacuate a VM and return its job when that has ended; LabError when it goes on for longer."""
        job = self.request("POST", "/evacuations", {"vm": name, **options})
        deadline = time.monotonic() + timeout_seconds
        while not job["ended"]:
            if time.monotonic() > deadline:
                raise LabError(f"evacuation of {name}: at {job['step']} after {timeout_seconds:g} s")
            job = self.get(f"/evacuations/{job['id']}?wait_seconds=5")
        return job
