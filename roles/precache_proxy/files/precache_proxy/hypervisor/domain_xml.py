# SPDX-License-Identifier: GPL-3.0-or-later
"""What a libvirt domain definition says, as far as protection and evacuation need it.

Parsing never fails on elements it does not know: libvirt adds some with every release. Only a text that is
no domain definition at all is an error. Format: https://libvirt.org/formatdomain.html
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from lxml import etree

from precache_proxy.errors import InvalidInput
from precache_proxy.units import KIB

# libvirt's scaled integers: https://libvirt.org/formatdomain.html#memory-allocation
_MEMORY_UNITS = {
    "b": 1, "bytes": 1, "kb": 10**3, "k": KIB, "kib": KIB, "mb": 10**6, "m": KIB**2, "mib": KIB**2,
    "gb": 10**9, "g": KIB**3, "gib": KIB**3, "tb": 10**12, "t": KIB**4, "tib": KIB**4,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Image:
    """One layer of a disk: ``kind`` is libvirt's source type (file, block, volume, network, nvme, ...)."""

    kind: str
    path: str
    format: str
    # network sources: the protocol (rbd, nbd, iscsi, ...); volumes: "pool/volume"
    location: str = ""


@dataclass(frozen=True, slots=True)
class Disk:
    """A ``<disk>``. ``path`` and ``format`` are those of the active layer, "" where there is none."""

    target: str
    device: str
    bus: str
    image: Image
    backing: tuple[Image, ...] = ()
    readonly: bool = False
    shareable: bool = False
    transient: bool = False
    serial: str = ""
    alias: str = ""
    # the name of QEMU's block job on it right now ("mirror job with state ready" as "copy"), or ""
    mirror: str = ""

    @property
    def path(self) -> str:
        """Path of the active layer; "" for an empty drive or a network disk."""
        return self.image.path

    @property
    def format(self) -> str:
        """Format of the active layer as libvirt was told (qcow2, raw, ...)."""
        return self.image.format

    @property
    def is_writable_disk(self) -> bool:
        """A hard disk that the guest can change and that is its own."""
        return (
            self.device in {"disk", "lun"} and not self.readonly and not self.shareable and not self.transient
        )


@dataclass(frozen=True, slots=True)
class Interface:
    """An ``<interface>``; ``source`` is the network's, bridge's or device's name."""

    kind: str
    source: str
    mac: str
    model: str = ""
    target: str = ""


@dataclass(frozen=True, slots=True)
class Nvram:
    """The UEFI variable store of a VM."""

    path: str
    format: str = "raw"
    template: str = ""


@dataclass(frozen=True, slots=True)
class Tpm:
    """An emulated TPM (``kind`` "emulator"), whose state is a directory, or a passed-through one."""

    kind: str
    version: str = ""
    state_path: str = ""


@dataclass(frozen=True, slots=True)
class HostDevice:
    """Something of this host that cannot go along, in words (``pci 0000:03:00.0``)."""

    kind: str
    description: str


@dataclass(frozen=True)
class Definition:
    """A domain definition. ``xml`` is the text it was read from."""

    uuid: str
    name: str
    disks: tuple[Disk, ...]
    nvram: Nvram | None
    tpm: Tpm | None
    hostdevs: tuple[HostDevice, ...]
    filesystems: tuple[str, ...]
    interfaces: tuple[Interface, ...]
    memory_bytes: int
    vcpus: int
    machine: str
    arch: str
    cpu: str
    type: str
    xml: str = field(repr=False)
    # not part of the XML: what libvirt says beside it
    autostart: bool = False
    # libvirt's numeric id as text while it runs, "" when shut off
    running_id: str = ""
    kernel_files: tuple[str, ...] = ()
    # the firmware's file, "" where QEMU takes its own
    loader: str = ""

    def disk(self, target: str) -> Disk | None:
        """The disk with this target name, or None."""
        return next((disk for disk in self.disks if disk.target == target), None)

    def with_autostart(self, autostart: bool) -> Definition:
        """The same with what libvirt says of autostart."""
        return replace(self, autostart=autostart)


def parse_element(xml: str) -> etree._Element:
    """The root element; entities and network access stay off, for some XML comes from the peer."""
    parser = etree.XMLParser(
        resolve_entities=False, no_network=True, remove_blank_text=False, huge_tree=False
    )
    try:
        root = etree.fromstring(xml.encode(), parser)
    except etree.XMLSyntaxError as error:
        raise InvalidInput(
            f"domain definition: not XML ({error}); give what `virsh dumpxml` prints"
        ) from error
    if root is None or root.tag != "domain":
        tag = "nothing" if root is None else f"<{root.tag}>"
        raise InvalidInput(f"domain definition: {tag} instead of <domain>; give what `virsh dumpxml` prints")
    return root


def _text(element: etree._Element | None, path: str, default: str = "") -> str:
    if element is None:
        return default
    found = element.findtext(path)
    return found.strip() if found is not None else default


def _attribute(element: etree._Element | None, path: str, name: str, default: str = "") -> str:
    if element is None:
        return default
    found = element if path == "." else element.find(path)
    return default if found is None else str(found.get(name, default))


def _elements(root: etree._Element, path: str) -> Iterator[etree._Element]:
    yield from root.findall(path)


def parse_memory(text: str, unit: str) -> int:
    """A ``<memory unit='KiB'>`` in bytes; KiB where no unit is given. 0 where it is no number."""
    try:
        return int(float(text)) * _MEMORY_UNITS.get(unit.lower() or "kib", KIB)
    except ValueError:
        return 0


def _source_image(kind: str, source: etree._Element | None, image_format: str) -> Image:
    """The layer that a ``<source>`` of a disk or a backing store names."""
    if source is None:
        return Image(kind, "", image_format)
    if kind == "network":
        name = source.get("name", "")
        return Image(kind, "", image_format, f"{source.get('protocol', '?')}:{name}")
    if kind == "volume":
        return Image(kind, "", image_format, f"{source.get('pool', '')}/{source.get('volume', '')}")
    path = source.get("file") or source.get("dev") or source.get("dir") or source.get("path") or ""
    return Image(kind, path, image_format)


def _backing_chain(disk: etree._Element) -> tuple[Image, ...]:
    chain: list[Image] = []
    backing = disk.find("backingStore")
    while backing is not None and backing.get("type") is not None:
        image_format = _attribute(backing, "format", "type", "raw")
        chain.append(_source_image(backing.get("type", "file"), backing.find("source"), image_format))
        backing = backing.find("backingStore")
    return tuple(chain)


def _parse_disk(element: etree._Element) -> Disk:
    return Disk(
        target=_attribute(element, "target", "dev"),
        device=element.get("device", "disk"),
        bus=_attribute(element, "target", "bus"),
        image=_source_image(
            element.get("type", "file"), element.find("source"), _attribute(element, "driver", "type", "raw")
        ),
        backing=_backing_chain(element),
        readonly=element.find("readonly") is not None,
        shareable=element.find("shareable") is not None,
        transient=element.find("transient") is not None,
        serial=_text(element, "serial"),
        alias=_attribute(element, "alias", "name"),
        mirror="" if element.find("mirror") is None else _attribute(element, "mirror", "job", "copy"),
    )


def _parse_interface(element: etree._Element) -> Interface:
    source = element.find("source")
    name = ""
    if source is not None:
        name = next(
            (source.get(key, "") for key in ("network", "bridge", "dev", "path", "name") if source.get(key)),
            "",
        )
    return Interface(
        kind=element.get("type", ""),
        source=name,
        mac=_attribute(element, "mac", "address").lower(),
        model=_attribute(element, "model", "type"),
        target=_attribute(element, "target", "dev"),
    )


def _parse_nvram(root: etree._Element) -> Nvram | None:
    element = root.find("os/nvram")
    if element is None:
        return None
    path = _attribute(element, "source", "file") or (element.text or "").strip()
    return Nvram(path, element.get("format", "raw"), element.get("template", ""))


def _parse_tpm(root: etree._Element, uuid: str) -> Tpm | None:
    backend = root.find("devices/tpm/backend")
    if backend is None:
        return None
    kind = backend.get("type", "")
    if kind != "emulator":
        return Tpm(kind, backend.get("version", ""))
    version = backend.get("version", "2.0")
    # libvirt's default place; a <source> says another (since libvirt 10.10)
    default = Path("/var/lib/libvirt/swtpm") / uuid / ("tpm1.2" if version == "1.2" else "tpm2")
    return Tpm(kind, version, _attribute(backend, "source", "path") or str(default))


def _parse_host_devices(root: etree._Element) -> Iterator[HostDevice]:
    for element in _elements(root, "devices/hostdev"):
        kind = element.get("type", element.get("mode", "device"))
        address = element.find("source/address")
        words = [] if address is None else [f"{key!s}={value!s}" for key, value in address.items()]
        yield HostDevice(kind, " ".join([kind, *sorted(words)]))
    for element in _elements(root, "devices/interface"):
        if element.get("type") in {"hostdev", "vdpa"}:
            mac = _attribute(element, "mac", "address")
            yield HostDevice("interface", f"interface {mac} of type {element.get('type')}")


def parse_definition(xml: str, *, autostart: bool = False) -> Definition:
    """Read a domain definition. Raises InvalidInput where the text is none."""
    root = parse_element(xml)
    uuid = _text(root, "uuid")
    name = _text(root, "name")
    if not name:
        raise InvalidInput("domain definition: it has no <name>; give what `virsh dumpxml` prints")
    memory = root.find("memory")
    operating_system = root.find("os")
    cpu = root.find("cpu")
    vcpus = _text(root, "vcpu", "1")
    return Definition(
        uuid=uuid,
        name=name,
        disks=tuple(_parse_disk(element) for element in _elements(root, "devices/disk")),
        nvram=_parse_nvram(root),
        tpm=_parse_tpm(root, uuid),
        hostdevs=tuple(_parse_host_devices(root)),
        filesystems=tuple(
            f"{_attribute(element, 'source', 'dir') or _attribute(element, 'source', 'socket') or '?'} as "
            f"{_attribute(element, 'target', 'dir') or '?'}"
            for element in _elements(root, "devices/filesystem")
        ),
        interfaces=tuple(_parse_interface(element) for element in _elements(root, "devices/interface")),
        memory_bytes=0
        if memory is None
        else parse_memory((memory.text or "").strip(), memory.get("unit", "KiB")),
        vcpus=int(vcpus) if vcpus.isdigit() else 1,
        machine=_attribute(operating_system, "type", "machine"),
        arch=_attribute(operating_system, "type", "arch"),
        cpu=_text(cpu, "model") or ("" if cpu is None else cpu.get("mode", "")),
        type=root.get("type", ""),
        xml=xml,
        autostart=autostart,
        running_id=root.get("id", ""),
        loader=_text(operating_system, "loader"),
        kernel_files=tuple(
            path for path in (_text(operating_system, tag) for tag in ("kernel", "initrd", "dtb")) if path
        ),
    )
