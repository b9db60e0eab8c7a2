# SPDX-License-Identifier: GPL-3.0-or-later
"""Kernel and initial file system of the tiny guest: Debian's cloud kernel, busybox, and our agent."""

import hashlib
import lzma
import os
import re
import stat
import tempfile
import zlib
from pathlib import Path

from lifeboat_lab.errors import LabError
from lifeboat_lab.images import BARE_MASKED_UNITS, NEEDED_MIB, bootstrap_from_packages, cached
from lifeboat_lab.shell import run

SOURCES = Path(__file__).resolve().parents[2] / "guest"
# What may carry a disk, a CD-ROM or a network card; what these depend on is found in them.
MODULES = ("virtio_blk", "virtio_net", "virtio_scsi", "sd_mod", "ahci", "sr_mod", "isofs", "virtio_balloon")
# What every guest needs to find a device and to speak; Debian 13's kernel has them built in.
BASE_MODULES = ("virtio_pci", "virtio_console")
DIRECTORIES = ("bin", "sbin", "proc", "sys", "dev", "modules", "tmp")
DEBIAN_PACKAGES = ("systemd", "systemd-sysv", "dbus", "udev", "procps", "python3", "iproute2")
FLAGS = ("-static", "-O2", "-Wall", "-Wextra", "-std=gnu11")


def build(full_image: Path) -> Path:
    """Directory with `vmlinuz`, `initrd.img` and `agent`; from the cache unless a source has changed."""
    sources = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(SOURCES.rglob("*"))
        if path.is_file()
    }
    recipe = {
        "image": full_image.name,
        "sources": sources,
        "modules": (*BASE_MODULES, *MODULES),
        "flags": FLAGS,
        "steps": 2,
    }
    return cached("guest", recipe, NEEDED_MIB["guest"], lambda target: _build(full_image, target))


def build_debian(full_image: Path, suite: str) -> Path:
    """Directory with `root`: Debian with systemd, Python and SQLite, built from the hosts' packages."""
    boot = build(full_image)
    recipe = {"boot": boot.name, "packages": DEBIAN_PACKAGES, "steps": 1}
    return cached(
        "guest-debian",
        recipe,
        NEEDED_MIB["debian"],
        lambda target: _build_debian(full_image, boot, suite, target),
    )


def _build_debian(full_image: Path, boot: Path, suite: str, target: Path) -> None:
    root = target / "root"
    bootstrap_from_packages(full_image / "packages", suite, DEBIAN_PACKAGES, root)
    program = root / "usr/local/lib/lab/database"
    for source, path, mode in (
        (boot / "agent", root / "usr/local/sbin/lab-agent", 0o755),
        (SOURCES / "debian/database", program, 0o755),
        (SOURCES / "debian/lab-agent.service", root / "etc/systemd/system/lab-agent.service", 0o644),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read_bytes())
        path.chmod(mode)
    wanted = root / "etc/systemd/system/multi-user.target.wants/lab-agent.service"
    wanted.symlink_to("/etc/systemd/system/lab-agent.service")
    # The paths of the tiny guest, whose disks are mounted below /.
    (root / "disk1").symlink_to(".")
    for number in (2, 3, 4):
        (root / f"disk{number}").mkdir()
    (root / "etc/fstab").write_text("LABEL=lab1 / ext4 errors=remount-ro 0 1\n")
    (root / "etc/hostname").write_text("debian\n")
    for unit in (*BARE_MASKED_UNITS, "systemd-udev-settle.service"):
        (root / "etc/systemd/system" / unit).unlink(missing_ok=True)
        (root / "etc/systemd/system" / unit).symlink_to("/dev/null")


def _build(full_image: Path, target: Path) -> None:
    packages = sorted((full_image / "packages").glob("linux-image-6*-cloud-amd64_*.deb"))
    if not packages:
        raise LabError(f"{full_image}/packages: holds no kernel package; remove {full_image} and run again")
    with tempfile.TemporaryDirectory(dir=target) as name:
        unpacked = Path(name)
        run(["dpkg-deb", "--extract", str(packages[-1]), str(unpacked)])
        (target / "vmlinuz").write_bytes(next((unpacked / "boot").glob("vmlinuz-*")).read_bytes())
        # Debian 12's kernel has them in /lib still.
        modules = Modules(next(path for path in unpacked.glob("**/lib/modules/*") if path.is_dir()))
        agent = target / "agent"
        run(["gcc", *FLAGS, "-o", str(agent), str(SOURCES / "agent.c")])
        archive = Archive()
        for directory in DIRECTORIES:
            archive.directory(directory)
        # Before init mounts devtmpfs the kernel opens this for its output.
        archive.console("dev/console")
        archive.file("init", (SOURCES / "init").read_bytes(), executable=True)
        archive.file("bin/agent", agent.read_bytes(), executable=True)
        archive.file("bin/busybox", (full_image / "root/usr/bin/busybox").read_bytes(), executable=True)
        applets = run([str(full_image / "root/usr/bin/busybox"), "--list"]).stdout.split()
        for applet in applets:
            if applet != "busybox":
                archive.link(f"bin/{applet}", "busybox")
        for module in (*BASE_MODULES, *MODULES):
            archive.file(
                f"modules/{module}.order", "".join(f"{name}\n" for name in modules.order(module)).encode()
            )
        for module, content in modules.contents.items():
            archive.file(f"modules/{module}.ko", content)
        compressor = zlib.compressobj(6, wbits=31)
        (target / "initrd.img").write_bytes(compressor.compress(archive.finished()) + compressor.flush())
    for path in target.iterdir():
        path.chmod(0o755 if path.name == "agent" else 0o644)


class Modules:
    """The kernel's modules, decompressed, with what each needs."""

    def __init__(self, tree: Path) -> None:
        self._files = {
            re.sub(r"\.ko(\.xz)?$", "", path.name).replace("-", "_"): path
            for path in (tree / "kernel").rglob("*.ko*")
        }
        self.contents: dict[str, bytes] = {}

    def order(self, module: str) -> list[str]:
        """The module after those that it depends on; what is built into the kernel is left out."""
        path = self._files.get(module)
        if path is None:
            return []
        content = path.read_bytes()
        self.contents[module] = lzma.decompress(content) if path.suffix == ".xz" else content
        match = re.search(rb"\x00depends=([^\x00]*)\x00", self.contents[module])
        ordered: list[str] = []
        for needed in (match.group(1).decode() if match else "").split(","):
            ordered += [name for name in self.order(needed.replace("-", "_")) if name not in ordered]
        return [*ordered, module]


class Archive:
    """A cpio archive in the "newc" format that the kernel unpacks (Documentation/driver-api/early-
    userspace)."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._inode = 0

    def directory(self, name: str) -> None:
        """Add a directory."""
        self._add(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, content: bytes, *, executable: bool = False) -> None:
        """Add a file."""
        self._add(name, stat.S_IFREG | (0o755 if executable else 0o644), content)

    def link(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def console(self, name: str) -> None:
        """Add the character device 5:1."""
        self._add(name, stat.S_IFCHR | 0o600, b"", device=os.makedev(5, 1))

    def finished(self) -> bytes:
        """The whole archive with its trailer."""
        self._add("TRAILER!!!", 0, b"")
        return bytes(self._data)

    def _add(self, name: str, mode: int, content: bytes, *, device: int = 0) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, os.major(device), os.minor(device),
                  len(encoded), 0)  # fmt: skip
        for part in (b"070701" + b"".join(b"%08x" % field for field in fields) + encoded, content):
            self._data += part
            self._data += bytes(-len(self._data) % 4)
