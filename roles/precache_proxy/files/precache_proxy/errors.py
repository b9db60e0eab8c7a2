# SPDX-License-Identifier: GPL-3.0-or-later
"""Errors that a user may see: a cause word for programs, one sentence for people.

Every error crosses the channel and the control interface as
``{"cause": ..., "message": ..., "findings": [...]}`` and comes back as the same class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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


class LifeboatError(Exception):
    """Base of all errors meant for people. ``exit_code`` is what the command line ends with."""

    cause: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, findings: Iterable[Finding] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.findings = tuple(findings)

    def as_dict(self) -> dict[str, Any]:
        """The form in which the error crosses a process boundary."""
        return {
            "cause": self.cause,
            "message": self.message,
            "findings": [asdict(finding) for finding in self.findings],
        }


class InvalidInput(LifeboatError):
    """What was asked for cannot be meant; nothing was changed."""

    cause = "invalid"
    exit_code = 2
    http_status = 400


class ConfigurationError(InvalidInput):
    """The configuration file does not say what it must."""

    cause = "configuration"


class NotFound(LifeboatError):
    """No such VM, peer, replica or job."""

    cause = "not-found"
    exit_code = 3
    http_status = 404


class Conflict(LifeboatError):
    """The thing is in a state, or in other hands, in which this may not be done."""

    cause = "conflict"
    exit_code = 4
    http_status = 409


class Unsupported(LifeboatError):
    """This VM, disk or host has something that cannot be protected or moved."""

    cause = "unsupported"
    exit_code = 5
    http_status = 422


class NoSpace(LifeboatError):
    """Not enough room on a file system or volume."""

    cause = "no-space"
    exit_code = 6
    http_status = 507


class PeerUnreachable(LifeboatError):
    """No connection to the peer."""

    cause = "unreachable"
    exit_code = 7
    http_status = 503


class PeerRefused(LifeboatError):
    """The peer's certificate, name or version is not the one expected."""

    cause = "refused"
    exit_code = 8
    http_status = 502


class PeerRestarted(PeerUnreachable):
    """The peer's process is a new one: what was under way with the old one is gone."""

    cause = "peer-restarted"


class Stalled(PeerUnreachable):
    """No progress for longer than allowed."""

    cause = "stalled"


class ProtocolError(LifeboatError):
    """The other side said something that this version cannot understand."""

    cause = "protocol"
    exit_code = 9
    http_status = 502


class NotUsed(ProtocolError):
    """A connection that was held ready has ended, and nothing that was sent for it has reached it."""

    cause = "not-used"


class TakenOver(Conflict):
    """An order of a coordinator that another has taken over from; nothing was changed."""

    cause = "taken-over"


class StaleEpoch(Conflict):
    """The VM's home has moved since: what was offered belongs to an older epoch."""

    cause = "stale-epoch"


class VmStateChanged(Conflict):
    """The VM was started, or shut off, since it was looked at: its disks are to be had elsewhere now."""

    cause = "state-changed"


class GuestBoots(VmStateChanged):
    """The guest has just booted and opens its ports: no backup of it may begin (see ``event_worker``)."""


class TrackingLost(LifeboatError):
    """The dirty bitmap that the next pass needs is gone or inconsistent."""

    cause = "tracking-lost"
    exit_code = 10
    http_status = 409


class IntegrityError(LifeboatError):
    """A digest does not match: nothing of it was kept."""

    cause = "integrity"
    exit_code = 11


class HypervisorError(LifeboatError):
    """libvirt or QEMU refused or failed."""

    cause = "hypervisor"
    exit_code = 12
    http_status = 502


class ProxyRestarted(LifeboatError):
    """A proxy is being stopped, at the source or the destination: what can be done again later is ended."""

    cause = "proxy-restarted"
    http_status = 503


class Cancelled(LifeboatError):
    """Ended on the operator's word."""

    cause = "cancelled"
    exit_code = 13
    http_status = 409


def _classes(root: type[LifeboatError]) -> Iterable[type[LifeboatError]]:
    yield root
    for subclass in root.__subclasses__():
        yield from _classes(subclass)


def from_dict(data: Mapping[str, Any]) -> LifeboatError:
    """The error that :meth:`LifeboatError.as_dict` described; unknown causes keep their sentence."""
    by_cause = {klass.cause: klass for klass in _classes(LifeboatError)}
    klass = by_cause.get(str(data.get("cause", "")), LifeboatError)
    findings = [
        Finding(*(str(item.get(key, "")) for key in ("subject", "fact", "way_out", "cause")))
        for item in data.get("findings", ())
    ]
    return klass(str(data.get("message", "the other side gave no reason")), findings)
