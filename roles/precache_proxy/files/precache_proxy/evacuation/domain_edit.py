# SPDX-License-Identifier: GPL-3.0-or-later
"""The definition as the destination needs it: same machine, disks at other places."""

from __future__ import annotations

from collections.abc import Mapping

from lxml import etree

from precache_proxy.hypervisor.domain_xml import parse_element

# Of this host's run time, not of the machine: the destination finds its own.
_HOST_ONLY = ("backingStore", "mirror")


def destination_xml(xml: str, overlays: Mapping[str, str], media: Mapping[str, str] | None = None) -> str:
    """``xml`` with each disk of ``overlays`` (target name -> path) as a qcow2 file at its new place.

    ``media``: the same for drives, whose images are plain there.
    ``<backingStore>`` goes away: libvirt at the destination reads the chain from the overlay itself, and the
    source's
    chain would be wrong there. Everything that the guest can see stays as it is, or libvirt refuses.
    """
    root = parse_element(xml)
    for disk in root.iterfind("devices/disk"):
        target = disk.find("target")
        key = "" if target is None else target.get("dev", "")
        if key in overlays:
            path, image_format = overlays[key], "qcow2"
        elif key in (media or {}):
            path, image_format = (media or {})[key], "raw"
        else:
            continue
        for tag in _HOST_ONLY:
            for element in disk.findall(tag):
                disk.remove(element)
        disk.set("type", "file")
        driver = disk.find("driver")
        if driver is None:
            driver = etree.SubElement(disk, "driver", {"name": "qemu"})
        driver.set("type", image_format)
        _point_source(disk, path)
    return etree.tostring(root, encoding="unicode")


def _point_source(disk: etree._Element, path: str) -> None:
    source = disk.find("source")
    if source is None:
        source = etree.SubElement(disk, "source")
    startup_policy = source.get("startupPolicy")
    tail = source.tail
    source.clear()
    source.tail = tail
    source.set("file", path)
    if startup_policy is not None:
        source.set("startupPolicy", startup_policy)


def replaced_paths(xml: str, paths: Mapping[str, tuple[str, str]]) -> str:
    """``xml`` with each disk of ``paths`` (target -> path, format) at that place, for a definition of this
    host."""
    root = parse_element(xml)
    for disk in root.iterfind("devices/disk"):
        target = disk.find("target")
        key = "" if target is None else target.get("dev", "")
        if key not in paths:
            continue
        path, image_format = paths[key]
        for element in disk.findall("backingStore"):
            disk.remove(element)
        driver = disk.find("driver")
        if driver is not None:
            driver.set("type", image_format)
        _point_source(disk, path)
    return etree.tostring(root, encoding="unicode")
