# SPDX-License-Identifier: GPL-3.0-or-later
"""Two controllers for one site: one coordinates, the other is told who, and a dead one is in nobody's way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import ProxyError
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._coordinator import Refused
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._leases import Leases, TakenOver
from hypothesis import given, settings
from hypothesis import strategies as st

from precache_proxy.control.coordinator_lease import CoordinatorLease
from precache_proxy.errors import TakenOver as Fenced
from small_parts.parts import DATABASE, KNOWN
from unit.plugins.coordination.world import World

HOSTS = ("home1", "home2", "home3")
WHO = ("anna", "bert", "carl")
# As in a proxy, whose lease one thread asks.
ONE_AT_A_TIME = threading.Lock()


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
        self.asked = 0
        self.entered: Callable[[], object] = lambda: None
        # What happens when it has answered, before anybody else is asked.
        self.afterwards: Callable[[], object] = lambda: None

    def request(
        self, method: str, path: str, body: Mapping[str, object] | None = None, timeout_seconds: float = 30.0
    ) -> Any:
        assert (method, path) == ("POST", "/v1/coordinator")
        self.asked += 1
        self.entered()
        if self.trouble:
            raise ProxyError(self.trouble, f"{self.name}: {self.trouble}")
        told: Any = body
        with ONE_AT_A_TIME:
            granted = self.lease.ask(
                told["coordinator"], told["who"], told["for_seconds"], take_over=told["take_over"]
            )
            answer = {"granted": granted, "coordinator": self.lease.told()}
        if granted and told["for_seconds"] > 0:
            self.afterwards()
        return answer

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
    second.renew("home1")
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


def test_one_that_was_taken_over_from_ends_also_if_the_other_has_ended_meanwhile(site: Site) -> None:
    """It stood still all the while: the operator's word was not for an hour."""
    first, second = site.controller("anna"), site.controller("bert")
    first.claim(HOSTS, 2.0, take_over=False)
    old = {host: first.epoch(host) for host in HOSTS}
    second.claim(HOSTS, 2.0, take_over=True)
    for host in HOSTS:
        second.renew(host)
    second.give_back()
    site.clock.now += 3600
    with pytest.raises(TakenOver, match="home1: bert had taken over its evacuation and has ended since"):
        first.renew("home1")
    first.give_back()
    assert site.holders() == [""] * 3
    for host, lease in site.leases.items():
        with pytest.raises(Fenced):
            lease.check(old[host], host)


def test_one_that_stood_still_while_nobody_came_goes_on_with_what_it_ordered(site: Site) -> None:
    first = site.controller("anna")
    first.claim(HOSTS, 2.0, take_over=False)
    old = first.epoch("home1")
    site.clock.now += 3600
    first.renew("home1")
    assert first.epoch("home1") == old
    site.leases["home1"].check(old, "home1")


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


@pytest.mark.parametrize("lost_by", ["cut", "restart"])
def test_one_that_only_tries_ends_nobody(site: Site, lost_by: str) -> None:
    """Anna has lost home1's lease for a moment, and looks at it while bert's try has it."""
    anna, bert = site.controller("anna"), site.controller("bert")
    assert anna.claim(HOSTS, 2.0, take_over=False) == []
    told: list[str] = []

    def look() -> None:
        for host in HOSTS:
            try:
                anna.renew(host)
            except ProxyError as error:
                told.append(str(error))

    if lost_by == "cut":
        site.ways["anna"]["home1"].trouble = "unreachable"
        for _look in range(8):
            site.clock.now += 2
            look()
        site.ways["anna"]["home1"].trouble = ""
    else:
        for way in site.ways.values():
            way["home1"].lease = site.leases["home1"]
        site.leases["home1"]._held = None
    assert site.holders() == ["", "anna", "anna"]
    told.clear()
    site.ways["bert"]["home1"].afterwards = look
    site.meanwhile = look
    (found,) = bert.claim(HOSTS, 2.0, take_over=False)
    assert "is being evacuated by anna" in found.fact
    assert len(told) == 1, "the next try begins with who refused, and holds nothing of hers"
    assert "home1: bert since" in told[0]
    assert "left to that one" in told[0]
    look()
    assert site.holders() == ["anna"] * 3


def test_who_loses_one_host_goes_on_with_the_others_and_ends_with_the_last(site: Site) -> None:
    anna, bert = site.controller("anna"), site.controller("bert")
    assert anna.claim(HOSTS, 2.0, take_over=False) == []
    # bert reaches home1 alone, and is there first after its proxy was restarted.
    site.leases["home1"]._held = None
    assert bert.claim(HOSTS[:1], 2.0, take_over=False) == []
    bert.renew("home1")
    for _look in range(2):
        with pytest.raises(ProxyError, match="left to that one"):
            anna.renew("home1")
        anna.renew("home2")
        anna.renew("home3")
    assert site.holders() == ["bert", "anna", "anna"]
    site.clock.now += 16
    bert.renew("home1")
    with pytest.raises(ProxyError, match="left to that one"):
        anna.renew("home1")
    bert.renew("home1")
    with pytest.raises(TakenOver):
        anna.renew("home1")


def test_of_two_that_take_over_from_each_other_one_goes_on(site: Site) -> None:
    """On two operators' word at once; each has some of the other's hosts."""
    anna, bert = site.controller("anna"), site.controller("bert")
    site.ways["anna"]["home1"].afterwards = lambda: bert.claim(HOSTS, 2.0, take_over=True)
    assert anna.claim(HOSTS, 2.0, take_over=True) == []
    assert site.holders() == ["bert", "anna", "anna"]
    ended = set()
    for who, controller in (("anna", anna), ("bert", bert)):
        for host in HOSTS:
            try:
                controller.renew(host)
            except ProxyError:
                continue
            except TakenOver:
                ended.add(who)
    assert len(ended) == 1


@pytest.mark.parametrize("first_is_of", ["a random identifier", "a clock that is ahead"])
def test_of_two_that_take_over_one_after_the_other_the_first_ends(site: Site, first_is_of: str) -> None:
    """Also where the second reaches only one of its hosts."""
    anna, bert = site.controller("anna"), site.controller("bert")
    later = "fffffffffffffff0" if first_is_of == "a random identifier" else f"{int(2e12):016x}"
    assert later > f"{int(site.clock.now * 1e6):016x}"
    anna._come_after = lambda _names: None  # type: ignore[method-assign]
    anna._identifier = later + 16 * "f"
    assert anna.claim(HOSTS, 2.0, take_over=True) == []
    for host in HOSTS:
        anna.renew(host)
    site.clock.now += 60
    for host in HOSTS:
        anna.renew(host)
    for host in HOSTS[1:]:
        site.ways["bert"][host].trouble = "unreachable"
    assert bert.claim(HOSTS, 2.0, take_over=True) == []
    assert site.holders() == ["bert", "anna", "anna"]
    for host in HOSTS[1:]:
        site.ways["bert"][host].trouble = ""
        with pytest.raises(ProxyError, match="left to that one"):
            bert.renew(host)
    with pytest.raises(TakenOver, match="home1: bert since"):
        anna.renew("home1")
    anna.give_back()
    for host in HOSTS:
        bert.renew(host)
    assert site.holders() == ["bert"] * 3


def test_whom_a_proxy_cannot_name_in_full_ends_nobody(site: Site) -> None:
    """Its record is of a version that did not say under which epoch that one was."""
    anna = site.controller("anna")
    assert anna.claim(HOSTS, 2.0, take_over=False) == []
    site.leases["home1"]._held = None
    site.leases["home1"]._before = {"id": "bert's", "taken_over": True}
    anna.renew("home1")
    assert site.holders() == ["anna"] * 3


def test_proxies_of_an_older_version_are_asked_together_and_once(site: Site) -> None:
    first, second = site.controller("anna"), site.controller("bert")
    assert first.claim(("home3",), 2.0, take_over=False) == []
    site.meanwhile = lambda: first.renew("home3")
    for host in ("home1", "home2"):
        site.ways["bert"][host].trouble = "not-found"
    # home2 answers only when home3 is asked beside it.
    beside = threading.Event()
    met: list[bool] = []
    site.ways["bert"]["home2"].entered = lambda: met.append(beside.wait(1.5))
    site.ways["bert"]["home3"].entered = beside.set
    (found,) = second.claim(HOSTS, 2.0, take_over=False)
    assert "anna" in found.fact
    assert len(site.waits) > 1, "it tried again"
    assert met == [True]
    assert [site.ways["bert"][host].asked for host in ("home1", "home2")] == [1, 1]
    assert sum("older version" in line for line in site.said) == 2


def test_silent_hosts_are_not_waited_for_one_by_one(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"home{number}" for number in range(1, 10)]
    site.leases = {name: CoordinatorLease(site.clock) for name in names}
    anna = site.controller("anna")
    for name in names[:8]:
        site.ways["anna"][name].trouble = "unreachable"
    asked: list[list[str]] = []
    ask_all = anna._ask_all

    def noted(hosts: Sequence[str], *, take_over: bool) -> Any:
        asked.append(list(hosts))
        return ask_all(hosts, take_over=take_over)

    monkeypatch.setattr(anna, "_ask_all", noted)
    assert anna.claim(names, 2.0, take_over=False) == []
    assert asked == [["home1"], ["home2"], ["home3"], names[3:]]


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


class Play:
    """Controllers that claim, look and end, while ways are cut and come back and proxies are restarted."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.controllers = {who: site.controller(who) for who in WHO}
        self.at_work: set[str] = set()
        self._one = threading.RLock()

    def looks(self, but: str = "") -> None:
        """Everybody who is at work looks once; who is taken over from ends."""
        with self._one:
            for who in sorted(self.at_work - {but}):
                for host in HOSTS:
                    try:
                        self.controllers[who].renew(host)
                    except ProxyError:
                        continue
                    except TakenOver:
                        self.ends(who)
                        break

    def ends(self, who: str) -> None:
        self.controllers[who].give_back()
        self.at_work.discard(who)

    def claims(self, who: str, host: str, *, take_over: bool) -> None:
        """One who has been cut off from that host is back as soon as the claim has something, and looks."""

        def comes_back() -> None:
            for other in WHO:
                self.site.ways[other][host].trouble = ""
            self.looks(who)

        for way in self.site.ways[who].values():
            way.afterwards = comes_back
        self.site.meanwhile = lambda: self.looks(who)
        if not self.controllers[who].claim(HOSTS, 2.0, take_over=take_over):
            self.at_work.add(who)
        for way in self.site.ways[who].values():
            way.afterwards = lambda: None

    def believing(self, host: str) -> list[str]:
        now = self.site.clock.now
        return [who for who in self.at_work if self.controllers[who]._granted.get(host, now) > now]


DEEDS = st.sampled_from(["claim", "claim", "take over", "look", "end", "cut", "cut", "time", "restart"])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(DEEDS, st.sampled_from(WHO), st.sampled_from(HOSTS)), max_size=14))
def test_never_two_coordinate_one_host_and_at_least_one_goes_on(deeds: list[tuple[str, str, str]]) -> None:
    """Whatever they do and cannot reach, in any order."""
    with ThreadPoolExecutor(8) as pool:
        site = Site(pool)
        play = Play(site)
        unheard = False
        # Who took over on an operator's word; once he has ended, those before him may all have.
        by_word: set[str] = set()
        word_was_kept = False
        for deed, who, host in deeds:
            began = set(play.at_work)
            if deed in {"claim", "take over"} and who not in play.at_work:
                play.claims(who, host, take_over=deed == "take over")
            elif deed == "end":
                word_was_kept = word_was_kept or who in by_word & play.at_work
                play.ends(who)
                began.discard(who)
            elif deed == "cut":
                way = site.ways[who][host]
                way.trouble = "" if way.trouble else "unreachable"
            elif deed == "time":
                for _look in range(8):
                    site.clock.now += 2
                    play.looks()
            elif deed == "restart":
                site.leases[host]._held = None
            else:
                play.looks()
            # Of a proxy that was restarted, and of who takes over, one hears at the next look there.
            unheard = unheard or deed in {"take over", "restart"}
            holders = set(site.holders()) - {""}
            # What one who ended could not give back runs out.
            if deed == "take over" and who in play.at_work - began:
                by_word.add(who)
            assert not began or play.at_work or holders or word_was_kept
            for name, holder in zip(HOSTS, site.holders(), strict=True):
                believe = play.believing(name)
                assert unheard or len(believe) <= 1
                assert unheard or not believe or holder == believe[0]


def run(world: World, said: list[str], ends: list[Any], **how: Any) -> threading.Thread:
    """A coordinator at work beside the test; how it ended is appended."""

    def work() -> None:
        coordinator = world.coordinator(**how)
        coordinator._say = said.append
        try:
            recorder = coordinator.run(coordinator.survey())
            ends.append({vm["name"]: vm["verdict"] for vm in recorder.outcomes})
        except Exception as error:  # noqa: BLE001 - the test tells which it expects
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
    patience = time.monotonic() + 30
    while not any(parts.evacuation.begun for parts in world.parts.values()):
        assert not ends, ends
        assert time.monotonic() < patience, "nothing was begun"
        time.sleep(0.05)
    second = run(world, [], ends, who="bert", take_over=True)
    first.join(30)
    assert not first.is_alive()
    assert isinstance(ends[0], TakenOver)
    assert "bert since" in str(ends[0])
    second.join(60)
    assert not second.is_alive()
    assert ends[1] == dict.fromkeys(KNOWN.values(), "evacuated")
    assert [len(parts.evacuation.begun) for parts in world.parts.values()] == [1, 1]


def test_an_order_that_was_on_its_way_while_another_took_over_does_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anna stands still with a start under way, as a stopped process or a connection that hangs does."""
    world.protect("home1", "web1")
    world.protect("home2", DATABASE)
    for parts in world.parts.values():
        parts.evacuation.step_seconds = 0.6
    on_the_way, goes_on = threading.Event(), threading.Event()
    refused: list[ProxyError] = []
    proxy = world.proxies["home1"]
    request = proxy.request

    def slow(method: str, path: str, body: Any = None, timeout_seconds: float = 30.0) -> Any:
        if (method, path) != ("POST", "/v1/evacuations") or on_the_way.is_set():
            return request(method, path, body, timeout_seconds)
        on_the_way.set()
        assert goes_on.wait(30)
        try:
            return request(method, path, body, timeout_seconds)
        except ProxyError as error:
            refused.append(error)
            raise

    monkeypatch.setattr(proxy, "request", slow)
    ends: list[Any] = []
    anna = run(world, [], ends, who="anna")
    assert on_the_way.wait(30)
    bert = run(world, [], ends, who="bert", take_over=True)
    patience = time.monotonic() + 30
    while not world.parts["home1"].evacuation.begun:
        assert time.monotonic() < patience, "bert begins nothing"
        time.sleep(0.05)
    goes_on.set()
    while not refused:
        assert time.monotonic() < patience, "it was obeyed"
        time.sleep(0.05)
    assert [error.cause for error in refused] == ["taken-over"]
    assert "home1: taken over by bert since" in str(refused[0])
    for thread in (anna, bert):
        thread.join(60)
    outcomes = [end for end in ends if isinstance(end, dict)]
    assert outcomes == [dict.fromkeys(KNOWN.values(), "evacuated")]
    assert [type(end).__name__ for end in ends if not isinstance(end, dict)] == ["TakenOver"]
    assert [len(parts.evacuation.begun) for parts in world.parts.values()] == [1, 1]
