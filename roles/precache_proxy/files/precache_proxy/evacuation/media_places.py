# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the media of a VM's drives are at its destination: carried there beforehand, and known by content."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from precache_proxy.errors import Finding
from precache_proxy.hypervisor.domain_xml import Definition
from precache_proxy.store.media import Medium


class Shelf(Protocol):
    """What is needed of the store's media."""

    def declared(self, vm: str) -> dict[str, Medium]: ...
    def locate(self, digest: str) -> Path | None: ...


@dataclass(frozen=True)
class MediaPlaces:
    """``paths``: drive -> plain image here; ``findings``: what is not here."""

    paths: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def find_places(definition: Definition, shelf: Shelf | None) -> MediaPlaces:
    """Look for every medium (blocking). What its home did not declare counts if it is at its path."""
    declared = {} if shelf is None else shelf.declared(definition.uuid)
    places = MediaPlaces()
    for disk in definition.disks:
        if disk.is_writable_disk or not disk.path:
            continue
        subject = f"VM {definition.name}, disk {disk.target}"
        medium = declared.get(disk.target)
        if medium is None:
            if not Path(disk.path).exists():
                places.findings.append(
                    Finding(
                        subject,
                        f"{disk.path} is not there at the destination and has not been carried there",
                        "wait until `precache-proxy status` at the source says that it is there, copy it "
                        "there, or eject it",
                        "not-found",
                    )
                )
        elif medium.path != disk.path:
            places.findings.append(
                Finding(
                    subject,
                    f"{disk.path} was put in after {medium.path}, and only that is at the destination",
                    "wait for the next pass and try again, or eject it",
                    "conflict",
                )
            )
        elif shelf is not None and (path := shelf.locate(medium.digest)) is not None:
            places.paths[disk.target] = str(path)
        else:
            places.findings.append(
                Finding(
                    subject,
                    f"{disk.path} is still on its way to the destination",
                    "wait until `precache-proxy status` at the source says that it is there, or eject it",
                    "conflict",
                )
            )
    return places
