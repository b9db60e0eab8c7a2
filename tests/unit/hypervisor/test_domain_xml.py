# SPDX-License-Identifier: GPL-3.0-or-later
"""Reading definitions: what protection looks at, and odd texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precache_proxy.errors import InvalidInput
from precache_proxy.hypervisor.domain_xml import parse_definition, parse_memory

FULL = """
<domain type='qemu' id='3' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>Müller &amp; Söhne 1</name>
  <uuid>6695eb01-f6a4-8304-79aa-97f2502e193f</uuid>
  <!-- a comment, as people leave them -->
  <memory unit='MiB'>256</memory>
  <vcpu placement='static'>2</vcpu>
  <os>
    <type arch='x86_64' machine='pc-q35-10.0'>hvm</type>
    <kernel>/srv/vmlinuz</kernel>
    <loader readonly='yes' type='pflash'>/usr/share/OVMF/CODE.fd</loader>
    <nvram template='/usr/share/OVMF/VARS.fd' format='raw'>/var/lib/libvirt/qemu/nvram/m_VARS.fd</nvram>
  </os>
  <cpu mode='custom' match='exact'><model fallback='forbid'>qemu64</model></cpu>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none'/>
      <source file='/images/a b.qcow2' index='2'/>
      <backingStore type='file' index='3'>
        <format type='raw'/>
        <source file='/images/base.raw'/>
        <backingStore/>
      </backingStore>
      <target dev='vda' bus='virtio'/>
      <serial>root</serial>
      <alias name='virtio-disk0'/>
    </disk>
    <disk type='file' device='cdrom'>
      <driver name='qemu' type='raw'/>
      <source file='/images/seed.iso'/>
      <target dev='sda' bus='sata'/>
      <readonly/>
    </disk>
    <disk type='file' device='cdrom'><target dev='sdb' bus='sata'/><readonly/></disk>
    <disk type='network' device='disk'>
      <driver name='qemu' type='raw'/>
      <source protocol='rbd' name='pool/image'><host name='mon1'/></source>
      <target dev='vdb' bus='virtio'/>
    </disk>
    <disk type='block' device='disk'>
      <driver name='qemu' type='raw'/>
      <source dev='/dev/vg/shared'/>
      <target dev='vdc' bus='virtio'/>
      <shareable/>
    </disk>
    <disk type='volume' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source pool='default' volume='v.qcow2'/>
      <target dev='vdd' bus='virtio'/>
    </disk>
    <interface type='bridge'>
      <mac address='52:54:00:AA:BB:CC'/><source bridge='br-lan'/><model type='virtio'/><target dev='vnet0'/>
    </interface>
    <hostdev mode='subsystem' type='pci'>
      <source><address domain='0x0000' bus='0x03' slot='0x00' function='0x0'/></source>
    </hostdev>
    <filesystem type='mount'><source dir='/srv/share'/><target dir='share'/></filesystem>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
  </devices>
  <qemu:commandline><qemu:arg value='-nodefaults'/></qemu:commandline>
</domain>
"""


def test_everything_that_protection_looks_at_is_read() -> None:
    definition = parse_definition(FULL, autostart=True)
    assert definition.name == "Müller & Söhne 1"
    assert definition.memory_bytes == 256 * 1024**2
    assert (definition.vcpus, definition.machine, definition.arch) == (2, "pc-q35-10.0", "x86_64")
    assert (definition.cpu, definition.type, definition.running_id) == ("qemu64", "qemu", "3")
    assert definition.autostart
    assert definition.kernel_files == ("/srv/vmlinuz",)
    assert definition.nvram is not None
    assert definition.nvram.path == "/var/lib/libvirt/qemu/nvram/m_VARS.fd"
    assert definition.loader == "/usr/share/OVMF/CODE.fd"
    assert definition.tpm is not None
    assert definition.tpm.state_path == "/var/lib/libvirt/swtpm/6695eb01-f6a4-8304-79aa-97f2502e193f/tpm2"
    assert [device.kind for device in definition.hostdevs] == ["pci"]
    assert "bus=0x03" in definition.hostdevs[0].description
    assert definition.filesystems == ("/srv/share as share",)
    assert definition.interfaces[0].mac == "52:54:00:aa:bb:cc"
    assert definition.interfaces[0].source == "br-lan"


def test_disks_with_chain_network_block_and_volume() -> None:
    definition = parse_definition(FULL)
    vda = definition.disk("vda")
    assert vda is not None
    assert (vda.path, vda.format, vda.serial, vda.alias) == (
        "/images/a b.qcow2",
        "qcow2",
        "root",
        "virtio-disk0",
    )
    assert [(image.path, image.format) for image in vda.backing] == [("/images/base.raw", "raw")]
    assert vda.is_writable_disk
    by_target = {disk.target: disk for disk in definition.disks}
    assert by_target["sda"].device == "cdrom"
    assert not by_target["sda"].is_writable_disk
    assert by_target["sdb"].path == ""
    assert (by_target["vdb"].image.kind, by_target["vdb"].image.location) == ("network", "rbd:pool/image")
    assert by_target["vdc"].path == "/dev/vg/shared"
    assert by_target["vdc"].shareable
    assert by_target["vdd"].image.location == "default/v.qcow2"
    assert definition.disk("vdz") is None


def test_a_bare_definition_has_defaults() -> None:
    definition = parse_definition("<domain><name>n</name></domain>")
    assert (definition.disks, definition.nvram, definition.tpm) == ((), None, None)
    assert (definition.memory_bytes, definition.vcpus, definition.uuid) == (0, 1, "")


@pytest.mark.parametrize("text", ["", "no xml", "<network/>", "<domain/>", "<domain><name/></domain>"])
def test_what_is_no_definition_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(InvalidInput, match="domain definition"):
        parse_definition(text)


def test_entities_are_not_expanded() -> None:
    text = "<!DOCTYPE d [<!ENTITY e SYSTEM 'file:///etc/passwd'>]><domain><name>n</name><uuid>&e;</uuid></domain>"
    assert "root" not in parse_definition(text).uuid


@given(st.integers(0, 2**40), st.sampled_from(["KiB", "k", "", "MiB", "bytes", "GB"]))
def test_memory_has_a_unit(number: int, unit: str) -> None:
    factor = {"KiB": 1024, "k": 1024, "": 1024, "MiB": 1024**2, "bytes": 1, "GB": 10**9}[unit]
    assert parse_memory(str(number), unit) == number * factor
