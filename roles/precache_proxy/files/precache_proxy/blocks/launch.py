# SPDX-License-Identifier: GPL-3.0-or-later
"""Starts QEMU's tools so that somebody can decide, knowing the process, before the tool opens an image.

The process waits at a gate (a line on its stdin) and then becomes the tool, with the same number and the same
start time. Whoever opens the gate may die first: then it ends without having opened anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

# Called with the process number while the process waits; what it raises keeps the gate shut.
Admit = Callable[[int], Awaitable[None]]

_AT_THE_GATE = 'read -r go || exit 1; exec 0</dev/null; exec "$@"'
# The socket is handed over as systemd would, as descriptor 3 and with the process's own number. setpriv has
# the kernel kill the server when the proxy dies (a preexec_fn would not be safe beside libvirt's threads); a
# proxy that died before that is no parent any more.
_SERVER_AT_THE_GATE = (
    '[ "$PPID" = "$1" ] || exit 1; shift; exec 3<&1 >/dev/null; read -r go || exit 1; exec 0</dev/null; '
    'export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@"'
)


def start_ticks(pid: int) -> int | None:
    """When a process began, in clock ticks since boot: with its number that is nobody else. None: gone."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    return int(status.rpartition(")")[2].split()[19])


async def start_tool(*command: str, environment: Mapping[str, str]) -> asyncio.subprocess.Process:
    """A tool that waits for :func:`open_gate`; it outlives the proxy, so that it ends what it has begun."""
    return await asyncio.create_subprocess_exec(
        "sh", "-c", _AT_THE_GATE, "sh", *command,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=dict(environment), process_group=0,
    )  # fmt: skip


async def start_server(
    *command: str, listener: int, environment: Mapping[str, str]
) -> asyncio.subprocess.Process:
    """A server on the listening socket that waits for :func:`open_gate`; it ends with the proxy."""
    return await asyncio.create_subprocess_exec(
        "setpriv", "--pdeathsig", "KILL",
        "sh", "-c", _SERVER_AT_THE_GATE, "sh", str(os.getpid()), *command,
        stdin=asyncio.subprocess.PIPE, stdout=listener, stderr=asyncio.subprocess.PIPE,
        env=dict(environment), process_group=0,
    )  # fmt: skip


async def open_gate(process: asyncio.subprocess.Process, admit: Admit | None) -> None:
    """Let the process become the tool once ``admit`` has returned. One that ended is its waiter's to see."""
    if admit is not None:
        await admit(process.pid)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(b"go\n")
        await process.stdin.drain()
        process.stdin.close()
        await process.stdin.wait_closed()
