# SPDX-License-Identifier: GPL-3.0-or-later
"""Amounts as people write and read them; inside, everything is bytes and seconds."""

from __future__ import annotations

import re

from precache_proxy.errors import InvalidInput

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB

_BINARY = {
    "": 1,
    "b": 1,
    "k": KIB,
    "kib": KIB,
    "m": MIB,
    "mib": MIB,
    "g": GIB,
    "gib": GIB,
    "t": TIB,
    "tib": TIB,
}
_DECIMAL = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_AMOUNT = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*$")
# "Mbps" is bits to most people, and would be eight times too much.
_BITS_OR_BYTES = re.compile(r"\d\s*[kKmMgGtT]?b(/s|ps)?\s*$")


def _split(text: str | float, what: str, example: str) -> tuple[float, str]:
    match = _AMOUNT.match(str(text))
    if match is None:
        raise InvalidInput(f"{what} {text!r}: not an amount; write it like {example}")
    return float(match.group(1)), match.group(2).lower()


def parse_bytes(text: str | float) -> int:
    """``1.5GiB`` -> bytes; K, M, G, T alone are binary. Raises InvalidInput."""
    number, unit = _split(text, "size", "512MiB")
    factor = _BINARY.get(unit) or _DECIMAL.get(unit)
    if factor is None:
        raise InvalidInput(
            f"size {text!r}: unknown unit {unit!r}; use B, KiB, MiB, GiB, TiB, kB, MB, GB or TB"
        )
    return int(number * factor)


def parse_rate(text: str | float) -> float:
    """``400Mbit/s`` or ``50MB/s`` -> bytes per second; a bare number is bytes. Raises InvalidInput."""
    if _BITS_OR_BYTES.search(str(text)):
        raise InvalidInput(f"rate {text!r}: may be meant in bits or in bytes; write Mbit/s or MB/s")
    number, unit = _split(re.sub(r"(/s|ps)\s*$", "", str(text).strip()), "rate", "400Mbit/s")
    if unit in _BITS:
        rate = number * _BITS[unit] / 8
    else:
        factor = _BINARY.get(unit) or _DECIMAL.get(unit)
        if factor is None:
            raise InvalidInput(f"rate {text!r}: unknown unit {unit!r}; use Mbit/s, Gbit/s, MB/s or MiB/s")
        rate = number * factor
    if rate <= 0:
        raise InvalidInput(f"rate {text!r}: nothing could be sent; give one above 0, or none for no limit")
    return rate


def parse_duration(text: str | float) -> float:
    """``15s``, ``20m``, ``1.5h`` -> seconds; a bare number is seconds. Raises InvalidInput."""
    number, unit = _split(text, "duration", "15s or 20m")
    if unit not in _SECONDS:
        raise InvalidInput(f"duration {text!r}: unknown unit {unit!r}; use ms, s, m, h or d")
    return number * _SECONDS[unit]


def format_bytes(number: float) -> str:
    """Bytes for people: ``1.2 GiB``."""
    for factor, unit in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(number) >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number:.0f} B"


def format_seconds(number: float) -> str:
    """Seconds for people: ``340 ms``, ``12.3 s``, ``4 min 10 s``."""
    if number < 1:
        return f"{number * 1000:.0f} ms"
    if number < 120:
        return f"{number:.1f} s"
    minutes, seconds = divmod(round(number), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
