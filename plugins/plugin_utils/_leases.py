# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""One coordinator per hypervisor: leases of seconds that the sources' proxies keep, renewed at each look.

Each grant has an epoch, higher than all before. An order names the one that was ours at the look that it was
decided by, and the proxy refuses it once somebody else has been granted a later one: what a controller that
stood still sends when it goes on does nothing.

A controller that dies renews nothing, and its successor waits no longer than the lease runs; one that is
alive is seen by its renewals, and the second is refused with who it is. Who only tries holds a host for a
moment and renews nothing: that ends nobody who is at work.
"""

from __future__ import annotations

import random
import re
import time
import typing as t
import uuid
from concurrent.futures import Executor, wait

from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import ProxyError
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import Finding
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._surveyor import Proxy, ask

_PATH = "/v1/coordinator"
# A few intervals, and no less than this.
_LEAST_SECONDS = 15.0
_INTERVALS = 5.0
# So long is waited for all hosts together; who is late is asked again at the first look.
_PATIENCE_SECONDS = 2.0
# The last renewal of one that was killed may come after the first look at it; another after that does not.
_RENEWALS_OF_THE_LIVING = 2
# So many are asked one after the other until one keeps a lease; each that is silent costs the patience.
_ASKED_ALONE = 3
_HOSTS_NAMED = 4
# Longer is refused by proxies.
_LONGEST_WHO = 200
# Of an identifier; the first half says when it was made, in microseconds since 1970.
_HALF_DIGITS = 16
_IDENTIFIER = re.compile(r"[0-9a-f]{32}")

Holder = t.Mapping[str, t.Any]


class TakenOver(Exception):
    """Another coordinates what was ours: this one gives no more orders."""


def findings_of(site: str, holders: t.Mapping[str, Holder], now: float) -> list[Finding]:
    """One finding for each coordinator that has hosts of the site; ``now`` is the controller's clock."""
    by_coordinator: dict[str, list[str]] = {}
    for host, holder in sorted(holders.items()):
        by_coordinator.setdefault(str(holder["id"]), []).append(host)
    found = []
    for hosts in by_coordinator.values():
        holder = holders[hosts[0]]
        heard = min(float(holders[host]["heard_seconds"]) for host in hosts)
        fact = f"is being evacuated by {_since(holder, now)} (as {_named(hosts)} says, {heard:.0f} s ago)"
        way_out = (
            "let that one go on; or end it and give the same command again; or, where it cannot be ended, "
            "take over by evacuate_take_over=true"
        )
        found.append(Finding(f"site {site}", fact, way_out))
    return found


def _since(holder: Holder, now: float) -> str:
    began = time.strftime("%H:%M:%S", time.localtime(now - float(holder["held_seconds"])))
    return f"{holder['who']} since {began}"


def _named(hosts: t.Sequence[str]) -> str:
    more = len(hosts) - _HOSTS_NAMED
    return ", ".join(hosts[:_HOSTS_NAMED]) + (f" and {more} more" if more > 0 else "")


def _later_than(identifiers: t.Iterable[str], now: float) -> str:
    """An identifier that is greater than all of these; ``now``: seconds since 1970.

    One that has no time in front (of an older version: a random one) is passed by all the same.
    """
    number = int(now * 1e6)
    for other in identifiers:
        if _IDENTIFIER.fullmatch(other):
            number = max(number, int(other[:_HALF_DIGITS], 16) + 1)
    return f"{number:0{_HALF_DIGITS}x}{uuid.uuid4().hex[:_HALF_DIGITS]}"


class Leases:
    """The leases of one coordinator on its sources; ``who`` is told to whoever comes second."""

    def __init__(
        self,
        site: str,
        proxies: t.Mapping[str, Proxy],
        who: str,
        pool: Executor,
        say: t.Callable[[str], None],
        clock: t.Callable[[], float],
        sleep: t.Callable[[float], None],
    ) -> None:
        self._site = site
        self._proxies = proxies
        self._who = "".join(letter for letter in who if letter.isprintable())[:_LONGEST_WHO] or "somebody"
        self._pool = pool
        self._say = say
        self._clock = clock
        self._sleep = sleep
        self._identifier = _later_than((), clock())
        # Until when each is ours, by our clock.
        self._granted: dict[str, float] = {}
        # Under which epoch each is, or was last; hosts of older proxies have none.
        self._epochs: dict[str, int] = {}
        # Who took over by word from us and has ended since, by hosts that are ours again.
        self._meanwhile: dict[str, str] = {}
        # Were ours, and another has them.
        self._lost: set[str] = set()
        # Proxies of an older version.
        self._cannot: set[str] = set()
        # That said nothing, or refused, at the last try.
        self._mute: set[str] = set()
        self._refused: set[str] = set()
        self._claimed = False
        self._by_word = False
        self.seconds = _LEAST_SECONDS

    def claim(self, hosts: t.Iterable[str], interval: float, *, take_over: bool) -> list[Finding]:
        """Become the coordinator of these hosts, all or none: who has them already is the finding.

        ``interval``: seconds between two looks. Waits for one who may be gone until his lease has run out.
        """
        self.seconds = max(_LEAST_SECONDS, _INTERVALS * interval)
        self._by_word = take_over
        names = sorted(hosts)
        if take_over:
            self._come_after(names)
        began, first_seen, said = self._clock(), dict[tuple[str, str], int](), False
        while True:
            self._claimed = True
            refused = self._try(names, take_over=take_over)
            if not refused:
                return []
            self.give_back()
            alive = False
            for host, holder in refused.items():
                key = (host, str(holder["id"]))
                seen = first_seen.setdefault(key, int(holder["renewals"]))
                alive = alive or int(holder["renewals"]) >= seen + _RENEWALS_OF_THE_LIVING
            if alive or self._clock() - began > 2 * self.seconds:
                return findings_of(self._site, refused, self._clock())
            if not said:
                said = True
                holder = next(iter(refused.values()))
                self._say(
                    f"{self._site}: evacuated by {_since(holder, self._clock())}; in the next "
                    f"{holder['seconds_left']:.0f} s it shows whether that one is still there"
                )
            # Two that try at once must not go on meeting.
            self._sleep(random.uniform(0.5, 1.5))

    def renew(self, host: str) -> None:
        """For some seconds more. Raises TakenOver, or ProxyError where another has it or nobody answers.

        A host that another has is left to that one, and asked again at the next look: who only tried, at a
        proxy that was restarted or out of our reach, has given it back by then. Taken over is who lost one on
        an operator's word, or all that he held to one that renews.
        """
        if not self._claimed or host in self._cannot:
            return
        holder = self._ask(host, self.seconds, take_over=False)
        if holder is None:
            self._lost.discard(host)
            if host in self._meanwhile:
                raise TakenOver(
                    f"{host}: {self._meanwhile[host]} had taken over its evacuation and has ended since; "
                    "this one gives no more orders, what is under way goes on: see what that one says, or "
                    "give the command again"
                )
            return
        if self._granted.pop(host, None) is not None:
            self._lost.add(host)
        told = f"{host}: {_since(holder, self._clock())} coordinates its evacuation"
        if host in self._lost and self._ends_us(holder):
            raise TakenOver(f"{told} and has taken over; this one gives no more orders, what is under way "
                            "goes on: see what that one says")  # fmt: skip
        raise ProxyError("conflict", f"{told}; its VMs are left to that one")

    def epoch(self, host: str) -> int | None:
        """What orders to a host are to name from now on; None: its proxy is of an older version."""
        return self._epochs.get(host)

    def _by_word_of(self, other: Holder) -> bool:
        """Whether another has taken over by an operator's word that counts for more than ours.

        Of two that take over at the same time each may hold some of the other's: by word one of them ends,
        and of two that do so one after the other the first.
        """
        if not other.get("taken_over"):
            return False
        return not (self._by_word and self._identifier > str(other.get("id")))

    def _ends_us(self, holder: Holder) -> bool:
        """Whether who has a host of ours ends us; of two, never each the other."""
        if self._by_word_of(holder):
            return True
        now = self._clock()
        return int(holder["renewals"]) > 0 and all(until <= now for until in list(self._granted.values()))

    def give_back(self) -> None:
        """Others need not wait until they have run out."""
        self._claimed = False
        # Who is at work before a next try has taken over nothing of ours.
        self._epochs.clear()
        self._meanwhile.clear()
        asked = [self._pool.submit(self._quietly, host) for host in list(self._granted)]
        self._granted.clear()
        wait(asked, _PATIENCE_SECONDS)

    def _quietly(self, host: str) -> None:
        try:
            self._ask(host, 0.0, take_over=False)
        except ProxyError:
            return  # it runs out by itself

    def _come_after(self, names: t.Sequence[str]) -> None:
        """Be the later one of all who have these hosts now, whatever their controllers' clocks say."""
        # To give back what one has not changes nothing, and tells who has it.
        told = self._answers(names, 0.0, take_over=False).values()
        self._identifier = _later_than((str(holder["id"]) for holder in told if holder), self._clock())

    def _try(self, names: t.Sequence[str], *, take_over: bool) -> dict[str, Holder]:
        """Who refused, by host; hosts that do not answer are asked again at the first look.

        In one order, the first alone: of two that begin at once one gets none, and not each some. Who refused
        at the last try comes first, lest each try takes for a moment what is free.
        """
        waiting = [name for name in names if name not in self._cannot]
        waiting.sort(key=lambda name: (name not in self._refused, name in self._mute))
        self._mute.clear()
        refused: dict[str, Holder] = {}
        for _number in range(_ASKED_ALONE):
            first, waiting = waiting[:1], waiting[1:]
            refused = self._ask_all(first, take_over=take_over)
            if refused or not self._mute.issuperset(first):
                break
        if not refused:
            refused = self._ask_all(waiting, take_over=take_over)
        self._refused = set(refused)
        return refused

    def _ask_all(self, names: t.Sequence[str], *, take_over: bool) -> dict[str, Holder]:
        told = self._answers(names, self.seconds, take_over=take_over)
        self._mute.update(name for name in names if name not in told)
        return {name: holder for name, holder in told.items() if holder is not None}

    def _answers(
        self, names: t.Sequence[str], seconds: float, *, take_over: bool
    ) -> dict[str, Holder | None]:
        """What :meth:`_ask` has of each host that answers in time."""
        asked = {name: self._pool.submit(self._ask, name, seconds, take_over=take_over) for name in names}
        wait(asked.values(), _PATIENCE_SECONDS)
        return {
            name: answer.result()
            for name, answer in asked.items()
            if answer.done() and answer.exception() is None
        }

    def _ask(self, host: str, seconds: float, *, take_over: bool) -> Holder | None:
        """None: it is ours, or the host keeps none; else who has it. Raises ProxyError."""
        body = {
            "coordinator": self._identifier, "who": self._who, "for_seconds": seconds, "take_over": take_over,
        }  # fmt: skip
        until = self._clock() + seconds
        try:
            told = ask(self._proxies[host], "POST", _PATH, body, _LEAST_SECONDS)
        except ProxyError as error:
            if error.cause != "not-found":
                raise
            if host not in self._cannot:
                self._cannot.add(host)
                self._say(f"{host}: its proxy is of an older version and cannot say whether somebody else "
                          "coordinates it")  # fmt: skip
            return None
        if told["granted"] and seconds > 0:
            self._granted[host] = until
            self._note(host, told["coordinator"])
        return None if told["granted"] else told["coordinator"]

    def _note(self, host: str, ours: Holder) -> None:
        """Under which epoch a host is ours now, and whether somebody took over since it was last."""
        epoch, before = ours.get("epoch"), ours.get("before")
        if epoch is None:
            return
        last = self._epochs.get(host)
        self._epochs[host] = int(epoch)
        if last is None or not before or before.get("id") == self._identifier:
            return
        if int(before.get("epoch") or 0) <= last:
            # Also where its record is of a version that did not say.
            return
        if self._by_word_of(before):
            self._meanwhile[host] = str(before.get("who") or "somebody")
