# SPDX-License-Identifier: GPL-3.0-or-later
"""What is asked before anything moves: links are measured until their rate is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import ProxyError
from ansible_collections.lifeboat.evacuation.plugins.module_utils._deadline import Watch
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import Finding
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._surveyor import Refused, Surveyor, Wanted

from unit.plugins.coordination.sites import MB, MBIT, site, vm


class Measuring:
    """A proxy that gives one answer after the other to each measurement; None: it does not answer."""

    def __init__(self, name: str, *answers: dict[str, Any] | None) -> None:
        self.name = name
        self.answers = list(answers)
        self.asked = 0

    def request(
        self, method: str, path: str, body: Mapping[str, object] | None = None, timeout_seconds: float = 30.0
    ) -> Any:
        self.asked += 1
        answer = self.answers.pop(0)
        if answer is None:
            raise ProxyError("unreachable", f"{path}: no link")
        return answer

    def close(self) -> None:
        pass


def rate(first: float, second: float, queue: float | None = 0.01) -> dict[str, Any]:
    """An answer in Mbit/s for each half."""
    return {"bytes_per_second": (first + second) / 2 * MBIT, "queue_seconds": queue,
            "halves_bytes_per_second": [first * MBIT, second * MBIT]}  # fmt: skip


def measured(*proxies: Measuring) -> tuple[float | None, list[str]]:
    said: list[str] = []
    wanted = Wanted("home", None, "feedback", 1.0, {})
    surveyor = Surveyor(wanted, proxies, {}, Watch(None, lambda _ups: 0.0), said.append)
    vms = [vm(f"a{number}", host=number + 1, memory=10 * MB) for number in range(len(proxies))]
    try:
        return surveyor.measured(site(*vms, rate=None)).uplinks["uplink"], said
    finally:
        surveyor.close()


def test_pairs_that_share_a_line_are_judged_by_their_sum() -> None:
    one, two = Measuring("home1", rate(30, 18)), Measuring("home2", rate(18, 30))
    told, said = measured(one, two)
    assert (told, said) == (pytest.approx(48 * MBIT), [])


def test_a_rate_that_is_none_yet_is_measured_again_by_all_and_said() -> None:
    one = Measuring("home1", rate(4, 8), rate(24, 25))
    two = Measuring("home2", rate(6, 8), rate(23, 24))
    told, said = measured(one, two)
    assert told == pytest.approx(48 * MBIT)
    assert said == [
        "uplink uplink: 13.0 Mbit/s measured, from 10.0 to 16.0 Mbit/s within it; it is measured again"
    ]
    assert (one.asked, two.asked) == (2, 2)


def test_measuring_ends_and_what_is_not_to_be_relied_on_is_said() -> None:
    one = Measuring("home1", *(rate(40, 42, queue=0.12) for _ in range(9)))
    told, said = measured(one)
    assert told == pytest.approx(41 * MBIT)
    assert one.asked == 3
    assert "a queue of 120 ms before it; do not rely on it: give evacuate_uplink" in said[-1]


def test_a_pair_that_does_not_answer_is_said_and_the_others_rate_is_the_lines() -> None:
    told, said = measured(Measuring("home1", rate(48, 47)), Measuring("home2", None))
    assert told == pytest.approx(47.5 * MBIT)
    assert "home2: the link to backup2 was not measured" in said[0]
    nobody, _said = measured(Measuring("home1", None))
    assert nobody is None


def test_a_proxy_of_an_older_version_is_believed() -> None:
    assert measured(Measuring("home1", {"bytes_per_second": 5e6})) == (5e6, [])


class Saying:
    """A proxy that has an answer for each path."""

    def __init__(self, name: str, status: dict[str, Any], workload: dict[str, Any] | None = None) -> None:
        self.name = name
        self._answers = {"/v1/status": status, "/v1/workload": workload or {}, "/v1/vms": {"unprotected": []}}

    def request(
        self, method: str, path: str, body: Mapping[str, object] | None = None, timeout_seconds: float = 30.0
    ) -> Any:
        return self._answers[path]

    def close(self) -> None:
        pass


def test_peers_that_only_the_sources_name_are_asked_what_they_have() -> None:
    """Placed by memory and space: no variable of the inventory names the destination."""
    gib = 2**30
    source = Saying(
        "home1",
        {"vms": [{"uuid": "u-web1", "name": "web1", "peer": "backup2"}], "links": [], "evacuations": []},
        {"vms": [{"uuid": "u-web1", "memory_bytes": 64 * gib, "running": True}]},
    )
    found = {"backup2": Saying("backup2", {"site": "backup"}, {"memory_free_bytes": gib})}
    asked: list[str] = []

    def find(name: str) -> tuple[Saying | None, list[Finding]]:
        asked.append(name)
        wrong = [Finding(f"{name}: ansible_ssh_executable", "is not followed", "take it out")]
        return found.get(name), [] if name in found else wrong

    wanted = Wanted("home", None, "feedback", 1.0, {})
    for name in ("backup2", "backup3"):
        surveyor = Surveyor(wanted, [source], {}, Watch(None, lambda _ups: 0.0), asked.append, find=find)
        try:
            if name == "backup3":
                del found["backup2"]
                with pytest.raises(Refused, match="backup2: ansible_ssh_executable: is not followed"):
                    surveyor.survey()
                continue
            (told,) = surveyor.forecast(surveyor.survey())[1]
        finally:
            surveyor.close()
        assert "destination backup2: has 1.0 GiB of memory free and replicas of VMs that need 64.1" in str(
            told
        )
