# SPDX-License-Identifier: GPL-3.0-or-later
"""All sites' addresses judged on the controller, with netaddr; hosts judge alike, with what Python brings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from small_parts.collection import importable

PREFIX, IPV4_PREFIX = "2001:db8:100::/64", "198.51.100.0/24"


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """The controller's and the hosts' judgement."""
    with importable(tmp_path_factory.mktemp("collections")):
        from ansible_collections.lifeboat.evacuation.plugins.module_utils import (
            _address_plan,
            _home_addresses,
        )

        yield _address_plan, _home_addresses


WRONG = [
    ("2001:db8:101::5", "is in no home prefix (2001:db8:100::/64)"),
    ("192.0.2.1", "is IPv4, which only BGP leads to a VM"),
    ("fe80::5", "give a global one"),
    ("ff02::1", "give a global one"),
    ("::", "give a global one"),
    ("2001:db8:100::g", "write it like 2001:db8:100::5"),
    ("2001:db8:100::5/64", "has host bits set"),
    ("", "write it like 2001:db8:100::5"),
]


@pytest.mark.parametrize(("text", "fact"), WRONG)
def test_an_address_that_cannot_be_meant_is_named(judges: tuple[Any, Any], text: str, fact: str) -> None:
    for judge in judges:
        (told,) = judge.findings([("VM web1", [text])], [PREFIX])
        assert told.startswith("VM web1: ")
        assert fact in told


def test_everything_that_is_wrong_is_told_at_once(judges: tuple[Any, Any]) -> None:
    plan, _ = judges
    wanted = [
        ("VM a", ["2001:db8:100::5", "2001:db8:200:1::/80"]),
        ("VM b", ["2001:DB8:100:0::5", "2001:db8:200:1::9", "nowhere"]),
    ]
    told = plan.findings(
        wanted, [PREFIX, "2001:DB8:100:0::/64", "2001:db8:200::/40", "2001:db8:200::/48", "x"]
    )
    assert [sentence.split("; ")[0] for sentence in told] == [
        "home prefix 2001:db8:200::/48: overlaps 2001:db8:200::/40",
        "home prefix x: invalid IPNetwork x",
        "VM b: 2001:db8:100::5 is VM a's too",
        "VM b: 2001:db8:200:1::9 is VM a's too",
        "VM b: nowhere: invalid IPNetwork nowhere",
    ]


lengths = st.sampled_from([128, 128, 124, 120, 112])
ipv4_networks = st.builds(
    lambda host, length: f"198.51.100.{host >> (32 - length) << (32 - length)}/{length}",
    st.integers(0, 0xFF),
    st.sampled_from([32, 32, 30, 28]),
)
networks = st.builds(
    lambda host, length: f"2001:db8:100::{host >> (128 - length) << (128 - length):x}/{length}",
    st.integers(0, 0x3FF),
    lengths,
)


@pytest.mark.parametrize("prefixes", [[PREFIX], [PREFIX, IPV4_PREFIX]])
@given(
    wanted=st.lists(
        st.tuples(st.sampled_from("abc"), st.lists(networks | ipv4_networks, max_size=4)), max_size=6
    )
)
def test_controller_and_hosts_judge_alike(
    judges: tuple[Any, Any], prefixes: list[str], wanted: list[tuple[str, list[str]]]
) -> None:
    plan, host = judges
    assert sorted(plan.findings(wanted, prefixes)) == sorted(host.findings(wanted, prefixes))


def test_ipv4_is_judged_like_ipv6_where_a_prefix_of_it_is_known(judges: tuple[Any, Any]) -> None:
    wanted = [
        ("VM a", ["198.51.100.5", "2001:db8:100::5"]),
        ("VM b", ["198.51.100.4/30"]),
        ("VM c", ["203.0.113.9"]),
    ]
    for judge in judges:
        assert judge.findings(wanted[:1], [PREFIX, IPV4_PREFIX]) == []
        shared, stray = judge.findings(wanted, [PREFIX, IPV4_PREFIX])
        assert shared == "VM b: 198.51.100.4/30 is VM a's too; give each VM addresses of its own"
        assert stray.startswith(f"VM c: 203.0.113.9 is in no home prefix ({PREFIX}, {IPV4_PREFIX})")


def test_a_controller_without_netaddr_is_told_what_to_install(
    judges: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _ = judges
    monkeypatch.setattr(plan, "MISSING", ImportError("No module named 'netaddr'"))
    assert plan.findings([], []) == []
    with pytest.raises(plan.NetaddrMissing, match="install it there"):
        plan.findings([], [PREFIX])
