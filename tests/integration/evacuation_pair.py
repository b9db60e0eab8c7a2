# SPDX-License-Identifier: GPL-3.0-or-later
"""Two whole proxies on two lab hosts, run from the checkout beside whatever is installed, with guests that
tell."""

from __future__ import annotations

import http.client
import json
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from integration.source_pair import PACKAGE, make_certificates
from lifeboat_lab.errors import LabError
from lifeboat_lab.guests.guests import Guest
from lifeboat_lab.guests.plan import GuestPlan
from lifeboat_lab.lab import Lab

HOME, BACKUP = "home1", "backup1"
HOOK = PACKAGE.parent / "libvirt_hook" / "lifeboat"
DIRECTORY = "/opt/lifeboat-evacuation-test"
STATE = "/var/lib/lifeboat-evacuation-test"
RUN = "/run/lifeboat-evacuation-test"
HOOK_PATH = "/etc/libvirt/hooks/qemu.d/lifeboat-evacuation-test"
LOG = "/var/log/lifeboat-evacuation-test.log"
PORT = 4949
# Long: passes run when an evacuation asks, so that what a test sees is the evacuation's own.
RPO_SECONDS = 600

Answer = dict[str, Any]


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


def wait_for(
    ask: Callable[[], Any], wanted: Callable[[Any], bool] = bool, *, timeout_seconds: float = 90
) -> Any:
    """Ask until the answer is the wanted one."""
    end = time.monotonic() + timeout_seconds
    while True:
        answer = ask()
        if wanted(answer):
            return answer
        assert time.monotonic() < end, f"not within {timeout_seconds} s; last: {answer}"
        time.sleep(0.3)


class EvacuationPair:
    """Both proxies. One object a test module; :meth:`reset` between tests."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._pids: dict[str, int] = {}
        self.guests: list[Guest] = []

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
            other = BACKUP if host == HOME else HOME
            self._end_former_proxy(host)
            self.shell(
                host,
                f"rm -rf {DIRECTORY} {STATE} {RUN} {LOG}; mkdir -p {DIRECTORY}/keys "
                f"/etc/libvirt/hooks/qemu.d;"
                f"mkdir -m 0711 {STATE} {RUN}",
            )
            base = self.root(host) / DIRECTORY.lstrip("/")
            for path in PACKAGE.rglob("*.py"):
                target = base / "precache_proxy" / path.relative_to(PACKAGE)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
            for name, content in files.items():
                (base / "keys" / name).write_bytes(content)
            (base / "hook").write_bytes(HOOK.read_bytes())
            (base / "hook").chmod(0o755)
            hook = self.root(host) / HOOK_PATH.lstrip("/")
            hook.write_text(
                f"#!/bin/sh\nexport LIFEBOAT_STATE_DIRECTORY={STATE} LIFEBOAT_RUN_DIRECTORY={RUN}\n"
                f'exec /usr/bin/python3 -IS {DIRECTORY}/hook "$@"\n'
            )
            hook.chmod(0o755)
            (base / "proxy.toml").write_text(self._configuration(host, other))
            # libvirt looks for hooks when it starts or is told to, and listens once its drivers are ready
            self.shell(host, "virsh uri >/dev/null; systemctl reload-or-restart libvirtd")

    def _end_former_proxy(self, host: str) -> None:
        """A test run that was killed leaves its proxies behind; their lock's holder is asked."""
        holder = self.shell(host, f"fuser {RUN}/proxy.lock 2>/dev/null", check=False)
        for pid in holder.split():
            self.shell(host, f"kill -KILL {pid}", check=False)

    def _configuration(self, host: str, other: str) -> str:
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
        wait_for(socket_path.exists, timeout_seconds=60)

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
        other = BACKUP if host == HOME else HOME
        path = self.root(host) / DIRECTORY.lstrip("/") / "proxy.toml"
        path.write_text(self._configuration(host, other) + lines)

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

    # -- guests

    def make_guest(self, name: str, **plan: Any) -> Guest:
        """A running, protected guest at home."""
        for left in self.lab.guests.all():
            # of a test run that was killed
            if left.name == name:
                left.remove()
        guest = self.lab.guests.define(HOME, GuestPlan(name, **plan))
        self.guests.append(guest)
        guest.start()
        guest.wait_ready()
        self.protect(guest)
        return guest

    def protect(self, guest: Guest, host: str = HOME) -> Answer:
        """Protect and wait until the replica is sealed."""
        peer = BACKUP if host == HOME else HOME
        self.ask(host, "PUT", f"/v1/vms/{guest.plan.uuid}", {"peer": peer, "rpo_seconds": RPO_SECONDS})
        return self.wait_protected(guest, host)

    def wait_protected(self, guest: Guest, host: str) -> Answer:
        """Until a generation is sealed at the peer and nothing is open."""

        def state() -> Answer:
            try:
                return self.ask(host, "GET", f"/v1/vms/{guest.plan.uuid}")
            except Refused:
                return {}

        return wait_for(  # type: ignore[no-any-return]
            state,
            lambda told: told.get("state") == "protected" and told["generation"] and not told["pass_open"],
            timeout_seconds=120,
        )

    def begin(self, host: str, guest: Guest, **options: Any) -> Answer:
        """Command an evacuation."""
        return self.ask(host, "POST", "/v1/evacuations", {"vm": guest.plan.uuid, **options})

    def job(self, host: str, job_id: str) -> Answer:
        """What the source says of a job."""
        for told in self.ask(host, "GET", "/v1/evacuations")["evacuations"]:
            if told["id"] == job_id:
                return dict(told)
        raise AssertionError(f"{host} does not know job {job_id}")

    def wait_job(self, host: str, job_id: str, *, timeout_seconds: float = 180) -> Answer:
        """The job once it has ended and owes nothing."""
        return wait_for(  # type: ignore[no-any-return]
            lambda: self.job(host, job_id),
            lambda told: told["step"] in {"done", "stayed"} and not told["owes_abort"],
            timeout_seconds=timeout_seconds,
        )

    def wait_step(self, host: str, job_id: str, step: str) -> Answer:
        """Until the job is at a step (or beyond its end, which fails)."""
        told: Answer = wait_for(
            lambda: self.job(host, job_id), lambda told: told["step"] in {step, "done", "stayed"}
        )
        assert told["step"] == step, told
        return told

    def wait_landed(self, host: str, guest: Guest) -> Answer:
        """Until the newest arrival of the guest has landed."""
        return wait_for(  # type: ignore[no-any-return]
            lambda: self.arrival(host, guest), lambda told: told.get("state") == "landed", timeout_seconds=120
        )

    def arrival(self, host: str, guest: Guest) -> Answer:
        """The newest arrival of a guest, {} where there is none."""
        told = [
            arrival
            for arrival in self.ask(host, "GET", "/v1/arrivals")["arrivals"]
            if arrival["vm"] == guest.plan.uuid
        ]
        return dict(max(told, key=lambda arrival: (arrival["epoch"], arrival["since"]))) if told else {}

    @contextmanager
    def never_twice(self, guest: Guest) -> Iterator[None]:
        """Ask both hosts all the time who runs the guest; both at once is the worst that can happen."""
        end = threading.Event()
        seen: list[str] = []

        def watch() -> None:
            while not end.wait(0.2):
                try:
                    first = guest.running_on()
                except LabError:
                    continue  # a host lost power between two questions; asked again at once
                # The hosts are asked one after the other: both count only if the first still says so after.
                if len(first) > 1 and first[0] in guest.running_on():
                    seen.append(f"{time.time():.1f}: {first}")

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join(30)
        assert seen == [], "running twice"

    def leftovers(self, host: str) -> list[str]:
        """Overlays, sockets and exceptions that no job needs any more."""
        found = self.shell(
            host,
            f"ls -d /var/lib/libvirt/images/*.lifeboat-* {RUN}/jobs/* {RUN}/arriving/* "
            f"{STATE}/disks/*/*-arrival.qcow2 2>/dev/null",
            check=False,
        )
        return found.split("\n")[:-1]

    def guarded(self, host: str, guest: Guest) -> bool:
        """Whether a start of the guest is forbidden on a host."""
        return (self.root(host) / STATE.lstrip("/") / "guard" / f"{guest.plan.uuid}.json").exists()

    def start_is_refused(self, host: str, guest: Guest) -> str:
        """Try to start the guest on a host where it must not run; what virsh says."""
        told = self.lab.exec(host, "virsh", "start", guest.plan.uuid, check=False, timeout_seconds=60)
        assert told.returncode != 0, f"the guest was started on {host}"
        return str(told.stderr)

    # -- the end

    def remove_guests(self) -> None:
        """Remove the test's guests and all that the proxies know of them: the next test begins anew."""
        for guest in self.guests:
            for host in (HOME, BACKUP):
                uuid = guest.plan.uuid
                if self.lab.host(host).running:
                    self.virsh(host, "destroy", uuid, check=False)
                    self.virsh(
                        host, "undefine", uuid, "--nvram", "--checkpoints-metadata", "--snapshots-metadata",
                        check=False,
                    )  # fmt: skip
            guest.remove()
        self.guests.clear()
        for host in (HOME, BACKUP):
            self.kill(host)
            left = "/var/lib/libvirt/images/*.lifeboat-*"
            self.shell(host, f"rm -rf {shlex.quote(STATE)}/* {shlex.quote(RUN)}/* {left}", check=False)

    def close(self) -> None:
        """End both proxies and remove what was installed."""
        for host in (HOME, BACKUP):
            self.kill(host, "TERM")
            self.shell(
                host,
                f"rm -rf {DIRECTORY} {STATE} {RUN} {HOOK_PATH}; systemctl reload-or-restart libvirtd",
                check=False,
            )
