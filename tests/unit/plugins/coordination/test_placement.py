# SPDX-License-Identifier: GPL-3.0-or-later
"""Where replicas go when nobody says so."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ansible_collections.lifeboat.evacuation.plugins.filter.placement import moved_away, placement
from ansible_collections.lifeboat.evacuation.plugins.module_utils._placement import (
    QEMU_OVERHEAD_BYTES,
    Placement,
    place,
)
from hypothesis import given, settings
from hypothesis import strategies as st

GIB = 2**30


def room(
    name: str, *domains: dict[str, Any], memory: float = 16, store: float = 100, **more: Any
) -> dict[str, Any]:
    """A hypervisor with so many GiB free."""
    return {
        "name": name,
        "site": name.rstrip("0123456789"),
        "memory_total_bytes": 32 * GIB,
        "memory_free_bytes": memory * GIB,
        "store": {"size_bytes": 200 * GIB, "free_bytes": (store + 1) * GIB, "minimum_free_bytes": GIB},
        "peers": [{"name": peer, "state": "up"} for peer in ("backup1", "backup2")],
        "domains": list(domains),
        **more,
    }


def vm(
    name: str, memory: float = 2, disks: float = 10, peer: str | None = None, **more: Any
) -> dict[str, Any]:
    return {"uuid": f"u-{name}", "name": name, "running": True, "peer": peer,
            "coverage": None, "memory_bytes": memory * GIB - QEMU_OVERHEAD_BYTES,
            "disk_bytes": disks * GIB, **more}  # fmt: skip


def asked(*vms: str | dict[str, Any], peers: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"vms": [{"name": one} if isinstance(one, str) else one for one in vms], "candidates": list(peers)}


def chosen(told: Placement) -> dict[str, tuple[str, str]]:
    return {
        name: (peer, told.reasons[host][name])
        for host, vms in told.peers.items()
        for name, peer in vms.items()
    }


def test_the_one_with_most_room_is_taken_and_said_why() -> None:
    rooms = {
        "home1": room("home1", vm("a"), vm("b", memory=6)),
        "backup1": room("backup1", memory=10),
        "backup2": room("backup2", memory=8),
    }
    told = place({"home1": asked("a", "b")}, rooms)
    # The large one first, to where there is most; then the other has most.
    assert chosen(told) == {"b": ("backup1", "most-room"), "a": ("backup2", "most-room")}
    assert told.told[0] == (
        "VM b of home1: to backup1 (most-room); 4.0 GiB of memory and 90.0 GiB of store left there"
    )
    assert told.findings == []


def test_space_counts_as_memory_does() -> None:
    rooms = {"home1": room("home1", vm("a", disks=60)), "backup1": room("backup1", store=50),
             "backup2": room("backup2", memory=4)}  # fmt: skip
    assert chosen(place({"home1": asked("a")}, rooms)) == {"a": ("backup2", "only-one-with-room")}


def test_what_is_promised_already_is_counted_also_that_of_hosts_beside_the_run() -> None:
    rooms = {
        "home1": room("home1", vm("a", memory=4)),
        # Not to be placed now, but its VM will come to backup1; half of its first copy is there.
        "home2": room("home2", vm("other", memory=14, disks=50, peer="backup1", coverage=0.5)),
        "backup1": room("backup1", memory=16),
        "backup2": room("backup2", memory=5),
    }
    told = place({"home1": asked("a")}, rooms)
    assert chosen(told) == {"a": ("backup2", "only-one-with-room")}


def test_who_is_placed_stays_and_who_names_a_peer_is_obeyed_however_full_it_is() -> None:
    rooms = {"home1": room("home1", vm("kept", peer="backup1"), vm("named"), vm("c")),
             "backup1": room("backup1", memory=0.5), "backup2": room("backup2")}  # fmt: skip
    told = place({"home1": asked("kept", {"name": "named", "peer": "backup1"}, "c")}, rooms)
    assert chosen(told) == {"kept": ("backup1", "kept"), "named": ("backup1", "named"),
                            "c": ("backup2", "only-one-with-room")}  # fmt: skip
    only = place({"home1": asked("c", peers=("backup1",))}, rooms)
    assert (chosen(only), only.findings) == ({"c": ("backup1", "only-peer")}, [])


def test_a_group_goes_to_one_place_while_it_has_room() -> None:
    members = [{"name": name, "group": "shop"} for name in ("a", "b", "c")]
    rooms = {"home1": room("home1", *(vm(one["name"], memory=4) for one in members)),
             "backup1": room("backup1", memory=9), "backup2": room("backup2", memory=8.5)}  # fmt: skip
    assert chosen(place({"home1": asked(*members)}, rooms)) == {
        "a": ("backup1", "most-room"),
        "b": ("backup1", "with-its-group"),
        "c": ("backup2", "only-one-with-room"),
    }


def test_everything_that_does_not_fit_is_told_at_once_with_the_facts() -> None:
    rooms = {
        "home1": room("home1", vm("big", memory=20), vm("wide", disks=150), vm("a")),
        "backup1": room("backup1"),
        "backup2": {"error": "was not reached"},
    }
    told = place({"home1": asked("big", "wide", "gone", "a")}, rooms)
    assert sorted(finding.split(" of home1")[0] for finding in told.findings) == [
        "VM big",
        "VM gone",
        "VM wide",
    ]
    text = " | ".join(told.findings)
    assert "needs 20.0 GiB of memory and 10.0 GiB of store" in text
    assert "backup1 has 16.0 GiB of memory and 100.0 GiB of store left" in text
    assert "backup2 did not say what room it has (was not reached)" in text
    assert "is not defined there" in text
    assert "lifeboat_peers" in text


@pytest.mark.parametrize(
    ("peers", "rooms", "part"),
    [
        (("backup1", "backup7"), {}, "backup7 is no peer of home1's proxy (run site_setup)"),
        (("backup1", "backup2"), {"backup2": {"site": "home"}}, "backup2 stands at the same site"),
    ],
    ids=["not-configured", "same-site"],
)
def test_a_peer_that_cannot_be_one_is_said(
    peers: tuple[str, ...], rooms: dict[str, dict[str, Any]], part: str
) -> None:
    all_rooms = {"home1": room("home1", vm("a", memory=20)), "backup1": room("backup1"),
                 "backup2": room("backup2")}  # fmt: skip
    for name, changed in rooms.items():
        all_rooms[name] |= changed
    (finding,) = place({"home1": asked("a", peers=peers)}, all_rooms).findings
    assert part in finding


def test_a_host_that_says_nothing_is_a_finding_where_there_is_a_choice() -> None:
    rooms = {"home1": {"error": "proxy down"}, "backup1": room("backup1")}
    told = place({"home1": asked("a", peers=("backup1", "backup2"))}, rooms)
    assert told.findings == ["VM a of home1: its host did not say what it has (proxy down); mend that first"]
    # Without one its own proxy says so, as it always did.
    assert place({"home1": asked("a", peers=("backup1",))}, rooms).findings == []


def test_one_without_a_choice_comes_before_those_that_have_one() -> None:
    rooms = {"home1": room("home1", vm("a", memory=8), vm("b", memory=6)),
             "home2": room("home2", vm("c", memory=6)),
             "backup1": room("backup1", memory=10), "backup2": room("backup2", memory=9)}  # fmt: skip
    told = place({"home1": asked("a"), "home2": asked("c", peers=("backup1",))}, rooms)
    assert chosen(told) == {"c": ("backup1", "only-peer"), "a": ("backup2", "only-one-with-room")}


@pytest.mark.parametrize(
    ("unknown", "part"),
    [
        ({"disk_bytes": None}, "its host does not know how large its images are; see `virsh dumpxml a`"),
        ({"memory_bytes": None}, "its host does not know how much memory it has;"),
        ({"memory_bytes": None, "disk_bytes": None}, "how much memory it has and how large its images are;"),
    ],
)
def test_what_is_not_known_does_not_fit_anywhere(unknown: dict[str, Any], part: str) -> None:
    rooms = {"home1": room("home1", vm("a", **unknown)), "backup1": room("backup1"),
             "backup2": room("backup2")}  # fmt: skip
    told = place({"home1": asked("a")}, rooms)
    assert (told.peers, part in " | ".join(told.findings)) == ({}, True)
    for way_out in (asked({"name": "a", "peer": "backup1"}), asked("a", peers=("backup1",))):
        assert place({"home1": way_out}, rooms).findings == []


_SIZES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 80)), max_size=8)


@settings(deadline=None)
@given(
    home1=_SIZES,
    home2=_SIZES,
    memory=st.lists(st.integers(0, 30), min_size=3, max_size=3),
    turned=st.booleans(),
    only=st.booleans(),
)
def test_nobody_is_promised_what_is_not_there_and_the_order_of_answers_is_nothing(
    home1: list[tuple[int, int]],
    home2: list[tuple[int, int]],
    memory: list[int],
    turned: bool,
    only: bool,
) -> None:
    peers = [f"backup{number}" for number in range(3)]
    rooms = {
        f"home{number}": room(
            f"home{number}",
            *(vm(f"{number}-{index}", size, disks) for index, (size, disks) in enumerate(sizes)),
            peers=[{"name": peer, "state": "up"} for peer in peers],
        )
        for number, sizes in ((1, home1), (2, home2))
    }
    rooms |= {peer: room(peer, memory=free) for peer, free in zip(peers, memory, strict=True)}
    wishes = {name: asked(*(one["name"] for one in rooms[name]["domains"])) for name in ("home1", "home2")}
    if only:
        # Those of one host are obeyed wherever they are told to go, however little room there is.
        wishes["home2"]["candidates"] = ["backup0"]
    told = place(wishes, rooms)
    if turned:
        again = place(dict(reversed(wishes.items())), dict(reversed(rooms.items())))
        assert (again.peers, again.findings) == (told.peers, told.findings)
    needs = {one["name"]: (one["memory_bytes"] + QEMU_OVERHEAD_BYTES, one["disk_bytes"])
             for name in wishes for one in rooms[name]["domains"]}  # fmt: skip
    placed = [(vm_name, peer) for vms in told.peers.values() for vm_name, peer in vms.items()]
    assert len(placed) + len(told.findings) == len(needs)
    for number, peer in enumerate(peers):
        here = [needs[name] for name, where in placed if where == peer]
        free = memory[number] * GIB, 100 * GIB
        obeyed = [needs[name] for name in told.peers.get("home2", {}) if only and number == 0]
        for index, room_there in enumerate(free):
            # Nobody who may choose comes on top of what is there, or of what had to go there.
            assert sum(one[index] for one in here) <= max(room_there, sum(one[index] for one in obeyed))


def test_the_filter_takes_results_as_ansible_registers_them() -> None:
    own = {"home1": {"hypervisor": room("home1", vm("a"))}}
    beside = [{"item": "backup1", "hypervisor": room("backup1")},
              {"item": "backup2", "unreachable": True, "msg": "no route"}]  # fmt: skip
    told = placement({"home1": asked("a")}, own, beside)
    assert told["peers"] == {"home1": {"a": "backup1"}}
    json.dumps(told)


def test_a_vm_that_was_made_anew_by_the_name_of_one_that_left_is_another_vm() -> None:
    """By its name alone it was taken for the one that left, and stayed unprotected."""
    tombstone = {"uuid": "u-1", "name": "web1", "peer": "backup1", "sentence": "It runs at backup1."}
    old, new = ({"uuid": uuid, "name": "web1"} for uuid in ("u-1", "u-2"))

    def gone(listed: str, *domains: dict[str, str]) -> list[str]:
        return [vm["name"] for vm in moved_away([{"name": listed}], [], domains, [tombstone])]

    assert gone("web1", new) == []
    assert gone("web1") == gone("web1", old) == ["web1"], "it alone is meant"
    assert gone("u-1", new) == ["u-1"], "by its UUID it always is"
    assert gone("u-2", new) == []
