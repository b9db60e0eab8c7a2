# SPDX-License-Identifier: GPL-3.0-or-later
"""The texts that libvirt is given, and the names of checkpoints."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from precache_proxy.source.backups import backup_socket, backup_xml
from precache_proxy.source.tracker import (
    checkpoint_name,
    checkpoint_xml,
    is_of_generation,
    parse_checkpoint_name,
)


@given(st.integers(0, 10**6), st.integers(0, 10**9), st.integers(1, 1000))
def test_names_of_checkpoints_say_where_they_belong(epoch: int, generation: int, number: int) -> None:
    name = checkpoint_name(epoch, generation, number)
    assert parse_checkpoint_name(name) == (epoch, generation, number)
    assert is_of_generation(name, epoch, generation)
    assert not is_of_generation(name, epoch, generation + 1)


def test_checkpoints_of_others_are_not_ours() -> None:
    for name in ("backup-1", "lifeboat", "lifeboat-e1", "lifeboat-e1-g2-x", "my-lifeboat-e1-g2"):
        assert parse_checkpoint_name(name) is None


def test_a_backup_names_every_disk() -> None:
    xml = backup_xml(
        Path("/run/a b/ü.sock"),
        {"vda": Path("/scratch/a&b.vda"), "vdb": Path("/scratch/vdb")},
        {"vda": "lifeboat-e0-g3"},
        ["sda"],
    )
    assert backup_socket(xml) == "/run/a b/ü.sock"
    root = etree.fromstring(xml)
    assert root.get("mode") == "pull"
    disks = {disk.get("name"): disk for disk in root.findall("disks/disk")}
    assert disks["vda"].get("incremental") == "lifeboat-e0-g3"
    assert disks["vda"].get("exportbitmap") == "dirty"
    scratch = disks["vda"].find("scratch")
    assert scratch is not None
    assert scratch.get("file") == "/scratch/a&b.vda"
    assert (disks["vdb"].get("backupmode"), disks["vdb"].get("exportbitmap")) == ("full", None)
    assert disks["sda"].get("backup") == "no"


def test_a_checkpoint_covers_some_disks_and_leaves_others_out() -> None:
    root = etree.fromstring(checkpoint_xml("lifeboat-e0-g1", ["vda"], ["sda"]))
    disks = {disk.get("name"): disk.get("checkpoint") for disk in root.findall("disks/disk")}
    assert disks == {"vda": "bitmap", "sda": "no"}
    assert root.findtext("name") == "lifeboat-e0-g1"
