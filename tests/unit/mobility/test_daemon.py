# SPDX-License-Identifier: GPL-3.0-or-later
"""The agent as a whole, where a part of it has ended."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mobility_agent.daemon import Daemon
from mobility_agent.datapath.first_hop import Former, FormerBridges
from mobility_agent.errors import KernelRefused, MobilityError


def test_an_agent_whose_work_has_ended_ends_and_says_why() -> None:
    # One that serves on without heartbeats would look well; systemd starts this one anew.
    well = SimpleNamespace(failure=lambda: None)
    ill = SimpleNamespace(failure=lambda: OSError("the link is gone"))
    daemon = Daemon.__new__(Daemon)
    daemon.parts = cast(Any, SimpleNamespace(anchor=well, gateway=None, moves=well))
    daemon._judge_work()
    daemon.parts = cast(Any, SimpleNamespace(anchor=well, gateway=ill, moves=None))
    with pytest.raises(MobilityError, match=r"gateway: its work has ended .*the link is gone"):
        daemon._judge_work()


class Kernel:
    """Notes what is asked of it; refuses to leave ``vmbr0``."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    def obstacles(self, bridge: str, _mac: str) -> list[str]:
        self.asked.append(bridge)
        return [f"bridge {bridge}: leads to other hosts by eno1"]

    def leave_first_hop(self, bridge: str, former: Former) -> None:
        self.asked.append((bridge, former.mac))
        if bridge == "vmbr0":
            raise KernelRefused("no")

    def withdraw(self) -> None:
        self.asked.append("withdraw")


def test_a_bridge_that_cannot_be_left_keeps_nothing_else_from_being_withdrawn(tmp_path: Path) -> None:
    file = tmp_path / "former_bridges.json"
    former, path = FormerBridges(file), Kernel()
    for bridge in "vmbr0", "vmbr1":
        former.note(bridge, Former(mac=f"52:54:00:00:00:0{bridge[-1]}"))
    daemon = Daemon.__new__(Daemon)
    daemon.parts = cast(Any, SimpleNamespace(path=path))
    bridges = [SimpleNamespace(name=name) for name in ("vmbr0", "vmbr1")]
    daemon._config = cast(Any, SimpleNamespace(gateway=True, bridges=bridges))
    daemon._former = former
    daemon._withdraw()
    assert path.asked == [("vmbr0", "52:54:00:00:00:00"), ("vmbr1", "52:54:00:00:00:01"), "withdraw"]
    # What was not undone is known at the next stop, too.
    again = FormerBridges(file)
    assert (again.of("vmbr0").mac, again.of("vmbr1").mac) == ("52:54:00:00:00:00", None)


def test_a_bridge_that_is_kept_off_is_judged_again_only_after_a_while() -> None:
    daemon, path = Daemon.__new__(Daemon), Kernel()
    daemon.parts = cast(Any, SimpleNamespace(path=path))
    daemon._kept_off = {}
    bridge = cast(Any, SimpleNamespace(name="vmbr0", mac="00:00:5e:00:52:13"))
    assert all(daemon._keeps_off(bridge) for _ in range(3))
    assert path.asked == ["vmbr0"]
    daemon._kept_off["vmbr0"] -= 60
    assert daemon._keeps_off(bridge)
    assert path.asked == ["vmbr0", "vmbr0"]
