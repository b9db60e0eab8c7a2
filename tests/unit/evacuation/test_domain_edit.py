# SPDX-License-Identifier: GPL-3.0-or-later
"""The destination's definition: disks elsewhere, everything that the guest sees as it was."""

from __future__ import annotations

from lxml import etree

from precache_proxy.evacuation.domain_edit import destination_xml, replaced_paths

XML = """<domain type='kvm'><name>web</name><uuid>11111111-2222-4333-8444-555555555501</uuid>
<devices>
  <disk type='block' device='disk'><driver name='qemu' type='raw' cache='none'/>
    <source dev='/dev/vg/web' index='3'><seclabel model='dac' relabel='no'/></source>
    <backingStore type='file'><format type='qcow2'/><source file='/a'/></backingStore>
    <mirror type='file' job='copy'/>
    <target dev='vda' bus='virtio'/><serial>S1</serial><address type='pci' slot='0x03'/></disk>
  <disk type='file' device='cdrom'><driver name='qemu' type='raw'/>
    <source file='/iso/x.iso' startupPolicy='optional'/><target dev='sda' bus='sata'/><readonly/></disk>
</devices></domain>"""


def test_a_disk_is_a_qcow2_file_at_its_new_place_and_the_same_to_the_guest() -> None:
    root = etree.fromstring(destination_xml(XML, {"vda": "/d/ä b.qcow2"}))
    disk = root.find("devices/disk[@device='disk']")
    assert disk is not None
    assert disk.get("type") == "file"
    source, driver = disk.find("source"), disk.find("driver")
    assert source is not None
    assert source.items() == [("file", "/d/ä b.qcow2")]
    assert len(source) == 0
    assert driver is not None
    assert sorted(driver.items()) == [("cache", "none"), ("name", "qemu"), ("type", "qcow2")]
    assert disk.find("backingStore") is None
    assert disk.find("mirror") is None
    assert disk.findtext("serial") == "S1"
    assert disk.find("address") is not None
    assert disk.find("target").attrib == {"dev": "vda", "bus": "virtio"}  # type: ignore[union-attr]


def test_what_does_not_move_stays_as_it_is() -> None:
    before = etree.fromstring(XML).find("devices/disk[@device='cdrom']")
    after = etree.fromstring(destination_xml(XML, {"vda": "/d"})).find("devices/disk[@device='cdrom']")
    assert before is not None
    assert after is not None
    assert etree.tostring(before) == etree.tostring(after)


def test_a_definition_of_this_host_names_the_images_again() -> None:
    xml = replaced_paths(destination_xml(XML, {"vda": "/overlay"}), {"vda": ("/images/web.raw", "raw")})
    disk = etree.fromstring(xml).find("devices/disk[@device='disk']")
    assert disk is not None
    assert disk.find("source").get("file") == "/images/web.raw"  # type: ignore[union-attr]
    assert disk.find("driver").get("type") == "raw"  # type: ignore[union-attr]
