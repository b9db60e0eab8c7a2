# SPDX-License-Identifier: GPL-3.0-or-later
"""The QEMU process of a VM on this host, halted by the kernel (SIGSTOP): its guest cannot be let go on.

libvirt lets a guest go on by asking its QEMU (``cont``); a halted one hears nothing, whoever asks and whether
we live or not. Its memory stays as it is, so that this can be taken back (SIGCONT) as long as nobody relies
on it. Where a process is, libvirt's pid files say (src/qemu/qemu_process.c, ``priv->pidfile``), and its
command line says whose it is (``-uuid``); a pidfd keeps both true until the signal is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

PID_FILES: Final = Path("/run/libvirt/qemu")
PROCESSES: Final = Path("/proc")
# Each thread stops at its next return from the kernel; one that waits for a disk takes as long as that.
HALT_SECONDS: Final = 0.5
END_SECONDS: Final = 30.0
_LOOK_SECONDS: Final = 0.001
# proc(5): stopped, traced, dead.
_STANDING: Final = frozenset("TtZX")


@contextlib.contextmanager
def _process(vm: str, pid_files: Path) -> Iterator[tuple[int, int] | None]:
    """Number and pidfd of the VM's QEMU; None where there is none."""
    wanted = b"-uuid\0" + vm.encode() + b"\0"
    for path in sorted(pid_files.glob("*.pid")):
        try:
            pid = int(path.read_text())
            descriptor = os.pidfd_open(pid)
        except (OSError, ValueError):
            continue
        try:
            with contextlib.suppress(OSError):
                # Read after the descriptor is open: another process of that number would have another line.
                if wanted in (PROCESSES / str(pid) / "cmdline").read_bytes():
                    yield pid, descriptor
                    return
        finally:
            os.close(descriptor)
    yield None


def _thread_states(pid: int) -> list[str]:
    states = []
    for path in (PROCESSES / str(pid) / "task").glob("*/stat"):
        with contextlib.suppress(OSError):
            # The name in brackets may have brackets of its own.
            states.append(path.read_text().rpartition(")")[2].split()[0])
    return states


def _stands(pid: int) -> bool:
    return all(state in _STANDING for state in _thread_states(pid))


def _halt(vm: str, pid_files: Path) -> bool:
    with _process(vm, pid_files) as found:
        if found is None:
            return False
        pid, descriptor = found
        try:
            signal.pidfd_send_signal(descriptor, signal.SIGSTOP)
            until = time.monotonic() + HALT_SECONDS
            while not (stands := _stands(pid)) and time.monotonic() < until:
                time.sleep(_LOOK_SECONDS)
            if not stands:
                signal.pidfd_send_signal(descriptor, signal.SIGCONT)
        except OSError:
            # It has ended meanwhile.
            return False
        return stands


def _signal_halted(vm: str, number: signal.Signals, pid_files: Path, wait_seconds: float) -> bool:
    with _process(vm, pid_files) as found:
        if found is None or not _stands(found[0]):
            return False
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(found[1], number)
        if wait_seconds:
            # Readable when the process has ended (pidfd_open(2)).
            select.select([found[1]], [], [], wait_seconds)
        return True


def _is_halted(vm: str, pid_files: Path) -> bool:
    with _process(vm, pid_files) as found:
        return found is not None and _stands(found[0])


class Emulators:
    """The QEMU processes of this host; ``vm`` is a UUID. Errors of the system go to the caller (OSError)."""

    def __init__(self, pid_files: Path = PID_FILES) -> None:
        self._pid_files = pid_files

    async def halt(self, vm: str) -> bool:
        """Halt it. True: it stands, with all its threads; False: there is none, or it goes on."""
        return await asyncio.to_thread(_halt, vm, self._pid_files)

    async def is_halted(self, vm: str) -> bool:
        """Whether it stands now; False where there is none."""
        return await asyncio.to_thread(_is_halted, vm, self._pid_files)

    async def go_on(self, vm: str) -> bool:
        """Let a halted one go on with what it was at, and with what it was asked meanwhile. Whether it was
        halted."""
        return await asyncio.to_thread(_signal_halted, vm, signal.SIGCONT, self._pid_files, 0.0)

    async def end(self, vm: str) -> bool:
        """End a halted one without another instruction of it; one that is not halted is let alone. Whether
        it was halted."""
        return await asyncio.to_thread(_signal_halted, vm, signal.SIGKILL, self._pid_files, END_SECONDS)
