# SPDX-License-Identifier: GPL-3.0-or-later
"""The last call of libvirt's migration at its source, as it passes our relay: *Finish*, and its reply.

libvirt makes it when *Perform* has ended, well (``cancelled`` 0) or not. Well means that QEMU's migration is
completed: with the return path that libvirt always asks for QEMU says so at the source only when the
destination has loaded everything. Until there is a reply libvirt here does nothing more to the VM: a good one
lets it end the VM, a bad one, or the connection's end, lets the VM go on (src/qemu/qemu_migration.c,
qemuMigrationSrcPerformPeer2Peer3). Layout of the call: src/remote/remote_protocol.x,
remote_domain_migrate_finish3_params_args, whose last word is ``cancelled``.
"""

from __future__ import annotations

import asyncio
import select
from typing import Final, Protocol

from precache_proxy.evacuation.libvirt_frames import (
    CALL,
    DOMAIN_MIGRATE_FINISH3_PARAMS,
    HEADER,
    REMOTE_PROGRAM,
)
from precache_proxy.evacuation.libvirt_replies import Replies

_WORD_BYTES: Final = 4
# A reply is held for as long as something of ours is written to disk, not longer.
_HOLD_SECONDS: Final = 5.0


class Connection(Protocol):
    """What is asked of the local side's connection."""

    def fileno(self) -> int: ...


class FinishCall:
    """Follows the one connection of a job's libvirt, in both directions.

    ``asked`` is set once a Finish after a good Perform has been read from libvirt as a whole. Its reply is
    held back from then on until :meth:`let_through`.
    """

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self._let_through = asyncio.Event()
        self._head = b""
        self._left = 0
        self._follows = False
        self._tail = b""
        self._connection: Connection | None = None
        self._replies: Replies | None = Replies(DOMAIN_MIGRATE_FINISH3_PARAMS)
        self._answered = False

    def carried_by(self, connection: Connection | None) -> None:
        """The local side's socket."""
        self._connection = connection

    def outward(self, piece: bytes) -> None:
        """What libvirt says, however it is cut."""
        data = self._head + piece
        self._head = b""
        while data and not self.asked.is_set():
            if not self._left:
                if len(data) < HEADER.size:
                    self._head = data
                    return
                length, program, _version, procedure, kind, _serial, _status = HEADER.unpack_from(data)
                self._left = max(length, HEADER.size)
                self._follows = (program, procedure, kind) == (
                    REMOTE_PROGRAM,
                    DOMAIN_MIGRATE_FINISH3_PARAMS,
                    CALL,
                )
                self._tail = b""
            part, data = data[: self._left], data[self._left :]
            self._left -= len(part)
            self._tail = (self._tail + part)[-_WORD_BYTES:]
            if not self._left and self._follows and self._tail == bytes(_WORD_BYTES):
                self.asked.set()

    async def inward(self, piece: bytes) -> None:
        """What libvirt is told next; returns when it may be."""
        if self._replies is None or not self._replies.contain(piece):
            return
        self._replies = None
        if self.asked.is_set() and not self._let_through.is_set():
            try:
                async with asyncio.timeout(_HOLD_SECONDS):
                    await self._let_through.wait()
            except TimeoutError:
                pass
        self._answered = True

    def let_through(self) -> None:
        """Its reply, come or to come, is libvirt's to hear."""
        self._let_through.set()

    @property
    def unanswered(self) -> bool:
        """Whether libvirt here still waits: it has no reply, and its connection has not ended for it."""
        if self._answered or self._connection is None:
            return False
        look = select.poll()
        try:
            # Told by the kernel at once, before our reader comes to hear of it.
            look.register(self._connection.fileno(), select.POLLRDHUP)
            return not look.poll(0)
        except (OSError, ValueError):
            return False
