# SPDX-License-Identifier: GPL-3.0-or-later
"""Connections that are opened ahead of a migration: used when all goes well, missed by nobody when not."""

from __future__ import annotations

import pytest

from integration.evacuation_pair import EvacuationPair
from integration.proxy_pair import BACKUP, HOME, wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

USED = "relay of the {} socket: the connection that was opened ahead is in use"
CLIENTS = "virt-admin client-list libvirtd | awk '$2 == \"unix\" {print $1}'"


def libvirt_connections(pair: EvacuationPair, host: str) -> int:
    """How many connections a host's libvirtd has accepted (state 03, connected)."""
    table = pair.shell(host, "cat /proc/net/unix")
    return sum(
        words[5] == "03" and words[-1].endswith("libvirt/libvirt-sock")
        for words in (line.split() for line in table.splitlines()[1:])
    )


def newest_connection(pair: EvacuationPair, host: str) -> int:
    """The number that libvirtd gave to the connection that the proxy made last; others come and go beside
    it."""
    for number in sorted((int(word) for word in pair.shell(host, CLIENTS).split()), reverse=True):
        told = pair.shell(host, f"virt-admin client-info libvirtd {number}", check=False)
        pairs = (line.partition(":") for line in told.splitlines())
        if str(pair.pid(host)) in {value.strip() for name, _colon, value in pairs if "process_id" in name}:
            return number
    raise AssertionError(f"libvirtd of {host} knows no connection of the proxy")


def test_libvirt_and_qemu_go_on_with_what_was_opened_ahead(pair: EvacuationPair) -> None:
    guest = pair.make_guest("expected", disks=2)
    # They are waited for as long as the way is far, and the machine may be busy.
    pair.lab.wan.set("rate=400mbit,rtt=300ms")
    try:
        job = pair.evacuate(guest)
    finally:
        pair.lab.wan.set("none")
    log = pair.log(HOME).partition(str(job["id"]))[2]
    assert log.count(USED.format("libvirt")) == 1, log
    assert log.count(USED.format("disk")) == 2, log
    assert "over the WAN" not in log


def test_a_held_connection_that_dies_costs_no_guest(pair: EvacuationPair) -> None:
    guest = pair.make_guest("held in vain")
    canary = guest.canary(HOME)
    before = libvirt_connections(pair, BACKUP)
    with pair.never_twice(guest):
        job_id = pair.begin_until(guest, HOME, "departure-prepared")
        wait_for(lambda: libvirt_connections(pair, BACKUP), lambda count: count == before + 1)
        # The newest is the one that is held; the proxy's own is as old as the proxy.
        held = newest_connection(pair, BACKUP)
        pair.shell(BACKUP, f"virt-admin client-disconnect libvirtd {held}")
        wait_for(lambda: libvirt_connections(pair, BACKUP), lambda count: count == before)
        pair.go_on(HOME)
        # Replaced, whether the source hears of it before libvirt's first own call or after it.
        assert pair.wait_job(HOME, job_id)["verdict"] == "evacuated"
        pair.check_settled(guest, job_id, canary, BACKUP)
    log = pair.log(HOME).partition(job_id)[2]
    heard_late = "what was sent on it is sent on another" in log
    assert (USED.format("libvirt") in log) == heard_late, log


@pytest.mark.parametrize("back_at_once", [True, False])
def test_nothing_is_held_for_a_source_that_died_before_libvirt_came(
    pair: EvacuationPair, *, back_at_once: bool
) -> None:
    guest = pair.make_guest("called off")
    canary = guest.canary(HOME)
    before = libvirt_connections(pair, BACKUP)
    with pair.never_twice(guest):
        job_id = pair.begin_until(guest, HOME, "departure-prepared")
        wait_for(lambda: libvirt_connections(pair, BACKUP), lambda count: count == before + 1)
        pair.kill(HOME)
        if back_at_once:
            pair.start(HOME)
        wait_for(lambda: libvirt_connections(pair, BACKUP), lambda count: count == before, timeout_seconds=40)
        if not back_at_once:
            pair.start(HOME)
        pair.check_settled(guest, job_id, canary, HOME)


def test_a_destination_whose_proxy_was_killed_meanwhile_holds_nothing_and_loses_nothing(
    pair: EvacuationPair,
) -> None:
    guest = pair.make_guest("forgotten")
    canary = guest.canary(HOME)
    before = libvirt_connections(pair, BACKUP)
    with pair.never_twice(guest):
        job_id = pair.begin_until(guest, HOME, "departure-prepared")
        wait_for(lambda: libvirt_connections(pair, BACKUP), lambda count: count == before + 1)
        held = newest_connection(pair, BACKUP)
        pair.kill(BACKUP)
        # libvirtd hears of it at its next turn, not at the instant that the proxy is gone.
        wait_for(
            lambda: pair.shell(BACKUP, CLIENTS).split(),
            lambda numbers: str(held) not in numbers,
            timeout_seconds=20,
        )
        pair.start(BACKUP)
        pair.go_on(HOME)
        # Whether the link is up again when libvirt connects decides; the guest is whole either way.
        verdict = pair.wait_job(HOME, job_id)["verdict"]
        pair.check_settled(guest, job_id, canary, BACKUP if verdict == "evacuated" else HOME)
