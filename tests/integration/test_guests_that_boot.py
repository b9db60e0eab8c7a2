# SPDX-License-Identifier: GPL-3.0-or-later
"""A guest that boots opens its ports: libvirt would stand still for 30 s were a backup of it open then."""

from __future__ import annotations

import time

import pytest
from lxml import etree

from integration.evacuation_pair import EvacuationPair
from integration.proxy_pair import BACKUP, HOME, wait_for
from lifeboat_lab.guests.guests import Guest

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]

RPO_SECONDS = 1.0
# For a little longer than this no backup of a guest that was started begins.
WITHOUT_SECONDS = 28.0


def ports_open(pair: EvacuationPair, guest: Guest) -> bool:
    """Whether the guest has opened all of its virtio serial ports."""
    xml = etree.fromstring(pair.shell(HOME, f"virsh dumpxml {guest.plan.uuid}").encode())
    states = [target.get("state") for target in xml.iterfind("./devices/channel/target[@type='virtio']")]
    return bool(states) and set(states) == {"connected"}


def backup_open(pair: EvacuationPair, guest: Guest) -> bool:
    """Whether libvirt has a backup job of the VM."""
    return "<domainbackup" in pair.virsh(HOME, "backup-dumpxml", guest.plan.uuid, check=False)


def test_no_backup_meets_a_guest_that_opens_its_ports(pair: EvacuationPair) -> None:
    guest = pair.make_guest("boots")
    url = f"/v1/vms/{guest.plan.uuid}"
    pair.ask(HOME, "PUT", url, {"peer": BACKUP, "rpo_seconds": RPO_SECONDS})
    began_at, in_time = int(time.time()), True
    for _boot in range(2):
        pair.virsh(HOME, "destroy", guest.plan.uuid)
        # A pass of what the VM left may still be under way, of its closed images.
        pair.wait_protected(guest, HOME)
        started = time.monotonic()
        pair.virsh(HOME, "start", guest.plan.uuid)
        seen: list[bool] = []
        while True:
            found = backup_open(pair, guest)
            if ports_open(pair, guest):
                in_time = in_time and time.monotonic() - started < WITHOUT_SECONDS
                break  # what has begun since then is in order
            if time.monotonic() - started < WITHOUT_SECONDS:
                seen.append(found)
        assert seen, "the guest was quicker than one can look"
        assert not any(seen), seen
        generation = pair.ask(HOME, "GET", url)["generation"]
        # Then as ever: what the boot wrote is sealed at once.
        wait_for(
            lambda: pair.ask(HOME, "GET", url)["generation"],
            lambda told, before=generation: told > before,
            timeout_seconds=60,
        )
    journal = pair.shell(HOME, f"journalctl -u libvirtd --since @{began_at} --no-pager")
    # A backup that begins after that may meet the opening of the ports of a guest that is slower.
    assert not in_time or "Cannot start job" not in journal, journal
