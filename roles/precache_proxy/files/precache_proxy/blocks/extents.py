# SPDX-License-Identifier: GPL-3.0-or-later
"""Sets of byte ranges: which parts of a disk changed, are held, or are still to be sent."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class Extents:
    """Sorted, disjoint, non-adjacent half-open byte ranges ``[start, end)``.

    Two integers a range; a disk that changed everywhere is one range, so memory is bounded by
    fragmentation: at the bitmap granularity of 64 KiB no disk has more ranges than half its blocks.
    """

    __slots__ = ("_ends", "_starts")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in ranges:
            self.add(start, end)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(zip(self._starts, self._ends, strict=True)))

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
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def remove(self, start: int, end: int) -> None:
        """Exclude ``[start, end)``."""
        if end <= start:
            return
        first = bisect_right(self._ends, start)
        last = bisect_left(self._starts, end)
        if first >= last:
            return
        starts: list[int] = []
        ends: list[int] = []
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
        result = Extents()
        for start, end in sorted([*self, *other]):
            result.add(start, end)
        return result

    def intersection(self, other: Extents) -> Extents:
        """What is in both."""
        result = Extents()
        mine, theirs = list(self), list(other)
        i = j = 0
        while i < len(mine) and j < len(theirs):
            result.add(max(mine[i][0], theirs[j][0]), min(mine[i][1], theirs[j][1]))
            if mine[i][1] < theirs[j][1]:
                i += 1
            else:
                j += 1
        return result

    def difference(self, other: Extents) -> Extents:
        """What is in this one only."""
        result = Extents()
        theirs = list(other)
        j = 0
        for start, end in self:
            while j < len(theirs) and theirs[j][1] <= start:
                j += 1
            k = j
            while k < len(theirs) and theirs[k][0] < end:
                result.add(start, theirs[k][0])
                start = max(start, theirs[k][1])
                k += 1
            result.add(start, end)
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
