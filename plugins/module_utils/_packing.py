# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a guest's memory comes to on the wire: told by QEMU's page counters beside the bytes that were sent.

QEMU counts what is left in pages, whether they are empty or not, and its rates jump from look to look by
ten times. Counted from the first look on, the bytes sent for a page that is not empty settle within seconds.
"""

from __future__ import annotations

import typing as t

from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import DEFAULT_PACKED_RATIO

# Fewer bytes of pages than that say little: the words that go before them are most of what was sent.
_ENOUGH_BYTES = 4e6
_ENOUGH_WIRE_BYTES = 3e6
_BUFFERED_BYTES = 32e6
_LEAST_RATIO, _MOST_RATIO = 0.02, 1.2
_PAGE_BYTES = 4096


class Packing:
    """One job's memory, on the wire.

    ``sent_bytes``: what of it has crossed, ``left_bytes``: what its round has left,
    ``dirty_bytes_per_second``: what its guest dirties.
    """

    def __init__(self) -> None:
        # From the first look on.
        self._wire_before, self._pages_before = 0.0, float("inf")
        self.ratio = DEFAULT_PACKED_RATIO
        self._counted = False
        self.sent_bytes = self.left_bytes = self.dirty_bytes_per_second = 0.0

    def look(self, sent_wire: float, progress: t.Mapping[str, t.Any]) -> None:
        """Take in counters: bytes sent for this VM, and what QEMU says of its job."""
        pages = _number(progress, "memory_normal_bytes")
        counted = pages - self._pages_before
        if counted <= 0 or sent_wire < self._wire_before:
            # What was sent before the first page is catch-up, not memory; and counters may begin anew.
            self._wire_before, self._pages_before, counted = sent_wire, pages, 0.0
        crossed = sent_wire - self._wire_before
        # Of a trickle most of what QEMU counts as sent is in buffers still.
        if counted >= (_ENOUGH_BYTES if crossed >= _ENOUGH_WIRE_BYTES else _BUFFERED_BYTES):
            self.ratio = min(_MOST_RATIO, max(_LEAST_RATIO, crossed / counted))
            self._counted = True
        page_bytes = _number(progress, "memory_page_size") or _PAGE_BYTES
        empty = _number(progress, "memory_constant") * page_bytes
        left = _number(progress, "memory_remaining_bytes")
        if _number(progress, "memory_iteration") <= 1 and pages >= _ENOUGH_BYTES:
            # Of those that nobody has looked at yet as many are thought to be empty.
            left *= pages / (pages + empty)
        self.sent_bytes = pages * self.ratio if self._counted else min(crossed, pages * self.ratio)
        self.left_bytes = left * self.ratio
        dirty = _number(progress, "memory_dirty_pages_per_second") * page_bytes
        self.dirty_bytes_per_second = dirty * self.ratio


def _number(progress: t.Mapping[str, t.Any], key: str) -> float:
    return float(progress.get(key) or 0.0)
