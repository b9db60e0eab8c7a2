# SPDX-License-Identifier: GPL-3.0-or-later
"""The roles on a host with nothing on it: no libvirt, no QEMU, no Python bindings, only a package source."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from integration.lab_host import lab_host, proxy_status
from integration.playbook_runner import ROOT, PlaybookResult, run_playbook
from lifeboat_lab.lab import Lab
from lifeboat_lab.settings import Settings

pytestmark = [pytest.mark.lab, pytest.mark.timeout(2400)]

PLAY = [
    {
        "name": "Set a bare host up",
        "hosts": "bare1",
        "gather_facts": False,
        "vars": {
            "precache_proxy_site": "home",
            "precache_proxy_peers": [{"name": "backup1", "address": "2001:db8:2::b"}],
        },
        "roles": [{"role": "lifeboat.evacuation.pki"}, {"role": "lifeboat.evacuation.precache_proxy"}],
    }
]


@pytest.fixture(scope="module")
def bare_lab() -> Iterator[Lab]:
    """A lab of its own with the bare host alone."""
    common = Settings.from_environment()
    lab = Lab(replace(common, name=f"{common.name[:15]}-bare", hosts=("bare1",)), say=print)
    lab.up(owner=os.getpid())
    yield lab
    lab.down()


def test_missing_packages_are_told_then_installed_then_left_alone(
    bare_lab: Lab, tmp_path_factory: pytest.TempPathFactory
) -> None:
    host = lab_host(bare_lab, "bare1")
    assert host.run("command -v virsh qemu-img").rc != 0
    work = tmp_path_factory.mktemp("bare")

    def play(*, check: bool = False) -> PlaybookResult:
        return run_playbook(
            PLAY,
            ROOT / "inventories" / "lab",
            work,
            variables={"pki_ca_directory": str(work / "pki")},
            check=check,
            wrap=lambda command: bare_lab.command("controller", command),
            environment={"LIFEBOAT_LAB": bare_lab.settings.name},
        )

    dry = play(check=True).require_success()
    assert any("Tell which packages would be installed" in task for task in dry.changed_tasks)
    assert host.run("command -v virsh qemu-img").rc != 0
    assert not host.file("/etc/lifeboat").exists

    play().require_success()
    for package in (
        "libvirt-daemon-system",
        "qemu-system-x86",
        "python3-libnbd",
        "python3-aiohttp",
        "ovmf",
        "swtpm-tools",
    ):
        assert host.package(package).is_installed
    assert host.service("precache-proxy").is_running
    assert proxy_status(host)["name"] == "bare1"

    assert play().require_success().changed_tasks == []
