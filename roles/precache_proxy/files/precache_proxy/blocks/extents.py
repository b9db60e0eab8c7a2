# SPDX-License-Identifier: GPL-3.0-or-later
"""Sets of byte ranges: which parts of a disk changed, are held, or are still to be sent."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from heapq import merge

_NARROW_BYTES = 4096


class Extents:
    """Sorted, disjoint, non-adjacent half-open byte ranges ``[start, end)``.

    16 bytes a range; a disk that changed everywhere is one range. What grows with a disk's fragmentation is
    kept within bounds by :meth:`coarsened`. Not to be changed while it is walked through.
    """

    __slots__ = ("_ends", "_starts")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts = array("q")
        self._ends = array("q")
        for start, end in ranges:
            self.add(start, end)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._ends, strict=True)

    def __len__(self) -> int:
        return len(self._starts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Extents) and self._starts == other._starts and self._ends == other._ends

    def __repr__(self) -> str:
        return f"Extents({list(self)!r})"

    def __contains__(self, offset: int) -> bool:
        index = bisect_right(self._starts, offset) - 1
        return index >= 0 and offset < self._ends[index]

    @property
    def total_bytes(self) -> int:
        """Bytes in all ranges together."""
        return sum(self._ends) - sum(self._starts)

    def copy(self) -> Extents:
        """An independent set with the same ranges."""
        twin = Extents()
        twin._starts, twin._ends = self._starts[:], self._ends[:]
        return twin

    def add(self, start: int, end: int) -> None:
        """Include ``[start, end)``; an empty range adds nothing."""
        if end <= start:
            return
        if not self._starts or start > self._ends[-1]:  # the usual case: walked in ascending order
            self._starts.append(start)
            self._ends.append(end)
            return
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = array("q", [start])
        self._ends[first:last] = array("q", [end])

    def remove(self, start: int, end: int) -> None:
        """Exclude ``[start, end)``."""
        if end <= start:
            return
        first = bisect_right(self._ends, start)
        last = bisect_left(self._starts, end)
        if first >= last:
            return
        starts, ends = array("q"), array("q")
        if self._starts[first] < start:
            starts.append(self._starts[first])
            ends.append(start)
        if self._ends[last - 1] > end:
            starts.append(end)
            ends.append(self._ends[last - 1])
        self._starts[first:last] = starts
        self._ends[first:last] = ends

    def union(self, other: Extents) -> Extents:
        """What is in either."""
        if not len(other):
            return self.copy()
        result = Extents()
        for start, end in merge(self, other):
            result.add(start, end)
        return result

    def intersection(self, other: Extents) -> Extents:
        """What is in both."""
        result = Extents()
        i = j = 0
        while i < len(self) and j < len(other):
            my_end, their_end = self._ends[i], other._ends[j]
            result.add(max(self._starts[i], other._starts[j]), min(my_end, their_end))
            if my_end < their_end:
                i += 1
            else:
                j += 1
        return result

    def difference(self, other: Extents) -> Extents:
        """What is in this one only."""
        result = Extents()
        starts, ends = other._starts, other._ends
        j = 0
        for start, end in self:
            while j < len(ends) and ends[j] <= start:
                j += 1
            k = j
            while k < len(starts) and starts[k] < end:
                result.add(start, starts[k])
                start = max(start, ends[k])
                k += 1
            result.add(start, end)
        return result

    def coarsened(self, limit: int) -> Extents:
        """A set of at most ``limit`` ranges (at least 1) that holds this one: narrow gaps are filled."""
        result, gap_bytes = self, _NARROW_BYTES
        while (excess := len(result) - limit) > 0:
            wider = Extents()
            for start, end in result:
                # no more of them than has to be: what lies in a gap is sent for nothing
                if excess and len(wider) and start - wider._ends[-1] <= gap_bytes:
                    wider._ends[-1] = end
                    excess -= 1
                else:
                    wider.add(start, end)
            result, gap_bytes = wider, gap_bytes * 2
        return result

    def pieces(self, limit_bytes: int) -> Iterator[tuple[int, int]]:
        """The ranges as ``(offset, length)``, none longer than ``limit_bytes``."""
        for start, end in self:
            for offset in range(start, end, limit_bytes):
                yield offset, min(limit_bytes, end - offset)

    def split_at_bytes(self, limit_bytes: int) -> tuple[Extents, Extents]:
        """The first ``limit_bytes`` of content, and the rest."""
        first, rest = Extents(), Extents()
        left = limit_bytes
        for start, end in self:
            middle = min(end, start + max(0, left))
            first.add(start, middle)
            rest.add(middle, end)
            left -= end - start
        return first, rest
