# SPDX-License-Identifier: GPL-3.0-or-later
"""How much this host's processors were waited for: what a kernel with pressure stall information counts."""

from __future__ import annotations

from pathlib import Path

_COUNTER = Path("/proc/pressure/cpu")


def processor_wait(path: Path = _COUNTER) -> dict[str, float] | None:
    """In what time one task at least was ready and had no processor ("some"; Linux
    Documentation/accounting/psi.rst): ``total_seconds`` since boot, and ``recent_share``, 0 to 1, of the last
    ten seconds by the kernel's decaying mean. None: this kernel does not count it.
    """
    try:
        lines = path.read_text(encoding="ascii").splitlines()
        some = next(line for line in lines if line.startswith("some "))
        told = dict(word.split("=") for word in some.split()[1:])
        return {"total_seconds": int(told["total"]) / 1e6, "recent_share": float(told["avg10"]) / 100}
    except (OSError, ValueError, KeyError, StopIteration):
        return None


def recent_share(path: Path = _COUNTER) -> float:
    """The same of the last ten seconds alone; 0 where this kernel does not count it."""
    return (processor_wait(path) or {}).get("recent_share", 0.0)
