# SPDX-License-Identifier: GPL-3.0-or-later
"""Errors that a user may see: a cause word for programs, one sentence for people.

They cross the control interface as ``{"cause": ..., "message": ..., "findings": [...]}``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that stands in the way: which thing, what is the matter, how to get out."""

    subject: str
    fact: str
    way_out: str
    cause: str = "invalid"

    def __str__(self) -> str:
        return f"{self.subject}: {self.fact}; {self.way_out}"


class MobilityError(Exception):
    """Base of all errors meant for people. ``exit_code`` is what the command line ends with."""

    cause: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, findings: Iterable[Finding] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.findings = tuple(findings)

    def as_dict(self) -> dict[str, Any]:
        """The form in which the error crosses the control interface."""
        return {
            "cause": self.cause,
            "message": self.message,
            "findings": [asdict(finding) for finding in self.findings],
        }


class InvalidInput(MobilityError):
    """What was asked for cannot be meant; nothing was changed."""

    cause = "invalid"
    exit_code = 2
    http_status = 400


class ConfigurationError(InvalidInput):
    """The configuration file does not say what it must."""

    cause = "configuration"


class NotFound(MobilityError):
    """No such VM, anchor or bridge."""

    cause = "not-found"
    exit_code = 3
    http_status = 404


class Conflict(MobilityError):
    """The thing is in a state, or in other hands, in which this may not be done."""

    cause = "conflict"
    exit_code = 4
    http_status = 409


class Unsupported(MobilityError):
    """This kernel or host lacks what the data path needs."""

    cause = "unsupported"
    exit_code = 5
    http_status = 422


class Unreachable(MobilityError):
    """Nobody answers there."""

    cause = "unreachable"
    exit_code = 7
    http_status = 503


class MalformedMessage(MobilityError):
    """A packet that is no mobility message of the RFCs: dropped and counted, never answered."""

    cause = "malformed"
    exit_code = 9
    http_status = 502


class NotAuthentic(MobilityError):
    """A message whose authenticator is missing or wrong: dropped and counted."""

    cause = "not-authentic"
    exit_code = 9
    http_status = 502


class KernelRefused(MobilityError):
    """The kernel did not take a route, rule, neighbour or filter."""

    cause = "kernel"
    exit_code = 12
    http_status = 502
