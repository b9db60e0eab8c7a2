# SPDX-License-Identifier: GPL-3.0-or-later
"""The device into which packets are routed that have to wait: a TUN device (linux/if_tun.h), IPv6 only.

It is there as long as this process has it open, and no longer: with it the kernel takes every route that
leads to it. A process that is killed while packets wait leaves the routes that stood below, in which the
waiting ones had only been put before others; nothing has to be cleaned up for packets to find their way.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from mobility_agent.errors import Unsupported

HOLD = "lbhold0"
#: The largest that the kernel lets a TUN device have: what may wait is judged where it goes on to.
MTU_OCTETS = 65535
#: Packets that the kernel keeps for us while we are busy otherwise; its own default is 500.
QUEUE_PACKETS = 8192
_CLONE = "/dev/net/tun"
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PACKET_INFORMATION, _IFF_EXCLUSIVE = 0x0001, 0x1000, 0x8000
_REQUEST = struct.Struct("=16sH22x")


class HoldDevice:
    """The process's end of it. What is written comes into the kernel as if received from a link."""

    def __init__(self) -> None:
        self._descriptor = -1

    @property
    def is_open(self) -> bool:
        """Whether there is such a device."""
        return self._descriptor >= 0

    def open(self) -> None:
        """Make it, in the network namespace of this thread, down. Raises Unsupported."""
        descriptor = -1
        try:
            descriptor = os.open(_CLONE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            # Exclusive: not one that somebody made to outlive its maker.
            flags = _IFF_TUN | _IFF_NO_PACKET_INFORMATION | _IFF_EXCLUSIVE
            fcntl.ioctl(descriptor, _TUNSETIFF, _REQUEST.pack(HOLD.encode(), flags))
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            in_use = error.errno in {errno.EBUSY, errno.EEXIST}
            way_out = f"remove what has its name: `ip link del {HOLD}`"
            raise Unsupported(
                f"device {HOLD}: cannot be made ({error}), so what comes for a VM while it is moved is lost; "
                + (way_out if in_use else f"load the module tun, let the agent have {_CLONE}, and restart it")
            ) from error
        self._descriptor = descriptor

    def fileno(self) -> int:
        """For whoever waits until there is something to read."""
        return self._descriptor

    def read(self) -> bytes | None:
        """The next packet, None when there is none now. Raises OSError when the device is gone."""
        try:
            return os.read(self._descriptor, MTU_OCTETS + 1)
        except BlockingIOError:
            return None

    def write(self, packet: bytes) -> bool:
        """Have the kernel route it, by what its routes say now; False when it does not take it."""
        try:
            os.write(self._descriptor, packet)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Let it vanish, and every route to it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1
