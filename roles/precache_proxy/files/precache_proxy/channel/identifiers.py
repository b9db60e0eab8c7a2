# SPDX-License-Identifier: GPL-3.0-or-later
"""A set of numbers that were used once each, mostly in order: a watermark and the few above it."""

from __future__ import annotations


class IdentifierSet:
    """Numbers from 1 up."""

    def __init__(self) -> None:
        self._below = 1  # all smaller ones are in
        self._above: set[int] = set()

    def add(self, number: int) -> None:
        """Put ``number`` in."""
        if number >= self._below:
            self._above.add(number)
            while self._below in self._above:
                self._above.remove(self._below)
                self._below += 1

    def __contains__(self, number: int) -> bool:
        return number < self._below or number in self._above

    def missing_before(self, number: int) -> int:
        """How many smaller than ``number`` are not in."""
        return max(0, number - self._below - len(self._above))
