# SPDX-License-Identifier: GPL-3.0-or-later
"""Two source proxies on two lab hosts, and guests without an operating system whose disks the test writes."""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import shlex
import socket
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from integration.libvirt_hook import LOOK_AGAIN, install_hook
from lifeboat_lab.lab import Lab

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "roles" / "precache_proxy" / "files" / "precache_proxy"
HOOK_PATH = "/etc/libvirt/hooks/qemu.d/lifeboat-source-test"
HOME, BACKUP = "home1", "backup1"
DIRECTORY = "/opt/lifeboat-source-test"
STATE = "/var/lib/lifeboat-source-test"
RUN = "/run/lifeboat-source-test"
PORT = 4848
LOG = "/var/log/lifeboat-source-test.log"
NOISE = "/var/tmp/noise"


class CallFailed(Exception):
    """What a proxy answered instead of a result."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(f"{error['cause']}: {error['message']}")
        self.cause = str(error["cause"])
        self.message = str(error["message"])
        self.findings = error.get("findings", [])


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
        time.sleep(0.2)


def wait_served(path: Path, is_over: Callable[[], bool], *, timeout_seconds: float) -> None:
    """Until a UNIX socket may be connected to: its file is there a moment before.

    ``is_over``: whoever serves it may be killed soon, and have answered, and ended, between two looks.
    """

    def listens() -> bool:
        with socket.socket(socket.AF_UNIX) as connection:
            return connection.connect_ex(str(path)) == 0

    wait_for(lambda: path.exists() and (listens() or is_over()), timeout_seconds=timeout_seconds)


def make_certificates(names: list[str]) -> dict[str, dict[str, bytes]]:
    """A private authority and one certificate a name, as files by host."""
    now = datetime.datetime.now(datetime.UTC)
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "source test")])

    def certificate(
        name: x509.Name, key: ec.EllipticCurvePrivateKey, *, authority: bool, alternative: str = ""
    ) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(authority_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if alternative:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([x509.DNSName(alternative)]), critical=False
            ).add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
        made = builder.sign(authority_key, hashes.SHA256())
        return made.public_bytes(serialization.Encoding.PEM)

    authority = certificate(authority_name, authority_key, authority=True)
    files: dict[str, dict[str, bytes]] = {}
    for name in names:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        files[name] = {
            "ca.crt": authority,
            "host.crt": certificate(subject, key, authority=False, alternative=name),
            "host.key": key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        }
    return files


@dataclass
class Vm:
    """A guest on the home host."""

    pair: SourcePair
    name: str
    uuid: str = ""
    disks: dict[str, str] = field(default_factory=dict)

    def virsh(self, *words: str, check: bool = True) -> str:
        """Run virsh at home."""
        return self.pair.run(HOME, "virsh", *words, check=check)

    def qemu_io(self, disk: str, command: str) -> None:
        """Write as the guest would: through QEMU's device."""
        number = list(self.disks).index(disk)
        path = f"/machine/peripheral/virtio-disk{number}/virtio-backend"
        told = self.virsh("qemu-monitor-command", "--hmp", self.name, f'qemu-io -d {path} "{command}"')
        assert "rror" not in told, told

    def write(self, disk: str, pattern: int, offset: str | int, length: str | int) -> None:
        """Fill a range with a byte and have it on the image."""
        self.qemu_io(disk, f"write -P {pattern} {offset} {length}")
        self.qemu_io(disk, "flush")

    def content(self, disk: str) -> str:
        """SHA-256 of what the guest sees on a disk."""
        return self.pair.content(HOME, self.disks[disk])

    def lose_power(self) -> None:
        """Its QEMU is killed; until libvirt has seen that."""
        self.pair.shell(HOME, f"kill -9 $(cat /run/libvirt/qemu/{shlex.quote(self.name)}.pid)")
        self.pair.wait(lambda: "shut off" in self.virsh("domstate", self.name))

    def backup_job(self) -> str:
        """The backup job that is open in QEMU, "" where none is."""
        return self.virsh("backup-dumpxml", self.name, check=False).strip()

    def checkpoints(self) -> list[str]:
        """Names of all of its checkpoints."""
        return self.virsh("checkpoint-list", self.name, "--name").split()

    def status(self) -> dict[str, Any]:
        """What its proxy says."""
        return self.pair.call(HOME, "status", vm=self.uuid)

    def run_pass(self) -> dict[str, Any]:
        """A pass now."""
        result: dict[str, Any] = self.pair.call(HOME, "run_pass", vm=self.uuid, reason="test")
        return result

    def wait_protected(self, *, timeout_seconds: float = 60) -> dict[str, Any]:
        """Until the state is protected and nothing is open."""
        return self.pair.wait(
            self.status,
            lambda status: status["state"] == "protected" and not status["pass_open"],
            timeout_seconds=timeout_seconds,
        )

    def require_equal(self, *disks: str) -> None:
        """The replica's sealed generation is what the guest sees, bit for bit."""
        generation = self.status()["generation"]
        replica = self.pair.call(BACKUP, "replica", vm=self.uuid)
        tops = self.pair.call(
            BACKUP, "replica_tops", vm=self.uuid, generation=generation, epoch=replica["epoch"]
        )
        for disk in disks or tuple(self.disks):
            assert self.pair.content(BACKUP, tops[disk]) == self.content(disk), f"{self.name} {disk}"

    def remove(self) -> None:
        """Unprotect, destroy, undefine, delete."""
        try:
            self.pair.call(HOME, "unprotect", vm=self.uuid, keep_replica=False)
        except CallFailed as error:
            if error.cause != "not-found":
                raise
        self.virsh("destroy", self.name, check=False)
        self.virsh("undefine", self.name, "--checkpoints-metadata", "--snapshots-metadata", check=False)
        # with the layers that a test or libvirt put beside them
        self.pair.shell(HOME, f"rm -f /var/lib/libvirt/images/{shlex.quote(self.name)}-vd*")
        self.pair.vms.remove(self)


class SourcePair:
    """Both proxies. ``settings`` are those of the home proxy's source."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._pids: dict[str, int] = {}
        self.vms: list[Vm] = []

    # -- hosts

    def run(self, host: str, *words: str, check: bool = True) -> str:
        """Run a command as root on a host."""
        return str(self.lab.exec(host, *words, check=check, timeout_seconds=120).stdout)

    def shell(self, host: str, script: str, *, check: bool = True) -> str:
        """Run a shell script as root on a host."""
        return self.run(host, "sh", "-c", script, check=check)

    def root(self, host: str) -> Path:
        """A host's files."""
        return Path(self.lab.host(host).root)

    def install(self) -> None:
        """Package, keys, directories and libvirt's hook on both hosts, nothing of a former run."""
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            tar.add(
                PACKAGE,
                "precache_proxy",
                filter=lambda member: None if "__pycache__" in member.name else member,
            )
            tar.add(Path(__file__).with_name("source_proxy.py"), "source_proxy.py")
        for host, files in make_certificates([HOME, BACKUP]).items():
            self.shell(
                host,
                f"rm -rf {DIRECTORY} {STATE} {RUN}; mkdir -p {DIRECTORY}/keys {RUN}; mkdir -m 0711 {STATE}",
            )
            base = self.root(host) / DIRECTORY.lstrip("/")
            with tarfile.open(fileobj=io.BytesIO(archive.getvalue())) as tar:
                tar.extractall(base)
            for name, content in files.items():
                (base / "keys" / name).write_bytes(content)
            install_hook(self.lab, host, HOOK_PATH, directory=DIRECTORY, state=STATE, run=RUN)

    def start(self, host: str, *, crash_at: str = "", stop_at: str = "", **settings: Any) -> None:
        """Start a proxy, to be killed or stopped at a named point, and wait until it answers."""
        other = BACKUP if host == HOME else HOME
        configuration = {
            "name": host, "state": STATE, "run": RUN, "keys": f"{DIRECTORY}/keys", "port": PORT,
            "peers": [other], "source": settings,
        }  # fmt: skip
        socket_path = self.root(host) / RUN.lstrip("/") / "control.sock"
        socket_path.unlink(missing_ok=True)
        script = (
            f"LIFEBOAT_CRASH_AT={crash_at} LIFEBOAT_STOP_AT={stop_at} "
            f"setsid python3 {DIRECTORY}/source_proxy.py {DIRECTORY} "
            f"{shlex.quote(json.dumps(configuration))} >> {LOG} 2>&1 < /dev/null & echo $!"
        )
        self._pids[host] = int(self.shell(host, script))
        wait_served(socket_path, lambda: self._is_gone(host), timeout_seconds=60)

    def signal(self, host: str, name: str) -> None:
        """Send a signal, to a stopped one too, and wait until the process is gone."""
        pid = self._pids[host]
        self.shell(host, f"kill -CONT {pid}; kill -{name} {pid}", check=False)
        self.wait_gone(host)

    def wait_gone(self, host: str, *, timeout_seconds: float = 60) -> None:
        """Until the proxy of a host has ended."""
        self.wait(lambda: self._is_gone(host), timeout_seconds=timeout_seconds)

    def _is_gone(self, host: str) -> bool:
        return bool(self.shell(host, f"test -d /proc/{self._pids[host]} || echo gone"))

    def wait_stopped(self, host: str, *, timeout_seconds: float = 60) -> None:
        """Until the proxy of a host stands still at its point (SIGSTOP)."""
        stat = f"cut -d' ' -f3 /proc/{self._pids[host]}/stat"
        self.wait(
            lambda: self.shell(host, stat, check=False).strip(),
            lambda state: state == "T",
            timeout_seconds=timeout_seconds,
        )

    def go_on(self, host: str) -> None:
        """Let a stopped proxy go on."""
        self.shell(host, f"kill -CONT {self._pids[host]}")

    def cut(self) -> None:
        """Lose every packet between the sites from now on."""
        self.lab.wan.cut("home", "backup")
        self.lab.wan.cut("backup", "home")

    def restart(self, host: str, *, crash_at: str = "", stop_at: str = "", **settings: Any) -> None:
        """Stop in order and start again."""
        self.signal(host, "TERM")
        self.start(host, crash_at=crash_at, stop_at=stop_at, **settings)

    def log(self, host: str) -> str:
        """The last lines of a proxy's log."""
        return self.shell(host, f"tail -n 40 {LOG}", check=False)

    def call(self, host: str, method: str, **arguments: Any) -> Any:
        """Ask a proxy. Raises CallFailed with its error, OSError where it does not answer."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(240)
            connection.connect(str(self.root(host) / RUN.lstrip("/") / "control.sock"))
            connection.sendall(json.dumps({"method": method, "arguments": arguments}).encode() + b"\n")
            line = connection.makefile().readline()
        if not line:
            raise ConnectionResetError(f"{host} went away during {method}")
        answer = json.loads(line)
        if "error" in answer:
            raise CallFailed(answer["error"])
        return answer["result"]

    wait = staticmethod(wait_for)

    # -- guests

    def content(self, host: str, image: str) -> str:
        """SHA-256 of an image's content, whoever has it open."""
        quoted = shlex.quote(image)
        script = (
            f"set -e; t=$(mktemp /var/tmp/content.XXXXXX); "
            f"qemu-img convert --force-share -O raw {quoted} $t; sha256sum < $t; rm -f $t"
        )
        return self.shell(host, script).split()[0]

    def make_vm(
        self, name: str, sizes: dict[str, str], *, formats: str = "qcow2", start: bool = True, extra: str = ""
    ) -> Vm:
        """Define (and start) a guest with empty disks."""
        vm = Vm(self, name)
        elements = ""
        for target, size in sizes.items():
            image = f"/var/lib/libvirt/images/{name}-{target}.{formats}"
            vm.disks[target] = image
            self.shell(HOME, f"rm -f {shlex.quote(image)}*")
            self.run(HOME, "qemu-img", "create", "-q", "-f", formats, image, size)
            elements += disk_element(image, target, formats)
        xml = (
            f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory><vcpu>1</vcpu>"
            "<os><type arch='x86_64' machine='q35'>hvm</type></os>"
            f"<devices>{elements}{extra}</devices></domain>"
        )
        path = self.root(HOME) / "var/tmp" / f"{hashlib.sha256(name.encode()).hexdigest()[:12]}.xml"
        path.write_text(xml)
        self.run(HOME, "virsh", "define", f"/var/tmp/{path.name}")
        vm.uuid = self.run(HOME, "virsh", "domuuid", name).strip()
        if start:
            self.run(HOME, "virsh", "start", name)
        self.vms.append(vm)
        return vm

    def make_noise(self, mebibytes: int) -> None:
        """A file that does not compress, to be written into guests."""
        self.shell(HOME, f"head -c {mebibytes}M /dev/urandom > {NOISE}; chmod 644 {NOISE}")

    def protect(self, vm: Vm, **options: Any) -> dict[str, Any]:
        """Protect towards the backup host with an RPO so long that passes run on demand only."""
        options.setdefault("rpo_seconds", 3600)
        self.call(HOME, "protect", vm=vm.name, peer=BACKUP, **options)
        return vm.wait_protected()

    def close(self) -> None:
        """End both proxies and remove what is left."""
        for host in (HOME, BACKUP):
            if host in self._pids:
                self.signal(host, "TERM")
        for host in (HOME, BACKUP):
            self.shell(
                host,
                f"rm -rf {DIRECTORY} {STATE} {RUN} {NOISE} {HOOK_PATH}; {LOOK_AGAIN}",
                check=False,
            )


@contextmanager
def installed_source_pair(lab: Lab) -> Iterator[SourcePair]:
    """Both proxies on their hosts, not started; afterwards nothing of them and their guests is left."""
    pair = SourcePair(lab)
    pair.install()
    yield pair
    try:
        for vm in list(pair.vms):
            vm.remove()
    finally:
        pair.close()


def disk_element(image: str, target: str, image_format: str = "qcow2") -> str:
    """A virtio disk."""
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='{image_format}' discard='unmap'/>"
        f"<source file='{image}'/><target dev='{target}' bus='virtio'/></disk>"
    )
