# SPDX-License-Identifier: GPL-3.0-or-later
"""The anchor's rules: who may change a binding, and who may not."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv6Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobility_agent.anchor.bindings import Binding, BindingTable, KnownGateway, Rules, Verdict
from mobility_agent.messages.headers import Status
from mobility_agent.messages.options import HandoffIndicator, Timestamp
from mobility_agent.messages.registration import Registration

VM = "11111111-2222-3333-4444-555555555555"
OTHER_VM = "99999999-2222-3333-4444-555555555555"
HOME = IPv6Network("2001:db8:100::5/128")
WALL = 1_700_000_000.0
OLD, NEW = IPv6Address("2001:db8:1::2"), IPv6Address("2001:db8:2::2")
OLD_CARE_OF, NEW_CARE_OF = IPv6Address("2001:db8:1::d"), IPv6Address("2001:db8:2::d")
RULES = Rules(
    prefixes=[IPv6Network("2001:db8:100::/48")],
    gateways={OLD: KnownGateway("old", OLD_CARE_OF), NEW: KnownGateway("new", NEW_CARE_OF)},
)
CARE_OF = {OLD: OLD_CARE_OF, NEW: NEW_CARE_OF}
REFRESH, HANDOFF = HandoffIndicator.UNCHANGED, HandoffIndicator.BETWEEN_GATEWAYS
START = HandoffIndicator.NEW_INTERFACE


class Anchor:
    """A binding table with a clock that each call may turn on."""

    def __init__(self) -> None:
        self.table = BindingTable(RULES)
        self.now = 1000.0

    @property
    def wall(self) -> float:
        return WALL + self.now

    def ask(
        self,
        gateway: IPv6Address,
        epoch: int,
        handoff: HandoffIndicator,
        *,
        at: float = 0.0,
        lifetime: int = 120,
        vm: str = VM,
        homes: tuple[IPv6Network, ...] = (HOME,),
        care_of: IPv6Address | None = None,
    ) -> Verdict:
        """A registration made ``at`` seconds from now."""
        ticks = Timestamp.of_seconds(self.wall + at).ticks
        asked = Registration(vm, homes, care_of or CARE_OF[gateway], epoch, ticks, lifetime, handoff)
        return self.table.register(asked, gateway, 1, now=self.now, wall=self.wall)

    def where(self, vm: str = VM) -> IPv6Address | None:
        """Where packets for the VM go."""
        binding = self.table.get(vm)
        return binding.care_of if binding is not None and binding.active else None


@pytest.fixture
def anchor() -> Anchor:
    return Anchor()


def test_a_first_registration_is_bound_and_refreshed(anchor: Anchor) -> None:
    assert anchor.ask(OLD, 1, HANDOFF).cause == "bound"
    anchor.now += 60
    assert anchor.ask(OLD, 1, REFRESH).cause == "refreshed"
    binding = anchor.table.get(VM)
    assert binding is not None
    assert binding.since_seconds == WALL + 1000
    assert binding.expires_seconds == anchor.now + 120


def test_a_newer_epoch_takes_over_and_the_old_gateway_is_to_be_told(anchor: Anchor) -> None:
    anchor.ask(OLD, 1, HANDOFF)
    verdict = anchor.ask(NEW, 2, HANDOFF, at=-5)
    assert verdict.accepted
    assert verdict.displaced is not None
    assert verdict.displaced.gateway == OLD
    assert anchor.where() == NEW_CARE_OF


def test_the_old_gateways_refresh_does_not_steal_the_binding_back(anchor: Anchor) -> None:
    anchor.ask(OLD, 1, HANDOFF)
    anchor.ask(NEW, 2, HANDOFF)
    for handoff in (REFRESH, HANDOFF, START):
        verdict = anchor.ask(OLD, 1, handoff, at=5)
        assert (verdict.status, verdict.cause) == (Status.SEQUENCE_OUT_OF_WINDOW, "stale-epoch")
    assert anchor.where() == NEW_CARE_OF


def test_a_hand_off_needs_a_newer_epoch(anchor: Anchor) -> None:
    anchor.ask(OLD, 4, HANDOFF)
    verdict = anchor.ask(NEW, 4, HANDOFF, at=5)
    assert (verdict.status, verdict.cause) == (Status.SEQUENCE_OUT_OF_WINDOW, "same-epoch")
    assert anchor.where() == OLD_CARE_OF


def test_a_refresh_from_a_care_of_address_that_is_not_bound_is_refused(anchor: Anchor) -> None:
    anchor.ask(OLD, 4, HANDOFF)
    verdict = anchor.ask(NEW, 4, REFRESH, at=5)
    assert (verdict.status, verdict.cause) == (Status.ADMINISTRATIVELY_PROHIBITED, "not-bound")
    # Nor from one that had it and may not know yet that it lost it, when nobody has it.
    anchor.ask(NEW, 5, HANDOFF, at=6)
    anchor.ask(NEW, 5, REFRESH, at=7, lifetime=0)
    assert anchor.ask(OLD, 5, REFRESH, at=8).cause == "not-bound"
    assert anchor.where() is None


def test_one_that_only_asks_in_the_holders_epoch_does_not_lock_the_holder_out(anchor: Anchor) -> None:
    # This anchor was away while the VM went from OLD to NEW in epoch 2.
    anchor.ask(OLD, 1, HANDOFF)
    assert anchor.ask(OLD, 2, REFRESH, at=1, lifetime=0).cause == "withdrawn"
    assert anchor.ask(NEW, 2, REFRESH, at=2).accepted
    assert anchor.where() == NEW_CARE_OF


def test_a_gateway_on_the_same_home_link_is_not_awaited() -> None:
    prefix = RULES.prefixes[0]
    both = Anchor()
    both.table = BindingTable(replace(RULES, home_gateways=[(prefix, frozenset({OLD, NEW}))]))
    one = Anchor()
    one.table = BindingTable(replace(RULES, home_gateways=[(prefix, frozenset({OLD}))]))
    for anchor in both, one:
        anchor.ask(OLD, 1, HANDOFF)
        anchor.ask(NEW, 2, HANDOFF)
    assert (both.table.awaited(prefix), one.table.awaited(prefix)) == (0, 1)


def test_of_two_starts_in_one_epoch_the_later_wins(anchor: Anchor) -> None:
    anchor.ask(OLD, 1, START, at=1)
    verdict = anchor.ask(NEW, 1, START, at=2)
    assert verdict.accepted
    assert verdict.displaced is not None
    assert anchor.ask(OLD, 1, START, at=1.5).cause == "replay"
    assert anchor.where() == NEW_CARE_OF


def test_a_replayed_update_is_refused_and_told_what_is_held(anchor: Anchor) -> None:
    first = anchor.ask(OLD, 1, HANDOFF)
    again = anchor.ask(OLD, 1, HANDOFF)
    assert (again.status, again.cause) == (Status.TIMESTAMP_TOO_LOW, "replay")
    assert first.after is not None
    assert again.ticks == first.after.ticks


@pytest.mark.parametrize(("at", "word"), [(300.0, "ahead of"), (-300.0, "behind")])
def test_a_clock_off_by_minutes_is_refused_with_the_anchors_time(
    anchor: Anchor, at: float, word: str
) -> None:
    verdict = anchor.ask(OLD, 1, HANDOFF, at=at)
    assert verdict.status is Status.TIMESTAMP_MISMATCH
    assert f"clock of old is 300.0 s {word}" in verdict.sentence
    assert verdict.ticks == Timestamp.of_seconds(anchor.wall).ticks
    assert anchor.where() is None


@pytest.mark.parametrize(
    ("change", "status", "cause"),
    [
        (
            {"homes": (IPv6Network("2001:db8:200::1/128"),)},
            Status.NOT_AUTHORIZED_FOR_PREFIX,
            "outside-prefixes",
        ),
        ({"homes": (IPv6Network("2001:db8::/32"),)}, Status.NOT_AUTHORIZED_FOR_PREFIX, "outside-prefixes"),
        ({"vm": OTHER_VM}, Status.NOT_AUTHORIZED_FOR_PREFIX, "duplicate-address"),
        ({"care_of": NEW_CARE_OF}, Status.ADMINISTRATIVELY_PROHIBITED, "foreign-care-of"),
    ],
)
def test_what_may_not_be_registered(
    anchor: Anchor, change: dict[str, object], status: Status, cause: str
) -> None:
    anchor.ask(OLD, 1, HANDOFF)
    verdict = anchor.ask(OLD, 2, HANDOFF, at=1, **change)  # type: ignore[arg-type]
    assert (verdict.status, verdict.cause) == (status, cause)
    assert verdict.before == verdict.after


def test_an_unknown_gateway_is_refused(anchor: Anchor) -> None:
    stranger = IPv6Address("2001:db8:3::2")
    verdict = anchor.ask(stranger, 9, HANDOFF, care_of=NEW_CARE_OF)
    assert verdict.status is Status.GATEWAY_NOT_AUTHORIZED


def test_a_withdrawal_by_another_changes_nothing(anchor: Anchor) -> None:
    anchor.ask(OLD, 1, HANDOFF)
    anchor.ask(NEW, 2, HANDOFF)
    assert anchor.ask(OLD, 2, REFRESH, at=1, lifetime=0).cause == "not-held"
    assert anchor.where() == NEW_CARE_OF


def test_a_withdrawn_address_may_be_another_vms_but_the_epoch_is_remembered(anchor: Anchor) -> None:
    anchor.ask(OLD, 3, HANDOFF)
    assert anchor.ask(OLD, 3, REFRESH, at=1, lifetime=0).cause == "withdrawn"
    assert anchor.ask(NEW, 1, START, vm=OTHER_VM).accepted
    anchor.ask(NEW, 1, REFRESH, at=1, vm=OTHER_VM, lifetime=0)
    assert anchor.ask(NEW, 2, START, at=2).cause == "stale-epoch"
    assert anchor.ask(NEW, 3, START, at=2).accepted


def test_what_is_not_refreshed_ends_and_may_come_back(anchor: Anchor) -> None:
    anchor.ask(OLD, 3, HANDOFF)
    anchor.now += 60
    anchor.ask(OLD, 3, REFRESH)
    anchor.now += 100
    assert anchor.table.expire(anchor.now) == []
    anchor.now += 20
    (ended,) = anchor.table.expire(anchor.now)
    assert ended.cause == "expired"
    assert anchor.where() is None
    assert len(anchor.table) == 0
    assert anchor.ask(OLD, 3, REFRESH).accepted
    assert anchor.where() == OLD_CARE_OF


def test_a_longer_lifetime_than_allowed_is_cut(anchor: Anchor) -> None:
    verdict = anchor.ask(OLD, 3, HANDOFF, lifetime=86400)
    assert verdict.after is not None
    assert verdict.after.lifetime_seconds == 600


def test_bindings_come_back_from_their_records(anchor: Anchor) -> None:
    anchor.ask(OLD, 3, HANDOFF)
    anchor.ask(NEW, 1, START, vm=OTHER_VM, homes=(IPv6Network("2001:db8:100:7::/64"),))
    anchor.ask(NEW, 1, REFRESH, at=1, vm=OTHER_VM, lifetime=0)
    restored = [
        Binding.from_record(b.vm, b.as_record(), now=50.0)
        for b in sorted(anchor.table.all(), key=lambda b: b.vm)
    ]
    expected = sorted(anchor.table.all(), key=lambda b: b.vm)
    assert [replace(b, expires_seconds=0) for b in restored] == [
        replace(b, expires_seconds=0) for b in expected
    ]
    assert restored[0].expires_seconds == 170.0
    table = BindingTable(RULES)
    table.restore(restored)
    assert len(table) == 1


asks = st.tuples(
    st.sampled_from([OLD, NEW]),
    st.integers(0, 4),
    st.sampled_from([REFRESH, HANDOFF, START]),
    st.floats(-9, 9),
    st.sampled_from([0, 120]),
)


@given(st.lists(asks, max_size=30))
def test_an_epoch_never_goes_back_and_a_replay_never_changes_anything(
    history: list[tuple[IPv6Address, int, HandoffIndicator, float, int]],
) -> None:
    anchor = Anchor()
    epoch, ticks = -1, -1
    accepted: list[tuple[IPv6Address, int, HandoffIndicator, float, int]] = []
    for gateway, asked_epoch, handoff, at, lifetime in history:
        verdict = anchor.ask(gateway, asked_epoch, handoff, at=at, lifetime=lifetime)
        if verdict.before != verdict.after and verdict.after is not None:
            assert (verdict.after.epoch, verdict.after.ticks) > (epoch, ticks)
            moved = verdict.before is not None and verdict.before.care_of != verdict.after.care_of
            if moved and verdict.before is not None and verdict.before.active:
                assert verdict.after.epoch > epoch or handoff is START
            if handoff is REFRESH and moved and verdict.before is not None:
                nobodys = not verdict.before.active and gateway not in verdict.before.untold
                assert verdict.after.epoch > epoch or nobodys or lifetime == 0
            epoch, ticks = verdict.after.epoch, verdict.after.ticks
            accepted.append((gateway, asked_epoch, handoff, at, lifetime))
        else:
            assert verdict.before == verdict.after
    held = anchor.table.get(VM)
    for gateway, asked_epoch, handoff, at, lifetime in accepted:
        anchor.ask(gateway, asked_epoch, handoff, at=at, lifetime=lifetime)
        assert anchor.table.get(VM) == held
