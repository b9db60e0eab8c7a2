# SPDX-License-Identifier: GPL-3.0-or-later
"""Metrics say what the API says."""

from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from precache_proxy.control.metrics import render
from precache_proxy.source.totals import PassTotals
from small_parts.parts import WEB


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_of_a_whole_proxy(served: Any) -> None:
    served.client.request("PUT", "/v1/vms/web1", {"peer": "backup1"})
    last_pass = {"open_seconds": 0.2, "total_seconds": 0.5, "data_bytes": 65536, "at": 5.0}
    totals = PassTotals(made=3, failed=1, wire_bytes=4096, _closed_seconds=1.5)
    scrub = {"turns": 2, "different_blocks": 1, "recent_different_blocks": 1}
    served.parts.source.spoil(WEB, last_pass=last_pass, passes=totals.as_dict(), scrub=scrub)
    served.parts.store.replicas = [
        {"vm": WEB, "name": "web1", "state": "sealed", "sealed": {"generation": 9}, "allocated_bytes": 5}
    ]
    served.client.request("POST", "/v1/evacuations", {"vm": "web1"})
    told = samples(render(served.client.request("GET", "/v1/status")).decode())
    vm = (("peer", "backup1"), ("uuid", WEB), ("vm", "web1"))
    assert told["lifeboat_vm_lag_bytes", vm] == 65536
    assert told["lifeboat_vm_coverage_ratio", vm] == 1.0
    assert told["lifeboat_vm_rpo_kept", vm] == 1.0
    assert told["lifeboat_vm_last_pass_open_seconds", vm] == 0.2
    assert told["lifeboat_vm_passes_total", vm] == 3
    assert told["lifeboat_vm_passes_failed_total", vm] == 1
    assert told["lifeboat_vm_passes_wire_bytes_total", vm] == 4096
    assert told["lifeboat_vm_passes_open_seconds_total", vm] == 1.5
    assert told["lifeboat_vm_scrub_different_blocks_total", vm] == 1.0
    assert told["lifeboat_vm_scrub_recent_different_blocks", vm] == 1.0
    assert told["lifeboat_link_state", (("peer", "backup1"), ("state", "up"))] == 1.0
    wire = (("class", "precache"), ("direction", "sent"), ("kind", "wire"), ("peer", "backup1"))
    assert told["lifeboat_link_bytes_total", wire] == 1_000_000
    assert told["lifeboat_replica_generation", (("uuid", WEB), ("vm", "web1"))] == 9
    assert told["lifeboat_evacuations", (("verdict", "running"),)] == 1
    assert told["lifeboat_store_free_bytes", ()] > 0


def test_metrics_are_served_as_prometheus_wants_them(served: Any) -> None:
    import http.client
    import socket

    connection = http.client.HTTPConnection("localhost", timeout=10)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(served.socket))
    connection.request("GET", "/metrics")
    response = connection.getresponse()
    assert response.getheader("Content-Type") == "text/plain; version=0.0.4; charset=utf-8"
    assert "lifeboat_proxy_info" in response.read().decode()
    connection.close()
