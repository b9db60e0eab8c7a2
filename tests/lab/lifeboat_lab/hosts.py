# SPDX-License-Identifier: GPL-3.0-or-later
"""One host: a full systemd booted by systemd-nspawn on a writable layer over the cached image."""

import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lifeboat_lab.control_group import ControlGroup
from lifeboat_lab.errors import LabError
from lifeboat_lab.images import PACKAGES_ON_HOST
from lifeboat_lab.network import NAMESPACES, Network, hosts_file
from lifeboat_lab.settings import HostPlan, Settings
from lifeboat_lab.shell import HOST_ENVIRONMENT, run

BOOT_SECONDS = 180
# The mounts are made in a mount namespace of the host's own: they end with its last process, however it ends.
# systemd 257 and libvirt want the unified control groups, whatever this machine mounts.
BOOT_SCRIPT = """
set -eu
echo $$ > "$GROUP/cgroup.procs"
mount -t overlay overlay -o "lowerdir=$LOWER,upperdir=$STATE/upper,workdir=$STATE/work" "$STATE/root"
umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
exec systemd-nspawn --quiet --directory="$STATE/root" --boot --settings=no --register=no --keep-unit \
  --machine="$MACHINE" --hostname="$HOST" --network-namespace-path="$NAMESPACE" --capability=all \
  --resolv-conf=off --timezone=off --link-journal=no --console=read-only "$@"
"""


@dataclass(frozen=True)
class Leader:
    """The init process of a running host, safe against process ids that were used again."""

    pid: int
    started_ticks: int

    @property
    def alive(self) -> bool:
        """Is this very process still there?"""
        return start_ticks(self.pid) == self.started_ticks


class Host:
    """A host of a lab, running or not."""

    def __init__(self, settings: Settings, plan: HostPlan, lower: Path, packages: Path) -> None:
        self.plan = plan
        self.name = plan.name
        self._settings = settings
        self._network = Network(settings)
        self._lower = lower
        self._packages = packages
        self._state = settings.state / "hosts" / plan.name
        self._record = settings.runtime / "hosts" / f"{plan.name}.json"

    @property
    def leader(self) -> Leader | None:
        """The host's init, or None while the host is off."""
        try:
            leader = Leader(**json.loads(self._record.read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return leader if leader.alive else None

    @property
    def running(self) -> bool:
        """Is the host switched on?"""
        return self.leader is not None

    @property
    def root(self) -> Path:
        """The running host's file system, seen from outside. Raises LabError while it is off."""
        return Path(f"/proc/{self._running_leader().pid}/root")

    @property
    def upper(self) -> Path:
        """What the host wrote on its disk: there also while it is off; read only, and only then."""
        return self._state / "upper"

    def prepare(self, public_key: str) -> None:
        """First installation of the host's own files: identity, keys, names. Does nothing the second time."""
        if self._state.is_dir():
            return
        building = self._state.with_name(f".{self.name}")
        shutil.rmtree(building, ignore_errors=True)
        upper = building / "upper"
        for directory in (upper / "etc/ssh", upper / "root/.ssh", building / "work", building / "root"):
            directory.mkdir(parents=True)
        (upper / "root").chmod(0o700)
        (upper / "root/.ssh").chmod(0o700)
        (upper / "etc/machine-id").write_text(uuid.uuid4().hex + "\n")
        (upper / "etc/hostname").write_text(self.name + "\n")
        (upper / "etc/hosts").write_text(hosts_file(management=False))
        (upper / "root/.ssh/authorized_keys").write_text(public_key)
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", self.name,
             "-f", str(upper / "etc/ssh/ssh_host_ed25519_key")])  # fmt: skip
        building.rename(self._state)

    @property
    def host_key(self) -> str:
        """The host's public SSH key, as in known_hosts without the name."""
        text = (self.upper / "etc/ssh/ssh_host_ed25519_key.pub").read_text()
        return " ".join(text.split()[:2])

    def trust(self, private_key: str, known_hosts: str) -> None:
        """Let root of this host log in to the others, as plain `virsh migrate` over ssh needs it."""
        # A mounted layer may only be written through its mount.
        directory = (self.root if self.running else self.upper) / "root/.ssh"
        key = directory / "id_ed25519"
        key.touch(mode=0o600)
        key.write_text(private_key)
        (directory / "known_hosts").write_text(known_hosts)

    def start(self) -> None:
        """Switch the host on and wait until it has booted. Raises LabError with the end of its console."""
        if self.running:
            return
        group = ControlGroup(self._settings.control_group(self.name))
        group.kill()
        group.create()
        self._network.connect(self.plan)
        self._record.parent.mkdir(parents=True, exist_ok=True)
        devices = [
            f"--bind={path}" for path in ("/dev/net/tun", "/dev/kvm", "/dev/fuse") if Path(path).exists()
        ]
        environment = HOST_ENVIRONMENT | {
            "GROUP": str(group.path),
            "LOWER": str(self._lower),
            "STATE": str(self._state),
            "HOST": self.name,
            "MACHINE": self._settings.namespace(self.name),
            "NAMESPACE": str(NAMESPACES / self._settings.namespace(self.name)),
        }
        with self._console.open("wb") as console:
            process = subprocess.Popen(
                ["unshare", "--mount", "--propagation", "private", "--", "/bin/sh", "-c", BOOT_SCRIPT, "boot",
                 f"--bind-ro={self._packages}:{PACKAGES_ON_HOST}", *devices],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )  # fmt: skip
        try:
            self._wait_booted(process, group)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """Power cut: the links go down, then every process of the host is killed at the same instant.

        What the host had written stays on its disk; what was only in memory, /run included, is gone.
        """
        self._network.disconnect(self.plan)
        ControlGroup(self._settings.control_group(self.name)).kill()
        self._record.unlink(missing_ok=True)

    def remove(self) -> None:
        """Cut the host off and delete its disk."""
        self.kill()
        shutil.rmtree(self._state, ignore_errors=True)

    def shut_down(self, timeout_seconds: float = 60) -> None:
        """Orderly power-off through the host's own init; a host that does not end in time is cut off."""
        leader = self.leader
        if leader is not None:
            os.kill(leader.pid, signal.SIGRTMIN + 4)
            deadline = time.monotonic() + timeout_seconds
            while leader.alive and time.monotonic() < deadline:
                time.sleep(0.1)
        self.kill()

    def enter(self, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` as root inside the host. Raises LabError while it is off."""
        environment = [f"{key}={value}" for key, value in HOST_ENVIRONMENT.items()]
        return ["nsenter", f"--target={self._running_leader().pid}", "--all", "--root", "--wd", "--",
                "env", "-i", "-C", "/root", *environment, *command]  # fmt: skip

    def exec(
        self, *command: str, check: bool = True, stdin: str | None = None, timeout_seconds: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as root inside the host and return what it printed; LabError when it fails."""
        return run(self.enter(command), check=check, stdin=stdin, timeout_seconds=timeout_seconds)

    def read(self, path: str) -> str:
        """A file of the running host."""
        return (self.root / path.lstrip("/")).read_text()

    @property
    def _console(self) -> Path:
        return self._settings.runtime / "hosts" / f"{self.name}.console"

    def _running_leader(self) -> Leader:
        leader = self.leader
        if leader is None:
            raise LabError(f"host {self.name}: is off; start it with `start-host {self.name}`")
        return leader

    def _wait_booted(self, process: "subprocess.Popen[bytes]", group: ControlGroup) -> None:
        wait_for(lambda: self._find_leader(process, group), BOOT_SECONDS, 0.05)
        # The message bus comes up some time after init: ask again until somebody answers.
        wait_for(lambda: self._booted(process), BOOT_SECONDS, 0.2)

    def _find_leader(self, process: "subprocess.Popen[bytes]", group: ControlGroup) -> bool:
        self._still_booting(process)
        for pid in group.processes():
            with suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text()
                inside = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[1:]
                if len(inside) > 1 and inside[-1] == "1":
                    self._record.write_text(json.dumps({"pid": pid, "started_ticks": start_ticks(pid)}))
                    return True
        return False

    def _booted(self, process: "subprocess.Popen[bytes]") -> bool:
        self._still_booting(process)
        answer = self.exec(
            "systemctl", "is-system-running", "--wait", check=False, timeout_seconds=BOOT_SECONDS
        )
        return answer.stdout.strip() in {"running", "degraded"}

    def _still_booting(self, process: "subprocess.Popen[bytes]") -> None:
        if process.poll() is not None:
            tail = " | ".join(self._console.read_text(errors="replace").splitlines()[-8:])
            raise LabError(f"host {self.name}: ended while booting with {process.returncode}: {tail}")


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks after the machine; None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def wait_for(condition: Callable[[], bool], timeout_seconds: float, step_seconds: float) -> None:
    """Poll until the condition holds. Raises LabError after the time is over."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(f"waited {timeout_seconds:g} s in vain for {condition.__qualname__}")
        time.sleep(step_seconds)
