# SPDX-License-Identifier: GPL-3.0-or-later
"""Typed reading of one TOML table or JSON object: what is wrong becomes a finding, and reading goes on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import time
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from precache_proxy.errors import Finding, InvalidInput
from precache_proxy.units import format_bytes, format_seconds, parse_bytes, parse_duration, parse_rate


@dataclass(frozen=True)
class _Required:
    """Stands for "there is no default"."""


REQUIRED: Final = _Required()


class Reader:
    """One table. Every method takes the key's default; a bad value is noted and the default stands in."""

    def __init__(
        self,
        values: Mapping[str, Any],
        where: str,
        prefix: str,
        findings: list[Finding],
        cause: str = "configuration",
    ) -> None:
        self._values = values
        self._where = where
        self._prefix = prefix
        self._findings = findings
        self._cause = cause
        self._known: set[str] = set()
        self._children: list[Reader] = []

    def _note(self, key: str, fact: str, way_out: str) -> None:
        self._findings.append(Finding(f"{self._where}: {self._prefix}{key}", fact, way_out, self._cause))

    def _value(self, key: str) -> Any:
        self._known.add(key)
        return self._values.get(key)

    def table(self, key: str) -> Reader:
        """The sub-table ``key``; an empty one where it is missing."""
        value = self._value(key)
        if value is not None and not isinstance(value, dict):
            self._note(key, f"is {value!r}, not a table", f"write it as [{self._prefix}{key}]")
            value = None
        return self._child(value or {}, f"{self._prefix}{key}.")

    def tables(self, key: str) -> Iterable[Reader]:
        """The array of tables ``key``."""
        value = self._value(key)
        if value is None:
            return
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            self._note(key, f"is {value!r}, not a list of tables", f"write each as [[{self._prefix}{key}]]")
            return
        for index, item in enumerate(value):
            yield self._child(item, f"{self._prefix}{key}[{index}].")

    def _child(self, values: Mapping[str, Any], prefix: str) -> Reader:
        child = Reader(values, self._where, prefix, self._findings, self._cause)
        self._children.append(child)
        return child

    def finish(self) -> None:
        """Note every key that nothing reads, here and below."""
        for key in self._values.keys() - self._known:
            longer = sorted(known for known in self._known if known.startswith(f"{key}_"))
            near = longer or get_close_matches(key, self._known, 1)
            way_out = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(self._known))}"
            self._note(key, "no such setting", way_out)
        for child in self._children:
            child.finish()

    def text(self, key: str, default: str | _Required, *, empty: bool = False) -> str:
        """A string, not empty unless ``empty``."""
        value = self._value(key)
        if value is None:
            if isinstance(default, str):
                return default
            self._note(key, "is missing", "set it")
            return ""
        if not isinstance(value, str) or (not value.strip() and not empty):
            self._note(key, f"is {value!r}", "write a text in quotes")
            return default if isinstance(default, str) else ""
        return value

    def name(self, key: str, pattern: re.Pattern[str]) -> str:
        """A required name as it may stand in certificates and file names."""
        value = self.text(key, REQUIRED)
        if value and not pattern.match(value):
            self._note(key, f"is {value!r}", "use letters, digits and . - _ as in a host name")
        return value

    def path(self, key: str, default: Path) -> Path:
        """An absolute path."""
        value = self.text(key, str(default))
        if not value.startswith("/"):
            self._note(key, f"is {value!r}, not an absolute path", f"write it in full, like {default}")
            return default
        return Path(value)

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        """A whole number in ``low..high``."""
        value = self._value(key)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self._note(key, f"is {value!r}", f"write a whole number from {low} to {high}")
            return default
        return value

    def boolean(self, key: str, *, default: bool) -> bool:
        """True or false."""
        value = self._value(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self._note(key, f"is {value!r}", "write true or false")
            return default
        return value

    def texts(self, key: str) -> tuple[str, ...] | None:
        """A list of texts, None where the key is missing."""
        value = self._value(key)
        if value is None:
            return None
        if (
            not isinstance(value, list)
            or not value
            or not all(isinstance(item, str) and item for item in value)
        ):
            self._note(key, f"is {value!r}", "write a list of texts, or leave it out")
            return None
        return tuple(value)

    def duration(self, key: str, default: float, low: float, high: float) -> float:
        """Seconds in ``low..high``."""
        value = self.optional_duration(key, low, high)
        return default if value is None else value

    def optional_duration(self, key: str, low: float, high: float) -> float | None:
        """Seconds in ``low..high``, None where the key is missing."""
        number = self._amount(key, parse_duration)
        if number is None:
            return None
        if not low <= number <= high:
            self._note(key, f"is {number:g} s", f"give {format_seconds(low)} to {format_seconds(high)}")
            return None
        return number

    def size(self, key: str, default: int, low: int) -> int:
        """Bytes, at least ``low``."""
        number = self._amount(key, parse_bytes)
        if number is None:
            return default
        if number < low:
            self._note(key, f"is {format_bytes(number)}", f"give at least {format_bytes(low)}")
            return default
        return int(number)

    def rate(self, key: str) -> float | None:
        """Bytes per second above zero, None (no limit) where the key is missing."""
        return self._amount(key, parse_rate)

    def _amount(self, key: str, parse: Callable[[str | int | float], float]) -> float | None:
        value = self._value(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            self._note(key, f"is {value!r}, not an amount", "write a number, or a text with a unit")
            return None
        try:
            return float(parse(value))
        except InvalidInput as error:
            fact, _mark, way_out = error.message.partition("; ")
            self._note(key, fact, way_out)
            return None

    def clock(self, key: str) -> time:
        """A required time of day, ``"HH:MM"`` or a TOML local time."""
        value = self._value(key)
        if isinstance(value, time):
            return value
        try:
            return time.fromisoformat(str(value))
        except ValueError:
            fact = f"is {value!r}" if value is not None else "is missing"
            self._note(key, fact, 'write a time of day like "08:30"')
            return time(0)

    def choices(self, key: str, default: Sequence[str], known: Sequence[str]) -> Sequence[str]:
        """A list of words out of ``known``."""
        value = self._value(key)
        if value is None:
            return default
        if not isinstance(value, list) or not value or any(item not in known for item in value):
            self._note(key, f"is {value!r}", f"write a list out of {', '.join(known)}")
            return default
        return [str(item) for item in value]
