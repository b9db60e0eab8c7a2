# SPDX-License-Identifier: GPL-3.0-or-later
"""Contact lost at each step of an evacuation, for a while or for ever: the VM runs once.

The proxy that reaches a named line stops there, the link is cut, and it goes on.
"""

from __future__ import annotations

import time

import pytest

from integration.evacuation_pair import EvacuationPair, sampled
from integration.proxy_pair import BACKUP, HOME, STATE, Refused, wait_for
from lifeboat_lab.guests.guests import Guest

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

# Cut here, the VM goes on at home, without having been told anything by anybody.
STAYS = (
    "departure-before-freeze", "departure-frozen", "departure-residual-sealed", "departure-before-prepare",
    "departure-prepared", "departure-migrating",
)  # fmt: skip
# Cut here, it is halted at home and whole there, or not: nobody may run it until contact is back.
IN_DOUBT = (
    "departure-migrated", "departure-before-tombstone", "departure-halted", "departure-tombstoned",
    "departure-released",
)  # fmt: skip
# Cut here, everything has been said.
DONE = ("departure-activated", "departure-before-undefine", "departure-undefined", "departure-adopted")
ARRIVAL_STAYS = ("arrival-recorded", "arrival-guarded", "arrival-prepared")
# Cut here, the destination has been released and does not need the source any more.
ARRIVAL_GOES_ON = ("arrival-released", "arrival-resumed", "arrival-activated")
SAMPLE = {"departure-residual-sealed", "departure-released", "arrival-released"}


def cut_at(pair: EvacuationPair, guest: Guest, host: str, point: str) -> str:
    """Begin an evacuation and cut the link before that host's proxy runs the line after a point; the job's
    number."""
    job_id = pair.begin_until(guest, host, point)
    pair.cut()
    pair.go_on(host)
    return job_id


# -- the link is cut


@pytest.mark.parametrize("point", sampled(SAMPLE, *STAYS))
def test_link_cut_before_the_hand_off(pair: EvacuationPair, point: str) -> None:
    guest = pair.make_guest("cut off")
    canary, images = guest.canary(HOME), guest.images(HOME)
    with pair.never_twice(guest):
        job_id = cut_at(pair, guest, HOME, point)
        pair.wait_step(HOME, job_id, "stayed")
        assert guest.running_on() == [HOME], "without contact, too"
        assert guest.images(HOME) == images, "its overlays are merged back"
        pair.lab.wan.heal()
        pair.check_healed(guest, job_id, canary, HOME)


@pytest.mark.parametrize("point", sampled(SAMPLE, *ARRIVAL_STAYS))
def test_link_cut_while_the_destination_prepares(pair: EvacuationPair, point: str) -> None:
    guest = pair.make_guest("cut off")
    canary, images = guest.canary(HOME), guest.images(HOME)
    with pair.never_twice(guest):
        job_id = cut_at(pair, guest, BACKUP, point)
        assert pair.wait_step(HOME, job_id, "stayed")["owes_abort"]
        assert guest.running_on() == [HOME]
        assert guest.images(HOME) == images
        pair.lab.wan.heal()
        pair.check_healed(guest, job_id, canary, HOME)


@pytest.mark.parametrize("point", sampled(SAMPLE, *IN_DOUBT))
def test_link_cut_between_the_vms_end_here_and_its_run_there(pair: EvacuationPair, point: str) -> None:
    """The one window in which nobody may run it: undecided, until contact is back."""
    guest = pair.make_guest("in doubt")
    canary, boots = guest.canary(HOME), guest.told().boots
    with pair.never_twice(guest):
        job_id = cut_at(pair, guest, HOME, point)
        told = pair.wait_step(HOME, job_id, "undecided")
        assert (told["verdict"], told["cause"]) == ("undecided", "no-contact"), told
        assert "keep-at-source" in told["sentence"]
        assert guest.running_on() == []
        # libvirt's last call may have been cut off: then libvirt there clears away what has arrived.
        arrived = guest.states().get(BACKUP) == "paused"
        assert arrived or point != "departure-released"
        pair.lab.wan.heal()
        pair.check_healed(guest, job_id, canary, BACKUP if arrived else HOME)
    assert guest.told().boots == boots


@pytest.mark.parametrize("point", sampled(SAMPLE, *DONE))
def test_link_cut_once_it_runs_there(pair: EvacuationPair, point: str) -> None:
    guest = pair.make_guest("away")
    canary = guest.canary(HOME)
    with pair.never_twice(guest):
        job_id = cut_at(pair, guest, HOME, point)
        assert pair.wait_step(HOME, job_id, "done")["verdict"] == "evacuated"
        assert guest.running_on() == [BACKUP]
        pair.lab.wan.heal()
        pair.check_healed(guest, job_id, canary, BACKUP)


@pytest.mark.parametrize("point", sampled(SAMPLE, *ARRIVAL_GOES_ON))
def test_link_cut_once_the_destination_was_released(pair: EvacuationPair, point: str) -> None:
    """It runs there, and the source does not know: it stays off here."""
    guest = pair.make_guest("ahead")
    canary = guest.canary(HOME)
    with pair.never_twice(guest):
        job_id = cut_at(pair, guest, BACKUP, point)
        wait_for(guest.running_on, lambda hosts: hosts == [BACKUP])
        pair.wait_step(HOME, job_id, "undecided")
        assert guest.running_on() == [BACKUP]
        assert "runs there" in pair.start_is_refused(HOME, guest)
        pair.lab.wan.heal()
        pair.check_healed(guest, job_id, canary, BACKUP)


def test_an_operator_keeps_an_undecided_vm_here(pair: EvacuationPair) -> None:
    guest = pair.make_guest("kept")
    with pair.never_twice(guest):
        job_id = cut_at(pair, guest, HOME, "departure-released")
        pair.wait_step(HOME, job_id, "undecided")
        with pytest.raises(Refused) as refused:
            pair.ask(HOME, "POST", f"/v1/evacuations/{job_id}/settle", {"decision": "perhaps"})
        assert refused.value.cause == "invalid"
        pair.ask(HOME, "POST", f"/v1/evacuations/{job_id}/settle", {"decision": "keep-at-source"})
        told = pair.wait_step(HOME, job_id, "stayed")
        assert (told["verdict"], told["owes_abort"]) == ("stayed", True)
        assert guest.running_on() == [HOME]
        assert guest.states().get(BACKUP) == "paused", "the destination has not heard of it"
        pair.lab.wan.heal()
        pair.wait_job(HOME, job_id)
        wait_for(lambda: pair.arrival(BACKUP, guest)["state"], lambda state: state == "aborted")
        assert guest.running_on() == [HOME]
    assert BACKUP not in guest.states()
    guest.wait_ready()
    assert guest.verify(HOME).intact
    assert pair.leftovers(HOME) == pair.leftovers(BACKUP) == []


# -- a source that is presumed dead

PRESUMED = "[evacuation]\npresume_source_dead_after_seconds = 300\n"


@pytest.mark.soak
def test_a_source_without_contact_stops_before_it_is_presumed_dead(pair: EvacuationPair) -> None:
    """Libvirt's last reply and the link are lost together: it runs here, and stands whole there."""
    guest = pair.make_guest("fenced", workload="idle")
    with pair.never_twice(guest):
        pair.kill(BACKUP, "TERM")
        pair.configure(BACKUP, PRESUMED)
        pair.start(BACKUP, drop_at="relay-finish-reply")
        pair.hide_processes(HOME)
        job_id = pair.begin_until(guest, HOME, "rollback-begun")
        pair.cut()
        cut_at_seconds = time.monotonic()
        pair.go_on(HOME)
        told = pair.wait_step(HOME, job_id, "stayed")
        assert told["owes_abort"]
        assert told["presumed_dead_after_seconds"] == 300
        assert guest.states() == {HOME: "running", BACKUP: "paused"}
        pair.restart(HOME)
        assert guest.running_on() == [HOME], "a restart alone stops nothing"
        wait_for(guest.running_on, lambda hosts: hosts == [], timeout_seconds=200)
        assert 120 < time.monotonic() - cut_at_seconds < 170, "at half of the time"
        assert pair.guarded(HOME, guest)
        wait_for(guest.running_on, lambda hosts: hosts == [BACKUP], timeout_seconds=240)
        assert time.monotonic() - cut_at_seconds >= 290
        assert pair.arrival(BACKUP, guest)["activated_by"] == "presumed"
        pair.lab.wan.heal()
        job = pair.wait_job(HOME, job_id)
        assert job["verdict"] == "evacuated", job
        wait_for(lambda: HOME not in guest.states())
        assert (
            "runs there"
            in (pair.root(HOME) / STATE.lstrip("/") / "guard" / f"{guest.plan.uuid}.json").read_text()
        )
    assert guest.running_on() == [BACKUP]


@pytest.mark.soak
def test_a_source_that_died_is_presumed_dead_and_starts_nothing_when_it_is_back(pair: EvacuationPair) -> None:
    guest = pair.make_guest("survivor")
    with pair.never_twice(guest):
        pair.kill(BACKUP, "TERM")
        pair.configure(BACKUP, PRESUMED)
        pair.start(BACKUP)
        job_id = pair.begin_until(guest, HOME, "departure-tombstoned")
        pair.lab.kill_host(HOME)
        wait_for(lambda: pair.arrival(BACKUP, guest)["cause"], lambda cause: cause == "no-contact")
        assert guest.running_on() == []
        wait_for(guest.running_on, lambda hosts: hosts == [BACKUP], timeout_seconds=360)
        assert pair.arrival(BACKUP, guest)["activated_by"] == "presumed"
        pair.lab.start_host(HOME)
        assert "runs there" in pair.start_is_refused(HOME, guest)
        pair.start(HOME)
        assert pair.wait_job(HOME, job_id)["verdict"] == "evacuated"
    assert guest.running_on() == [BACKUP]
    pair.wait_landed(BACKUP, guest)
    assert guest.verify(BACKUP).intact
