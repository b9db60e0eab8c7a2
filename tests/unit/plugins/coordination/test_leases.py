# SPDX-License-Identifier: GPL-3.0-or-later
"""Two controllers for one site: one coordinates, the other is told who, and a dead one is in nobody's way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import ProxyError
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._coordinator import Refused
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._leases import Leases, TakenOver
from hypothesis import given, settings
from hypothesis import strategies as st

from precache_proxy.control.coordinator_lease import CoordinatorLease
from small_parts.parts import DATABASE, KNOWN
from unit.plugins.coordination.world import World

HOSTS = ("home1", "home2", "home3")


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Keeping:
    """A proxy that keeps a lease; one coordinator's way to it may be cut."""

    def __init__(self, name: str, lease: CoordinatorLease) -> None:
        self.name = name
        self.lease = lease
        self.trouble = ""

    def request(
        self, method: str, path: str, body: Mapping[str, object] | None = None, timeout_seconds: float = 30.0
    ) -> Any:
        assert (method, path) == ("POST", "/v1/coordinator")
        if self.trouble:
            raise ProxyError(self.trouble, f"{self.name}: {self.trouble}")
        told: Any = body
        granted = self.lease.ask(
            told["coordinator"], told["who"], told["for_seconds"], take_over=told["take_over"]
        )
        return {"granted": granted, "coordinator": self.lease.told()}

    def close(self) -> None:
        pass


class Site:
    """Three hypervisors, and controllers that take turns on one clock."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.clock = Clock()
        self.leases = {name: CoordinatorLease(self.clock) for name in HOSTS}
        self.ways: dict[str, dict[str, Keeping]] = {}
        self.said: list[str] = []
        self.waits: list[float] = []
        # What others do while one waits.
        self.meanwhile: Callable[[], object] = lambda: None
        self._pool = pool

    def controller(self, who: str) -> Leases:
        self.ways[who] = {name: Keeping(name, lease) for name, lease in self.leases.items()}
        return Leases("home", self.ways[who], who, self._pool, self.said.append, self.clock, self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.clock.now += seconds
        self.meanwhile()

    def holders(self) -> list[str]:
        return [str((lease.told() or {}).get("who", "")) for lease in self.leases.values()]


@pytest.fixture
def site() -> Iterator[Site]:
    with ThreadPoolExecutor(8) as pool:
        yield Site(pool)


def test_a_second_one_is_told_who_is_first_since_when_and_what_to_do(site: Site) -> None:
    first, second = site.controller("anna on ctl1"), site.controller("bert on ctl2")
    assert first.claim(HOSTS, 2.0, take_over=False) == []
    began = time.strftime("%H:%M:%S", time.localtime(site.clock.now))
    for _look in range(20):
        site.clock.now += 2
        for host in HOSTS:
            first.renew(host)
    site.meanwhile = lambda: [first.renew(host) for host in HOSTS]
    (found,) = second.claim(HOSTS, 2.0, take_over=False)
    assert found.subject == "site home"
    assert found.fact == f"is being evacuated by anna on ctl1 since {began} (as home1 says, 0 s ago)"
    assert "end it and give the same command again" in found.way_out
    assert "evacuate_take_over=true" in found.way_out
    assert sum(site.waits) < 5, "one that lives is seen at once"
    assert site.holders() == ["anna on ctl1"] * 3
    second.give_back()
    assert site.holders() == ["anna on ctl1"] * 3, "who has nothing gives nothing back"


def test_the_successor_of_a_dead_one_waits_for_no_longer_than_its_lease(site: Site) -> None:
    first, second = site.controller("anna"), site.controller("bert")
    first.claim(HOSTS, 2.0, take_over=False)
    # Killed, and its last renewal was on the way.
    last = [first]

    def one_more() -> None:
        if last:
            last.pop().renew("home1")

    site.meanwhile = one_more
    assert second.claim(HOSTS, 2.0, take_over=False) == []
    assert sum(site.waits) < 15 + 2 * 1.5 + 0.1
    assert site.holders() == ["bert"] * 3
    (line,) = site.said
    assert line.startswith("home: evacuated by anna since ")
    assert line.endswith("; in the next 15 s it shows whether that one is still there")
    with pytest.raises(TakenOver):
        first.renew("home1")


def test_one_that_ends_keeps_nobody_waiting(site: Site) -> None:
    first, second = site.controller("anna"), site.controller("bert")
    first.claim(HOSTS, 2.0, take_over=False)
    first.give_back()
    first.renew("home1")
    assert site.holders() == [""] * 3, "what is still on its way renews nothing"
    assert second.claim(HOSTS, 2.0, take_over=False) == []
    assert site.waits == []


def test_it_is_taken_over_on_the_operators_word(site: Site) -> None:
    first, second = site.controller("anna"), site.controller("bert")
    first.claim(HOSTS, 2.0, take_over=False)
    assert second.claim(HOSTS, 2.0, take_over=True) == []
    assert site.waits == []
    with pytest.raises(
        TakenOver, match=r"home2: bert since \d\d:\d\d:\d\d coordinates .* gives no more orders"
    ):
        first.renew("home2")
    first.give_back()
    assert site.holders() == ["bert"] * 3


def test_all_hosts_or_none(site: Site) -> None:
    """Of another that could reach only one of them; both wanted all, and one goes on."""
    first, second = site.controller("anna"), site.controller("bert")
    for name in ("home1", "home3"):
        site.ways["anna"][name].trouble = "unreachable"
    assert first.claim(HOSTS, 2.0, take_over=False) == []
    assert site.holders() == ["", "anna", ""]
    site.meanwhile = lambda: first.renew("home2")
    (found,) = second.claim(HOSTS, 2.0, take_over=False)
    assert "(as home2 says, 0 s ago)" in found.fact
    assert site.holders() == ["", "anna", ""], "what it had got it gave back"
    # One that was out of reach then, and is another's by the time that it answers, is not taken over.
    site.leases["home3"].ask("other", "carl", 15)
    site.ways["anna"]["home3"].trouble = ""
    with pytest.raises(ProxyError, match=r"home3: carl since .* its VMs are left to that one"):
        first.renew("home3")


def test_a_proxy_that_was_restarted_is_asked_anew(site: Site) -> None:
    first = site.controller("anna")
    first.claim(HOSTS, 2.0, take_over=False)
    site.ways["anna"]["home1"].lease = site.leases["home1"] = CoordinatorLease(site.clock)
    first.renew("home1")
    assert site.holders() == ["anna"] * 3


def test_a_proxy_of_an_older_version_keeps_none(site: Site) -> None:
    first = site.controller("anna")
    site.ways["anna"]["home2"].trouble = "not-found"
    assert first.claim(HOSTS, 2.0, take_over=False) == []
    first.renew("home2")
    (line,) = site.said
    assert line.startswith("home2: its proxy is of an older version")
    site.ways["anna"]["home1"].trouble = "unreachable"
    with pytest.raises(ProxyError, match="home1: unreachable"):
        first.renew("home1")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["anna", "bert", "carl"]), st.integers(0, 2)), max_size=9),
    st.lists(st.tuples(st.sampled_from(["anna", "bert", "carl"]), st.sampled_from(HOSTS)), max_size=4),
)
def test_never_two_believe_that_they_coordinate_one_host(
    turns: list[tuple[str, int]], cuts: list[tuple[str, str]]
) -> None:
    """Whoever claims, renews or ends, and whatever some of them cannot reach, in any order."""
    with ThreadPoolExecutor(4) as pool:
        site = Site(pool)
        controllers = {who: site.controller(who) for who in ("anna", "bert", "carl")}
        for who, host in cuts:
            site.ways[who][host].trouble = "unreachable"
        at_work: set[str] = set()

        def renew_all(but: str) -> None:
            for other in sorted(at_work - {but}):
                for host in HOSTS:
                    if not site.ways[other][host].trouble:
                        try:
                            controllers[other].renew(host)
                        except ProxyError:
                            continue  # never its own

        for who, what in turns:
            site.meanwhile = lambda who=who: renew_all(who)  # type: ignore[misc]
            if what == 2 and who in at_work:
                controllers[who].give_back()
                at_work.discard(who)
            elif what == 0 and who not in at_work:
                if not controllers[who].claim(HOSTS, 2.0, take_over=False):
                    at_work.add(who)
            else:
                renew_all("")
            # By what the proxies keep: nobody else's, and whoever was granted one has it.
            for host, holder in zip(HOSTS, site.holders(), strict=True):
                believe = [one for one in at_work if host in controllers[one]._granted]
                assert len(believe) <= 1
                assert holder in {"", *believe}


def run(world: World, said: list[str], ends: list[Any], **how: Any) -> threading.Thread:
    """A coordinator at work beside the test; how it ended is appended."""

    def work() -> None:
        coordinator = world.coordinator(**how)
        coordinator._say = said.append
        try:
            recorder = coordinator.run(coordinator.survey())
            ends.append({vm["name"]: vm["verdict"] for vm in recorder.outcomes})
        except (Refused, TakenOver) as error:
            ends.append(error)
        finally:
            coordinator.close()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_of_two_at_once_one_moves_all_and_the_other_is_refused(world: World) -> None:
    world.protect("home1", "web1")
    world.protect("home2", DATABASE)
    for parts in world.parts.values():
        parts.evacuation.step_seconds = 1.0
    ends: list[Any] = []
    threads = [run(world, [], ends, who=who) for who in ("anna", "bert")]
    for thread in threads:
        thread.join(60)
    (refused,) = [end for end in ends if isinstance(end, Refused)]
    (moved,) = [end for end in ends if not isinstance(end, Refused)]
    assert moved == dict.fromkeys(KNOWN.values(), "evacuated")
    assert "site home: is being evacuated by " in str(refused)
    assert [parts.evacuation.begun for parts in world.parts.values()] == [["web1"], [KNOWN[DATABASE]]]
    assert all(parts.lease.told() is None for parts in world.parts.values()), "given back at the end"


def test_one_that_is_taken_over_from_ends_and_its_jobs_go_on(world: World) -> None:
    world.protect("home1", "web1")
    world.protect("home2", DATABASE)
    for parts in world.parts.values():
        parts.evacuation.step_seconds = 0.6
    ends: list[Any] = []
    first = run(world, [], ends, who="anna")
    while not any(parts.evacuation.begun for parts in world.parts.values()):
        time.sleep(0.05)
    second = run(world, [], ends, who="bert", take_over=True)
    first.join(30)
    assert isinstance(ends[0], TakenOver)
    assert "bert since" in str(ends[0])
    second.join(60)
    assert ends[1] == dict.fromkeys(KNOWN.values(), "evacuated")
    assert [len(parts.evacuation.begun) for parts in world.parts.values()] == [1, 1]
