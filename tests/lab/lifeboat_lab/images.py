# SPDX-License-Identifier: GPL-3.0-or-later
"""Cached base images: the read-only lower layer of every host, and the packages it was built from.

An image is named by a hash of all that goes into it, is built beside its final place and renamed when it is
complete: an image that exists is whole, and a change of the recipe makes a new one.
"""

import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

from lifeboat_lab.errors import LabError
from lifeboat_lab.settings import CACHE, Settings
from lifeboat_lab.shell import run

NEEDED_MIB = {"full": 3000, "bare": 800, "guest": 200, "debian": 600}
PACKAGES_ON_HOST = "/srv/lab-packages"
# What a build mounts ends with it, also when it is killed: nothing is deleted through a mount left behind.
PRIVATE_MOUNTS = ("unshare", "--mount", "--propagation", "private", "--")

SYSTEM_PACKAGES = (
    "systemd", "systemd-sysv", "dbus", "libpam-systemd", "openssh-server", "python3", "iproute2",
    "iputils-ping", "procps",
)  # fmt: skip
FULL_PACKAGES = (
    *SYSTEM_PACKAGES,
    # the hypervisor
    "libvirt-daemon-system", "libvirt-clients", "qemu-system-x86", "qemu-utils", "qemu-block-extra", "ovmf",
    "swtpm", "swtpm-tools", "dmidecode", "polkitd", "netcat-openbsd",
    # what the daemons import, as the distribution has it
    "python3-libvirt", "python3-libnbd", "python3-aiohttp", "python3-prometheus-client", "python3-zstandard",
    "python3-xxhash", "python3-systemd", "python3-cryptography", "python3-msgpack", "python3-lxml",
    "python3-pyroute2", "python3-apt",
    # what an operator and our tests look with
    "rsync", "sudo", "nftables", "e2fsprogs", "strace", "socat", "attr", "tcpdump", "iperf3", "openssl",
    "ca-certificates", "libnbd-bin", "zstd", "jq", "psmisc", "less", "util-linux-extra", "busybox-static",
)  # fmt: skip
# Not installed on hosts: kernel and modules of the guests, taken from the packages; and what roles install
# where they are asked to.
DOWNLOADED_PACKAGES = ("linux-image-cloud-amd64", "frr", "frr-pythontools", "radvd")

# A guest is ended by the tests, or dies with its host; timers would only take our two cores.
MASKED_UNITS = (
    "libvirt-guests.service", "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer",
    "e2scrub_all.timer", "fstrim.timer", "man-db.timer", "console-getty.service", "systemd-timesyncd.service",
    "systemd-networkd.service", "systemd-networkd-wait-online.service", "systemd-firstboot.service",
    "nftables.service",
)  # fmt: skip
# Without libkmod this one fails, and there is no module to load in a container.
BARE_MASKED_UNITS = (*MASKED_UNITS, "systemd-modules-load.service")

FILES = {
    "etc/apt/sources.list.d/lab.sources": (
        "# The packages this host was built from; there is no way out to any other archive.\n"
        f"Types: deb\nURIs: file://{PACKAGES_ON_HOST}\nSuites: ./\nTrusted: yes\n"
    ),
    "etc/ssh/sshd_config.d/lab.conf": (
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\nUseDNS no\nMaxStartups 200\n"
        "MaxSessions 200\n"
    ),
    "etc/systemd/journald.conf.d/lab.conf": "[Journal]\nStorage=persistent\nSystemMaxUse=64M\n",
    "etc/resolv.conf": "",
    "etc/hostname": "unnamed\n",
}


class Images:
    """The cache of one suite."""

    def __init__(self, settings: Settings, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._say = say

    def full(self) -> Path:
        """Directory of the hypervisors' image: `root/`, `packages/`."""
        recipe = {
            "suite": self._settings.suite,
            "packages": FULL_PACKAGES,
            "downloaded": DOWNLOADED_PACKAGES,
            "files": FILES,
            "masked": MASKED_UNITS,
            "steps": 6,  # raise when the code below changes what comes out
        }
        return cached(f"full-{self._settings.suite}", recipe, NEEDED_MIB["full"], self._build_full)

    def bare(self) -> Path:
        """Directory of the image that has only systemd, ssh and python3; built from the full image's
        packages."""
        full = self.full()
        recipe = {"from": full.name, "packages": SYSTEM_PACKAGES, "masked": BARE_MASKED_UNITS, "steps": 2}
        return cached(
            f"bare-{self._settings.suite}",
            recipe,
            NEEDED_MIB["bare"],
            lambda target: self._build_bare(full, target),
        )

    def _build_full(self, target: Path) -> None:
        self._say(f"building the hosts' image ({self._settings.suite}): 1 to 3 minutes, once")
        packages = target / "packages"
        packages.mkdir()
        command = [
            *PRIVATE_MOUNTS, "mmdebstrap", "--mode=root", "--variant=minbase",
            "--skip=essential/unlink", "--architectures=amd64", f"--include={','.join(FULL_PACKAGES)}",
            '--customize-hook=env APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get --yes --download-only '
            f"--no-install-recommends install {' '.join(DOWNLOADED_PACKAGES)}",
            f'--customize-hook=mv "$1"/var/cache/apt/archives/*.deb {packages}/',
            self._settings.suite, str(target / "root"),
        ]  # fmt: skip
        if self._settings.mirror:
            command.append(self._settings.mirror)
        run(command, timeout_seconds=1800)
        index = run(
            ["dpkg-scanpackages", "--multiversion", str(packages), "/dev/null"], timeout_seconds=300
        ).stdout
        index = index.replace(f"Filename: {packages}/", "Filename: ./")
        (packages / "Packages").write_text(index)
        # Named as the suite is: essential packages are looked for in that one only.
        (packages / "Release").write_text(
            f"Date: {formatdate(usegmt=True)}\nSuite: {self._settings.suite}\n"
            f"Codename: {self._settings.suite}\nSHA256:\n"
            f" {hashlib.sha256(index.encode()).hexdigest()} {len(index.encode())} Packages\n"
        )
        customise(target / "root")

    def _build_bare(self, full: Path, target: Path) -> None:
        self._say("building the image of the host without packages: half a minute, once")
        bootstrap_from_packages(full / "packages", self._settings.suite, SYSTEM_PACKAGES, target / "root")
        customise(target / "root", BARE_MASKED_UNITS)


def bootstrap_from_packages(packages: Path, suite: str, wanted: Sequence[str], root: Path) -> None:
    """A Debian root from nothing but the packages of a base image. LabError when one is missing."""
    run(
        [
            *PRIVATE_MOUNTS, "mmdebstrap", "--mode=root", "--variant=minbase", "--architectures=amd64",
            f"--include={','.join(wanted)}", suite, str(root), f"deb [trusted=yes] copy:{packages} ./",
        ],
        timeout_seconds=900,
    )  # fmt: skip


def customise(root: Path, masked: Sequence[str] = MASKED_UNITS) -> None:
    """What all hosts share beyond the packages: settings that make a host quick to boot and unable to get
    out."""
    for old in ("etc/apt/sources.list", "etc/machine-id"):
        (root / old).unlink(missing_ok=True)
    for key in (root / "etc/ssh").glob("ssh_host_*"):
        key.unlink()
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(text)
    for unit in masked:
        mask = root / "etc/systemd/system" / unit
        mask.unlink(missing_ok=True)
        mask.symlink_to("/dev/null")
    (root / PACKAGES_ON_HOST.lstrip("/")).mkdir(parents=True, exist_ok=True)
    (root / "var/log/journal").mkdir(exist_ok=True)
    if (root / "etc/libvirt").is_dir():
        _customise_libvirt(root / "etc/libvirt")


def _customise_libvirt(directory: Path) -> None:
    for name, line in {
        # This kernel has no AppArmor; QEMU stays libvirt's unprivileged user with dynamic ownership, as by
        # default.
        "qemu.conf": 'security_driver = "none"',
        # All hosts see the same machine's firmware: without this they share one identity and libvirt refuses
        # to migrate "to the same host".
        "libvirtd.conf": 'host_uuid_source = "machine-id"',
        # What guests tell through a port goes into a file that the logging daemon must not cut up.
        "virtlogd.conf": "max_size = 0",
    }.items():
        with (directory / name).open("a") as file:
            file.write(f"\n# set by the lab\n{line}\n")
    shutil.rmtree(directory / "qemu/networks/autostart", ignore_errors=True)
    # The pool that virt-install makes on an ordinary host; plain `virsh migrate` creates images through it.
    pool = directory / "storage/default.xml"
    (pool.parent / "autostart").mkdir(parents=True, exist_ok=True)
    pool.write_text(
        "<pool type='dir'><name>default</name><target><path>/var/lib/libvirt/images</path></target></pool>\n"
    )
    (pool.parent / "autostart/default.xml").symlink_to("/etc/libvirt/storage/default.xml")


def cached(kind: str, recipe: object, needed_mib: int, build: Callable[[Path], None]) -> Path:
    """The directory made by `build` for this recipe, from the cache if it is there.

    Raises LabError when the disk is too full to try; a build that fails leaves nothing.
    """
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    final = CACHE / f"{kind}-{digest}"
    if final.is_dir():
        return final
    with _only_builder():
        if final.is_dir():
            return final
        for abandoned in CACHE.glob(f".{kind}-*"):
            shutil.rmtree(abandoned)
        free_mib = shutil.disk_usage(CACHE).free >> 20
        if free_mib < needed_mib:
            raise LabError(
                f"{CACHE}: {needed_mib} MiB needed for the image {kind}, {free_mib} MiB free; free space "
                "or mount a larger file system there"
            )
        target = Path(tempfile.mkdtemp(prefix=f".{kind}-", dir=CACHE))
        try:
            target.chmod(0o755)
            build(target)
            target.rename(final)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
    return final


def remove_unused(used: set[Path]) -> list[Path]:
    """Delete cached images except these; they are built again when needed. Returns what went."""
    if not CACHE.is_dir():
        return []
    with _only_builder():
        gone = [path for path in sorted(CACHE.iterdir()) if path.is_dir() and path not in used]
        for path in gone:
            shutil.rmtree(path)
    return gone


@contextmanager
def _only_builder() -> Iterator[None]:
    """One build at a time on the machine: two would only fetch the same packages twice."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
