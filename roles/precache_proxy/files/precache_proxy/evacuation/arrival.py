# SPDX-License-Identifier: GPL-3.0-or-later
"""The record of one evacuation at its destination."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from precache_proxy import durable
from precache_proxy.errors import Conflict, IntegrityError
from precache_proxy.evacuation.job import Mode


class ArrivalState(StrEnum):
    """Where an arrival stands.

    RELEASED is the source's irrevocable word that it will not run the VM; from ACTIVATED on it runs here.
    """

    PREPARED = "prepared"
    RELEASED = "released"
    ACTIVATED = "activated"
    LANDED = "landed"
    ABORTING = "aborting"
    ABORTED = "aborted"


FOLLOWING: Final[Mapping[ArrivalState, frozenset[ArrivalState]]] = {
    ArrivalState.PREPARED: frozenset({ArrivalState.RELEASED, ArrivalState.ABORTING}),
    ArrivalState.RELEASED: frozenset({ArrivalState.ACTIVATED, ArrivalState.ABORTING}),
    ArrivalState.ACTIVATED: frozenset({ArrivalState.LANDED}),
    ArrivalState.LANDED: frozenset(),
    ArrivalState.ABORTING: frozenset({ArrivalState.ABORTED}),
    ArrivalState.ABORTED: frozenset(),
}
# The cause of one that stands here and whose old home cannot be asked.
NO_CONTACT: Final = "no-contact"
RUNS_HERE: Final = frozenset({ArrivalState.ACTIVATED, ArrivalState.LANDED})


@dataclass(slots=True)
class ArrivalDisk:
    """A disk of an arrival: the replica's top, the overlay that libvirt fills, and the one from activation
    on.

    ``size_bytes`` is the guest-visible size.
    """

    replica: str
    replica_format: str
    overlay: str
    top: str
    size_bytes: int
    # the lowest image of the chain that is ours: landing collapses into it and no deeper; "" until then
    base: str = ""
    # the layers that landing merges into it, to be removed once that is done
    merged: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Arrival:
    """One evacuation, at its destination. ``id`` is the source's job id, ``epoch`` the one it raises the VM
    to."""

    id: str
    vm: str
    name: str
    peer: str
    epoch: int
    generation: int
    state: ArrivalState = ArrivalState.PREPARED
    since: float = 0.0
    cause: str = ""
    sentence: str = ""
    autostart: bool = False
    # the definition it is to have here, for the case that libvirt has lost its own
    definition: str = field(default="", repr=False)
    # the tombstone that this arrival's guard replaced (a VM that comes back), to be put back on abort
    tombstone: dict[str, Any] | None = None
    # names of bitmaps that the migration stream brings along and nobody follows here
    stray_bitmaps: list[str] = field(default_factory=list)
    # what the protection at the old home was asked for: the way back is protected alike
    protection: dict[str, Any] = field(default_factory=dict)
    disks: dict[str, ArrivalDisk] = field(default_factory=dict)
    # it comes without its memory (job.Mode)
    mode: str = Mode.LIVE.value
    # False: it was shut off at its old home and stays so here
    boots: bool = True
    # of one that comes without its memory: UEFI variables and TPM state by name -> SHA-256
    attachments: dict[str, str] = field(default_factory=dict)
    # they are in their places here since an earlier stay, and not among the attachments
    state_is_in_place: bool = False
    # drive -> where its medium is here
    media: dict[str, str] = field(default_factory=dict)
    # the checkpoint that tracks the way back from the first instant, "" until it exists
    checkpoint: str = ""
    memory_lost: bool = False
    # its addresses do not lead here yet: the mobility agent is asked again
    network_owed: bool = False
    # on whose word it was activated without the source's: "" (with it), "operator", "presumed"
    activated_by: str = ""
    # it came from the last sealed generation, its home being dead (fail_over.py), of which instant
    fails_over: bool = False
    sealed_at: float | None = None
    # its old home knows, and does not start it any more
    home_told: bool = False
    timings: dict[str, float] = field(default_factory=dict)
    landing: str = ""

    @property
    def restarts(self) -> bool:
        """It boots here; no memory comes along."""
        return self.mode == Mode.RESTART.value

    @property
    def has_lost_memory(self) -> bool:
        """It had to be started anew though its memory was to come along."""
        return self.memory_lost and not self.restarts

    @property
    def ended(self) -> bool:
        """Nothing more is to be done."""
        return self.state in {ArrivalState.LANDED, ArrivalState.ABORTED}

    def advance(self, state: ArrivalState) -> None:
        """Go on to ``state``. Raises Conflict where it may not follow."""
        if state not in FOLLOWING[self.state]:
            raise Conflict(
                f"arrival {self.id} of {self.name}: it is {self.state.value} and cannot become "
                f"{state.value}; "
                "see `precache-proxy status` here and at the source"
            )
        self.state = state

    def contact_matters_no_more(self) -> None:
        """It was decided, or can be asked about again: drop the sentence that calls for a decision."""
        if self.cause == NO_CONTACT:
            self.cause = self.sentence = ""

    def record(self) -> dict[str, Any]:
        """All of it, as the file holds it."""
        return asdict(self)

    def as_dict(self) -> dict[str, Any]:
        """What the control API shows: all but the definition, which may hold secrets of the VM."""
        return {key: value for key, value in asdict(self).items() if key != "definition"}


def arrival_from_dict(data: Mapping[str, Any]) -> Arrival:
    """What :meth:`Arrival.record` gave; unknown keys are dropped. Raises IntegrityError."""
    known = {item.name for item in fields(Arrival)}
    values = {key: value for key, value in data.items() if key in known}
    try:
        values["state"] = ArrivalState(values["state"])
        values["disks"] = {key: ArrivalDisk(**disk) for key, disk in values.get("disks", {}).items()}
        return Arrival(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"arrival record {data.get('id', '?')}: not understood ({error}); it was written by another "
            f"version: "
            "install that one again, or move the record away once you know where the VM runs"
        ) from error


class ArrivalJournal:
    """The arrivals of this host, one durable file each."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def save(self, arrival: Arrival) -> None:
        """Make the record durable (blocking)."""
        durable.make_directory(self.directory, 0o750)
        durable.write_json(self.directory / f"{arrival.id}.json", arrival.record())

    def enter(self, arrival: Arrival, state: ArrivalState) -> None:
        """Advance and make that durable; only then may it be acted upon (blocking).

        Where it cannot be made durable (a full disk) the arrival stays as it was.
        """
        before = arrival.state
        arrival.advance(state)
        try:
            self.save(arrival)
        except OSError:
            arrival.state = before
            raise

    def remove(self, job_id: str) -> None:
        """Forget one for good (blocking)."""
        durable.remove(self.directory / f"{job_id}.json")

    def load(self) -> list[Arrival]:
        """Every arrival on record, oldest first."""
        if not self.directory.is_dir():
            return []
        records = (durable.read_json(path) for path in sorted(self.directory.glob("*.json")))
        return sorted(
            (arrival_from_dict(record) for record in records if record), key=lambda item: item.since
        )
