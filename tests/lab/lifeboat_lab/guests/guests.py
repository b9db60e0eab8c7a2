# SPDX-License-Identifier: GPL-3.0-or-later
"""Defining, starting, asking and checking guests on the lab's hosts."""

import hashlib
import ipaddress
import json
import os
import re
import shutil
import socket
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from lifeboat_lab.errors import LabError
from lifeboat_lab.guests import kernel, records, verify
from lifeboat_lab.guests.collector import Collector
from lifeboat_lab.guests.plan import BOOT_DIRECTORY, GuestPlan
from lifeboat_lab.guests.watch import Watch
from lifeboat_lab.hosts import Host, wait_for
from lifeboat_lab.settings import RUNTIME
from lifeboat_lab.shell import run

if TYPE_CHECKING:
    from lifeboat_lab.lab import Lab

PROBE_SECONDS = 12
CONTENT_FILE_BYTES = 1 << 20
ANSWER_SECONDS = 60.0
STARTED = "started"


@dataclass(frozen=True)
class Verdict:
    """The result of a check: what the guest acknowledged, what the disks hold, and everything that is
    wrong."""

    acknowledged: int
    disks: tuple[verify.DiskReport, ...]
    findings: tuple[str, ...]

    @property
    def intact(self) -> bool:
        """Nothing lost, nothing damaged."""
        return not self.findings


class Guest:
    """A guest of the lab; on which host its domain is, is asked of the hosts each time."""

    def __init__(self, lab: "Lab", record: dict[str, Any]) -> None:
        self._lab = lab
        self.plan = GuestPlan(**record["plan"])
        self.address: str = record["address"]
        self.home: str = record["home"]
        self.manifests: list[dict[str, str]] = record["manifests"]

    @property
    def name(self) -> str:
        """Name of the domain."""
        return self.plan.name

    # --- its domain ----------------------------------------------------------------------------

    def states(self) -> dict[str, str]:
        """State of the domain on every host that is on and knows it, as `virsh domstate` words it."""
        found = {}
        for name, host in self._lab.hosts.items():
            if host.running and host.plan.image == "full":
                answer = host.exec("virsh", "domstate", self.plan.uuid, check=False)
                if answer.returncode == 0:
                    found[name] = answer.stdout.strip()
        return found

    def running_on(self) -> list[str]:
        """Hosts where the domain is executing instructions: more than one is the worst that can happen."""
        return [host for host, state in self.states().items() if state == "running"]

    def start(self, host: str | None = None) -> None:
        """Start the domain on the host (default: where it was defined)."""
        place = self._host(host)
        # What an earlier run told must not be taken for this one's.
        with (place.root / self.plan.record_path.lstrip("/")).open("a") as log:
            log.write(f"\n{STARTED}\n")
        place.exec("virsh", "start", self.plan.uuid)

    def destroy(self, host: str | None = None) -> None:
        """Pull the plug of the guest."""
        self._host(host).exec("virsh", "destroy", self.plan.uuid)

    def wait_ready(self, timeout_seconds: float = 240, *, host: str | None = None) -> None:
        """Wait until the guest of its newest start has booted and told its canary."""
        place = self._host(host)
        log = place.root / self.plan.record_path.lstrip("/")

        def told() -> bool:
            text = log.read_text(errors="replace") if log.exists() else ""
            return (
                re.search(r"^canary [0-9a-f]{64}$", text[max(text.rfind(STARTED), 0) :], re.MULTILINE)
                is not None
            )

        wait_for(told, timeout_seconds, 0.1)

    def remove(self) -> None:
        """Undefine the domain and delete its images and records wherever they are."""
        for name, host in self._lab.hosts.items():
            if not host.running or host.plan.image != "full":
                continue
            if name in self.states():
                host.exec("virsh", "destroy", self.plan.uuid, check=False)
            # One that stock libvirt moved there is transient: destroyed, it is gone.
            if name in self.states():
                host.exec("virsh", "undefine", "--nvram", "--checkpoints-metadata", "--snapshots-metadata",
                          self.plan.uuid)  # fmt: skip
            paths = [self.plan.disk_path(target) for target in self.plan.targets]
            host.exec("rm", "-f", self.plan.record_path, self.plan.cdrom_path, *paths)
        self._lab.guests.forget(self)

    # --- what it says --------------------------------------------------------------------------

    def ask(self, command: str, host: str | None = None) -> str:
        """Send a line to the agent (canary | status | run COMMAND | poweroff) and return its answer.

        Raises LabError when it does not answer within a minute.
        """
        place = self._host(host if host is not None else self._only_runner())
        xml = ElementTree.fromstring(place.exec("virsh", "dumpxml", self.plan.uuid).stdout)
        source = xml.find("./devices/channel[@type='unix']/source")
        path = source.get("path") if source is not None else None
        if path is None:
            raise LabError(f"guest {self.name}: has no control channel on {place.name}; is it running there?")
        text = b""
        with _connected(place.root / path.lstrip("/")) as port:
            try:
                port.sendall(command.encode() + b"\n")
                while not (text == b".\n" or text.endswith(b"\n.\n")):
                    if not (got := port.recv(65536)):
                        break
                    text += got
            except TimeoutError as error:
                raise LabError(
                    f"guest {self.name}: no answer to {command!r} within {ANSWER_SECONDS:g} s"
                ) from error
        return text.decode(errors="replace").removesuffix(".\n").strip()

    def canary(self, host: str | None = None) -> str:
        """SHA-256 of the guest's random file in memory, computed now."""
        return self.ask("canary", host)

    def told(self) -> records.Told:
        """Everything that the guest told, wherever it was at the time."""
        texts = []
        for host in self._lab.hosts.values():
            path = self.plan.record_path.lstrip("/")
            file = (host.root if host.running else host.upper) / path
            if file.exists():
                texts.append(file.read_text(errors="replace"))
        return records.parse(texts)

    def watch(self) -> Watch:
        """Follow its heartbeats on all hosts that are on: `with guest.watch() as watch: ...`."""
        path = self.plan.record_path.lstrip("/")
        hosts = [host for host in self._lab.hosts.values() if host.running and host.plan.image == "full"]
        return Watch(host.root / path for host in hosts)

    # --- is everything there? ------------------------------------------------------------------

    def verify(
        self,
        host: str,
        *,
        images: dict[str, tuple[str, str]] | None = None,
        acknowledged: int | None = None,
        committed: int | None = None,
        canary: str | None = None,
        one_instant: bool = False,
    ) -> Verdict:
        """Check disks on a host: fsck, content, every record that was acknowledged; one instant over all
        disks.

        `images` is target -> (path, format); default: what the domain there uses now. `acknowledged` is the
        highest record that must be there (default: the highest that the guest has told of before this call);
        for a copy of an earlier instant, such as a replica, pass what had been told by then. `committed`: the
        same for the rows of a database. With `canary`
        the running guest's memory is compared too. `one_instant`: the disks stand still and must be of one
        instant, as those of a replica or of a guest that is off.
        """
        needed = self.told().highest_acknowledged if acknowledged is None else acknowledged
        place = self._host(host)
        # A copy of a disk that is being written is of no instant at all: what it lacks is nobody's loss.
        still = images is None and self.states().get(host) == "running"
        images = images or self.images(host)
        findings: list[str] = []
        if canary is not None and (now := self.canary(host)) != canary:
            findings.append(f"canary in memory was {canary[:16]}, is {now[:16]}")
        workloads = self.plan.workload.split(",")
        has_log = "fsync-log" in workloads
        committed = self.told().highest_committed if committed is None else committed
        if still:
            place.exec("virsh", "suspend", self.plan.uuid)
        try:
            reports = [
                # All but the log is on the first disk only.
                verify.examine(
                    place,
                    *images[target],
                    manifest,
                    [w for w in workloads if w == "fsync-log" or target == self.plan.targets[0]],
                )
                for target, manifest in zip(self.plan.targets, self.manifests, strict=True)
            ]
        finally:
            if still:
                place.exec("virsh", "resume", self.plan.uuid)
        for report in reports:
            findings += [f"{report.image}: {finding}" for finding in report.findings]
            if has_log and report.records < needed:
                findings.append(
                    f"{report.image}: {report.records} records, but {needed} were acknowledged: "
                    f"{needed - report.records} lost"
                )
        if reports[0].rows < committed:
            findings.append(
                f"{reports[0].image}: {reports[0].rows} rows, but {committed} were committed: "
                f"{committed - reports[0].rows} lost"
            )
        counts = [report.records for report in reports] if has_log and one_instant else []
        if any(not 0 <= earlier - later <= 1 for earlier, later in pairwise(counts)):
            findings.append(
                f"disks are not of one instant: they hold {counts} records, in order of the disks"
            )
        told = self.told()
        if told.doubled_beats > 1:
            findings.append(f"{told.doubled_beats} heartbeats came from two hosts: two copies were running")
        findings += [f"guest told: {error}" for error in told.errors]
        return Verdict(needed, tuple(reports), tuple(findings))

    def images(self, host: str) -> dict[str, tuple[str, str]]:
        """Target -> (path, format) of the disks as the domain on that host has them now."""
        xml = ElementTree.fromstring(self._host(host).exec("virsh", "dumpxml", self.plan.uuid).stdout)
        found = {}
        for disk in xml.findall("./devices/disk[@device='disk']"):
            target, source, driver = disk.find("target"), disk.find("source"), disk.find("driver")
            if target is not None and source is not None and driver is not None:
                path = source.get("file") or source.get("dev") or ""
                found[target.get("dev", "")] = (path, driver.get("type", "raw"))
        return found

    def _host(self, name: str | None) -> Host:
        return self._lab.host(name if name is not None else self.home)

    def _only_runner(self) -> str:
        running = self.running_on()
        if len(running) != 1:
            raise LabError(
                f"guest {self.name}: runs on {running or 'no host'}, not on one; it is {self.states()}"
            )
        return running[0]


class Guests:
    """All guests of a lab."""

    def __init__(self, lab: "Lab") -> None:
        self._lab = lab
        self.collector = Collector(lab)
        self._directory = lab.settings.state / "guests"

    def define(self, host: str, plan: GuestPlan) -> Guest:
        """Make the guest's disks with real content on a host and define its domain there. Does not start it.

        Every host that is on gets the kernel and an empty record file, so that the guest may arrive there.
        Raises LabError when the name is taken.
        """
        if any(guest.name == plan.name for guest in self.all()):
            raise LabError(f"guest {plan.name}: is there already; remove it first or choose another name")
        place = self._lab.host(host)
        self._prepare_hosts(plan)
        self.collector.start()
        address = self._free_address(place)
        manifests = [make_disk(place, plan, index, self._system(plan, index)) for index in range(plan.disks)]
        if plan.cdrom:
            (place.root / plan.cdrom_path.lstrip("/")).write_bytes(os.urandom(1 << 20))
        place.exec(
            "virsh", "define", "/dev/stdin", stdin=plan.domain_xml(address, self._accelerator(place, plan))
        )
        record = {"plan": asdict(plan), "address": address, "home": host, "manifests": manifests}
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / f"{plan.uuid}.json").write_text(json.dumps(record))
        return Guest(self._lab, record)

    def all(self) -> list[Guest]:
        """Every guest that was defined and not removed."""
        found = [Guest(self._lab, json.loads(path.read_text())) for path in self._directory.glob("*.json")]
        return sorted(found, key=lambda guest: guest.name)

    def get(self, name: str) -> Guest:
        """A guest by its name. Raises LabError naming those that there are."""
        for guest in self.all():
            if guest.name == name:
                return guest
        raise LabError(
            f"guest {name}: not known; there are {', '.join(g.name for g in self.all()) or 'none'}"
        )

    def forget(self, guest: Guest) -> None:
        """Drop the record of a guest that is gone."""
        (self._directory / f"{guest.plan.uuid}.json").unlink(missing_ok=True)

    def _free_address(self, host: Host) -> str:
        network = ipaddress.IPv6Network(host.plan.guest_prefix)
        taken = {guest.address for guest in self.all()}
        return next(str(network[n]) for n in range(0x100, 0x10000) if str(network[n]) not in taken)

    def _accelerator(self, host: Host, plan: GuestPlan) -> str:
        """What runs the guest's processors: `kvm` only where it really boots this kernel, found out once."""
        if plan.accelerator != "auto":
            return plan.accelerator
        if not Path("/dev/kvm").exists():
            return "qemu"
        known = RUNTIME / "accelerator"
        if not known.exists():
            answer = host.exec(
                "timeout", str(PROBE_SECONDS), "qemu-system-x86_64", "-accel", "kvm", "-m", "128",
                "-no-reboot",
                "-nodefaults", "-display", "none", "-serial", "stdio", "-kernel", f"{BOOT_DIRECTORY}/vmlinuz",
                "-initrd", f"{BOOT_DIRECTORY}/initrd.img", "-append", "console=ttyS0 panic=-1 lab.disks=0",
                check=False,
            )  # fmt: skip
            known.write_text("kvm" if "lab guest: ready" in answer.stdout else "qemu")
        return known.read_text()

    def _system(self, plan: GuestPlan, index: int) -> Path | None:
        """The system that the first disk of a guest carries, if it has one."""
        if plan.system != "debian" or index > 0:
            return None
        return kernel.build_debian(self._lab.full_image(), self._lab.settings.suite) / "root"

    def _prepare_hosts(self, plan: GuestPlan) -> None:
        boot = kernel.build(self._lab.full_image())
        for host in self._lab.hosts.values():
            if not host.running or host.plan.image != "full":
                continue
            directory = host.root / BOOT_DIRECTORY.lstrip("/")
            (directory / "records").mkdir(parents=True, exist_ok=True)
            for name in ("vmlinuz", "initrd.img"):
                source, target = boot / name, directory / name
                if not target.exists() or target.stat().st_size != source.stat().st_size:
                    shutil.copyfile(source, target.with_suffix(".new"))
                    target.with_suffix(".new").rename(target)
            # QEMU opens it on either side of a move; libvirt gives it to QEMU's user each time.
            (host.root / plan.record_path.lstrip("/")).touch()


def make_disk(host: Host, plan: GuestPlan, index: int, system: Path | None = None) -> dict[str, str]:
    """An ext4 image of incompressible files, beside a system if one is given, on a host.

    Returns path below /content -> SHA-256.
    """
    target = plan.targets[index]
    work = Path(f"var/tmp/lab-make-{plan.uuid}-{index}")
    outside = host.root / work
    manifest: dict[str, str] = {}
    content = outside / "tree/content"
    outside.mkdir(parents=True)
    try:
        if system is not None:
            run(["cp", "--archive", str(system), str(outside / "tree")], timeout_seconds=600)
        content.mkdir(parents=True)
        for number in range(plan.content_mib):
            data = os.urandom(CONTENT_FILE_BYTES)
            file = content / f"{number // 100:03}" / f"{number:05}"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(data)
            manifest[str(file.relative_to(content))] = hashlib.sha256(data).hexdigest()
        path = plan.disk_path(target)
        host.exec("mkdir", "-p", plan.disk_directory)
        raw = f"/{work}/disk.raw"
        host.exec("mke2fs", "-q", "-t", "ext4", "-b", "4096", "-E", "lazy_itable_init=1",
                  "-L", f"lab{index + 1}", "-d", f"/{work}/tree",
                  raw, f"{plan.disk_mib}M", timeout_seconds=600)  # fmt: skip
        if plan.disk_format == "raw":
            host.exec("mv", raw, path)
        else:
            host.exec(
                "qemu-img", "convert", "-f", "raw", "-O", plan.disk_format, raw, path, timeout_seconds=600
            )
    finally:
        shutil.rmtree(outside)
    return manifest


def _connected(path: Path) -> socket.socket:
    port = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    port.settimeout(ANSWER_SECONDS)
    # The path may be longer than an address of this family; a descriptor's name never is.
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        port.connect(f"/proc/self/fd/{directory}/{path.name}")
    except OSError as error:
        port.close()
        raise LabError(f"guest's control port {path}: {error.strerror}") from error
    finally:
        os.close(directory)
    return port
