# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab as a whole: what the command line and the tests' fixtures hold in their hands."""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lifeboat_lab import preflight
from lifeboat_lab.control_group import ControlGroup
from lifeboat_lab.errors import LabError
from lifeboat_lab.guests.guests import Guests
from lifeboat_lab.hosts import Host, start_ticks
from lifeboat_lab.images import Images, remove_unused
from lifeboat_lab.inventory import inventory
from lifeboat_lab.keys import Keys
from lifeboat_lab.network import NAMESPACES, Network
from lifeboat_lab.settings import HOSTS, RUNTIME, STATE, Settings
from lifeboat_lab.shell import run
from lifeboat_lab.wan import Wan

NETWORK_MEMBERS = ("router", "client", "controller")


def silent(_text: str) -> None:
    """Say nothing."""


class Lab:
    """One lab by its settings. Making the object changes nothing; `up` builds, `down` removes.

    A lab with an `owner` (a process id) is removed by any later `up` once that process is gone: test runs
    that make labs of their own name themselves as the owner.
    """

    def __init__(self, settings: Settings | None = None, *, say: Callable[[str], None] = silent) -> None:
        self.settings = settings or Settings.from_environment()
        self._say = say
        self._record = self.settings.state / "lab.json"
        self.network = Network(self.settings)
        self.keys = Keys(self.settings)
        self.wan = Wan(self.settings)
        self.guests = Guests(self)

    # --- building ------------------------------------------------------------------------------

    def up(self, *, owner: int | None = None) -> bool:
        """Build what is missing and switch on what is off. Returns False when there was nothing to do.

        Raises LabError before anything is built when this machine cannot carry a lab.
        """
        preflight.check()
        with self._lock():
            remove_orphans(self._say)
            record = self._read_record()
            if record is not None and not record.get("complete"):
                self._say(f"lab {self.settings.name}: was left half built; removing it first")
                self._remove()
                record = None
            if record is not None and record["suite"] != self.settings.suite:
                raise LabError(
                    f"lab {self.settings.name}: is built from {record['suite']}, not {self.settings.suite}; "
                    "run `make lab-down` first or choose another name with LIFEBOAT_LAB"
                )
            if record is not None and self._all_running(record):
                return False
            known = record["hosts"] if record else {}
            owned = (record or {}).get("owner") if owner is None else process_identity(owner)
            images = self._images(known)
            self._write_record(known, complete=False, owner=owned)
            try:
                self._build(images)
            except BaseException:
                self._take_back(known, images, owned)
                raise
            self._write_record(images, complete=True, owner=owned)
        return True

    def _build(self, images: dict[str, list[str]]) -> None:
        """Make what is missing and switch on what is off."""
        public_key = self.keys.ensure()
        self.network.build_core()
        self.wan.start()
        hosts = [self._host(name, images) for name in images]
        for host in hosts:
            host.prepare(public_key)
        self.keys.write(hosts)
        to_start = [host for host in hosts if not host.running]
        if to_start:
            self._say(f"booting {', '.join(host.name for host in to_start)}")
        with ThreadPoolExecutor(max_workers=4) as pool:
            list(pool.map(Host.start, to_start))
        (self.settings.runtime / "inventory.json").write_text(
            json.dumps(inventory(self.settings, [host.plan for host in hosts], self.keys), indent=2)
        )

    def _take_back(
        self, known: dict[str, list[str]], images: dict[str, list[str]], owner: dict[str, int | None] | None
    ) -> None:
        """Undo a build that failed: a new lab goes as a whole, an older one loses only the new hosts."""
        if not known:
            self._remove()
            return
        for name in images.keys() - known.keys():
            self._host(name, images).remove()
        self._write_record(known, complete=True, owner=owner)

    def down(self) -> bool:
        """Remove the lab: processes, mounts, namespaces, disks. Returns False when there was none."""
        if os.geteuid() != 0:
            raise LabError("the lab's hosts belong to root: run this as root")
        with self._lock():
            there = self.settings.state.exists() or self.settings.runtime.exists()
            self._remove()
        return there

    def _remove(self) -> None:
        # No host may outlive the record that names it, so the record goes last.
        self.keys.end_masters()
        for member in NETWORK_MEMBERS:
            self._end_visitors(member)
        for plan in HOSTS.values():
            self.network.disconnect(plan)
        ControlGroup(self.settings.control_group()).kill()
        self.network.remove()
        shutil.rmtree(self.settings.runtime, ignore_errors=True)
        shutil.rmtree(self.settings.state, ignore_errors=True)
        for directory in (STATE, RUNTIME):
            with suppress(OSError):
                directory.rmdir()

    def _end_visitors(self, member: str) -> None:
        """End what somebody started inside a namespace of ours and left there; never this process's own
        line."""
        own = set()
        pid = os.getpid()
        while pid > 1:
            own.add(pid)
            status = Path(f"/proc/{pid}/status").read_text()
            pid = int(next(line for line in status.splitlines() if line.startswith("PPid:")).split()[1])
        for pid in set(self.network.processes(member)) - own:
            with suppress(ProcessLookupError):
                os.kill(pid, 9)

    # --- using ---------------------------------------------------------------------------------

    @property
    def built(self) -> bool:
        """Was `up` completed, and not yet `down`?"""
        record = self._read_record()
        return record is not None and bool(record.get("complete"))

    @property
    def hosts(self) -> dict[str, Host]:
        """The hosts of the lab as it was built. Raises LabError when there is no lab."""
        record = self._read_record()
        if record is None:
            raise LabError(f"lab {self.settings.name}: is not built; run `make lab-up`")
        return {name: self._host(name, record["hosts"]) for name in record["hosts"]}

    def host(self, name: str) -> Host:
        """One host by its name. Raises LabError naming those that there are."""
        hosts = self.hosts
        if name not in hosts:
            raise LabError(f"host {name}: not in lab {self.settings.name}, which has {', '.join(hosts)}")
        return hosts[name]

    def full_image(self) -> Path:
        """The cached image that the hypervisors of this lab were made on."""
        return Images(self.settings, self._say).full()

    def command(self, member: str, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` on a host, or in the namespace of router, client or
        controller."""
        if member in NETWORK_MEMBERS:
            if not self.network.exists(member):
                raise LabError(f"lab {self.settings.name}: is not built; run `make lab-up`")
            return ["ip", "netns", "exec", self.settings.namespace(member), *command]
        return self.host(member).enter(command)

    def exec(
        self,
        member: str,
        *command: str,
        check: bool = True,
        stdin: str | None = None,
        timeout_seconds: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end and return what it printed; LabError when it fails."""
        return run(self.command(member, command), check=check, stdin=stdin, timeout_seconds=timeout_seconds)

    def kill_host(self, name: str) -> None:
        """Power cut of one host."""
        self.host(name).kill()

    def start_host(self, name: str) -> None:
        """Switch a host on that was killed or shut down; its disk is as it was left."""
        self.host(name).start()

    def shut_down_host(self, name: str) -> None:
        """Switch a host off in order."""
        self.host(name).shut_down()

    def status(self) -> dict[str, Any]:
        """What there is and whether it runs."""
        record = self._read_record()
        if record is None:
            return {"name": self.settings.name, "built": False, "hosts": {}}
        hosts = {
            name: {
                "site": host.plan.site,
                "address": host.plan.address,
                "management_address": host.plan.management_address,
                "running": host.running,
            }
            for name, host in self.hosts.items()
        }
        return {
            "name": self.settings.name,
            "built": bool(record.get("complete")),
            "suite": record["suite"],
            "hosts": hosts,
            "wan": self.wan.status() if self.wan.running else None,
        }

    # --- the record ----------------------------------------------------------------------------

    def _images(self, known: dict[str, list[str]]) -> dict[str, list[str]]:
        """Image and packages directories per host: hosts that exist keep the image that they were made on."""
        images = Images(self.settings, self._say)
        result = dict(known)
        for plan in self.settings.plans():
            if plan.name not in result:
                lower = images.full() if plan.image == "full" else images.bare()
                result[plan.name] = [str(lower / "root"), str(images.full() / "packages")]
        return {name: result[name] for name in HOSTS if name in result}

    def _host(self, name: str, images: dict[str, list[str]]) -> Host:
        lower, packages = images[name]
        return Host(self.settings, HOSTS[name], Path(lower), Path(packages))

    def _all_running(self, record: dict[str, Any]) -> bool:
        wanted = set(self.settings.hosts) | set(record["hosts"])
        return (
            wanted == set(record["hosts"])
            and self.wan.running
            and all((NAMESPACES / self.settings.namespace(member)).exists() for member in NETWORK_MEMBERS)
            and all(self._host(name, record["hosts"]).running for name in record["hosts"])
        )

    def _read_record(self) -> dict[str, Any] | None:
        try:
            record: dict[str, Any] = json.loads(self._record.read_text())
        except FileNotFoundError:
            # Something of ours without a record is what a killed `down` left.
            leftover = self.settings.state.exists() or self.settings.runtime.exists()
            return {"complete": False, "suite": self.settings.suite, "hosts": {}} if leftover else None
        except ValueError:
            return {"complete": False, "suite": self.settings.suite, "hosts": {}}
        return record

    def _write_record(
        self, hosts: dict[str, list[str]], *, complete: bool, owner: dict[str, int | None] | None
    ) -> None:
        self.settings.state.mkdir(parents=True, exist_ok=True)
        self.settings.runtime.mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = {"complete": complete, "suite": self.settings.suite, "hosts": hosts}
        if owner is not None:
            record["owner"] = owner
        temporary = self._record.with_suffix(".new")
        temporary.write_text(json.dumps(record, indent=2))
        temporary.rename(self._record)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One builder or remover of this lab at a time; the lock ends with its process."""
        path = Path(f"/run/lock/lifeboat-lab-{self.settings.name}.lock")
        with path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def clean() -> list[Path]:
    """Delete the cached images that no lab of this machine is built on."""
    used: set[Path] = set()
    for path in STATE.glob("*/lab.json"):
        for directories in json.loads(path.read_text())["hosts"].values():
            used |= {Path(directory).parent for directory in directories}
    return remove_unused(used)


def process_identity(pid: int) -> dict[str, int | None]:
    """A process as it is recorded: its id and when it started, so that a later one is not taken for it."""
    return {"pid": pid, "started_ticks": start_ticks(pid)}


def remove_orphans(say: Callable[[str], None] = silent) -> None:
    """Remove the labs whose owner, a test run, was killed before it could."""
    for path in STATE.glob("*/lab.json"):
        try:
            owner = json.loads(path.read_text()).get("owner")
        except (OSError, ValueError):
            continue
        if owner and process_identity(owner["pid"]) != owner:
            name = path.parent.name
            say(f"lab {name}: its test run is gone; removing it")
            Lab(Settings(name=name)).down()
