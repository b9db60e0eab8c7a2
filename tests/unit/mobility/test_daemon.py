# SPDX-License-Identifier: GPL-3.0-or-later
"""The agent as a whole, where a part of it has ended."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from mobility_agent.daemon import Daemon
from mobility_agent.errors import MobilityError


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
