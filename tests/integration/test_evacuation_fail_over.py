# SPDX-License-Identifier: GPL-3.0-or-later
"""The home is dead: the VM runs at its peer from the last sealed generation, and nowhere else ever after."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest

from integration.evacuation_pair import RPO_SECONDS, EvacuationPair
from integration.playbook_runner import PlaybookResult
from integration.proxy_pair import BACKUP, HOME, RUN, Answer, Refused, wait_for
from lifeboat_lab.guests.guests import Guest
from precache_proxy.crash_points import CRASH_POINTS

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]


def test_a_vm_runs_from_its_last_generation_and_its_home_learns_of_it(pair: EvacuationPair) -> None:
    guest = pair.make_guest("bereft", disks=2)
    command = f"/v1/replicas/{guest.plan.uuid}/fail-over"
    pair.virsh(HOME, "autostart", guest.plan.uuid)
    acknowledged = guest.told().highest_acknowledged
    sealed = pair.ask(HOME, "POST", f"/v1/vms/{guest.plan.uuid}/pass")["generation"]
    wait_for(lambda: guest.told().highest_acknowledged, lambda now: now > acknowledged + 20)
    with pair.never_twice(guest):
        with pytest.raises(Refused, match=f"generation {sealed}, sealed .* ago"):
            pair.ask(BACKUP, "POST", command, {})
        with pytest.raises(Refused, match="its home is not dead, it is running there"):
            pair.ask(BACKUP, "POST", command, {"source_is_dead": True})
        assert guest.states() == {HOME: "running"}
        assert not pair.guarded(HOME, guest)
        assert not pair.guarded(BACKUP, guest)

        pair.lab.kill_host(HOME)
        arrival = pair.ask(BACKUP, "POST", command, {"source_is_dead": True})
        assert (arrival["state"], arrival["generation"], arrival["epoch"]) == ("activated", sealed, 1)
        assert (arrival["activated_by"], arrival["home_told"]) == ("operator", False)
        assert guest.running_on() == [BACKUP]
        guest.wait_ready(host=BACKUP)
        pair.wait_landed(BACKUP, guest)
        found = guest.verify(BACKUP, acknowledged=acknowledged)
        assert found.intact, found.findings

        pair.lab.start_host(HOME)
        pair.start(HOME)
        wait_for(lambda: pair.arrival(BACKUP, guest)["home_told"], timeout_seconds=60)
        assert pair.guarded(HOME, guest)
        [gone] = pair.ask(HOME, "GET", "/v1/hypervisor")["moved_away"]
        assert (gone["uuid"], gone["name"], gone["peer"]) == (guest.plan.uuid, guest.name, BACKUP)
        assert guest.states() == {BACKUP: "running"}
        # What was written at home since stays there, and nobody takes it for a replica.
        assert guest.plan.uuid not in str(pair.ask(HOME, "GET", "/v1/vms"))
        # The way back begins with a first copy.
        told = pair.wait_protected(guest, BACKUP)
        # As it was asked for at its home.
        assert (told["autostart"], told["rpo_seconds"]) == (True, RPO_SECONDS)
        job = pair.wait_job(BACKUP, pair.begin(BACKUP, guest)["id"])
        assert job["verdict"] == "evacuated", (job, pair.log(BACKUP))
    assert guest.running_on() == [HOME]
    pair.wait_landed(HOME, guest)
    found = guest.verify(HOME, acknowledged=acknowledged)
    assert found.intact, found.findings


def test_the_playbook_runs_what_a_dead_site_left_behind(
    pair: EvacuationPair, lab_playbook: Callable[..., PlaybookResult]
) -> None:
    guest = pair.make_guest("bequest")
    acknowledged = guest.told().highest_acknowledged
    sealed = pair.ask(HOME, "POST", f"/v1/vms/{guest.plan.uuid}/pass")["generation"]
    # A lab may have more hosts, without proxies: they are not of this story.
    asked = {
        "fail_over_site": "home",
        "evacuation_socket": f"{RUN}/control.sock",
        "lifeboat_hosts": f"{HOME}:{BACKUP}",
    }
    word = {**asked, "fail_over_site_is_dead": True}
    here = ("--limit", HOME)
    with pair.never_twice(guest):
        # By the word alone it is not dead: the host lets us in, its proxy is heard, and it runs the guest.
        refused = lab_playbook("fail_over", variables=word, options=here)
        assert refused.return_code != 0
        assert f"{HOME}: it is not dead: Ansible reaches it and its proxy answers {BACKUP}" in refused.output
        assert "its home is not dead, it is running there" in refused.output
        assert (refused.changed, guest.states()) == (0, {HOME: "running"})
        pair.lab.kill_host(HOME)
        wait_for(
            lambda: [link["state"] for link in pair.ask(BACKUP, "GET", "/v1/links")["links"]] == ["down"]
        )
        would = lab_playbook("fail_over", variables=asked, options=here, check=True).require_success()
        assert "would-start" in would.output
        assert guest.running_on() == []
        told = lab_playbook("fail_over", variables=word, options=here).require_success()
        [row] = [line for line in told.output.splitlines() if "restarted-from-replica" in line][:1]
        assert row.split()[:5] == [f'"{guest.name}', HOME, BACKUP, "restarted-from-replica", str(sealed)]
        assert guest.running_on() == [BACKUP]
        guest.wait_ready(host=BACKUP)
        again = lab_playbook("fail_over", variables=word, options=here).require_success()
        assert (again.changed, "already-there" in again.output) == (0, True)
        pair.wait_landed(BACKUP, guest)
        found = guest.verify(BACKUP, acknowledged=acknowledged)
        assert found.intact, found.findings
        come_back(pair)
        check_given_up(pair, guest, acknowledged)


# The home has lost power, or only the guest there is off and its proxy answers.
DEAD, OFF = "dead", "off"
TABLE = [
    (where, home, point)
    for where, points in ((BACKUP, ("fail-over-prepared", "fail-over-home-told")),
                          (HOME, ("home-forbidden", "home-jobs-ended")))
    for home in (DEAD, OFF)
    for point in points
]  # fmt: skip


def bereave(pair: EvacuationPair, name: str, home: str) -> tuple[Guest, int]:
    """A guest that does not run any more, and the last write that is in its last generation for sure."""
    guest = pair.make_guest(name)
    acknowledged = guest.told().highest_acknowledged
    pair.ask(HOME, "POST", f"/v1/vms/{guest.plan.uuid}/pass")
    if home == DEAD:
        pair.lab.kill_host(HOME)
    else:
        pair.virsh(HOME, "destroy", guest.plan.uuid)
    return guest, acknowledged


def fail_over(pair: EvacuationPair, guest: Guest) -> Answer:
    """The operator's command."""
    path = f"/v1/replicas/{guest.plan.uuid}/fail-over"
    return pair.ask(BACKUP, "POST", path, {"source_is_dead": True})


def come_back(pair: EvacuationPair, *, crash_at: str = "") -> None:
    """The home has power again, and its proxy is started."""
    pair.lab.start_host(HOME)
    pair.start(HOME, crash_at=crash_at)


def check_given_up(pair: EvacuationPair, guest: Guest, acknowledged: int) -> None:
    """It runs at the peer alone, whole as of its generation, and its home knows."""
    wait_for(lambda: pair.arrival(BACKUP, guest).get("home_told"), timeout_seconds=120)
    pair.wait_landed(BACKUP, guest)
    wait_for(guest.states, lambda states: states == {BACKUP: "running"})
    guest.wait_ready(host=BACKUP)
    assert pair.guarded(HOME, guest)
    assert not pair.guarded(BACKUP, guest)
    found = guest.verify(BACKUP, acknowledged=acknowledged)
    assert found.intact, found.findings
    assert guest.plan.uuid not in str(pair.ask(HOME, "GET", "/v1/vms"))
    assert pair.leftovers(HOME) == pair.leftovers(BACKUP) == []
    # Said twice, it is found running.
    assert fail_over(pair, guest)["id"] == pair.arrival(BACKUP, guest)["id"]
    assert guest.running_on() == [BACKUP]


def kill_at_the_peer(pair: EvacuationPair, guest: Guest, home: str, point: str) -> None:
    pair.restart(BACKUP, crash_at=point)
    if home == OFF:
        pair.wait_links()
    with suppress(OSError):
        fail_over(pair, guest)
    wait_for(lambda: not pair.alive(BACKUP), timeout_seconds=120)
    pair.start(BACKUP)
    if home == OFF:
        # It can be asked again, and then the operator's word is good.
        wait_for(guest.running_on, lambda hosts: hosts == [BACKUP], timeout_seconds=60)
        return
    # It may have refused before we were killed: nothing runs until somebody says it again.
    told = wait_for(lambda: pair.arrival(BACKUP, guest), lambda told: told.get("cause") == "no-contact")
    assert told["state"] == "prepared"
    assert f"repeat `precache-proxy fail-over {guest.name} --source-is-dead`" in told["sentence"]
    assert guest.running_on() == []
    assert fail_over(pair, guest)["state"] == "activated"
    come_back(pair)


def kill_at_home(pair: EvacuationPair, guest: Guest, home: str, point: str) -> None:
    if home == DEAD:
        assert fail_over(pair, guest)["state"] == "activated"
        come_back(pair, crash_at=point)
    else:
        pair.restart(HOME, crash_at=point)
        pair.wait_links()
        # Whether it is an answer or an error: what was begun goes on.
        with suppress(Refused):
            fail_over(pair, guest)
    wait_for(lambda: not pair.alive(HOME), timeout_seconds=120)
    assert pair.guarded(HOME, guest)
    assert "was started at" in pair.start_is_refused(HOME, guest)
    pair.start(HOME)


@pytest.mark.parametrize(
    ("where", "home", "point"),
    [
        pytest.param(*row, id="-".join(row), marks=[] if row == TABLE[0] else [pytest.mark.soak])
        for row in TABLE
    ],
)
def test_a_proxy_is_killed_in_a_fail_over(pair: EvacuationPair, where: str, home: str, point: str) -> None:
    assert point in CRASH_POINTS
    guest, acknowledged = bereave(pair, "orphan", home)
    with pair.never_twice(guest):
        (kill_at_the_peer if where == BACKUP else kill_at_home)(pair, guest, home, point)
        check_given_up(pair, guest, acknowledged)
