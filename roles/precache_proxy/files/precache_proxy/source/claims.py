# SPDX-License-Identifier: GPL-3.0-or-later
"""Processes of ours that have images of a shut-off VM open, so that none of them keeps it from starting.

libvirt's hook ends the processes that it finds noted, and waits for those that change an image; whoever
comes after it must not open anything. A process is noted *before* it opens an image, and libvirt is asked
*after that* whether the VM is off still. libvirt calls a VM active before it calls the hook. So whichever
way the two are interleaved, one sees the other::

    we:     note the process   -> ask: is it active?   -> open
    start:  the VM is active   -> hook: who is noted?  -> QEMU opens

If the hook misses the note, the note came after the hook's look, and our question after the note: the answer
is yes. Nothing needs to be taken back when either side dies: a note of a process that is gone says nothing
(it has the process's start time), and that a VM is active is libvirt's own to take back.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import ClassVar

from precache_proxy.blocks.launch import start_ticks
from precache_proxy.errors import LifeboatError, VmStateChanged
from precache_proxy.source.tracker import VmReference


class ImageClaims:
    """Notes in the run directory: ``readers/`` can be ended at any time, ``changing/`` are let finish."""

    READERS: ClassVar[str] = "readers"
    CHANGING: ClassVar[str] = "changing"

    def __init__(
        self, run_directory: Path, vm: VmReference, is_active: Callable[[], Awaitable[bool]]
    ) -> None:
        self._run_directory = run_directory
        self._vm = vm
        self._is_active = is_active

    def _path(self, kind: str) -> Path:
        return self._run_directory / kind / f"{self._vm.uuid}.json"

    async def require_off(self) -> None:
        """Raise VmStateChanged where the VM runs, or is being started."""
        if await self._is_active():
            raise VmStateChanged(f"{self._vm}: it was started while its images were in use here; ask again")

    async def blame_start(self) -> None:
        """Raise VmStateChanged where the VM was started: what failed may only be the hook's doing."""
        try:
            await self.require_off()
        except VmStateChanged:
            raise
        except LifeboatError:
            return  # libvirt does not say: what failed speaks for itself

    async def admit_reader(self, pid: int) -> None:
        """Let a process that only reads open an image. Raises VmStateChanged: then it must not."""
        await self._admit(self.READERS, pid)

    async def admit_change(self, pid: int) -> None:
        """Let a process that changes an image, shortly, open it. Raises VmStateChanged: then it must not."""
        await self._admit(self.CHANGING, pid)

    async def _admit(self, kind: str, pid: int) -> None:
        await asyncio.to_thread(self._note, kind, pid)
        await self.require_off()

    def _note(self, kind: str, pid: int) -> None:
        path = self._path(kind)
        # What a former proxy left may take a while to die: it stays noted as long.
        noted = [*self._alive(path), *((pid, ticks) for ticks in [start_ticks(pid)] if ticks is not None)]
        path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.new")
        beside.write_text(
            json.dumps({"pids": [one[0] for one in noted], "ticks": [one[1] for one in noted]}),
            encoding="ascii",
        )
        beside.rename(path)

    @staticmethod
    def _alive(path: Path) -> list[tuple[int, int]]:
        try:
            told = json.loads(path.read_text(encoding="ascii"))
            noted = [(int(pid), int(ticks)) for pid, ticks in zip(told["pids"], told["ticks"], strict=True)]
        except (OSError, ValueError, KeyError, TypeError):
            return []
        return [(pid, ticks) for pid, ticks in noted if start_ticks(pid) == ticks]

    async def forget_ended(self) -> None:
        """Remove the notes of which no process is left."""
        await asyncio.to_thread(self._forget_ended)

    def _forget_ended(self) -> None:
        for kind in (self.READERS, self.CHANGING):
            path = self._path(kind)
            if path.exists() and not self._alive(path):
                path.unlink(missing_ok=True)
