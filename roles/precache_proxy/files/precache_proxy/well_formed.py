# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether values read from a file are of the types that a record says: JSON promises none."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from precache_proxy.errors import IntegrityError


def require_well_formed(record: Any, where: str) -> None:
    """Raise IntegrityError, naming ``where`` and the field, for a dataclass with a value of another type."""
    fault = _fault(record, type(record), "")
    if fault:
        raise IntegrityError(f"{where}: not a record of this release ({fault})")


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _fault(value: Any, hint: Any, at: str) -> str:
    """The first value that is not what it should be, "" where all are."""
    if hint is Any:
        return ""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in {Union, types.UnionType}:
        faults = [_fault(value, choice, at) for choice in arguments]
        return "" if "" in faults else faults[0]
    if is_dataclass(hint):
        if not isinstance(value, hint):  # type: ignore[arg-type]
            return _other(value, getattr(hint, "__name__", str(hint)), at)
        hints = _hints(hint)  # type: ignore[arg-type]
        names = [field.name for field in fields(hint)]
        return _first((getattr(value, name), hints[name], f"{at}.{name}") for name in names)
    if origin is dict or origin is Mapping:
        if not isinstance(value, dict):
            return _other(value, "map", at)
        keys = ((key, arguments[0], f"{at} key {key!r}") for key in value)
        return _first(keys) or _first((item, arguments[1], f"{at}[{key!r}]") for key, item in value.items())
    if origin in {list, tuple}:
        if not isinstance(value, origin):
            return _other(value, "list", at)
        return _first((item, arguments[0], f"{at}[{number}]") for number, item in enumerate(value))
    # JSON writes a whole number without a point; True is no number
    allowed = (int, float) if hint is float else hint
    if not isinstance(value, allowed) or (isinstance(value, bool) and hint is not bool):
        return _other(value, getattr(hint, "__name__", str(hint)), at)
    return ""


def _first(parts: Any) -> str:
    return next((fault for part in parts if (fault := _fault(*part))), "")


def _other(value: Any, wanted: str, at: str) -> str:
    return f"{at.lstrip('.') or 'the record'} is {type(value).__name__}, not {wanted}"
