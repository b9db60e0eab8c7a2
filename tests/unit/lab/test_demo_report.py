# SPDX-License-Identifier: GPL-3.0-or-later
"""What the demonstration says of each VM, the client's gap among it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from lifeboat_demo.report import Report, VmResult, render, write

VM = VmResult(
    name="log1",
    workload="fsync-log",
    verdict="evacuated",
    eviction_seconds=14.4,
    downtime_seconds=1.8,
    guest_clock_gap_seconds=0.1,
    client_gap_seconds=1.934,
    wire_bytes=33_600_000,
    ram_wire_bytes=30_000_000,
    integrity=True,
    acknowledged_writes=500,
    findings=(),
)
REPORT = Report(
    vms=(VM,),
    compared="log1",
    baseline_finished=True,
    baseline_seconds=96.1,
    baseline_bytes=504_000_000,
    baseline_downtime_seconds=1.2,
    reduction=0.85,
    bound_seconds=6.3,
    makespan_seconds=40.5,
    wan={"name": "trans-pacific"},
)


def test_the_clients_gap_is_in_the_table_and_in_the_report(tmp_path: Path) -> None:
    head, _, row = render(REPORT).splitlines()[:3]
    column = head.index("client's gap")
    assert row[column:].startswith("1934 ms")
    told = json.loads(write(REPORT, tmp_path).read_text())
    assert told["vms"][0]["client_gap_seconds"] == 1.934
    assert told["holds"]


def test_a_vm_that_answers_no_client_has_no_gap_and_does_not_hold() -> None:
    finding = "its home address 2001:db8:1:1::100 does not answer the client any more"
    lost = replace(VM, client_gap_seconds=None, integrity=False, findings=(finding,))
    report = replace(REPORT, vms=(lost,))
    assert not report.holds
    assert f"log1: {finding}" in render(report)
    head, _, row = render(report).splitlines()[:3]
    assert row[head.index("client's gap") :].startswith("-")
