# SPDX-License-Identifier: GPL-3.0-or-later
"""Deadlines as people write them, and a real upsd with the dummy driver."""

from __future__ import annotations

import datetime
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ansible_collections.lifeboat.evacuation.plugins.module_utils._deadline import (
    Deadline,
    UpsError,
    Watch,
    meaning,
    parse,
    passed,
    runtime_of,
)
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._ups import read_runtime

from small_parts.ports import free_port

NOW = datetime.datetime(2026, 11, 21, 12, 0, 0).astimezone().timestamp()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("20m", 1200), (90, 90), ("90", 90), ("1h30m", 5400), ("1.5h", 5400), ("2 min", 120), ("1d", 86400),
     ("12:30", 1800), ("12:00:05", 5), ("2026-11-21T12:10", 600)],
)  # fmt: skip
def test_what_is_understood(text: object, seconds: float) -> None:
    deadline, findings = parse(text, NOW)
    assert findings == []
    assert deadline is not None
    assert deadline.at == pytest.approx(NOW + seconds)


def test_a_zone_is_heeded() -> None:
    at = datetime.datetime.fromtimestamp(NOW + 60, datetime.UTC).isoformat()
    deadline, _findings = parse(at, NOW)
    assert deadline is not None
    assert deadline.at == pytest.approx(NOW + 60)


@pytest.mark.parametrize(
    "text",
    [
        "soon",
        "20 parsecs",
        "-5",
        "25:00",
        "2026-13-40T10:00",
        "ups:",
        "5m3",
        True,
        "m",
        "9" * 400,
        "400d",
        "nan",
    ],
)
def test_what_is_not(text: object) -> None:
    deadline, findings = parse(text, NOW)
    assert deadline is None
    assert "is not understood" in str(findings[0])


@pytest.mark.parametrize("text", ["0", "11:59", "2026-11-21T11:00", "0s"])
def test_what_has_passed(text: str) -> None:
    deadline, findings = parse(text, NOW)
    assert deadline is not None
    assert findings == [], "what is under way may be asked for all the same"
    assert "passed" in str(passed(deadline, NOW)[0])
    assert "nothing new starts" in meaning(deadline, text, NOW)
    assert passed(deadline, NOW - 86400) == passed(None, NOW) == []


def test_the_command_that_is_given_again_means_the_same_instant() -> None:
    """20m counts from each command, and a time of day is that of the day."""
    for text in ("20m", 90, "14:30"):
        first, _findings = parse(text, NOW)
        assert first is not None
        key, _mark, again = first.how_again.partition("=")
        second, findings = parse(again, NOW + 7200)
        assert second is not None
        assert (key, second.at, findings) == ("evacuate_deadline", pytest.approx(first.at), [])
        assert second.how_again == "", "said whole it stays the same"
    ups, _findings = parse("ups:x@host", NOW)
    assert ups is not None
    assert ups.how_again == ups.instant == ""


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A zone whose summer time ends on 2026-10-25 at 01:00 UTC, and began on 2026-03-29 at 01:00 UTC."""
    with monkeypatch.context() as patched:
        patched.setenv("TZ", "Europe/Berlin")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("berlin")
@pytest.mark.parametrize(
    ("now", "text", "instant"),
    [
        ("2026-10-24T22:30", "04:00", "2026-10-25T03:00"),
        ("2026-10-24T22:30", "2026-10-25T04:00", "2026-10-25T03:00"),
        ("2026-03-28T23:30", "04:00", "2026-03-29T02:00"),
        # The hour that is there twice: the first one, then the second.
        ("2026-10-24T22:30", "02:15", "2026-10-25T00:15"),
        ("2026-10-25T00:30", "02:15", "2026-10-25T01:15"),
    ],
    ids=["ends", "ends-whole", "begins", "first", "again"],
)
def test_the_offset_is_that_of_the_instant(now: str, text: str, instant: str) -> None:
    at = datetime.datetime.fromisoformat(f"{now}+00:00").timestamp()
    deadline, findings = parse(text, at)
    assert findings == []
    assert deadline is not None
    assert deadline.at == datetime.datetime.fromisoformat(f"{instant}+00:00").timestamp()


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (870, "deadline 870: 870 s (14 min 30 s) from now, at 12:14:30"),
        (870, "if 14:30 was meant, put it in quotes: YAML makes 870 of it"),
        (52200, "if 14:30:00 was meant"),
        ("14:30", "9000 s (2 h 30 min) from now, at 14:30:00"),
    ],
)
def test_how_a_deadline_was_understood_is_said(given: object, part: str) -> None:
    deadline, _findings = parse(given, NOW)
    assert deadline is not None
    assert part in meaning(deadline, given, NOW)
    assert ("was meant" in meaning(deadline, given, NOW)) == isinstance(given, int)


@pytest.mark.parametrize("given", [30, 100_000, "870"])
def test_what_is_no_time_of_day_in_yaml_is_not_taken_for_one(given: object) -> None:
    deadline, _findings = parse(given, NOW)
    assert deadline is not None
    assert "was meant" not in meaning(deadline, given, NOW)


def test_none_is_none() -> None:
    assert parse(None, NOW) == parse("", NOW) == (None, [])


def test_a_ups_is_asked_again_and_its_silence_survived() -> None:
    answers: list[float | UpsError] = [600.0, 300.0, UpsError("gone"), 900.0]

    def read(_ups: str) -> float:
        answer = answers.pop(0)
        if isinstance(answer, UpsError):
            raise answer
        return answer

    watch = Watch(Deadline("ups:x", ups="x@localhost"), read, reserve_seconds=60)
    assert watch.now(1000.0) == 1540.0
    assert watch.now(1005.0) == 1540.0, "asked every 10 s only"
    assert watch.now(1010.0) == 1250.0, "a deadline may come nearer"
    assert watch.now(1020.0) == 1250.0
    assert watch.trouble == "gone"
    assert watch.now(1030.0) == 1870.0, "and go away"
    assert watch.trouble == ""


def test_a_ups_that_is_slow_to_answer_keeps_nobody_waiting() -> None:
    let_go, answers = threading.Event(), [600.0, 300.0, 200.0]

    def read(_ups: str) -> float:
        if len(answers) < 3:
            let_go.wait(10)
        return answers.pop(0)

    watch = Watch(Deadline("ups:x", ups="x@localhost"), read)
    asked: list[threading.Thread] = []

    def aside(ask: Callable[[], None]) -> None:
        asked.append(threading.Thread(target=ask))
        asked[-1].start()

    watch.aside = aside
    assert watch.now(1000.0) == 1600.0, "the first is waited for: nothing is planned without"
    began = time.monotonic()
    assert [watch.now(1010.0), watch.now(1025.0)] == [1600.0, 1600.0]
    assert time.monotonic() - began < 5
    assert len(asked) == 1, "one question at a time"
    let_go.set()
    asked[0].join()
    assert watch.at == 1310.0, "counted from when it was asked"
    watch.now(1026.0)
    asked[1].join()
    assert watch.now(1027.0) == 1226.0


@pytest.mark.parametrize("text", ["", "n/a", "-1", "nan", "inf", "1e999"])
def test_a_runtime_that_is_none(text: str) -> None:
    with pytest.raises(UpsError, match="no number"):
        runtime_of(text, "x@localhost")


def test_without_nut_the_way_out_is_named() -> None:
    with pytest.raises(UpsError, match="install nut-client"):
        read_runtime("x@localhost", program="upsc-that-is-not-there")


@pytest.fixture
def upsd(tmp_path: Path) -> Iterator[tuple[int, Callable[[str], None]]]:
    """A real upsd on loopback with two dummy UPSes: its port, and how to set what `full` tells."""
    driver = Path("/usr/lib/nut/dummy-ups")
    # Debian's /usr/sbin/upsd is a script that asks /etc/nut/nut.conf first whether it may.
    upsd_path = shutil.which("upsd", path="/usr/lib/nut:/lib/nut")
    if not driver.exists() or upsd_path is None or os.geteuid() != 0:
        pytest.skip("nut-server is not installed (apt-get install nut-server nut-client), or not root")
    port = free_port()
    state, etc = tmp_path / "state", tmp_path / "etc"
    state.mkdir()
    etc.mkdir()
    (etc / "ups.conf").write_text(
        f"[full]\ndriver = dummy-ups\nport = {etc}/full.dev\nmode = dummy-loop\n"
        f"[mute]\ndriver = dummy-ups\nport = {etc}/mute.dev\nmode = dummy-loop\n"
    )
    (etc / "upsd.conf").write_text(f"LISTEN 127.0.0.1 {port}\n")
    (etc / "upsd.users").write_text("")
    for path in etc.iterdir():
        path.chmod(0o600)

    def tell(runtime: str) -> None:
        text = f"ups.status: OB\nbattery.charge: 40\nbattery.runtime: {runtime}\nTIMER 1\n"
        (etc / "full.dev").write_text(text)

    tell("600")
    (etc / "mute.dev").write_text("ups.status: OB\nTIMER 1\n")
    environment = {
        **os.environ,
        "NUT_CONFPATH": str(etc),
        "NUT_STATEPATH": str(state),
        "NUT_ALTPIDPATH": str(state),
    }
    running = []
    try:
        for name in ("full", "mute"):
            running.append(
                subprocess.Popen([str(driver), "-a", name, "-u", "root", "-D"], env=environment,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )  # fmt: skip
        running.append(
            subprocess.Popen([upsd_path, "-D", "-u", "root"], env=environment,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )  # fmt: skip
        _wait_for(lambda: read_runtime(f"full@127.0.0.1:{port}") > 0)
        yield port, tell
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait(10)


def _wait_for(good: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            if good():
                return
        except UpsError as error:
            if time.monotonic() > until:
                pytest.fail(f"upsd: {error}")
        assert time.monotonic() < until
        time.sleep(0.2)


def test_a_real_upsd_is_read_and_read_again(upsd: tuple[int, Callable[[str], None]]) -> None:
    port, tell = upsd
    ups = f"full@127.0.0.1:{port}"
    deadline, findings = parse(f"ups:{ups}", time.time())
    assert findings == []
    watch = Watch(deadline, read_runtime, every_seconds=0.0)
    first = watch.now(1000.0)
    assert first == pytest.approx(1600.0)
    tell("120")
    _wait_for(lambda: watch.now(1000.0) == pytest.approx(1120.0))


def test_a_real_upsd_without_a_runtime_or_the_name(upsd: tuple[int, Callable[[str], None]]) -> None:
    port, _tell = upsd
    with pytest.raises(UpsError, match=r"tells no battery\.runtime"):
        read_runtime(f"mute@127.0.0.1:{port}")
    with pytest.raises(UpsError, match="knows this name"):
        read_runtime(f"other@127.0.0.1:{port}")
    with pytest.raises(UpsError, match="see that upsd runs"):
        read_runtime(f"full@127.0.0.1:{free_port()}")
