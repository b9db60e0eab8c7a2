# SPDX-License-Identifier: GPL-3.0-or-later
"""What the peer is still to be told of a session's streams: what has arrived, and which were reset."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from precache_proxy.channel.frames import FrameType, pack, pack_acknowledge, pack_json
from precache_proxy.channel.stream import Stream
from precache_proxy.errors import LifeboatError
from precache_proxy.units import KIB

_ACKNOWLEDGE_SECONDS = 0.01
_LARGEST_RESET_BYTES = 60 * KIB


class Dues:
    """Acknowledgements are told once, and again where a connection may have lost them; resets until the peer
    confirms them; the last acknowledgement of a stream until it is proved that it has come.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._loop = asyncio.get_running_loop()
        self._owed: dict[int, Stream] = {}
        self._due: dict[int, Stream] = {}
        self._owed_timer: asyncio.TimerHandle | None = None
        self._resetting: dict[int, bytes] = {}
        self._resets_due: dict[int, bytes] = {}
        self._farewells: list[bytes] = []

    @property
    def unconfirmed_resets(self) -> Iterable[bytes]:
        """Their frames."""
        return self._resetting.values()

    def is_reset(self, identifier: int) -> bool:
        """Whether the peer has not confirmed yet that it heard of the stream's reset."""
        return identifier in self._resetting

    def acknowledge(self, stream: Stream, *, soon: bool) -> None:
        """At once, or with what else goes within 10 ms."""
        if soon:
            self._due[stream.identifier] = stream
            self._wake()
        else:
            self._owed[stream.identifier] = stream
            if self._owed_timer is None:
                self._owed_timer = self._loop.call_later(_ACKNOWLEDGE_SECONDS, self._pay_owed)

    def _pay_owed(self) -> None:
        self._owed_timer = None
        self._due.update(self._owed)
        self._owed.clear()
        self._wake()

    def reset(self, stream: Stream, error: LifeboatError) -> None:
        """Tell of a reset until it is confirmed."""
        payload = pack_json(error.as_dict())
        if len(payload) > _LARGEST_RESET_BYTES:
            payload = pack_json({"cause": error.cause, "message": error.message[: 8 * KIB], "findings": []})
        frame = pack(FrameType.RESET, payload, stream=stream.identifier)
        self._resetting[stream.identifier] = self._resets_due[stream.identifier] = frame
        self._wake()

    def reset_confirmed(self, identifier: int) -> None:
        """The peer knows."""
        self._resetting.pop(identifier, None)
        self._resets_due.pop(identifier, None)

    def forget(self, stream: Stream) -> None:
        """Nothing of what arrived on it needs to be told any more."""
        self._owed.pop(stream.identifier, None)
        self._due.pop(stream.identifier, None)

    def farewell(self, frames: Iterable[bytes]) -> None:
        """Tell last acknowledgements, of streams that are known no longer: nothing else would repeat them."""
        self._farewells.extend(frames)
        if self._farewells:
            self._wake()

    def take_farewells(self) -> list[bytes]:
        """Their frames; whoever takes them keeps them until they have come."""
        taken, self._farewells = self._farewells, []
        return taken

    def repeat(self, streams: Iterable[Stream]) -> None:
        """A connection is gone or silent, perhaps with what was told on it."""
        self._due.update((stream.identifier, stream) for stream in streams)
        self._resets_due.update(self._resetting)

    def take(self, *, with_owed: bool) -> list[bytes]:
        """The frames that are due. ``with_owed``: there is more to send, so what could wait goes along."""
        if with_owed and self._owed:
            self._due.update(self._owed)
            self._owed.clear()
        pieces = [pack_acknowledge(key, *stream.acknowledgement()) for key, stream in self._due.items()]
        self._due.clear()
        if self._resets_due:
            pieces.extend(self._resets_due.values())
            self._resets_due.clear()
        return pieces

    def clear(self) -> None:
        """The session is over."""
        self._due.clear()
        self._owed.clear()
        self._resetting.clear()
        self._resets_due.clear()
        self._farewells.clear()
        if self._owed_timer is not None:
            self._owed_timer.cancel()
