# SPDX-License-Identifier: GPL-3.0-or-later
"""Work beside everything else: started, stopped, and not lost when it fails."""

from __future__ import annotations

import asyncio

import pytest

from mobility_agent.background import Background, again_and_again


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


async def test_work_that_ended_by_itself_says_why() -> None:
    async def work() -> None:
        raise OSError("the link is gone")

    background = Background()
    assert background.failure() is None
    background.start(work())
    assert background.failure() is None
    await asyncio.sleep(0.01)
    assert isinstance(background.failure(), OSError)


async def test_a_round_that_fails_is_not_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobility_agent.background._AFTER_FAILURE_SECONDS", 0.01)
    rounds: list[int] = []
    wake = asyncio.Event()

    def one_round() -> float:
        rounds.append(len(rounds))
        if len(rounds) == 1:
            raise OSError("the link is gone")
        return 60.0

    background = Background()
    background.start(again_and_again("work", one_round, wake, 0.001))
    await asyncio.sleep(0.1)
    assert rounds == [0, 1]
    wake.set()
    await asyncio.sleep(0.01)
    assert rounds == [0, 1, 2]
    assert background.failure() is None
    await background.stop()


async def test_work_that_is_woken_while_it_is_stopped_ends_all_the_same() -> None:
    wake = asyncio.Event()
    background = Background()
    background.start(again_and_again("work", lambda: 60.0, wake, 0.001))
    await asyncio.sleep(0.01)
    wake.set()
    await asyncio.wait_for(background.stop(), 5)
