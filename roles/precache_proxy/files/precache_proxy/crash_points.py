# SPDX-License-Identifier: GPL-3.0-or-later
"""Named places where a test may kill this process, to see what a crash there leaves behind.

Honoured only when the environment says ``LIFEBOAT_CRASH_AT=name`` (or ``name:3`` for the third time there)
when
the process starts. The table is the one list of them; docs/evacuation.md says what each line leaves.
``LIFEBOAT_STOP_AT=name`` stops the process there instead (SIGSTOP), until the test has changed the world and
sends SIGCONT. ``LIFEBOAT_DROP_AT=name`` loses a message on its way (DROP_POINTS).
"""

from __future__ import annotations

import os
import signal
from typing import Final

from precache_proxy.errors import ConfigurationError

VARIABLE: Final = "LIFEBOAT_CRASH_AT"
STOP_VARIABLE: Final = "LIFEBOAT_STOP_AT"
DROP_VARIABLE: Final = "LIFEBOAT_DROP_AT"

CRASH_POINTS: Final[dict[str, str]] = {
    # source side of an evacuation, in order
    "departure-admitted": "the job's record is there, nothing was done",
    "departure-before-freeze": "step freeze is durable, no overlay yet",
    "restart-before-stop": "step stop is durable, starts are forbidden, the guest was not asked to end",
    "restart-stopped": "the guest has ended, the residual was not read",
    "departure-frozen": "overlays carry the guest's writes, the residual was not read",
    "departure-residual-sealed": "the peer holds the frozen instant",
    "departure-before-prepare": "step prepare is durable, the peer was not asked",
    "departure-prepared": "the peer has overlays, guard and sockets",
    "departure-migrating": "libvirt is copying RAM",
    "departure-before-standstill": "a live move is called off, the guest was not stopped for that",
    "departure-stands-still": "the guest stands still, libvirt was not told to end the move",
    "departure-migrated": "libvirt says that it is over; nothing of ours is recorded",
    "departure-before-tombstone": "step confirm is durable, no tombstone yet",
    "departure-halted": "QEMU is halted, libvirt waits for the destination's last word; no tombstone yet",
    "departure-tombstoned": "the tombstone is durable, not released",
    "departure-released": "released is durable here, the peer was not told",
    "departure-activated": "the peer runs the VM, step finish is not recorded",
    "departure-before-undefine": "step finish is durable, the domain is still defined",
    "departure-undefined": "the domain is gone from libvirt, its image was not adopted",
    "departure-adopted": "the image is the base for coming back, the job is not closed",
    "rollback-begun": "step rollback is durable, nothing was undone",
    "rollback-peer-cleaned": "the peer has dropped its arrival, the overlays are still on",
    "rollback-merged": "the overlays are merged back, the job is not closed",
    # destination side
    "arrival-recorded": "the arrival's record is there, nothing else",
    "arrival-guarded": "the guard forbids starts, no overlays yet",
    "arrival-prepared": "everything stands for libvirt to come, the source has no answer",
    "restart-state-placed": "UEFI variables and TPM state are in place, the domain is not defined",
    "restart-defined": "the domain is defined, and not started",
    "arrival-tops-named": "the running VM's definition names its top overlays, it writes below them still",
    "arrival-changed-over": "the running VM writes to its top overlays, the record does not know that",
    "arrival-tracked": "the VM has its top overlay and checkpoint, and the record says so",
    "arrival-released": "released is durable, the VM is still paused",
    "arrival-resumed": "the VM runs, activated is not recorded",
    "arrival-activated": "activated is durable, the guard still stands, the source has no answer",
    "arrival-aborting": "aborting is durable, nothing was removed",
    "landing-begun": "the way back is protected, no layer was collapsed",
    "landing-merged": "a disk's layers are merged into its lowest image, their files are still there",
    "landing-collapsed": "layers are collapsed, the landing is not recorded",
    # a VM from a generation, its home taken for dead: at the destination, then at the home
    "fail-over-prepared": "it stands there and the operator's word is durable, the home was not asked",
    "fail-over-home-told": "the home has given it up or does not answer, released is not recorded",
    "home-forbidden": "the home's tombstone is durable, nothing was ended",
    "home-jobs-ended": "the home's jobs are ended, the domain is still defined",
    # free for the rooms below
    "raw-overlay-on": "a raw disk has its overlay, no record says that the VM is protected",
    "seed-checkpointed": "the first copy's checkpoint is there, the record does not know it",
    "seed-copied": "the peer holds the first copy, no generation is sealed",
    "resync-sealed": "what differed is sealed, the record still says that tracking was lost",
    "return-sealed": "the way back's first generation is sealed, the record still names its overlays",
    "pass-begun": "the watchdog's record of a backup is there, the backup is not",
    "pass-open": "a pull backup is open in QEMU",
    "pass-sent": "a generation was sent, no acknowledgement yet",
    "pass-sealed": "the peer has acknowledged, the old checkpoint still exists",
    "pass-recorded": "the new generation is durable here, the old checkpoint still exists",
    "store-before-seal": "all of a generation was written, nothing was synced",
    "store-sealed": "the record is durable, the source was not told",
    "store-committing": "a superseded generation is being committed into the base",
    "store-generation-open": "overlays of a generation are created, nothing is written",
    "store-flushed": "a generation's overlays are closed, not synced",
    "store-synced": "a generation's overlays are synced, the record does not know them",
    "store-mark": "seeded blocks are flushed, their mark is not recorded",
    "store-marked": "the mark is durable, the source was not told",
    "store-committed": "the base is synced, the overlay above still names the superseded one",
    "store-rebased": "the overlay above names the base, the record does not know it",
    "store-commit-recorded": "the record no longer names superseded overlays, their files are still there",
    "store-recovering": "some leftovers of a crash are deleted, others not",
    "store-removing": "a removed replica's record says so, its files are still there",
}


DROP_POINTS: Final[dict[str, str]] = {
    "relay-finish-reply": "the destination's libvirt has the VM whole, the source's never hears of it",
}


def _wanted(variable: str, table: dict[str, str]) -> tuple[str, int]:
    name, _unused, count = os.environ.get(variable, "").partition(":")
    if name and name not in table:
        raise ConfigurationError(f"{variable}={name}: no such point; the tables are in crash_points.py")
    return name, int(count) if count.isdigit() else 1


_name, _remaining = _wanted(VARIABLE, CRASH_POINTS)
_stop_name, _stop_remaining = _wanted(STOP_VARIABLE, CRASH_POINTS)
_drop_name, _unused_count = _wanted(DROP_VARIABLE, DROP_POINTS)


def drops(name: str) -> bool:
    """Whether the environment asked for what passes there to be lost. KeyError on an unlisted name."""
    DROP_POINTS[name]
    return name == _drop_name


def crash_point(name: str) -> None:
    """Die here by SIGKILL, or stop here by SIGSTOP, if the environment asked for it; otherwise nothing.

    KeyError on an unlisted name.
    """
    global _remaining, _stop_remaining  # noqa: PLW0603  (how often we came by is a fact of the process)
    CRASH_POINTS[name]
    if name == _stop_name:
        _stop_remaining -= 1
        if _stop_remaining == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
    if name != _name:
        return
    _remaining -= 1
    if _remaining <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
