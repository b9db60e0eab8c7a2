# SPDX-License-Identifier: GPL-3.0-or-later
"""What the data path does when the kernel refuses a change: nothing is taken for done that was not."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv6Address, IPv6Network
from typing import Any

import pytest

from mobility_agent.datapath import path as path_module
from mobility_agent.datapath.netlink import Request
from mobility_agent.datapath.path import DataPath
from mobility_agent.datapath.settings import HomePrefix, PathSettings
from mobility_agent.errors import KernelRefused

HOME = (IPv6Network("2001:db8:100::5/128"),)
ONE, OTHER = IPv6Address("2001:db8:1::d"), IPv6Address("2001:db8:2::d")
MAC = "52:54:00:00:00:01"


class Kernel:
    """Routes and neighbours by what they are of; a device that is gone is an OSError, as the real one's."""

    def __init__(self) -> None:
        self.holds: set[str] = set()
        self.refuses = False

    def apply(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if self.refuses:
                raise KernelRefused(f"{request.subject}: no")
            place = self._place(request.subject)
            self.holds = {one for one in self.holds if self._place(one) != place}
            if not request.removal:
                self.holds.add(request.subject)

    @staticmethod
    def _place(subject: str) -> tuple[str, ...]:
        """Of a route: destination and table, not what it leads to; of a neighbour: address and device."""
        words = subject.split()
        return tuple(words[:4]) if words[0] == "route" else (*words[:2], words[-1])

    def of_home(self) -> set[str]:
        return {one.removeprefix(f"route {HOME[0]} ") for one in self.holds if str(HOME[0]) in one}


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(path_module, "RouteSocket", lambda: kernel)
    monkeypatch.setattr("socket.if_nametoindex", lambda _name: 7)
    return kernel


def made(*, anchor: bool) -> DataPath:
    settings = PathSettings(
        IPv6Address("2001:db8:9::2"),
        IPv6Address("2001:db8:9::d"),
        frozenset(),
        (HomePrefix(IPv6Network("2001:db8:100::/64")),),
        () if anchor else ("vmbr0",),
        anchor=anchor,
    )
    path = DataPath(settings)
    path._started = True
    return path


def test_a_binding_that_the_kernel_refused_is_put_when_it_is_asked_for_again(kernel: Kernel) -> None:
    path = made(anchor=True)
    path.set_remote(HOME, ONE)
    kernel.refuses = True
    for _ in range(2):
        with pytest.raises(KernelRefused):
            path.set_remote(HOME, OTHER)
    assert path.unsure
    kernel.refuses = False
    path.set_remote(HOME, OTHER)
    assert kernel.of_home() == {f"table 7601 to {OTHER} dev lbtun1"}
    assert not path.unsure


def test_one_that_is_on_another_bridge_by_now_has_no_neighbour_on_the_first(kernel: Kernel) -> None:
    """Its card was plugged out, or another one in."""
    path = made(anchor=False)
    path.set_local(HOME, "vmbr0", MAC)
    path.set_local(HOME, "vmbr1", MAC)
    found = {one for one in kernel.holds if one.startswith("neighbour")}
    assert found == {f"neighbour {HOME[0].network_address} lladdr {MAC} dev vmbr1"}
    assert kernel.of_home() == {"table 7600 dev vmbr1"}


def test_a_vm_that_the_kernel_refused_is_refused_again_and_put_in_the_end(kernel: Kernel) -> None:
    path = made(anchor=False)
    kernel.refuses = True
    for _ in range(2):
        with pytest.raises(KernelRefused):
            path.set_local(HOME, "vmbr0", MAC)
    kernel.refuses = False
    path.set_local(HOME, "vmbr0", MAC)
    assert kernel.of_home() == {"table 7600 dev vmbr0"}


def test_what_a_gateway_forgets_stays_where_the_anchor_on_the_same_host_has_it(kernel: Kernel) -> None:
    path = made(anchor=True)
    path.set_remote(HOME, ONE)
    bound = {f"table 7601 to {ONE} dev lbtun1"}
    path.set_lost(HOME)
    path.clear(HOME)
    assert kernel.of_home() == bound
    # Nor does a refused arrival, or where the gateway led it, change where it is bound.
    path.set_away(HOME, OTHER)
    path.set_local(HOME, "vmbr0", MAC)
    path.clear(HOME)
    assert kernel.of_home() == bound
    path.clear_remote(HOME)
    path.set_away(HOME, OTHER)
    path.clear(HOME)
    assert kernel.of_home() == set()


def test_what_was_to_go_when_the_kernel_refused_goes_with_the_next_change(kernel: Kernel) -> None:
    path = made(anchor=False)
    path.set_away(HOME, ONE)
    assert kernel.of_home() == {f"table 7601 to {ONE} dev lbtun1", "table 7600 dev lbtun0"}
    kernel.refuses = True
    with pytest.raises(KernelRefused):
        path.set_local(HOME, "vmbr0", MAC)
    kernel.refuses = False
    path.set_local(HOME, "vmbr0", MAC)
    # Of the tunnel nothing is left, though nothing that is wanted says any more that it was there.
    assert kernel.of_home() == {"table 7600 dev vmbr0"}


def test_a_device_that_is_gone_is_a_refusal_and_mended_when_it_is_back(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made(anchor=False)

    def gone(_name: str) -> int:
        raise OSError(19, "No such device")

    with monkeypatch.context() as patch:
        patch.setattr("socket.if_nametoindex", gone)
        with pytest.raises(KernelRefused, match="is the device there"):
            path.set_anchor(ONE)
    assert path.unsure
    started: list[Any] = []
    monkeypatch.setattr(path, "start", lambda: started.append(True))
    # Asked for again it is not taken for done, either.
    path.set_anchor(ONE)
    assert path.mend()
    assert len(started) == 2


def test_a_path_that_is_too_narrow_for_any_tunnel_is_named(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(path_module.judgement, "findings", lambda *_unused: [])
    path = made(anchor=True)
    path.learn_mtu(ONE, 1400)
    assert path.findings() == []
    path.learn_mtu(ONE, 1300)
    (finding,) = path.findings()
    assert f"path to {ONE}: carries 1300 octets" in str(finding)
    path.learn_mtu(ONE, None)
    assert path.findings() == []


def test_what_waits_goes_before_wherever_else_a_vm_is_led(kernel: Kernel) -> None:
    path = made(anchor=False)
    path.set_local(HOME, "vmbr0", MAC)
    path.hold(HOME)
    waiting = "table 7603 dev lbhold0"
    assert kernel.of_home() == {"table 7600 dev vmbr0", waiting}
    path.set_lost(HOME)
    assert kernel.of_home() == {"table 7600 blackhole", waiting}
    path.set_away(HOME, ONE)
    tunnelled = {f"table 7601 to {ONE} dev lbtun1", "table 7600 dev lbtun0"}
    assert kernel.of_home() == {*tunnelled, waiting}
    path.end_hold(HOME)
    assert kernel.of_home() == tunnelled
    path.hold(HOME)
    path.clear(HOME)
    assert kernel.of_home() == set()


def test_a_hold_that_the_kernel_refused_leaves_nothing_behind(kernel: Kernel) -> None:
    path = made(anchor=False)
    path.set_local(HOME, "vmbr0", MAC)
    kernel.refuses = True
    with pytest.raises(KernelRefused):
        path.hold(HOME)
    kernel.refuses = False
    path.end_hold(HOME)
    assert kernel.of_home() == {"table 7600 dev vmbr0"}
    assert not path.unsure


def test_only_a_gateway_has_rules_for_what_waits() -> None:
    def tables(path: DataPath) -> list[tuple[int, int, str | None]]:
        return sorted((rule.priority, rule.table, rule.device) for rule in path._rules())

    assert [rule for rule in tables(made(anchor=False)) if 990 < rule[0] < 1001] == [
        (995, 7600, "lbhold0"),
        (996, 254, "lbhold0"),
        (999, 7603, None),
        (1000, 7600, None),
    ]
    assert not [rule for rule in tables(made(anchor=True)) if 990 < rule[0] < 1000]
