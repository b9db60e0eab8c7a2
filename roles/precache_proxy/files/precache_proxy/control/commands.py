# SPDX-License-Identifier: GPL-3.0-or-later
"""The subcommands that talk to a running proxy. Each returns an exit code and raises only LifeboatError."""

from __future__ import annotations

import json
import os
import selectors
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from precache_proxy.control import check_output, tables
from precache_proxy.control.client import Client, ProxyDown, segment
from precache_proxy.units import format_bytes, format_seconds

_CHUNK_BYTES = 64 * 1024


@dataclass(frozen=True)
class Output:
    """How to print: as JSON or for people, in how many columns."""

    as_json: bool
    width: int

    @classmethod
    def of_terminal(cls, *, as_json: bool) -> Output:
        """As wide as the terminal, 80 where there is none."""
        return cls(as_json, max(shutil.get_terminal_size((80, 24)).columns, 60))

    def value(self, value: Any, lines: list[str]) -> None:
        """Print one or the other."""
        if self.as_json:
            print(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False))
        else:
            print("\n".join(lines))


def status(client: Client, output: Output, vm: str | None) -> int:
    """``status``: the whole proxy, or one VM."""
    if vm is not None:
        told = client.request("GET", f"/v1/vms/{segment(vm)}")
        lines = tables.vms([told], output.width)
        output.value(told, lines)
        return 0
    told = client.request("GET", "/v1/status")
    output.value(told, tables.status(told, output.width))
    return 0


def check(client: Client, output: Output, *, nagios: bool) -> int:
    """``check``: ends with 0, 1, 2 or 3 (ok, warning, critical, unknown) in every form of output."""
    try:
        told = client.request("GET", "/v1/check", timeout_seconds=60)
    except ProxyDown as error:
        result = {"check": "proxy", "subject": "-", "severity": "critical", "sentence": error.message}
        told = {"name": os.uname().nodename, "checks": [result]}
    results = told["checks"]
    if nagios:
        print("\n".join(check_output.nagios(told["name"], results)))
    else:
        output.value(told, check_output.console(results, output.width))
    return int(check_output.severity(results))


def verify(client: Client, output: Output, vm: str) -> int:
    """``verify``: the replica equals the source; ends with 1 when it does not."""
    told = client.request("POST", f"/v1/vms/{segment(vm)}/verify", timeout_seconds=None)
    equal = bool(told["equal"])
    if equal:
        line = f"{vm}: replica equals the source at generation {told['generation']}"
    else:
        line = f"{vm}: REPLICA DIFFERS from the source at generation {told['generation']}"
    details = [
        f"{key.replace('_', ' ')}: {_readable(key, value)}" for key, value in told.items() if _plain(value)
    ]
    output.value(told, [line, *("  " + detail for detail in details)])
    return 0 if equal else 1


def _plain(value: Any) -> bool:
    return isinstance(value, (int, float, str)) and not isinstance(value, bool)


def _readable(key: str, value: Any) -> str:
    if key.endswith("_bytes"):
        return format_bytes(value)
    return format_seconds(value) if key.endswith("_seconds") else str(value)


def settle(client: Client, output: Output, job: str, decision: str) -> int:
    """``settle``: the operator's word on an undecided job."""
    told = client.request("POST", f"/v1/evacuations/{segment(job)}/settle", {"decision": decision})
    stands = told.get("step") or told.get("state")  # a job has a step, an arrival a state
    output.value(told, [f"{told.get('name', job)}: {stands}: {told.get('sentence') or 'settled'}"])
    return 0


def fail_over(client: Client, output: Output, vm: str, *, source_is_dead: bool) -> int:
    """``fail-over``: run a VM whose home is dead from the last sealed generation of its replica here."""
    told = client.request(
        "POST",
        f"/v1/replicas/{segment(vm)}/fail-over",
        {"source_is_dead": source_is_dead},
        timeout_seconds=None,
    )
    output.value(told, [f"{told.get('name', vm)}: {told.get('state')}: {told.get('sentence')}"])
    return 0


def connect(path: Path) -> int:
    """``connect``: standard input and output become the control socket (HTTP through SSH, without a port)."""
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        peer.connect(str(path))
    except OSError as error:
        raise ProxyDown(
            f"control socket {path}: the precache proxy does not answer ({error.strerror}); "
            "see systemctl status precache-proxy"
        ) from error
    source, sink = sys.stdin.fileno(), sys.stdout.fileno()
    with peer, selectors.DefaultSelector() as selector:
        selector.register(source, selectors.EVENT_READ)
        selector.register(peer, selectors.EVENT_READ)
        while True:
            for key, _mask in selector.select():
                if key.fileobj is peer:
                    data = peer.recv(_CHUNK_BYTES)
                    if not data:
                        return 0
                    _write_all(sink, data)
                    continue
                data = os.read(source, _CHUNK_BYTES)
                if data:
                    peer.sendall(data)
                else:
                    # The client has said all; the answer may still come.
                    selector.unregister(source)
                    peer.shutdown(socket.SHUT_WR)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
