# SPDX-License-Identifier: GPL-3.0-or-later
"""Who must not start here: durable files that the libvirt hook reads.

``guard/<uuid>.json`` forbids every start of that VM on this host: a tombstone (it was released to another
host) or an
arrival that was not yet activated. ``arriving/<uuid>`` lives on tmpfs and lets one thing through in spite of
it: the incoming migration itself, or one start of our own. After a reboot it is gone, the guard is not.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from precache_proxy import durable
from precache_proxy.errors import Finding, IntegrityError
from precache_proxy.source.scratch import boottime_seconds

HOOKS: Final = Path("/etc/libvirt/hooks/qemu.d")
TOMBSTONE: Final = "moved-away"
ARRIVAL: Final = "arrival"
FENCED: Final = "fenced"
LEAVING: Final = "leaving"


@dataclass(frozen=True, slots=True)
class Forbidden:
    """Why a VM must not start here. ``sentence`` is what the operator sees when virsh is refused.

    A tombstone names the VM, and the ``peer`` that it runs at.
    """

    vm: str
    cause: str
    sentence: str
    job: str
    epoch: int
    since: float = field(default_factory=time.time)
    name: str = ""
    peer: str = ""


def hook_findings(host: str, directory: Path = HOOKS) -> list[Finding]:
    """Without the hook a guard file is only paper: nothing would refuse a start (blocking)."""
    if any(os.access(path, os.X_OK) for path in directory.glob("lifeboat*")):
        return []
    return [
        Finding(
            host,
            f"libvirt's hook {directory}/lifeboat is not there, so that nothing refuses to start a VM twice",
            "run the role lifeboat.evacuation.precache_proxy there",
            "configuration",
        )
    ]


class Guard:
    """The guard files under ``directory`` and the passes for arrivals under ``run_directory`` (blocking
    calls)."""

    def __init__(self, directory: Path, run_directory: Path) -> None:
        self.directory = directory / "guard"
        self.arriving_directory = run_directory / "arriving"

    def prepare_directories(self) -> None:
        """Make both directories; the guard's is synced so that its entries can be durable."""
        durable.make_directory(self.directory, 0o755)
        self.arriving_directory.mkdir(parents=True, exist_ok=True, mode=0o755)

    def _path(self, vm: str) -> Path:
        return self.directory / f"{vm}.json"

    def forbid(self, forbidden: Forbidden) -> None:
        """No start of that VM here from the return of this call on, power cut or not."""
        durable.write_json(self._path(forbidden.vm), asdict(forbidden), mode=0o644)

    def allow(self, vm: str, *, job: str) -> None:
        """Lift what ``job`` forbade; what another job has forbidden since stays."""
        found = self.forbidden(vm)
        if found is not None and found.job == job:
            durable.remove(self._path(vm))

    def forbidden(self, vm: str) -> Forbidden | None:
        """What forbids a start of the VM, or None. Raises IntegrityError on a broken file: that forbids,
        too."""
        data: dict[str, Any] | None = durable.read_json(self._path(vm))
        if data is None:
            return None
        told = {key: data[key] for key in ("vm", "cause", "sentence", "job", "epoch", "since")}
        return Forbidden(**told, name=str(data.get("name", "")), peer=str(data.get("peer", "")))

    def all(self) -> Iterator[Forbidden]:
        """Everything that is forbidden here."""
        for path in sorted(self.directory.glob("*.json")) if self.directory.is_dir() else ():
            found = self.forbidden(path.stem)
            if found is not None:
                yield found

    def tombstones(self) -> list[Forbidden]:
        """The VMs that left from here for good, by name; a broken file is not among them (it forbids all the
        same)."""
        found = []
        for path in self.directory.glob("*.json"):
            with contextlib.suppress(IntegrityError, KeyError, TypeError):
                forbidden = self.forbidden(path.stem)
                if forbidden is not None and forbidden.cause == TOMBSTONE:
                    found.append(forbidden)
        return sorted(found, key=lambda item: (item.name, item.vm))

    def let_arrive(self, vm: str) -> None:
        """Let the incoming migration of the VM pass the hook, until :meth:`arrived` or a reboot."""
        self.arriving_directory.mkdir(parents=True, exist_ok=True, mode=0o755)
        (self.arriving_directory / vm).touch(mode=0o644)

    def let_start(self, vm: str, seconds: float) -> None:
        """Let one start of the VM pass the hook, by whoever comes first, within that time and while this
        process lives; :meth:`arrived` ends it early."""
        self.arriving_directory.mkdir(parents=True, exist_ok=True, mode=0o755)
        path = self.arriving_directory / vm
        # Written beside: an empty file would let every start through.
        beside = path.with_name(f".{vm}.new")
        beside.write_text(f"{os.getpid()} {boottime_seconds() + seconds:.3f}\n", encoding="ascii")
        beside.replace(path)

    def arrived(self, vm: str) -> None:
        """The exception is over: from now on the guard holds for every start."""
        (self.arriving_directory / vm).unlink(missing_ok=True)
