# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""When the power goes, as an operator says it: seconds from now, an instant, or what a UPS has left.

Pure: the clock and whatever asks the UPS are given.
"""

from __future__ import annotations

import datetime
import math
import re
import typing as t
from dataclasses import dataclass

from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import Finding

_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(sec|min|s|m|h|d)?", re.IGNORECASE)
_UNITS = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_CLOCK = re.compile(r"^([01]?\d|2[0-3]):([0-5]\d)(?::([0-5]\d))?$")
_UPS = re.compile(r"^ups:([\w.-]+)(?:@([\w.:\[\]-]+))?$")
# What is farther away is no deadline, but a slip.
_LONGEST_SECONDS = 366 * 86400.0
_FORMS = "seconds, 20m, 1h30m, 14:30, 2026-11-21T14:30:00+01:00, or ups:NAME@HOST"


class UpsError(Exception):
    """The UPS said nothing that could be used; the text is the fact and the way out."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """A deadline as it was given: an instant (seconds since 1970), or the UPS to ask."""

    text: str
    at: float | None = None
    ups: str = ""

    @property
    def moves(self) -> bool:
        """It has to be asked for again and again."""
        return bool(self.ups)

    @property
    def instant(self) -> str:
        """The same for whoever gives the command again later, with its date and offset; "" of a UPS."""
        if self.at is None:
            return ""
        return datetime.datetime.fromtimestamp(self.at).astimezone().isoformat(timespec="seconds")

    @property
    def how_again(self) -> str:
        """What the command must say when it is given again, "" where the same words mean the same then."""
        if self.at is None or re.match(r"^\d{4}-", self.text):
            return ""
        return f"evacuate_deadline={self.instant}"


def parse_duration(text: str) -> float | None:
    """Seconds of ``90``, ``20m`` or ``1h30m``; None for anything else."""
    text = text.strip()
    total, end = 0.0, 0
    for match in _PART.finditer(text):
        if text[end : match.start()].strip():
            return None
        if not match.group(2) and (match.start() or match.end() != len(text)):
            return None
        total += float(match.group(1)) * _UNITS[(match.group(2) or "s").lower()]
        end = match.end()
    return total if end and not text[end:].strip() and total <= _LONGEST_SECONDS else None


def parse(value: object, now: float) -> tuple[Deadline | None, list[Finding]]:
    """What ``evacuate_deadline`` means at ``now``; None where none is set, or where it cannot be meant.

    A duration counts from now. A time of day is today's, by the controller's clock and zone. One that has
    passed is understood, too (:func:`passed`).
    """
    text = "" if value is None else str(value).strip()
    if not text:
        return None, []
    if isinstance(value, bool):
        return None, [_not_understood(text)]
    ups = _UPS.match(text)
    if ups:
        return Deadline(text, ups=f"{ups.group(1)}@{ups.group(2) or 'localhost'}"), []
    seconds = parse_duration(text)
    at = now + seconds if seconds is not None else _instant(text, now)
    if at is None:
        return None, [_not_understood(text)]
    return Deadline(text, at=at), []


def passed(deadline: Deadline | None, now: float) -> list[Finding]:
    """That a deadline has passed. With VMs under way that is no reason not to tell what becomes of them."""
    if deadline is None or deadline.at is None or deadline.at > now:
        return []
    way_out = "name a later one, or none; without a deadline everything is moved that can be"
    return [Finding(f"deadline {deadline.text!r}", f"passed {now - deadline.at:.0f} s ago", way_out)]


def _not_understood(text: str) -> Finding:
    return Finding(f"deadline {text!r}", "is not understood", f"write {_FORMS}")


def _instant(text: str, now: float) -> float | None:
    clock = _CLOCK.match(text)
    if clock:
        hour, minute, second = (int(part or 0) for part in clock.groups())
        # Without an offset: that of the instant holds, not that of now, where summer time ends between them.
        local = datetime.datetime.fromtimestamp(now).replace(  # noqa: DTZ006
            hour=hour, minute=minute, second=second, microsecond=0
        )
        # An hour that there is twice: the first that is still to come.
        first, again = (local.replace(fold=fold).timestamp() for fold in (0, 1))
        return again if first <= now < again else first
    if not re.match(r"^\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}", text):
        return None
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def meaning(deadline: Deadline, given: object, now: float) -> str:
    """A deadline as it was understood, in words, for whoever meant another to see it."""
    if deadline.at is None:
        return f"deadline: what UPS {deadline.ups} has left, asked for again and again"
    left = deadline.at - now
    if left <= 0:
        return (
            f"deadline {deadline.text}: passed {-left:.0f} s ago, at {deadline.instant}; nothing new starts"
        )
    minutes, seconds = divmod(round(left), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{count} {unit}" for count, unit in ((hours, "h"), (minutes, "min"), (seconds, "s")) if count]
    at = datetime.datetime.fromtimestamp(deadline.at).astimezone()
    told = (
        f"deadline {deadline.text}: {left:.0f} s ({' '.join(parts) or '0 s'}) from now, at {at:%H:%M:%S %z}"
    )
    clock = _as_clock(given)
    return told + (f"; if {clock} was meant, put it in quotes: YAML makes {given} of it" if clock else "")


def _as_clock(given: object) -> str:
    """The time of day that YAML 1.1 would have made this number of, "" for what is none."""
    if not isinstance(given, int) or isinstance(given, bool):
        return ""
    # 14:30 is 14 * 60 + 30, 14:30:00 is 60 times that; an hour with a nought before it stays a text.
    if 60 <= given < 24 * 60:
        return f"{given // 60}:{given % 60:02d}"
    if 3600 <= given < 24 * 3600:
        return f"{given // 3600}:{given // 60 % 60:02d}:{given % 60:02d}"
    return ""


class Watch:
    """A deadline over time: asks a UPS again every so often, keeps the last answer where it says nothing.

    ``aside`` runs what it is given in another thread: whoever sets it is not kept waiting by a UPS that is
    slow to answer, and hears of its answer at a later look. The first answer is always waited for.
    """

    def __init__(
        self,
        deadline: Deadline | None,
        read_runtime: t.Callable[[str], float],
        reserve_seconds: float = 0.0,
        every_seconds: float = 10.0,
    ) -> None:
        self.deadline = deadline
        self.at = None if deadline is None or deadline.at is None else deadline.at - reserve_seconds
        self.trouble = ""
        self._read = read_runtime
        self._reserve = reserve_seconds
        self._every = every_seconds
        self._asked_at: float | None = None
        self.aside: t.Callable[[t.Callable[[], None]], None] | None = None
        self._asking = False

    def now(self, now: float) -> float | None:
        """When the deadline is, as is known now; None: there is none, or a UPS has never answered."""
        deadline = self.deadline
        if deadline is None or not deadline.moves:
            return self.at
        if self._asking or (self._asked_at is not None and now - self._asked_at < self._every):
            return self.at
        self._asked_at = now
        if self.aside is None or self.at is None:
            self._ask(deadline.ups, now)
        else:
            self._asking = True
            self.aside(lambda: self._ask(deadline.ups, now))
        return self.at

    def _ask(self, ups: str, now: float) -> None:
        try:
            # Of when it was asked: if the answer took long, so much less is left.
            self.at = now + self._read(ups) - self._reserve
            self.trouble = ""
        except UpsError as error:
            self.trouble = str(error)
        except Exception as error:  # noqa: BLE001
            # Nobody looks at what another thread raises.
            self.trouble = f"UPS {ups}: {error!r}"
        finally:
            self._asking = False


def runtime_of(text: str, ups: str) -> float:
    """The seconds in what ``upsc NAME battery.runtime`` printed. Raises UpsError."""
    try:
        seconds = float(text.strip())
    except ValueError:
        seconds = -1.0
    # "nan" and "inf" are numbers to Python, and no time that a battery lasts.
    if not math.isfinite(seconds) or seconds < 0:
        raise UpsError(
            f"UPS {ups}: battery.runtime is {text.strip()!r}, no number of seconds; "
            "see `upsc` for what it tells, or give the deadline as a time"
        )
    return seconds
