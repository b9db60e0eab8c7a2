# SPDX-License-Identifier: GPL-3.0-or-later
"""What the demonstration came to, as JSON and as a table."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TARGET_VERDICT = "evacuated"


@dataclass(frozen=True)
class VmResult:
    """One VM's evacuation. `findings` is what the checks found wrong; `integrity` is that there is none.

    `client_gap_seconds`: longest time in which a client got no answer from the VM's home address.
    """

    name: str
    workload: str
    verdict: str
    eviction_seconds: float | None
    downtime_seconds: float | None
    guest_clock_gap_seconds: float | None
    client_gap_seconds: float | None
    wire_bytes: int | None
    ram_wire_bytes: int | None
    integrity: bool
    acknowledged_writes: int
    findings: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """Seconds are wall-clock; `bound_seconds` and `baseline_seconds` belong to the VM named `compared`.

    A baseline that is not finished was given up after `baseline_seconds`.
    """

    vms: tuple[VmResult, ...]
    compared: str
    baseline_finished: bool
    baseline_seconds: float
    baseline_bytes: int
    baseline_downtime_seconds: float | None
    reduction: float
    bound_seconds: float
    makespan_seconds: float
    wan: dict[str, Any]

    @property
    def holds(self) -> bool:
        """Everything out, nothing lost."""
        return all(vm.verdict == TARGET_VERDICT and vm.integrity for vm in self.vms)

    def as_dict(self) -> dict[str, Any]:
        """The JSON form, documented in docs/benchmarks.md."""
        return {"schema": "lifeboat-demo/1", **asdict(self), "holds": self.holds}


def write(report: Report, directory: Path) -> Path:
    """Write report.json and return its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "report.json"
    path.write_text(json.dumps(report.as_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def render(report: Report) -> str:
    """The table that is printed at the end."""
    head = (
        "VM",
        "workload",
        "verdict",
        "eviction",
        "downtime",
        "client's gap",
        "on the wire",
        "acknowledged writes",
        "nothing lost",
    )
    rows = [
        (
            vm.name,
            vm.workload,
            vm.verdict,
            _seconds(vm.eviction_seconds),
            _seconds(vm.downtime_seconds),
            _seconds(vm.client_gap_seconds),
            "-" if vm.wire_bytes is None else f"{vm.wire_bytes / 1e6:.1f} MB",
            str(vm.acknowledged_writes),
            "yes" if vm.integrity else "NO",
        )
        for vm in report.vms
    ]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
             for row in [head, tuple("-" * width for width in widths), *rows]]  # fmt: skip
    compared = next(vm for vm in report.vms if vm.name == report.compared)
    lines += [
        "",
        f"all {len(report.vms)} out in {report.makespan_seconds:.1f} s over a WAN of {report.wan['name']}",
        f"virsh migrate --copy-storage-all of a VM like {report.compared}: "
        f"{'' if report.baseline_finished else 'given up after '}{report.baseline_seconds:.1f} s, "
        f"{report.baseline_bytes / 1e6:.0f} MB, downtime {_seconds(report.baseline_downtime_seconds)}",
        f"{report.compared} by Lifeboat: {_seconds(compared.eviction_seconds)}, {report.reduction:.1%} less "
        f"(bound for its memory on this link: {report.bound_seconds:.1f} s)",
    ]
    lines += [f"{vm.name}: {finding}" for vm in report.vms for finding in vm.findings]
    return "\n".join(lines)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s" if value >= 2 else f"{value * 1000:.0f} ms"
