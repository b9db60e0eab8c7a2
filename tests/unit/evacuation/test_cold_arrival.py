# SPDX-License-Identifier: GPL-3.0-or-later
"""What is put in place at the destination before a VM without its memory is defined there."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast

import pytest

from precache_proxy.errors import Conflict, HypervisorError, IntegrityError, Unsupported
from precache_proxy.evacuation import cold_arrival
from precache_proxy.evacuation.arrival import Arrival
from precache_proxy.evacuation.guard import Guard

VM = "11111111-2222-4333-8444-555555555501"

FIRMWARE = """<domain type='kvm'><name>web1</name><uuid>{vm}</uuid><os><nvram>{nvram}</nvram></os><devices>
<tpm model='tpm-crb'><backend type='emulator' version='2.0'><source type='{kind}' path='{tpm}'/></backend>
</tpm></devices></domain>"""


def an_arrival(
    tmp_path: Path, contents: dict[str, bytes], kind: str = "dir"
) -> tuple[Arrival, dict[str, Path]]:
    xml = FIRMWARE.format(
        vm=VM, nvram=tmp_path / "nvram" / "web1.fd", tpm=tmp_path / "swtpm" / VM / "tpm2", kind=kind
    )
    arrival = Arrival("j1", VM, "web1", "home1", 1, 7, mode="restart", definition=xml)
    blobs = {}
    for name, content in contents.items():
        digest = hashlib.sha256(content).hexdigest()
        arrival.attachments[name] = digest
        blobs[name] = tmp_path / digest
        blobs[name].write_bytes(content)
    return arrival, blobs


def test_variables_and_tpm_state_are_put_in_place_and_nothing_older_is_left(tmp_path: Path) -> None:
    arrival, blobs = an_arrival(tmp_path, {"nvram": b"variables", "tpm/tpm2-00.permall": b"state"})
    stale = tmp_path / "swtpm" / VM / "tpm2" / "tpm2-00.volatilestate"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an earlier stay")
    for _twice in range(2):
        cold_arrival._place(arrival, blobs)
        assert (tmp_path / "nvram" / "web1.fd").read_bytes() == b"variables"
        state = tmp_path / "swtpm" / VM / "tpm2"
        assert {path.name: path.read_bytes() for path in state.iterdir()} == {"tpm2-00.permall": b"state"}
        assert state.stat().st_mode & 0o777 == 0o700


def test_what_an_evacuation_left_in_place_is_not_wiped(tmp_path: Path) -> None:
    arrival, _blobs = an_arrival(tmp_path, {})
    arrival.state_is_in_place = True
    kept = [tmp_path / "nvram" / "web1.fd", tmp_path / "swtpm" / VM / "tpm2" / "tpm2-00.permall"]
    for path in kept:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"of its stay")
    cold_arrival._place(arrival, {})
    assert [path.read_bytes() for path in kept] == [b"of its stay"] * 2
    arrival.state_is_in_place = False
    cold_arrival._place(arrival, {})
    assert [path.exists() for path in kept] == [False, False]


def test_a_tpm_whose_state_is_one_file(tmp_path: Path) -> None:
    arrival, blobs = an_arrival(tmp_path, {"tpm/tpm2": b"state"}, kind="file")
    cold_arrival._place(arrival, blobs)
    assert (tmp_path / "swtpm" / VM / "tpm2").read_bytes() == b"state"


def test_what_is_not_what_the_source_has_is_refused(tmp_path: Path) -> None:
    arrival, blobs = an_arrival(tmp_path, {"nvram": b"variables"})
    blobs["nvram"].write_bytes(b"older")
    with pytest.raises(IntegrityError, match="its nvram here is not what home1 has"):
        cold_arrival._place(arrival, blobs)
    with pytest.raises(IntegrityError):
        cold_arrival._place(arrival, {})
    assert not (tmp_path / "nvram").exists()


@pytest.mark.parametrize("name", ["tpm/../../escaped", "tpm//etc/shadow", "tpm/", "other"])
def test_a_name_that_has_no_place_is_refused(tmp_path: Path, name: str) -> None:
    arrival, blobs = an_arrival(tmp_path, {name: b"content"})
    with pytest.raises(Unsupported, match="has no place in its definition"):
        cold_arrival._place(arrival, blobs)


class Libvirt:
    """Notes whether a start would pass the hook at each line."""

    def __init__(self, guard: Guard, started: bool | Exception) -> None:
        self.exception = guard.arriving_directory / VM
        self.started = started
        self.open_at: list[tuple[str, bool]] = []

    async def define(self, _xml: str, _name: str) -> None:
        self.open_at.append(("define", self.exception.exists()))

    async def start(self, _vm: str, *, paused: bool) -> bool:
        assert paused
        self.open_at.append(("start", self.exception.exists() and bool(self.exception.read_text())))
        if isinstance(self.started, Exception):
            raise self.started
        return self.started


@pytest.mark.parametrize(
    ("started", "raised"),
    [(True, None), (False, Conflict), (HypervisorError("no memory"), HypervisorError)],
)
async def test_nobody_but_us_may_start_it(
    tmp_path: Path, started: bool | Exception, raised: type[Exception] | None
) -> None:
    arrival, blobs = an_arrival(tmp_path, {})
    guard = Guard(tmp_path / "state", tmp_path / "run")
    guard.prepare_directories()
    libvirt = Libvirt(guard, started)
    ready = cold_arrival.stand_ready(cast(Any, libvirt), guard, arrival, blobs)
    if raised is None:
        await ready
    else:
        with pytest.raises(raised):
            await ready
    assert libvirt.open_at == [("define", False), ("start", True)]
    assert not libvirt.exception.exists()
