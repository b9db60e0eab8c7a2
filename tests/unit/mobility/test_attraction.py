# SPDX-License-Identifier: GPL-3.0-or-later
"""When an anchor leads the home prefixes to itself, and when it hands them back."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path

import pytest

from mobility_agent.anchor import attraction
from mobility_agent.anchor.attraction import Attractor, Watch
from mobility_agent.config import Attraction, Prefix
from mobility_agent.errors import KernelRefused

ONE, OTHER = IPv6Network("2001:db8:100::/64"), IPv6Network("2001:db8:200::/64")
ROUTER, OTHER_ROUTER = IPv6Address("2001:db8:1::1"), IPv6Address("2001:db8:2::1")
SILENT = Attraction("when-silent", ROUTER, 3.0)
FOREVER = float("inf")


@dataclass
class Kernel:
    """What stands in the main table, each time that it was said."""

    told: list[tuple[IPv6Network, ...]] = field(default_factory=list)
    refuses: bool = False

    def install(self, prefixes: Sequence[IPv6Network]) -> None:
        if self.refuses:
            raise KernelRefused("no")
        self.told.append(tuple(prefixes))


class Parts:
    """An attractor, started anew as often as is asked for."""

    def __init__(self, directory: Path, settings: Attraction, *prefixes: Prefix) -> None:
        self.directory, self.settings, self.prefixes = directory, settings, prefixes
        self.awaited = 0

    def start(self) -> tuple[Attractor, Kernel]:
        kernel = Kernel()
        attractor = Attractor(
            self.settings,
            self.prefixes,
            kernel.install,
            self.directory / "attracted.json",
            lambda _prefix: self.awaited,
        )
        attractor.restore()
        return attractor, kernel


@pytest.mark.parametrize(("mode", "expected"), [("always", (ONE, OTHER)), ("never", ())])
def test_what_is_always_attracted_is_wanted_before_the_data_path_starts(
    tmp_path: Path, mode: str, expected: tuple[IPv6Network, ...]
) -> None:
    _attractor, kernel = Parts(tmp_path, Attraction(mode), Prefix(ONE), Prefix(OTHER)).start()
    assert kernel.told == [expected]


def test_a_home_that_was_silent_is_believed_silent_after_a_restart_until_it_is_heard(tmp_path: Path) -> None:
    parts = Parts(tmp_path, SILENT, Prefix(ONE))
    attractor, kernel = parts.start()
    assert kernel.told == [()]
    attractor.judge(ROUTER, 2.9)
    assert kernel.told == [()]
    attractor.judge(ROUTER, 3.1)
    assert kernel.told == [(), (ONE,)]

    attractor, kernel = parts.start()
    assert kernel.told == [(ONE,)]
    # Nobody has been asked yet.
    attractor.judge(ROUTER, FOREVER)
    assert kernel.told == [(ONE,)]
    attractor.judge(ROUTER, 0.2)
    assert kernel.told == [(ONE,), ()]
    assert parts.start()[1].told == [()]


def test_a_prefix_is_not_handed_back_before_its_gateways_know_where_vms_went(tmp_path: Path) -> None:
    parts = Parts(tmp_path, SILENT, Prefix(ONE))
    attractor, kernel = parts.start()
    attractor.judge(ROUTER, 5)
    parts.awaited = 2
    for _ in range(3):
        attractor.judge(ROUTER, 0.1)
    assert kernel.told[-1] == (ONE,)
    assert attractor.status()["waiting"] == [str(ONE)]
    parts.awaited = 0
    attractor.judge(ROUTER, 0.1)
    assert kernel.told[-1] == ()
    assert attractor.status()["waiting"] == []


def test_each_home_site_falls_silent_for_itself(tmp_path: Path) -> None:
    attractor, kernel = Parts(tmp_path, SILENT, Prefix(ONE), Prefix(OTHER, watch=OTHER_ROUTER)).start()
    attractor.judge(ROUTER, 5)
    attractor.judge(OTHER_ROUTER, 0.1)
    assert kernel.told[-1] == (ONE,)
    attractor.judge(OTHER_ROUTER, 5)
    attractor.judge(ROUTER, 0.1)
    assert kernel.told[-1] == (OTHER,)
    assert attractor.status()["prefixes"] == [str(OTHER)]


def test_what_the_kernel_refused_is_tried_again(tmp_path: Path) -> None:
    attractor, kernel = Parts(tmp_path, SILENT, Prefix(ONE)).start()
    kernel.refuses = True
    attractor.judge(ROUTER, 5)
    assert attractor.status()["attracting"] is False
    kernel.refuses = False
    attractor.judge(ROUTER, 6)
    assert kernel.told[-1] == (ONE,)


@pytest.mark.parametrize("kept", ["", "[1]", '["2001:db8:999::/64"]', '{"a": 1}'])
def test_a_damaged_memory_is_left_out(tmp_path: Path, kept: str) -> None:
    (tmp_path / "attracted.json").write_text(kept)
    assert Parts(tmp_path, SILENT, Prefix(ONE)).start()[1].told == [()]


@pytest.mark.skipif(os.geteuid() != 0, reason="raw sockets are root's")
async def test_who_stands_still_itself_takes_no_router_for_silent() -> None:
    told: list[float] = []
    watch = Watch(IPv6Address("::1"), 0.4, lambda _router, silence: told.append(silence), silent=False)
    watch.start()
    for _ in range(3):
        await asyncio.sleep(0.25)
        time.sleep(1.0)  # noqa: ASYNC251
    await asyncio.sleep(0.25)
    await watch.stop()
    assert told
    assert max(told) < 0.4


@pytest.mark.skipif(os.geteuid() != 0, reason="raw sockets are root's")
async def test_one_that_does_not_answer_is_silent_after_four_questions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # For experiments (RFC 4443): the kernel drops it.
    monkeypatch.setattr(attraction, "_ECHO_REQUEST", 200)
    told: list[float] = []
    watch = Watch(IPv6Address("::1"), 0.4, lambda _router, silence: told.append(silence), silent=False)
    watch.start()
    async with asyncio.timeout(10):
        while not any(silence >= 0.4 for silence in told):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    await watch.stop()
    assert len(told) == 4
