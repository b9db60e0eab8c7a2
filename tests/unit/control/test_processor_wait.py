# SPDX-License-Identifier: GPL-3.0-or-later
"""What the kernel counts of waiting for processors, and kernels that do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from precache_proxy.processor_wait import processor_wait, recent_share


def test_what_the_kernel_counts(tmp_path: Path) -> None:
    counter = tmp_path / "cpu"
    counter.write_text(
        "some avg10=61.94 avg60=19.05 avg300=8.73 total=9683291240\n"
        "full avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
    )
    told = processor_wait(counter)
    assert told is not None
    assert told["total_seconds"] == pytest.approx(9683.29124)
    assert told["recent_share"] == pytest.approx(0.6194)
    assert recent_share(counter) == pytest.approx(0.6194)


def test_a_kernel_that_does_not_count(tmp_path: Path) -> None:
    assert processor_wait(tmp_path / "none") is None
    assert recent_share(tmp_path / "none") == 0.0
    for text in ("", "some avg10=1.00\n", "some avg10=x avg60=0 avg300=0 total=y\n", "some nonsense\n"):
        (tmp_path / "cpu").write_text(text)
        assert processor_wait(tmp_path / "cpu") is None


def test_the_kernel_that_runs_here() -> None:
    told = processor_wait()
    if told is None:
        pytest.skip("this kernel does not count it")
    assert told["total_seconds"] >= 0
    assert 0.0 <= told["recent_share"] <= 1.0
