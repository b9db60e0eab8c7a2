# SPDX-License-Identifier: GPL-3.0-or-later
"""Gateways against anchors on a network that delays, loses and repeats, with a clock of its own."""

from __future__ import annotations

import heapq
import random
from dataclasses import replace
from ipaddress import IPv6Address, IPv6Network
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobility_agent.anchor.bindings import BindingTable, KnownGateway, Rules
from mobility_agent.gateway.registrar import Outcome, Outgoing, Registrar
from mobility_agent.messages.headers import Heartbeat, Status
from mobility_agent.messages.options import HandoffIndicator
from mobility_agent.messages.registration import Acknowledgement
from mobility_agent.signalling.heartbeat import Pulse

VM = "11111111-2222-3333-4444-555555555555"
HOMES = (IPv6Network("2001:db8:100::5/128"),)
GATEWAYS = {
    "old": (IPv6Address("2001:db8:1::2"), IPv6Address("2001:db8:1::d")),
    "new": (IPv6Address("2001:db8:2::2"), IPv6Address("2001:db8:2::d")),
}
RULES = Rules(
    prefixes=[IPv6Network("2001:db8:100::/48")],
    gateways={address: KnownGateway(name, care_of) for name, (address, care_of) in GATEWAYS.items()},
)
ANCHORS = ("anchor1", "anchor2")
WALL = 1_700_000_000.0
REFRESH, HANDOFF = HandoffIndicator.UNCHANGED, HandoffIndicator.BETWEEN_GATEWAYS
START = HandoffIndicator.NEW_INTERFACE


class Net:
    """Two gateways, two anchors, one clock."""

    def __init__(self, seed: int = 0, delay: float = 0.04, loss: float = 0.0) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.delay, self.loss = delay, loss
        self.tables = {name: BindingTable(RULES) for name in ANCHORS}
        self.gateways = {name: Registrar(ANCHORS, care_of, 120) for name, (_, care_of) in GATEWAYS.items()}
        self.clock_error = dict.fromkeys(GATEWAYS, 0.0)
        self.down: set[str] = set()
        self.outcomes: list[tuple[float, str, Outcome]] = []
        self.sent: list[tuple[float, str, Outgoing]] = []
        self._flying: list[tuple[float, int, str, object]] = []
        self._order = 0

    def _fly(self, gateway: str, what: object) -> None:
        copies = 1 if self.random.random() >= self.loss else 0
        copies += self.random.random() < self.loss / 2
        for _ in range(copies):
            self._order += 1
            jitter = self.random.random() * self.loss * self.delay
            heapq.heappush(self._flying, (self.now + self.delay / 2 + jitter, self._order, gateway, what))

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end = self.now + seconds
        while True:
            for name, registrar in self.gateways.items():
                for outgoing in registrar.due(self.now, WALL + self.now + self.clock_error[name]):
                    self.sent.append((self.now, name, outgoing))
                    self._fly(name, outgoing)
            times = [due for registrar in self.gateways.values() if (due := registrar.next_due()) is not None]
            times += [self._flying[0][0]] if self._flying else []
            following = max(min(times, default=end), self.now)
            if following > end:
                break
            self.now = max(following, self.now + 1e-9)
            while self._flying and self._flying[0][0] <= self.now:
                _, _, gateway, what = heapq.heappop(self._flying)
                self._arrive(gateway, what)
        self.now = end

    def _arrive(self, gateway: str, what: object) -> None:
        if isinstance(what, Outgoing):
            if what.anchor in self.down:
                return
            table = self.tables[what.anchor]
            table.expire(self.now)
            address = GATEWAYS[gateway][0]
            verdict = table.register(
                what.registration, address, what.sequence, now=self.now, wall=WALL + self.now
            )
            after = verdict.after
            lifetime = after.lifetime_seconds if after is not None and verdict.accepted else 0
            answer = Acknowledgement(
                what.registration.vm,
                verdict.status,
                what.sequence,
                lifetime,
                verdict.ticks,
                what.registration.homes,
                None if after is None else after.epoch,
                None if after is None or not after.active else after.care_of,
            )
            self._fly(gateway, (what.anchor, answer))
            return
        anchor, answer = what  # type: ignore[misc]
        self.outcomes.append(
            (self.now, gateway, self.gateways[gateway].acknowledge(anchor, answer, self.now))
        )

    def where(self, anchor: str = "anchor1", vm: str = VM) -> IPv6Address | None:
        binding = self.tables[anchor].get(vm)
        return binding.care_of if binding is not None and binding.active else None

    def kinds(self, gateway: str) -> list[str]:
        return [outcome.kind for _, name, outcome in self.outcomes if name == gateway]


def test_a_claim_is_bound_at_every_anchor_after_half_a_round_trip() -> None:
    net = Net(delay=0.2)
    net.gateways["old"].attach(VM, HOMES, 1, HANDOFF, net.now)
    net.run(0.11)
    assert [net.where(anchor) for anchor in ANCHORS] == [GATEWAYS["old"][1]] * 2
    assert net.gateways["old"].acknowledged(VM) == []
    net.run(0.1)
    assert net.gateways["old"].acknowledged(VM) == list(ANCHORS)
    assert len(net.sent) == 2


@pytest.mark.parametrize("round_trip", [0.0, 0.02, 0.08, 0.2])
def test_a_lost_message_is_sent_again_after_one_round_trip(round_trip: float) -> None:
    net = Net(delay=round_trip)
    registrar = net.gateways["old"]
    for anchor in ANCHORS:
        registrar.anchor_answers(anchor, round_trip, 0.0)
    net.down = {"anchor1"}
    registrar.attach(VM, HOMES, 1, HANDOFF, net.now)
    net.run(10)
    times = [at for at, _, outgoing in net.sent if outgoing.anchor == "anchor1"]
    assert times[1] - times[0] == pytest.approx(round_trip + 0.02, abs=0.001)
    gaps = [after - before for before, after in pairwise(times)]
    assert gaps == sorted(gaps)
    assert max(gaps) <= 3.001
    net.down = set()
    net.run(4)
    assert net.where("anchor1") == GATEWAYS["old"][1]


def test_a_registration_is_refreshed_before_it_ends() -> None:
    net = Net()
    net.gateways["old"].attach(VM, HOMES, 1, HANDOFF, net.now)
    net.run(1000)
    assert net.where() == GATEWAYS["old"][1]
    # Two anchors, every 45 to 60 s.
    assert 32 <= len(net.sent) <= 46
    assert "refused" not in net.kinds("old")


def test_the_loser_of_a_hand_off_is_told_at_its_next_refresh_at_the_latest() -> None:
    net = Net()
    net.gateways["old"].attach(VM, HOMES, 1, HANDOFF, net.now)
    net.run(10)
    net.gateways["new"].attach(VM, HOMES, 2, HANDOFF, net.now)
    net.run(120)
    assert net.kinds("old").count("lost") == 1
    lost = next(outcome for _, _, outcome in net.outcomes if outcome.kind == "lost")
    assert (lost.epoch, lost.holder) == (2, GATEWAYS["new"][1])
    assert net.where() == GATEWAYS["new"][1]
    assert "withdrawn here" in lost.sentence


def test_what_was_moved_by_hand_is_claimed_with_a_made_up_epoch() -> None:
    net = Net()
    net.gateways["old"].attach(VM, HOMES, 7, HANDOFF, net.now)
    net.run(1)
    net.gateways["new"].attach(VM, HOMES, 0, HANDOFF, net.now, evident=True)
    net.run(1)
    assert "raised" in net.kinds("new")
    for anchor in ANCHORS:
        assert net.where(anchor) == GATEWAYS["new"][1]
        binding = net.tables[anchor].get(VM)
        assert binding is not None
        assert binding.epoch == 8


def test_without_evidence_no_epoch_is_made_up() -> None:
    net = Net()
    net.gateways["old"].attach(VM, HOMES, 7, HANDOFF, net.now)
    net.run(1)
    net.gateways["new"].attach(VM, HOMES, 3, START, net.now)
    net.run(1)
    assert "lost" in net.kinds("new")
    assert net.where() == GATEWAYS["old"][1]


def test_one_that_the_anchors_have_here_already_in_a_newer_epoch_is_not_given_up() -> None:
    net = Net()
    net.gateways["old"].attach(VM, HOMES, 7, HANDOFF, net.now)
    net.run(1)
    # The agent was killed before its journal had it; libvirt says that the VM runs here.
    net.gateways["old"] = Registrar(ANCHORS, GATEWAYS["old"][1], 120)
    net.gateways["old"].attach(VM, HOMES, 0, START, net.now)
    net.run(5)
    assert "lost" not in net.kinds("old")
    assert "adopted" in net.kinds("old")
    assert net.gateways["old"].acknowledged(VM) == list(ANCHORS)
    assert net.gateways["old"].epoch(VM) == 7


@pytest.mark.parametrize("stale_answers_first", [True, False])
def test_an_anchor_that_missed_a_move_makes_nobody_take_the_vm_back(stale_answers_first: bool) -> None:
    net = Net()
    net.gateways["old"].attach(VM, HOMES, 7, HANDOFF, net.now)
    net.run(1)
    # Shut off here and started elsewhere, in the same epoch; one anchor is cut off from all that.
    stale = "anchor2"
    net.down = {stale}
    net.gateways["old"].release(VM, HOMES, 7, net.now)
    net.run(1)
    net.gateways["new"].attach(VM, HOMES, 0, START, net.now)
    net.run(1)
    assert net.where("anchor1") == GATEWAYS["new"][1]
    assert net.where(stale) == GATEWAYS["old"][1]
    # An agent with an old journal comes back when only that anchor answers it, or both do.
    net.gateways["old"] = Registrar(ANCHORS, GATEWAYS["old"][1], 120)
    net.gateways["new"].forget(VM)
    net.down = {"anchor1"} if stale_answers_first else set()
    net.gateways["old"].attach(VM, HOMES, 3, START, net.now)
    net.run(1)
    net.down = set()
    net.run(60)
    assert net.where("anchor1") == GATEWAYS["new"][1]
    assert net.kinds("old").count("lost") == 1
    assert net.gateways["old"].epoch(VM) is None


def test_one_that_did_start_here_is_bound_also_where_it_was_bound_nowhere_last() -> None:
    net = Net()
    net.gateways["old"].attach(VM, HOMES, 7, HANDOFF, net.now)
    net.run(1)
    stale = "anchor2"
    net.down = {stale}
    net.gateways["old"].release(VM, HOMES, 7, net.now)
    net.run(1)
    net.gateways["new"].attach(VM, HOMES, 7, START, net.now)
    net.run(1)
    net.gateways["new"].release(VM, HOMES, 7, net.now)
    net.run(1)
    net.gateways["new"].forget(VM)
    assert net.where("anchor1") is None
    # The stale one is heard first, and has it here still; the other has it nowhere.
    net.gateways["old"] = Registrar(ANCHORS, GATEWAYS["old"][1], 120)
    net.down = {"anchor1"}
    net.gateways["old"].attach(VM, HOMES, 3, START, net.now)
    net.run(1)
    assert "adopted" in net.kinds("old")
    net.down = set()
    net.run(10)
    assert net.gateways["old"].acknowledged(VM) == list(ANCHORS)
    assert [net.where(anchor) for anchor in ANCHORS] == [GATEWAYS["old"][1]] * 2
    assert "lost" not in net.kinds("old")


def test_one_that_surely_came_is_not_given_up_for_what_an_anchor_missed() -> None:
    net = Net()
    net.gateways["old"].attach(VM, HOMES, 5, HANDOFF, net.now)
    net.run(1)
    # Shut off here and started elsewhere in the same epoch, which one anchor missed; then moved back by hand.
    net.down = {"anchor2"}
    net.gateways["old"].release(VM, HOMES, 5, net.now)
    net.run(1)
    net.gateways["new"].attach(VM, HOMES, 0, START, net.now)
    net.run(1)
    net.gateways["old"] = Registrar(ANCHORS, GATEWAYS["old"][1], 120)
    # The one that missed it is heard first.
    net.down = {"anchor1"}
    net.gateways["old"].attach(VM, HOMES, 0, HANDOFF, net.now, evident=True)
    net.run(0.3)
    net.down = set()
    net.run(10)
    assert "lost" not in net.kinds("old")
    assert [net.where(anchor) for anchor in ANCHORS] == [GATEWAYS["old"][1]] * 2


def test_what_an_anchor_refuses_to_withdraw_is_not_claimed_instead() -> None:
    net = Net()
    net.gateways["new"].attach(VM, HOMES, 7, HANDOFF, net.now)
    net.run(1)
    net.gateways["new"].release(VM, HOMES, 7, net.now)
    net.run(1)
    # Started here and shut off; one anchor does not know this gateway, and refuses the one and the other.
    strangers = {address: known for address, known in RULES.gateways.items() if known.name != "old"}
    net.tables["anchor2"].rules = replace(RULES, gateways=strangers)
    net.gateways["old"].attach(VM, HOMES, 7, START, net.now)
    net.run(2)
    assert [net.where(anchor) for anchor in ANCHORS] == [GATEWAYS["old"][1], None]
    net.gateways["old"].release(VM, HOMES, 7, net.now)
    net.run(2)
    # It runs elsewhere when that anchor learns to know this gateway.
    net.gateways["new"].attach(VM, HOMES, 7, START, net.now)
    net.run(2)
    net.tables["anchor2"].rules = RULES
    net.run(100)
    assert [net.where(anchor) for anchor in ANCHORS] == [GATEWAYS["new"][1]] * 2


@pytest.mark.parametrize("error", [-240.0, 240.0])
def test_a_clock_off_by_minutes_is_told_and_the_vm_is_bound_all_the_same(error: float) -> None:
    net = Net()
    net.clock_error["old"] = error
    net.gateways["old"].attach(VM, HOMES, 1, HANDOFF, net.now)
    net.run(1)
    corrected = next(outcome for _, _, outcome in net.outcomes if outcome.kind == "corrected")
    assert "set both by NTP" in corrected.sentence
    assert all(net.where(anchor) == GATEWAYS["old"][1] for anchor in ANCHORS)
    net.run(300)
    assert net.kinds("old").count("corrected") == 2  # once for each anchor


def test_a_clock_set_back_does_not_lock_a_gateway_out() -> None:
    net = Net()
    net.clock_error["old"] = 5.0
    net.gateways["old"].attach(VM, HOMES, 1, HANDOFF, net.now)
    net.run(1)
    # The agent starts anew with its clock right: its timestamps are lower than what the anchors hold.
    net.gateways["old"] = Registrar(ANCHORS, GATEWAYS["old"][1], 120)
    net.clock_error["old"] = 0.0
    net.gateways["old"].attach(VM, HOMES, 1, REFRESH, net.now)
    net.run(1)
    assert net.gateways["old"].acknowledged(VM) == list(ANCHORS)


def test_a_withdrawal_reaches_the_anchors_and_is_then_forgotten() -> None:
    net = Net()
    registrar = net.gateways["old"]
    registrar.attach(VM, HOMES, 1, HANDOFF, net.now)
    net.run(1)
    registrar.withdraw(VM, net.now)
    net.run(1)
    assert net.where() is None
    assert registrar.status(VM) == {}
    sent = len(net.sent)
    net.run(500)
    assert len(net.sent) == sent


def test_a_silent_anchor_does_not_keep_a_withdrawal_for_ever() -> None:
    net = Net()
    registrar = net.gateways["old"]
    registrar.attach(VM, HOMES, 1, HANDOFF, net.now)
    net.run(1)
    net.down = {"anchor2"}
    registrar.withdraw(VM, net.now)
    net.run(60)
    assert registrar.status(VM) == {}
    assert registrar.next_due() is None or registrar.next_due() > net.now + 1


def test_a_restarted_anchor_gets_everything_back_at_once() -> None:
    net = Net()
    registrar = net.gateways["old"]
    vms = [f"{number:08x}-0000-0000-0000-000000000000" for number in range(1000)]
    for number, vm in enumerate(vms):
        registrar.attach(vm, (IPv6Network((HOMES[0].network_address + number).packed),), 1, HANDOFF, net.now)
    net.run(2)
    net.tables["anchor2"] = BindingTable(RULES)
    assert registrar.anchor_restarted("anchor2", net.now) == 1000
    net.run(1)
    assert len(net.tables["anchor2"]) == 1000


def test_a_claim_goes_ahead_of_thousands_of_refreshes() -> None:
    net = Net(delay=0.2)
    registrar = net.gateways["old"]
    vms = [f"{number:08x}-0000-0000-0000-000000000000" for number in range(3000)]
    for number, vm in enumerate(vms):
        registrar.attach(
            vm, (IPv6Network((HOMES[0].network_address + 1 + number).packed),), 1, REFRESH, net.now
        )
    net.run(0.05)
    registrar.attach(VM, HOMES, 1, HANDOFF, net.now)
    net.run(0.11)
    assert net.where() == GATEWAYS["old"][1]
    net.run(5)
    assert len(net.tables["anchor1"]) == 3001


def _due(registrar: Registrar, begin: float, end: float) -> list[Outgoing]:
    """What is sent in so many seconds, when nothing is answered."""
    steps = range(int(begin * 1000), int(end * 1000))
    return [outgoing for step in steps for outgoing in registrar.due(step / 1000, WALL + step / 1000)]


def _crowd(registrar: Registrar, count: int, now: float = 0.0) -> None:
    for number in range(count):
        homes = (IPv6Network((HOMES[0].network_address + 1 + number).packed),)
        registrar.attach(f"{number:08x}-0000-0000-0000-000000000000", homes, 1, REFRESH, now)


def test_few_messages_wait_at_an_anchor_that_is_near_and_many_are_under_way_to_one_that_is_far() -> None:
    net = Net(delay=0.2)
    registrar = net.gateways["old"]
    registrar.anchor_answers("anchor1", 0.001, 0.0)
    registrar.anchor_answers("anchor2", 0.2, 0.0)
    _crowd(registrar, 2000)
    sent = [outgoing.anchor for outgoing in _due(registrar, 0.0, 0.5)]
    assert (sent.count("anchor1"), sent.count("anchor2")) == (32, 500)
    # A queue of our own making does not let us make a longer one.
    for _ in range(20):
        registrar.anchor_answers("anchor1", 0.5, 0.0)
    assert _due(registrar, 0.5, 0.6) == []
    # A claim goes first, and waits for nobody.
    registrar.attach(VM, HOMES, 1, HANDOFF, 5.0)
    assert [outgoing.registration.vm for outgoing in registrar.due(5.0, WALL + 5)][:2] == [VM, VM]


def _answered(registrar: Registrar, sent: list[Outgoing], now: float, granted_seconds: int = 120) -> None:
    for one in sent:
        told = Acknowledgement(one.registration.vm, 0, one.sequence, granted_seconds, one.registration.ticks)
        registrar.acknowledge(one.anchor, told, now)


def test_what_is_routine_leaves_time_for_others_and_waits_for_a_claim() -> None:
    registrar = Registrar(ANCHORS, GATEWAYS["old"][1], 120)
    _crowd(registrar, 2000)
    sent = _due(registrar, 0.0, 0.2)
    # Not as fast as it can, also where anchors answer at once.
    assert 16 <= len(registrar.due(0.2, WALL)) + len(sent) <= 820
    _answered(registrar, sent, 0.2)
    registrar.attach(VM, HOMES, 1, HANDOFF, 0.3)
    claims = _due(registrar, 0.3, 0.34)
    assert {outgoing.registration.vm for outgoing in claims} == {VM}
    _answered(registrar, claims[:2], 0.34)
    assert len(_due(registrar, 0.34, 0.35)) >= 16


def test_what_an_anchor_missed_holds_nothing_up_once_it_is_answered() -> None:
    registrar = Registrar(["anchor1"], GATEWAYS["old"][1], 120)
    registrar.attach(VM, HOMES, 1, HANDOFF, 0.0)
    assert len(registrar.due(0.0, WALL)) == 1
    registrar.anchor_returned("anchor1", 0.1)
    again = registrar.due(0.1, WALL)
    assert len(again) == 1
    _answered(registrar, again, 0.12)
    # The next one, too, lets what is routine go on with its answer.
    _crowd(registrar, 100, 1.0)
    registrar.attach(VM, HOMES, 2, HANDOFF, 1.0)
    claim = registrar.due(1.0, WALL)
    assert [outgoing.registration.vm for outgoing in claim] == [VM]
    _answered(registrar, claim, 1.005)
    assert registrar.due(1.006, WALL)


def test_refreshes_get_through_while_hand_overs_follow_each_other() -> None:
    registrar = Registrar(ANCHORS, GATEWAYS["old"][1], 120)
    _crowd(registrar, 2000)
    routine = 0
    for step in range(100):
        now = step / 100
        registrar.give_way(now)
        sent = registrar.due(now, WALL + now)
        routine += len(sent)
        _answered(registrar, sent, now)
    assert routine >= 72


@pytest.mark.parametrize("granted_seconds", [120, 40])
def test_no_binding_of_thousands_runs_out_while_hand_overs_follow_each_other(granted_seconds: int) -> None:
    registrar = Registrar(ANCHORS, GATEWAYS["old"][1], 120)
    _crowd(registrar, 5000)
    routine, most, seconds = 0, 0, 3
    for step in range(seconds * 500):
        now = step / 500
        registrar.give_way(now)
        sent = registrar.due(now, WALL + now)
        routine += len(sent)
        most = max(most, len(sent))
        _answered(registrar, sent, now, granted_seconds)
    # Half a lifetime, less the share by which refreshes are spread.
    assert routine / seconds >= len(ANCHORS) * 5000 / (granted_seconds / 2 * 0.75)
    # And what a claim finds in its way is no more than ever.
    assert most <= 8


@pytest.mark.parametrize("how", ["withdraw", "release"])
def test_what_is_not_here_any_more_is_told_before_what_only_confirms(how: str) -> None:
    registrar = Registrar(["anchor1"], GATEWAYS["old"][1], 120)
    registrar.attach(VM, HOMES, 1, HANDOFF, 0.0)
    _answered(registrar, registrar.due(0.0, WALL), 0.01)
    _crowd(registrar, 2000, 1.0)
    assert len(registrar.due(1.0, WALL)) == 8
    if how == "withdraw":
        registrar.withdraw(VM, 1.001)
    else:
        registrar.release(VM, HOMES, 1, 1.001)
    first = registrar.due(1.002, WALL)[0].registration
    assert (first.vm, first.lifetime_seconds) == (VM, 0)


def test_a_routine_message_that_is_lost_is_sent_again_though_the_window_is_full() -> None:
    registrar = Registrar(["anchor1"], GATEWAYS["old"][1], 120)
    registrar.anchor_answers("anchor1", 0.001, 0.0)
    _crowd(registrar, 40)
    first = {outgoing.registration.vm for outgoing in _due(registrar, 0.0, 0.5)}
    assert len(first) == 32
    assert {outgoing.registration.vm for outgoing in _due(registrar, 0.5, 2.5)} == first


def test_vms_that_were_registered_together_do_not_come_back_together() -> None:
    registrar = Registrar(["anchor1"], GATEWAYS["old"][1], 120)
    _crowd(registrar, 600)
    for step in range(600):
        _answered(registrar, registrar.due(step / 1000, WALL), step / 1000)
    per_second = []
    for second in range(44, 62):
        sent = _due(registrar, second, second + 1)
        _answered(registrar, sent, second + 1)
        per_second.append(len(sent))
    assert sum(per_second) == 600
    assert max(per_second) < 100


def test_an_anchor_that_answers_again_hears_at_once_what_it_missed() -> None:
    net = Net()
    registrar = net.gateways["old"]
    net.down = {"anchor2"}
    registrar.attach(VM, HOMES, 1, HANDOFF, net.now)
    net.run(60.5)
    net.down = set()
    registrar.anchor_returned("anchor2", net.now)
    net.run(0.05)
    assert net.where("anchor2") == GATEWAYS["old"][1]


def test_a_refusal_is_told_and_tried_again_later() -> None:
    net = Net()
    registrar = net.gateways["old"]
    registrar.attach(VM, (IPv6Network("2001:db8:200::1/128"),), 1, HANDOFF, net.now)
    net.run(20)
    refused = [outcome for _, _, outcome in net.outcomes if outcome.kind == "refused"]
    assert len(refused) == 2
    assert "155 (not authorized for prefix)" in refused[0].sentence
    net.run(20)
    assert net.kinds("old").count("refused") == 4


def test_an_answer_that_nobody_waits_for_is_ignored() -> None:
    registrar = Registrar(ANCHORS, GATEWAYS["old"][1], 120)
    stray = Acknowledgement(VM, Status.ACCEPTED, 1, 120, 0)
    assert registrar.acknowledge("anchor1", stray, 0.0).kind == "ignored"
    registrar.attach(VM, HOMES, 1, HANDOFF, 0.0)
    registrar.due(0.0, WALL)
    assert registrar.acknowledge("anchor1", Acknowledgement(VM, 0, 999, 120, 0), 0.0).kind == "ignored"


def test_an_answer_of_another_time_is_ignored_though_its_number_fits() -> None:
    registrar = Registrar(ANCHORS, GATEWAYS["old"][1], 120)
    registrar.attach(VM, HOMES, 1, HANDOFF, 0.0)
    sent = {outgoing.anchor: outgoing for outgoing in registrar.due(0.0, WALL)}["anchor1"]
    ticks = sent.registration.ticks
    replayed = Acknowledgement(VM, Status.ACCEPTED, sent.sequence, 120, ticks - 1)
    assert registrar.acknowledge("anchor1", replayed, 0.0).kind == "ignored"
    # That of an earlier of several copies counts: it names its own time.
    registrar.due(10.0, WALL + 10)
    assert registrar.acknowledge("anchor1", replace(replayed, ticks=ticks), 10.0).kind == "registered"


def test_numbers_do_not_begin_anew_at_each_start() -> None:
    def first() -> int:
        registrar = Registrar(ANCHORS, GATEWAYS["old"][1], 120)
        registrar.attach(VM, HOMES, 1, HANDOFF, 0.0)
        return registrar.due(0.0, WALL)[0].sequence

    assert len({first() for _ in range(8)}) > 1
    assert len({Pulse(1.0, 0.0).due(0.0, WALL).sequence for _ in range(8)}) > 1  # type: ignore[union-attr]


def test_silence_is_noticed_when_it_is_due_and_not_a_beat_later() -> None:
    pulse = Pulse(0.5, 0.0)
    request = pulse.due(0.0, WALL)
    assert request is not None
    pulse.answered(Heartbeat(request.sequence, response=True), 0.1)
    for at in (0.5, 1.0, 1.5):
        assert pulse.due(at, WALL + at)
    # From the first that was not answered: two more, and a round trip.
    assert pulse.next_at == pytest.approx(0.5 + 1.0 + 0.1)
    assert not pulse.fell_silent(1.59)
    assert pulse.fell_silent(1.61)


@pytest.mark.parametrize("outstanding", [False, True])
def test_who_stood_still_takes_nobody_else_for_silent(*, outstanding: bool) -> None:
    pulse = Pulse(0.5, 0.0)
    request = pulse.due(0.0, WALL)
    assert request is not None
    pulse.answered(Heartbeat(request.sequence, response=True), 0.1)
    if outstanding:
        # Answered at once, but that waits in our socket.
        request = pulse.due(0.5, WALL)
        assert request is not None
    again = pulse.due(9.0, WALL)
    assert again is not None
    assert not pulse.fell_silent(9.0)
    assert pulse.answered(Heartbeat(again.sequence, response=True), 9.1) is not None
    assert pulse.up
    assert pulse.due(9.5, WALL)
    assert not pulse.fell_silent(10.5)
    assert pulse.fell_silent(10.7)


def test_who_comes_back_to_what_went_elsewhere_hears_where_it_is() -> None:
    net = Net()
    net.gateways["old"].attach(VM, HOMES, 1, HANDOFF, net.now)
    net.run(1)
    net.gateways["new"].attach(VM, HOMES, 2, HANDOFF, net.now)
    net.run(1)
    registrar = net.gateways["old"]
    registrar.forget(VM)
    net.outcomes.clear()
    # For as long as it takes: at first no anchor can be reached.
    net.down = set(ANCHORS)
    registrar.release(VM, HOMES, 1, net.now)
    net.run(120)
    net.down = set()
    net.run(4)
    (lost,) = [outcome for _, who, outcome in net.outcomes if who == "old" and outcome.kind == "lost"]
    assert (lost.holder, lost.epoch) == (GATEWAYS["new"][1], 2)
    assert [net.where(anchor) for anchor in ANCHORS] == [GATEWAYS["new"][1]] * 2
    # In the epoch of the holder, too, which the answer is a yes to.
    registrar.release(VM, HOMES, 2, net.now)
    net.run(1)
    assert net.kinds("old").count("lost") == 2
    assert [net.where(anchor) for anchor in ANCHORS] == [GATEWAYS["new"][1]] * 2


def test_what_is_nowhere_is_told_once_all_anchors_have_said_so() -> None:
    net = Net()
    registrar = net.gateways["old"]
    registrar.attach(VM, HOMES, 1, HANDOFF, net.now)
    net.run(1)
    net.down = {"anchor2"}
    registrar.release(VM, HOMES, 1, net.now)
    net.run(30)
    assert "nowhere" not in net.kinds("old")
    net.down = set()
    net.run(4)
    (told,) = [outcome for _, _, outcome in net.outcomes if outcome.kind == "nowhere"]
    assert told.epoch == 1
    assert registrar.status(VM) == {}
    registrar.release("22222222-2222-3333-4444-555555555555", HOMES, 1, net.now)
    net.run(1)
    assert [outcome.epoch for _, _, outcome in net.outcomes if outcome.kind == "nowhere"] == [1, None]


def test_a_vm_that_was_shut_off_elsewhere_and_starts_here_takes_up_the_epoch() -> None:
    net = Net()
    net.gateways["old"].attach(VM, HOMES, 4, HANDOFF, net.now)
    net.run(1)
    net.gateways["old"].withdraw(VM, net.now)
    net.run(1)
    net.gateways["new"].attach(VM, HOMES, 0, START, net.now)
    net.run(1)
    assert "adopted" in net.kinds("new")
    assert "lost" not in net.kinds("new")
    assert [net.where(anchor) for anchor in ANCHORS] == [GATEWAYS["new"][1]] * 2
    assert net.gateways["new"].epoch(VM) == 4
    # Where somebody holds it, a start in an older epoch is none.
    net.gateways["old"].attach(VM, HOMES, 0, START, net.now)
    net.run(1)
    assert "lost" in net.kinds("old")
    assert [net.where(anchor) for anchor in ANCHORS] == [GATEWAYS["new"][1]] * 2


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    loss=st.sampled_from([0.0, 0.1, 0.5]),
    moves=st.lists(st.tuples(st.sampled_from(sorted(GATEWAYS)), st.floats(0.0, 3.0)), min_size=1, max_size=6),
    errors=st.tuples(st.floats(-100, 100), st.floats(-100, 100)),
)
def test_in_the_end_every_anchor_knows_the_last_move(
    seed: int, loss: float, moves: list[tuple[str, float]], errors: tuple[float, float]
) -> None:
    net = Net(seed, delay=0.1, loss=loss)
    net.clock_error = dict(zip(sorted(GATEWAYS), errors, strict=True))
    for epoch, (gateway, pause) in enumerate(moves, 1):
        net.gateways[gateway].attach(VM, HOMES, epoch, HANDOFF, net.now)
        net.run(pause)
    net.run(300)
    last = moves[-1][0]
    assert [net.where(anchor) for anchor in ANCHORS] == [GATEWAYS[last][1]] * 2
    assert net.gateways[last].acknowledged(VM) == list(ANCHORS)
    for other in GATEWAYS.keys() - {last}:
        assert net.gateways[other].status(VM) == {}
