# SPDX-License-Identifier: GPL-3.0-or-later
"""How streams end before their time."""

from __future__ import annotations

from precache_proxy.errors import LifeboatError, PeerUnreachable


class LinkLost(PeerUnreachable):
    """The link was down for longer than a session is kept; what was under way is gone."""

    cause = "link-lost"


class StreamReset(LifeboatError):
    """The stream ended by a reset, from either side. ``error`` is the reason, with its own class
    and cause.
    """

    cause = "reset"

    def __init__(self, error: LifeboatError) -> None:
        super().__init__(error.message, error.findings)
        self.error = error
        # The class's word is only a fallback: callers and the wire see the word of the reason.
        self.__dict__["cause"] = error.cause
