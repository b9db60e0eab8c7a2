# SPDX-License-Identifier: GPL-3.0-or-later
"""Two whole proxies on two lab hosts, run from the checkout beside whatever is installed."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

from integration.libvirt_hook import LOOK_AGAIN, install_hook
from integration.source_pair import PACKAGE, make_certificates, wait_for, wait_served
from lifeboat_lab.lab import Lab

HOME, BACKUP = "home1", "backup1"
DIRECTORY = "/opt/lifeboat-evacuation-test"
STATE = "/var/lib/lifeboat-evacuation-test"
RUN = "/run/lifeboat-evacuation-test"
HOOK_PATH = "/etc/libvirt/hooks/qemu.d/lifeboat-evacuation-test"
LOG = "/var/log/lifeboat-evacuation-test.log"
PORT = 4949

Answer = dict[str, Any]


def other_host(host: str) -> str:
    """The other one of the two."""
    return BACKUP if host == HOME else HOME


class Refused(Exception):
    """What the control API answered instead of a result."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(f"{answer.get('cause')}: {answer.get('message')}")
        self.cause = str(answer.get("cause"))
        self.message = str(answer.get("message"))
        self.findings = answer.get("findings", [])


class UnixConnection(http.client.HTTPConnection):
    """HTTP on a UNIX socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("proxy", timeout=300)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(300)
        self.sock.connect(str(self._path))


class ProxyPair:
    """Both proxies, of the checkout, apart from what may be installed on the hosts."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._pids: dict[str, int] = {}

    # -- hosts

    def shell(self, host: str, script: str, *, check: bool = True, timeout_seconds: float = 120) -> str:
        """Run a shell script as root on a host."""
        told = self.lab.exec(host, "sh", "-c", script, check=check, timeout_seconds=timeout_seconds)
        return str(told.stdout)

    def virsh(self, host: str, *words: str, check: bool = True) -> str:
        """Run virsh on a host; its output and errors."""
        told = self.lab.exec(host, "virsh", *words, check=check, timeout_seconds=120)
        return str(told.stdout) + str(told.stderr)

    def root(self, host: str) -> Path:
        """A host's files."""
        return Path(self.lab.host(host).root)

    def install(self) -> None:
        """Package, keys, hook and configuration on both hosts; nothing of a former run."""
        for host, files in make_certificates([HOME, BACKUP]).items():
            self._end_former_proxy(host)
            self.shell(
                host,
                f"rm -rf {DIRECTORY} {STATE} {RUN} {LOG}; mkdir -p {DIRECTORY}/keys; "
                f"mkdir -m 0711 {STATE} {RUN}",
            )
            base = self.root(host) / DIRECTORY.lstrip("/")
            for path in PACKAGE.rglob("*.py"):
                target = base / "precache_proxy" / path.relative_to(PACKAGE)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
            for name, content in files.items():
                (base / "keys" / name).write_bytes(content)
            (base / "proxy.toml").write_text(self._configuration(host))
            install_hook(self.lab, host, HOOK_PATH, directory=DIRECTORY, state=STATE, run=RUN)

    def _end_former_proxy(self, host: str) -> None:
        """A test run that was killed leaves its proxies behind; their lock's holder is asked."""
        holder = self.shell(host, f"fuser {RUN}/proxy.lock 2>/dev/null", check=False)
        for pid in holder.split():
            self.shell(host, f"kill -KILL {pid}", check=False)

    def _configuration(self, host: str) -> str:
        other = other_host(host)
        return (
            f'name = "{host}"\nsite = "{host}"\n[listen]\nport = {PORT}\n'
            f'[tls]\nca = "{DIRECTORY}/keys/ca.crt"\ncertificate = "{DIRECTORY}/keys/host.crt"\n'
            f'key = "{DIRECTORY}/keys/host.key"\n'
            f'[paths]\nstate = "{STATE}"\nrun = "{RUN}"\n[control]\ngroup = "root"\n'
            f"[store]\nminimum_free_bytes = 0\n"
            f'[[peers]]\nname = "{other}"\naddress = "{other}"\nport = {PORT}\n'
        )

    # -- proxies

    def start(self, host: str, *, crash_at: str = "", stop_at: str = "", drop_at: str = "") -> None:
        """Start a proxy, to be killed, stopped or to lose something at a named point; wait until it
        answers."""
        socket_path = self.root(host) / RUN.lstrip("/") / "control.sock"
        self.shell(host, f"mkdir -p -m 0711 {RUN}; rm -f {RUN}/control.sock")
        script = (
            f"cd /; LIFEBOAT_CRASH_AT={crash_at} LIFEBOAT_STOP_AT={stop_at} LIFEBOAT_DROP_AT={drop_at} "
            f"PYTHONPATH={DIRECTORY} PYTHONDONTWRITEBYTECODE=1 "
            f"setsid python3 -m precache_proxy run --config {DIRECTORY}/proxy.toml "
            f">> {LOG} 2>&1 < /dev/null & echo $!"
        )
        self._pids[host] = int(self.shell(host, script))
        wait_served(socket_path, lambda: not self.alive(host), timeout_seconds=60)

    def pid(self, host: str) -> int:
        """The number of its process on that host."""
        return self._pids[host]

    def alive(self, host: str) -> bool:
        """Whether the proxy's process is there."""
        pid = self._pids.get(host)
        return pid is not None and "yes" in self.shell(
            host, f"grep -q precache_proxy /proc/{pid}/cmdline 2>/dev/null && echo yes", check=False
        )

    def wait_stopped(self, host: str, timeout_seconds: float = 120) -> None:
        """Until a proxy stands still at its point (SIGSTOP)."""
        pid = self._pids[host]
        wait_for(
            lambda: self.shell(host, f"cut -d' ' -f3 /proc/{pid}/stat", check=False).strip(),
            lambda state: state == "T",
            timeout_seconds=timeout_seconds,
        )

    def go_on(self, host: str) -> None:
        """Let a stopped proxy go on."""
        self.shell(host, f"kill -CONT {self._pids[host]}")

    def kill(self, host: str, name: str = "KILL") -> None:
        """Signal a proxy, a stopped one too, and wait until it is gone."""
        if self.alive(host):
            self.shell(host, f"kill -CONT {self._pids[host]}", check=False)
            self.shell(host, f"kill -{name} {self._pids[host]}", check=False)
            wait_for(lambda: not self.alive(host), timeout_seconds=60)
        self._pids.pop(host, None)

    def restart(self, host: str, *, crash_at: str = "", stop_at: str = "", drop_at: str = "") -> None:
        """End a proxy by SIGTERM and start it anew."""
        self.kill(host, "TERM")
        self.start(host, crash_at=crash_at, stop_at=stop_at, drop_at=drop_at)

    def configure(self, host: str, lines: str = "") -> None:
        """Add lines to a proxy's configuration, which counts from its next start; "" takes them back."""
        path = self.root(host) / DIRECTORY.lstrip("/") / "proxy.toml"
        path.write_text(self._configuration(host) + lines)

    def cut(self) -> None:
        """Lose every packet between the sites from now on."""
        self.lab.wan.cut("home", "backup")
        self.lab.wan.cut("backup", "home")

    def log(self, host: str) -> str:
        """The last lines of a proxy's log."""
        return self.shell(host, f"tail -n 60 {LOG}", check=False)

    def ask(self, host: str, method: str, path: str, body: Answer | None = None) -> Answer:
        """Ask a proxy's control API. Raises Refused, OSError."""
        connection = UnixConnection(self.root(host) / RUN.lstrip("/") / "control.sock")
        try:
            content = None if body is None else json.dumps(body).encode()
            connection.request(method, path, content, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer: Answer = json.loads(response.read())
        finally:
            connection.close()
        if response.status >= 400:
            raise Refused(answer)
        return answer

    def wait_links(self) -> None:
        """Until both proxies hear each other."""
        for host in (HOME, BACKUP):
            wait_for(
                lambda host=host: [link["state"] for link in self.ask(host, "GET", "/v1/links")["links"]],  # type: ignore[misc]
                lambda states: states == ["up"],
            )

    def close(self) -> None:
        """End both proxies and remove what was installed."""
        for host in (HOME, BACKUP):
            self.kill(host, "TERM")
            self.shell(
                host,
                f"rm -rf {DIRECTORY} {STATE} {RUN} {HOOK_PATH}; {LOOK_AGAIN}",
                check=False,
            )
