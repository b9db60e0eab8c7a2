# SPDX-License-Identifier: GPL-3.0-or-later
"""What a guest is like, and its domain XML."""

import hashlib
import uuid
from dataclasses import dataclass, field
from xml.sax.saxutils import escape, quoteattr

from lifeboat_lab.errors import LabError
from lifeboat_lab.settings import CLIENT_ADDRESS

BOOT_DIRECTORY = "/var/lib/libvirt/lab-guest"
RECORDS_DIRECTORY = f"{BOOT_DIRECTORY}/records"
WORKLOADS = ("idle", "fsync-log", "dirty-ram", "page-cache", "file-tree", "database")
# Smallest memory and first disk of each system, in MiB.
SYSTEMS = {"tiny": (64, 16), "debian": (256, 700)}
BUSES = {"virtio": "vd", "scsi": "sd", "sata": "sd"}
BUS_MODULES = {"virtio": ("virtio_blk",), "scsi": ("virtio_scsi", "sd_mod"), "sata": ("ahci", "sd_mod")}
CDROM_MODULES = ("ahci", "sr_mod", "isofs")
MOST_DISKS = 4


@dataclass(frozen=True)
class GuestPlan:
    """A guest before there is one. Sizes in MiB; `workload` is one of WORKLOADS or several joined by
    commas."""

    name: str
    system: str = "tiny"
    workload: str = "fsync-log"
    ram_mib: int = 128
    virtual_processors: int = 1
    disk_mib: int = 256
    disks: int = 1
    disk_format: str = "qcow2"
    disk_directory: str = "/var/lib/libvirt/images"
    bus: str = "virtio"
    content_mib: int = 32
    canary_mib: int = 4
    heartbeat_milliseconds: int = 20
    records_per_second: int = 20
    dirty_mib_per_second: int = 10
    dirty_mib: int = 32
    files_per_second: int = 100
    accelerator: str = "auto"
    firmware: str = "bios"
    tpm: bool = False
    cdrom: bool = False
    uuid: str = field(default_factory=lambda: str(uuid.uuid4()))

    def __post_init__(self) -> None:
        findings = []
        unknown = [word for word in self.workload.split(",") if word not in WORKLOADS]
        if unknown:
            findings.append(f"workload {', '.join(unknown)} is not known; use some of {', '.join(WORKLOADS)}")
        if not 1 <= self.disks <= MOST_DISKS:
            findings.append(f"{self.disks} disks: must be 1 to {MOST_DISKS}")
        if self.bus not in BUSES:
            findings.append(f"bus {self.bus} is not known; use one of {', '.join(BUSES)}")
        if self.accelerator not in {"auto", "qemu", "kvm"}:
            findings.append(f"accelerator {self.accelerator} is not known; use auto, qemu or kvm")
        if self.firmware not in {"bios", "uefi"}:
            findings.append(f"firmware {self.firmware} is not known; use bios or uefi")
        if self.disk_format not in {"qcow2", "raw"}:
            findings.append(f"disk format {self.disk_format} is not known; use qcow2 or raw")
        if self.system not in SYSTEMS:
            findings.append(f"system {self.system} is not known; use one of {', '.join(SYSTEMS)}")
        else:
            ram_mib, disk_mib = SYSTEMS[self.system]
            if self.ram_mib < ram_mib:
                findings.append(f"{self.ram_mib} MiB of memory: {self.system} needs {ram_mib}")
            if self.disk_mib < disk_mib + self.content_mib * 1.1:
                findings.append(
                    f"disk of {self.disk_mib} MiB: too small for {self.system} and {self.content_mib} MiB of "
                    "content"
                )
            if "database" in self.workload.split(",") and self.system != "debian":
                findings.append("workload database: only in a guest with the system debian")
        if not self.name or "/" in self.name:
            findings.append("the name must not be empty nor hold a slash")
        if findings:
            raise LabError(f"guest {self.name}: " + "; ".join(findings))

    @property
    def tag(self) -> str:
        """The guest's name for itself: plain ASCII, whatever the domain is called."""
        return f"g{self.uuid[:8]}"

    @property
    def targets(self) -> list[str]:
        """Target names of the disks in the domain: vda, vdb, ..."""
        return [f"{BUSES[self.bus]}{letter}" for letter in "abcd"[: self.disks]]

    def disk_path(self, target: str) -> str:
        """Image of one disk on its host."""
        return f"{self.disk_directory}/{self.name}-{target}.{self.disk_format}"

    @property
    def cdrom_path(self) -> str:
        """Image of the CD-ROM on its host."""
        return f"{self.disk_directory}/{self.name}.iso"

    @property
    def record_path(self) -> str:
        """The file that the guest writes what happened to; the same path on every host."""
        return f"{RECORDS_DIRECTORY}/{self.tag}.log"

    def mac_address(self) -> str:
        """A MAC address of its own for the guest's network card."""
        digest = hashlib.sha256(self.uuid.encode()).digest()
        return "52:54:00:" + ":".join(f"{byte:02x}" for byte in digest[:3])

    def command_line(self, address: str) -> str:
        """The kernel's command line, which is also the agent's settings."""
        settings = {
            "tag": self.tag,
            "system": self.system,
            "address": address,
            "collector": CLIENT_ADDRESS,
            "disks": self.disks,
            "modules": ",".join(
                ["virtio_net", *BUS_MODULES[self.bus], *(CDROM_MODULES if self.cdrom else ())]
            ),
            "workload": self.workload,
            "canary_mib": self.canary_mib,
            "heartbeat_milliseconds": self.heartbeat_milliseconds,
            "records_per_second": self.records_per_second,
            "dirty_mib_per_second": self.dirty_mib_per_second,
            "dirty_mib": self.dirty_mib,
            "files_per_second": self.files_per_second,
        }
        return "console=ttyS0 quiet panic=-1 " + " ".join(
            f"lab.{key}={value}" for key, value in settings.items()
        )

    def domain_xml(self, address: str, accelerator: str) -> str:
        """The domain as libvirt is told; `address` is the guest's own, `accelerator` qemu or kvm."""
        disks = "".join(self._disk_xml(target) for target in self.targets)
        if self.bus == "scsi":
            disks += "<controller type='scsi' model='virtio-scsi'/>"
        if self.cdrom:
            disks += (
                "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/>"
                f"<source file={quoteattr(self.cdrom_path)}/><target dev='sdz' bus='sata'/><readonly/></disk>"
            )
        # UEFI reads a kernel given by the command line as well as the BIOS does.
        uefi = self.firmware == "uefi"
        return f"""<domain type={quoteattr(accelerator)}>
  <name>{escape(self.name)}</name>
  <uuid>{self.uuid}</uuid>
  <memory unit='MiB'>{self.ram_mib}</memory>
  <vcpu>{self.virtual_processors}</vcpu>
  <os{" firmware='efi'" if uefi else ""}>
    <type arch='x86_64' machine='q35'>hvm</type>
    {"<firmware><feature enabled='no' name='secure-boot'/></firmware>" if uefi else ""}
    <kernel>{BOOT_DIRECTORY}/vmlinuz</kernel>
    <initrd>{BOOT_DIRECTORY}/initrd.img</initrd>
    <cmdline>{escape(self.command_line(address))}</cmdline>
  </os>
  <features><acpi/></features>
  <clock offset='utc'/>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    {disks}
    <interface type='bridge'>
      <mac address='{self.mac_address()}'/><source bridge='vmbr0'/><model type='virtio'/>
    </interface>
    <serial type='pty'><target port='0'/></serial>
    <channel type='file'>
      <source path='{self.record_path}' append='on'/><target type='virtio' name='lifeboat.record'/>
    </channel>
    <channel type='unix'><source mode='bind'/><target type='virtio' name='lifeboat.control'/></channel>
    {"<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>" if self.tpm else ""}
  </devices>
</domain>
"""

    def _disk_xml(self, target: str) -> str:
        path = quoteattr(self.disk_path(target))
        return (
            f"<disk type='file' device='disk'><driver name='qemu' type='{self.disk_format}' cache='none' "
            f"discard='unmap'/><source file={path}/><target dev='{target}' bus='{self.bus}'/></disk>"
        )
