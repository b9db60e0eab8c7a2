# SPDX-License-Identifier: GPL-3.0-or-later
"""Work beside everything else: started, stopped, and not lost when it fails."""

from __future__ import annotations

import asyncio

import pytest

from mobility_agent.background import Background


async def test_stopped_work_has_ended_and_a_second_stop_does_nothing() -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("work")

    background = Background()
    await background.stop()
    background.start(work())
    await asyncio.sleep(0)
    await background.stop()
    await background.stop()
    assert ended == ["work"]


async def test_what_the_work_raised_comes_out_of_the_stop() -> None:
    async def work() -> None:
        raise OSError("the link is gone")

    background = Background()
    background.start(work())
    await asyncio.sleep(0)
    with pytest.raises(OSError, match="the link is gone"):
        await background.stop()
