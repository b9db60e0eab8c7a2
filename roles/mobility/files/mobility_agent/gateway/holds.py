# SPDX-License-Identifier: GPL-3.0-or-later
"""What comes for a VM between its stop here and its going on elsewhere waits, and is sent after it.

The idea of RFC 5949 (buffered, and forwarded by the previous gateway), by way of a TUN device: packets for
the VM's home addresses are routed into it, read here, and written back once the VM's routes say where it is,
or that it goes on here.

Order is kept: while those that waited are written back, what comes still goes behind them, and only when none
is left is the way into the device closed. What a hold may take is bounded. Of more than that the *newest* is
dropped: of a stream the first that is missing holds up all that follow, the last is made good by what the
receiver says of the others. Whoever moves the VM may say, again and again, that it still stands still: then
the hold goes on, and what has waited for longer than a segment may live is dropped.

A process that is killed takes the device, and the routes to it, along: packets go where they went before.
Those that waited are lost then, as all of them were without a hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from ipaddress import IPv6Address, IPv6Network
from typing import Protocol

from mobility_agent.errors import Finding, MobilityError

logger = logging.getLogger(__name__)

#: How long a VM's packets are held without anybody's word.
LONGEST_SECONDS = 10.0
#: How old one may get: a segment's longest life (RFC 9293, section 3.4.1), after which it may be taken for
#: another connection's.
OLDEST_SECONDS = 120.0
#: Where only routing knows where a VM went, nobody may come to say so: it is not waited for longer.
UNTOLD_SECONDS = 2.0
#: What waits for one VM, and for all of them together.
VM_PACKETS, VM_OCTETS, ALL_OCTETS = 8192, 16 << 20, 64 << 20
# Others have a turn after so many packets; about a millisecond's work.
_BURST = 128
# Where packets come faster than they are written back, the way into the device is closed all the same.
_LONGEST_END_SECONDS = 1.0
_HEADER_OCTETS, _DESTINATION = 40, slice(24, 40)


class Device(Protocol):
    """A TUN device, or what is like one."""

    @property
    def is_open(self) -> bool:
        """Whether it is there."""

    def open(self) -> None:
        """Make it. Raises MobilityError."""

    def fileno(self) -> int:
        """To wait for."""

    def read(self) -> bytes | None:
        """A packet, or None. Raises OSError when it is gone."""

    def write(self, packet: bytes) -> bool:
        """Whether the kernel took it."""

    def close(self) -> None:
        """Let it go."""


class Ways(Protocol):
    """Of the data path, what leads packets into the device."""

    def prepare_hold(self) -> None:
        """Set the device up."""

    def hold(self, homes: Iterable[IPv6Network]) -> None:
        """Into the device from now on."""

    def end_hold(self, homes: Iterable[IPv6Network]) -> None:
        """To the VM from now on."""


@dataclass(slots=True, eq=False)
class _Hold:
    """One VM's. ``ending``: what waited is being written back."""

    vm: str
    homes: tuple[IPv6Network, ...]
    began: float
    timer: asyncio.TimerHandle | None = None
    ending: asyncio.Task[None] | None = None
    # when each came (monotonic)
    packets: deque[tuple[float, bytes]] = field(default_factory=deque)
    octets: int = 0
    taken: int = 0
    dropped: int = 0


class Holds:
    """All of a gateway's. ``networks``: of the home prefixes; ``device`` None: nothing is ever held."""

    def __init__(
        self,
        ways: Ways,
        device: Device | None,
        networks: Iterable[IPv6Network],
        longest_seconds: float = LONGEST_SECONDS,
    ) -> None:
        self._ways = ways
        self._device = device
        self._networks = tuple(networks)
        self._longest_seconds = longest_seconds
        self._holds: dict[str, _Hold] = {}
        self._singles: dict[bytes, _Hold] = {}
        self._refusal: MobilityError | None = None
        #: Packets since the start: held, of those written back, and dropped.
        self.counters = {"held": 0, "sent_on": 0, "dropped": 0}

    # --- start and stop ---

    def start(self) -> None:
        """Make the device. Without it the agent does all the rest."""
        if self._device is None:
            return
        try:
            self._device.open()
            self._ways.prepare_hold()
            asyncio.get_running_loop().add_reader(self._device.fileno(), self._read)
        except MobilityError as error:
            self._device.close()
            self._refusal = error
            logger.warning("%s", error)

    def stop(self) -> None:
        """What waits is written back, to where routes lead now; then the device is let go."""
        if self._device is None or not self._device.is_open:
            return
        for hold in list(self._holds.values()):
            self._cancel(hold)
            self._write(hold, len(hold.packets))
            self._close_way(hold)
        asyncio.get_running_loop().remove_reader(self._device.fileno())
        self._device.close()

    # --- what is held ---

    def begin(self, vm: str, homes: Collection[IPv6Network]) -> bool:
        """The VM's vCPUs stand still, to go on elsewhere: hold what comes for it. False: cannot be done."""
        if self._device is None or not self._device.is_open or not homes:
            return False
        hold = self._holds.get(vm)
        if hold is None:
            hold = self._holds[vm] = _Hold(vm, tuple(homes), time.monotonic())
            for home in hold.homes:
                if home.prefixlen == home.max_prefixlen:
                    self._singles[home.network_address.packed] = hold
            try:
                self._ways.hold(hold.homes)
            except MobilityError as error:
                logger.warning("VM %s: what comes while it is moved is not held: %s", vm, error)
                self._close_way(hold)
                return False
            logger.info("VM %s: stands still to be moved; what comes for it waits", vm, extra={"VM": vm})
        self._cancel(hold)
        self._end_in(hold, self._longest_seconds)
        return True

    def extend(self, vm: str) -> bool:
        """The VM still stands still: what waits goes on waiting. Whether anything does.

        Begins none: its word may come when the VM runs again.
        """
        hold = self._holds.get(vm)
        if hold is None or hold.ending is not None:
            return False
        self._cancel(hold)
        self._end_in(hold, self._longest_seconds)
        return True

    def end_within(self, vm: str, seconds: float) -> None:
        """Nobody may say where it went: wait for that no longer."""
        hold = self._holds.get(vm)
        if hold is not None and hold.timer is not None:
            left = hold.timer.when() - asyncio.get_running_loop().time()
            self._cancel(hold)
            self._end_in(hold, max(min(left, seconds), 0.0))

    def _end_in(self, hold: _Hold, seconds: float) -> None:
        hold.timer = asyncio.get_running_loop().call_later(seconds, self._time_is_up, hold.vm)

    def _time_is_up(self, vm: str) -> None:
        logger.warning("VM %s: nobody has said where it goes on; what waited goes where routes lead", vm)
        self.end(vm)

    def end(self, vm: str) -> None:
        """Its routes say where it is: what waited goes there, in order, then what comes."""
        hold = self._holds.get(vm)
        if hold is not None and hold.ending is None:
            self._cancel(hold)
            hold.ending = asyncio.get_running_loop().create_task(self._send_on(hold))

    def discard(self, vm: str) -> None:
        """Nobody has its addresses any more: what waited is dropped."""
        hold = self._holds.get(vm)
        if hold is not None:
            self._cancel(hold)
            self._drop_waiting(hold)
            self._close_way(hold)

    def _cancel(self, hold: _Hold) -> None:
        if hold.timer is not None:
            hold.timer.cancel()
        if hold.ending is not None:
            hold.ending.cancel()
        hold.timer = hold.ending = None

    async def _send_on(self, hold: _Hold) -> None:
        until = time.monotonic() + _LONGEST_END_SECONDS
        while time.monotonic() < until:
            self._write(hold, _BURST)
            if not hold.packets:
                # The kernel may have some that nobody has read yet.
                self._read()
                if not hold.packets:
                    break
            await asyncio.sleep(0)
        # No turn for others from here: what the way's end lets through must not come before these.
        self._close_way(hold)

    def _close_way(self, hold: _Hold) -> None:
        """What comes goes to the VM from now on; what came before that goes first, as well as can be."""
        try:
            self._ways.end_hold(hold.homes)
        except (MobilityError, OSError) as error:
            # What still comes in by the device belongs to no hold then, and is written back as it comes.
            logger.error("VM %s: %s; tried again", hold.vm, error)
        with contextlib.suppress(OSError):
            self._read_all()
        self._write(hold, len(hold.packets))
        if self._holds.get(hold.vm) is hold:
            del self._holds[hold.vm]
        for home in hold.homes:
            self._singles.pop(home.network_address.packed, None)
        if hold.taken:
            logger.info(
                "VM %s: %d packets came in the %.3f s since it stood still; sent on, but for %d dropped",
                hold.vm,
                hold.taken,
                time.monotonic() - hold.began,
                hold.dropped,
                extra={"VM": hold.vm},
            )

    # --- packets ---

    def _read(self) -> None:
        try:
            for _count in range(_BURST):
                if not self._read_one():
                    return
        except OSError as error:
            self._begin_anew(error)

    def _read_all(self) -> None:
        """What the kernel has by now. Raises OSError."""
        until = time.monotonic() + _LONGEST_END_SECONDS
        while self._read_one() and time.monotonic() < until:
            pass

    def _read_one(self) -> bool:
        """Whether there was one."""
        packet = self._device.read() if self._device is not None and self._device.is_open else None
        if packet is None:
            return False
        if len(packet) < _HEADER_OCTETS or packet[0] >> 4 != 6:
            return True
        hold = self._singles.get(packet[_DESTINATION]) or self._of_prefix(packet)
        if hold is not None:
            self._keep(hold, packet)
        elif any(IPv6Address(packet[_DESTINATION]) in network for network in self._networks):
            # On its way in when its hold ended. What the kernel itself says on a new link is nobody's.
            self._give(packet)
        return True

    def _of_prefix(self, packet: bytes) -> _Hold | None:
        address = IPv6Address(packet[_DESTINATION])
        return next(
            (hold for hold in self._holds.values() if any(address in home for home in hold.homes)), None
        )

    def _keep(self, hold: _Hold, packet: bytes) -> None:
        size, now = len(packet), time.monotonic()
        self._drop_old(hold, now)
        hold.taken += 1
        self.counters["held"] += 1
        full = len(hold.packets) >= VM_PACKETS or hold.octets + size > VM_OCTETS
        if full or sum(each.octets for each in self._holds.values()) + size > ALL_OCTETS:
            if not hold.dropped:
                logger.warning("VM %s: more comes for it than may wait; the newest is dropped", hold.vm)
            hold.dropped += 1
            self.counters["dropped"] += 1
        else:
            hold.packets.append((now, packet))
            hold.octets += size

    def _write(self, hold: _Hold, most: int) -> None:
        self._drop_old(hold, time.monotonic())
        for _count in range(min(most, len(hold.packets))):
            _came, packet = hold.packets.popleft()
            hold.octets -= len(packet)
            hold.dropped += not self._give(packet)

    def _drop_old(self, hold: _Hold, now: float) -> None:
        while hold.packets and hold.packets[0][0] < now - OLDEST_SECONDS:
            _came, packet = hold.packets.popleft()
            hold.octets -= len(packet)
            hold.dropped += 1
            self.counters["dropped"] += 1

    def _give(self, packet: bytes) -> bool:
        taken = self._device is not None and self._device.is_open and self._device.write(packet)
        self.counters["sent_on" if taken else "dropped"] += 1
        return taken

    def _drop_waiting(self, hold: _Hold) -> None:
        hold.dropped += len(hold.packets)
        self.counters["dropped"] += len(hold.packets)
        hold.packets.clear()
        hold.octets = 0

    def _begin_anew(self, error: OSError) -> None:
        """Somebody has taken the device away, and with it the routes: nothing waits any more."""
        logger.error("the hold device is gone (%s); made anew", error)
        if self._device is None:
            return
        asyncio.get_running_loop().remove_reader(self._device.fileno())
        self._device.close()
        self.start()
        for hold in list(self._holds.values()):
            self.end(hold.vm)

    # --- what is asked about ---

    def findings(self) -> list[Finding]:
        """Why nothing is held, where that is so."""
        if self._refusal is None or (self._device is not None and self._device.is_open):
            return []
        fact, _unused, way_out = self._refusal.message.partition("; ")
        return [Finding("moves from here", fact, way_out, self._refusal.cause)]

    def status(self) -> dict[str, int]:
        """VMs whose packets wait now, and packets since the start by what became of them."""
        return {"vms": len(self._holds), **self.counters}
