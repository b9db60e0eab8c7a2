# SPDX-License-Identifier: GPL-3.0-or-later
"""The key of the lab's root, made at set-up, and the ssh files that controller and hosts use."""

from collections.abc import Iterable
from pathlib import Path

from lifeboat_lab.hosts import Host
from lifeboat_lab.settings import Settings
from lifeboat_lab.shell import run


class Keys:
    """Files in `<state>/ssh`: id_ed25519, known_hosts, config."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.directory = settings.state / "ssh"
        self.private = self.directory / "id_ed25519"
        self.config = self.directory / "config"
        self.known_hosts = self.directory / "known_hosts"
        self.control_sockets = settings.runtime / "ssh"

    def ensure(self) -> str:
        """Make the key pair if there is none and return the public key."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o700)
        self.control_sockets.mkdir(parents=True, exist_ok=True)
        self.control_sockets.chmod(0o700)
        if not self.private.exists():
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"root of {self._settings.name}",
                 "-f", str(self.private)])  # fmt: skip
        return Path(f"{self.private}.pub").read_text()

    def write(self, hosts: Iterable[Host]) -> None:
        """known_hosts and ssh configuration for the hosts that there are; hosts learn each other's keys."""
        hosts = list(hosts)
        known = "".join(
            f"{host.name},{host.plan.address},{host.plan.management_address} {host.host_key}\n"
            for host in hosts
        )
        self.known_hosts.write_text(known)
        for host in hosts:
            host.trust(self.private.read_text(), known)
        self.config.write_text(
            "Host *\n"
            "  User root\n"
            f"  IdentityFile {self.private}\n"
            "  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {self.known_hosts}\n"
            "  GlobalKnownHostsFile /dev/null\n"
            "  StrictHostKeyChecking yes\n"
            "  ControlMaster auto\n"
            f"  ControlPath {self.control_sockets}/%C\n"
            "  ControlPersist 60\n"
        )

    def end_masters(self) -> None:
        """Ask every shared connection to end; a socket nobody serves is removed."""
        if not self.control_sockets.is_dir():
            return
        for path in self.control_sockets.iterdir():
            run(["ssh", "-o", f"ControlPath={path}", "-O", "exit", "any"], check=False, timeout_seconds=10)
            path.unlink(missing_ok=True)
