# SPDX-License-Identifier: GPL-3.0-or-later
"""The source gives its VM up while libvirt's last call of the move is still on its way.

When libvirt asks the destination for *Finish* all memory is there (finish_call.py), and the guest stands
still until we release it. libvirt here waits for the answer, a round trip and more, and then for the end of
its QEMU; nothing of that is needed by a VM that is resumed at the destination on our word. What is needed is
that it cannot go on here: libvirt would let it, were Finish to fail. So its QEMU is halted first
(emulator.py). Halted while libvirt still waited, it can hear of no such order any more, and its memory is
kept until the destination has said what became of the VM: with *activated* it is ended, with the
destination's durable word that it will not run it, it goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from precache_proxy.errors import LifeboatError
from precache_proxy.evacuation.calling_off import CallingOff
from precache_proxy.evacuation.domains import Domains
from precache_proxy.evacuation.emulator import Emulators
from precache_proxy.evacuation.finish_call import FinishCall
from precache_proxy.evacuation.reconcile import Presence
from precache_proxy.evacuation.relay import remove_job_directory

if TYPE_CHECKING:
    from precache_proxy.evacuation.departure import Departure

logger = logging.getLogger(__name__)

# A question that QEMU has not answered by then keeps it from being halted: the move ends as libvirt ends it.
LOOK_SECONDS: Final = 1.0
# libvirt hears of the end of a QEMU from its monitor's socket.
OFF_SECONDS: Final = 10.0
_ASK_SECONDS: Final = 0.05


class UnendedMove:
    """libvirt's call for one move. ``conclude`` awaits it and puts away what belongs to it, once.

    ``looking`` is held while QEMU is asked how far it is; ``last_look`` asks for the last time.
    """

    def __init__(
        self,
        vm: str,
        emulators: Emulators,
        moving: asyncio.Task[None],
        finish: FinishCall,
        ending: CallingOff,
        looking: asyncio.Lock,
        last_look: Callable[[], Awaitable[None]],
        conclude: Callable[[], Awaitable[None]],
    ) -> None:
        self._vm = vm
        self._emulators = emulators
        self._moving = moving
        self._finish = finish
        self._ending = ending
        self._looking = looking
        self._last_look = last_look
        self._conclude = conclude
        self._quiet = False

    async def memory_over(self) -> bool:
        """Return when libvirt waits for the destination's last word only (True), or for nothing any more."""
        asked = asyncio.create_task(self._finish.asked.wait())
        try:
            await asyncio.wait({self._moving, asked}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked.cancel()
        return not self._moving.done()

    async def quieten(self) -> None:
        """See that nobody of ours asks QEMU, or is about to stop its guest; said on what it has come to."""
        await self._ending.over()
        with contextlib.suppress(TimeoutError, LifeboatError):
            async with asyncio.timeout(LOOK_SECONDS):
                await self._looking.acquire()
            self._quiet = True
            await self._last_look()

    async def halt(self) -> bool:
        """Halt QEMU. True: its guest cannot go on here, whatever libvirt, its operators or we do now.

        False: libvirt has its answer already, or its connection has ended, or QEMU was not to be halted: it
        may have been told to go on before it was.
        """
        if not self._quiet or not self._finish.unanswered:
            return False
        # Asked again after: an order that was given in between is obeyed at the latest when it goes on.
        return await self._emulators.halt(self._vm) and self._finish.unanswered

    def let_through(self) -> None:
        """The destination's answer is libvirt's to hear from now on."""
        self._finish.let_through()

    async def give_up(self) -> None:
        """Leave the move to libvirt: QEMU goes on, and so do whatever libvirt asked of it. Raises what ended
        the move, as it does without all this."""
        await self._emulators.go_on(self._vm)
        self.let_through()
        self._release_looks()
        await self._conclude()

    async def end(self) -> None:
        """The VM runs there: end QEMU here, and what libvirt has to say of that is heard by nobody."""
        await self._emulators.end(self._vm)
        self.let_through()
        self._release_looks()
        try:
            await self._conclude()
        except LifeboatError as error:
            logger.info("VM %s: after its release libvirt ended the move so: %s", self._vm, error)

    def _release_looks(self) -> None:
        if self._quiet:
            self._quiet = False
            self._looking.release()


async def take_back(departure: Departure) -> None:
    """The VM is not given up, or not any more: let a QEMU of it that is halted here go on. Repeatable."""
    unended, departure.unended = departure.unended, None
    if unended is not None:
        with contextlib.suppress(LifeboatError):
            await unended.give_up()
    elif await departure.around.emulators.go_on(departure.job.vm):
        logger.warning("VM %s: its QEMU was halted here by an earlier run; it goes on", departure.job.vm)


async def end(departure: Departure) -> None:
    """The VM runs at the destination: end a QEMU of it that is halted here, and wait until libvirt says so.

    One that is not halted is let alone. Repeatable.
    """
    unended, departure.unended = departure.unended, None
    around, vm = departure.around, departure.job.vm
    if unended is not None:
        await unended.end()
        await _until_off(around.domains, vm)
    elif await around.emulators.end(vm):
        await _until_off(around.domains, vm)
    # Of a proxy that was killed after the release they are still there.
    await asyncio.to_thread(remove_job_directory, around.run_directory / "jobs" / departure.job.id)


async def _until_off(domains: Domains, vm: str) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(OFF_SECONDS):
            while await domains.presence_at_source(vm) in {Presence.PAUSED, Presence.RUNNING}:  # noqa: ASYNC110
                await asyncio.sleep(_ASK_SECONDS)
