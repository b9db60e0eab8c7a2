# SPDX-License-Identifier: GPL-3.0-or-later
"""Which disks go along, and every reason why a VM cannot be protected."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from precache_proxy.errors import InvalidInput, Unsupported
from precache_proxy.hypervisor.domain_xml import Definition, parse_definition
from precache_proxy.source.attachments import attachment_files, changed_attachments, read_attachments
from precache_proxy.source.layout import (
    device_findings,
    disk_findings,
    plan_layout,
    qcow2_version,
    raise_findings,
)


def domain(*devices: str, operating_system: str = "") -> Definition:
    return parse_definition(
        f"<domain><name>web</name><uuid>6695eb01-f6a4-8304-79aa-97f2502e193f</uuid><os>{operating_system}</os>"
        f"<devices>{''.join(devices)}</devices></domain>"
    )


def disk(
    target: str,
    source: str,
    *,
    kind: str = "file",
    image: str = "qcow2",
    more: str = "",
    device: str = "disk",
) -> str:
    return (
        f"<disk type='{kind}' device='{device}'><driver type='{image}'/>{source}"
        f"<target dev='{target}' bus='virtio'/>{more}</disk>"
    )


VDA = disk("vda", "<source file='/i/vda.qcow2'/>")


def facts(definition: Definition, only: list[str] | None = None, *, consent: bool = False) -> list[str]:
    return [str(finding) for finding in disk_findings(definition, only, raw_overlay_consent=consent)]


def test_tracked_static_and_absent() -> None:
    definition = domain(
        VDA,
        disk("vdb", "<source dev='/dev/vg/b'/>", kind="block"),
        disk("sda", "<source file='/i/seed.iso'/>", image="raw", more="<readonly/>", device="cdrom"),
        disk("sdb", "", image="raw", more="<readonly/>", device="cdrom"),
    )
    layout = plan_layout(definition, None)
    assert list(layout.tracked) == ["vda", "vdb"]
    assert list(layout.static) == ["sda"]
    assert layout.absent == ["sda", "sdb"]
    assert facts(definition) == []
    assert plan_layout(definition, ["vda"]).absent == ["vdb", "sda", "sdb"]


@pytest.mark.parametrize(
    ("element", "words"),
    [
        (disk("vdb", "<source file='/i/b.raw'/>", image="raw"), "it is raw"),
        (disk("vdb", "<source protocol='rbd' name='p/i'/>", kind="network"), "network storage (rbd:p/i)"),
        (disk("vdb", "<source file='/i/b'/>", more="<shareable/>"), "shared with other VMs"),
        (disk("vdb", "<source file='/i/b'/>", more="<transient/>"), "transient"),
        (disk("vdb", "<source dev='/dev/sdx'/>", kind="block", device="lun", image="raw"), "SCSI"),
        (disk("vdb", "<source file='/i/b'/>", image="vmdk"), "format vmdk"),
        (disk("vdb", "<source pool='p' volume='v'/>", kind="volume"), "volume p/v has no local path"),
        (disk("vdb", "<source type='pci'/>", kind="nvme"), "type nvme"),
        (disk("vdb", "<source file='/i/b'/>", more="<mirror job='copy'/>"), "block job (copy)"),
    ],
)
def test_what_cannot_be_protected_is_told_with_a_way_out(element: str, words: str) -> None:
    definition = domain(VDA, element)
    told = facts(definition)
    assert len(told) == 1
    assert told[0].startswith("VM web disk vdb: ")
    assert words in told[0]
    assert "; " in told[0]
    assert facts(definition, ["vda"]) == []


def test_raw_with_the_operators_word_is_no_finding() -> None:
    definition = domain(disk("vda", "<source file='/i/a.raw'/>", image="raw"))
    assert facts(definition, consent=True) == []
    assert plan_layout(definition, None).refused == ["vda"]


def test_a_disk_that_is_not_there_and_a_vm_without_disks() -> None:
    assert "it has no such disk; name some of: vda" in facts(domain(VDA), ["vdx"])[0]
    assert "no disk of its own" in facts(domain())[0]


def test_old_qcow2_is_named_with_the_command_that_helps(tmp_path: Path) -> None:
    image = tmp_path / "old.qcow2"
    image.write_bytes(b"QFI\xfb" + struct.pack(">I", 2) + bytes(500))
    assert qcow2_version(image) == 2
    assert qcow2_version(tmp_path / "none") is None
    assert f"compat=1.1 {image}" in facts(domain(disk("vda", f"<source file='{image}'/>")))[0]


def test_devices_of_this_host() -> None:
    definition = domain(
        "<hostdev mode='subsystem' type='usb'><source><address bus='1' device='3'/></source></hostdev>",
        "<filesystem><source dir='/srv'/><target dir='s'/></filesystem>",
        "<tpm><backend type='passthrough'/></tpm>",
    )
    told = " ".join(str(finding) for finding in device_findings(definition))
    for words in ("usb bus=1 device=3", "/srv as s", "passthrough"):
        assert words in told


def test_findings_become_one_error_of_their_class() -> None:
    same = device_findings(domain("<filesystem><source dir='/srv'/><target dir='s'/></filesystem>"))
    with pytest.raises(Unsupported, match=r"VM web cannot.*nothing was changed"):
        raise_findings(same, "VM web cannot be protected")
    mixed = [*same, *disk_findings(domain(VDA), ["vdx"], raw_overlay_consent=False)]
    with pytest.raises(InvalidInput) as caught:
        raise_findings(mixed, "VM web cannot be protected")
    assert len(caught.value.findings) == 2
    raise_findings([], "nothing")


def test_uefi_variables_and_tpm_state_go_along_when_they_changed(tmp_path: Path) -> None:
    nvram, tpm = tmp_path / "vars.fd", tmp_path / "tpm2"
    nvram.write_bytes(b"variables")
    (tpm / "deep").mkdir(parents=True)
    (tpm / "tpm2-00.permall").write_bytes(b"state")
    (tpm / ".lock").write_bytes(b"")
    definition = domain(
        f"<tpm><backend type='emulator' version='2.0'><source type='dir' path='{tpm}'/></backend></tpm>",
        operating_system=f"<nvram>{nvram}</nvram>",
    )
    assert attachment_files(definition) == {"nvram": nvram, "tpm/tpm2-00.permall": tpm / "tpm2-00.permall"}
    contents = read_attachments(definition)
    changed, digests = changed_attachments(contents, {})
    assert changed == {"nvram": b"variables", "tpm/tpm2-00.permall": b"state"}
    nvram.write_bytes(b"other variables")
    changed, _ = changed_attachments(read_attachments(definition), digests)
    assert changed == {"nvram": b"other variables"}
