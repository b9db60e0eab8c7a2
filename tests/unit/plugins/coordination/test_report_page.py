# SPDX-License-Identifier: GPL-3.0-or-later
"""The report's page: made of a simulated evacuation's figures, opened in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._report_page import render, write_page

BEGAN = 1_763_700_000.0


def report() -> dict[str, Any]:
    """Twelve VMs, one of which stayed and one of which was paused; names as people choose them."""
    names = ["web1", "Datenbank für Köln", "<script>alert(1)</script>", *(f"worker-{n}" for n in range(9))]
    vms: list[dict[str, Any]] = []
    planned = []
    for number, name in enumerate(names):
        start, end = 4.0 * number, 4.0 * number + 11.0
        steps = [
            {"step": step, "started_at": BEGAN + start + at, "ended_at": BEGAN + start + until}
            for step, at, until in (
                ("preflight", 0.0, 0.6),
                ("catch-up", 0.6, 2.2),
                ("freeze", 2.2, 2.4),
                ("migrate", 2.4, 10.0),
                ("confirm", 10.0, 10.6),
                ("finish", 10.6, 11.0),
            )
        ]
        vm = {
            "name": name,
            "vm": f"uuid-{number}",
            "host": f"home{number % 2 + 1}",
            "peer": f"backup{number % 2 + 1}",
            "verdict": "evacuated",
            "rung": "paused" if number == 3 else "live",
            "started_seconds": start,
            "out_seconds": end,
            "forecast_end_seconds": end + 2,
            "downtime_seconds": 0.31,
            "wire_bytes": 48_200_000,
            "steps": steps,
            "sentence": "",
        }
        if number == 11:
            vm |= {
                "verdict": "stayed",
                "out_seconds": None,
                "steps": [],
                "started_seconds": None,
                "lag_seconds": 12.0,
                "downtime_seconds": None,
                "wire_bytes": None,
                "sentence": "VM worker-8 stays: there was no time for it before the deadline",
            }
        vms.append(vm)
        planned.append(
            {"name": name, "end_seconds": None if number == 11 else end + 2, "rung": "live", "reason": "x"}
        )
    samples = [
        {
            "at_seconds": 2.0 * n,
            "goodput_bytes_per_second": {"home1 backup1": 3e6 + 2e5 * (n % 4), "home2 backup2": 2.4e6},
            "capacity_bytes_per_second": {"home": 6.2e6},
            "out": 0,
            "under_way": 2,
            "waiting": 3,
            "deadline_in_seconds": 60 - 2.0 * n,
        }
        for n in range(28)
    ]
    return {
        "schema_version": 1,
        "site": "home",
        "check_mode": False,
        "started_at": "2025-11-21T04:40:00+00:00",
        "ended_at": "2025-11-21T04:40:55+00:00",
        "hosts": ["home1", "home2"],
        "hosts_failed": [],
        "totals": {"vms": 12, "out": 11, "all_out": False, "verdicts": {"evacuated": 11, "stayed": 1}},
        "vms": vms,
        "coordination": {
            "strategy": "feedback",
            "deadline": "60s",
            "seconds": 55.0,
            "makespan_seconds": 51.0,
            "horizon_seconds": 60.0,
            "expected_share": 0.44,
            "bytes_by_class": {"control": 120_000, "migration": 520_000_000, "precache": 31_000_000},
            "forecast": {
                "at": "x",
                "site": "home",
                "makespan_seconds": 53.0,
                "leaving": 11,
                "expected_share": 0.41,
                "vms": planned,
            },
            "samples": samples,
            "decisions": [
                {
                    "at_seconds": 12.0,
                    "vm": "worker-0",
                    "what": "falls-to-paused",
                    "reason": "does-not-converge",
                    "sentence": "dirties 7.0 MB/s, 6.1 MB/s are sent",
                }
            ],
        },
    }


def test_names_cannot_write_into_the_page() -> None:
    page = render(report())
    assert "<script>alert" not in page
    assert "&lt;script&gt;" in page


def test_the_page_needs_nothing_but_itself() -> None:
    page = render(report())
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "@import" not in page
    assert "11 of 12" in page
    assert "forecast 53.0 s" in page


def test_a_forecast_by_guess_is_called_one() -> None:
    guessed = report()
    assert "a guess" not in render(guessed)
    guessed["coordination"]["forecast"]["line_known"] = False
    assert "forecast 53.0 s, a guess: what the line carries was not known" in render(guessed)


def test_an_evacuation_of_nothing_has_a_page_too() -> None:
    empty = report()
    empty["vms"] = []
    empty["totals"] = {"vms": 0, "out": 0, "all_out": True, "verdicts": {}}
    empty["coordination"] |= {
        "samples": [],
        "decisions": [],
        "bytes_by_class": {},
        "expected_share": None,
        "makespan_seconds": 0.0,
        "seconds": 0.0,
    }
    empty["coordination"]["forecast"] |= {"vms": [], "leaving": 0, "makespan_seconds": 0.0}
    assert "0 of 0" in render(empty)


@pytest.mark.parametrize(("what", "width"), [("desktop", 1280), ("phone", 390)])
def test_a_browser_shows_it_without_complaint(tmp_path: Path, what: str, width: int) -> None:
    """Opens without a console error; nothing is wider than the window; the pictures are drawn."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium here (apt-get install chromium)")
    page = tmp_path / "report.html"
    write_page(report(), page)
    # Measured by the page itself, in a frame of that width: a headless window has a least width of its own.
    probe = tmp_path / "probe.html"
    probe.write_text(
        f"""<!doctype html><html><body style="margin:0"><iframe id="f" src="report.html"
        style="width:{width}px;height:2000px;border:0"></iframe><pre id="out"></pre><script>
        const errors = [];
        const frame = document.getElementById("f");
        window.addEventListener("error", e => errors.push(String(e.message)));
        frame.onload = () => {{
          const d = frame.contentDocument, w = frame.contentWindow;
          const wide = [...d.querySelectorAll("main *")].filter(e => !e.closest(".wide")
            && e.getBoundingClientRect().right > {width} + 1).map(e => e.tagName + "." + e.className);
          document.getElementById("out").textContent = JSON.stringify({{
            errors, wide, scroll: d.documentElement.scrollWidth,
            figures: d.querySelectorAll("#key-figures .figure").length,
            bars: d.querySelectorAll("#timeline rect").length, title: d.title,
            drawn: [...d.querySelectorAll("polyline.result")].map(p => p.getBBox().width)}});
        }};</script></body></html>"""
    )
    options = [
        browser,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
        "--virtual-time-budget=4000",
    ]
    done = subprocess.run(
        [*options, "--dump-dom", f"file://{probe}"], capture_output=True, text=True, timeout=120, check=True
    )
    told = re.search(r'<pre id="out">(\{.*?\})</pre>', done.stdout, re.DOTALL)
    assert told, done.stdout[-2000:] + done.stderr[-2000:]
    seen = json.loads(told.group(1).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert seen["errors"] == []
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert seen["wide"] == []
    assert seen["scroll"] <= width
    assert seen["figures"] == 5
    assert seen["bars"] == 6 * 11
    assert all(drawn > 100 for drawn in seen["drawn"])
    assert seen["title"] == "Evacuation of home: 11 of 12 out"
