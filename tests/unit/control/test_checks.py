# SPDX-License-Identifier: GPL-3.0-or-later
"""The checks: each tells what is wrong, and their forms agree."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from precache_proxy.control import check_output
from precache_proxy.control.answers import as_json, vms_answer
from precache_proxy.control.certificate import expires_at
from precache_proxy.control.checks import CheckResult, Severity, run_checks, worst
from precache_proxy.control.parts import Parts
from precache_proxy.control.requests import Protection
from precache_proxy.control.tables import vms
from precache_proxy.errors import ConfigurationError
from precache_proxy.evacuation.arrival import Arrival, ArrivalState
from small_parts.parts import WEB, small_parts

DAY = 86400.0


def certificate(path: Path, end: datetime) -> None:
    """A certificate that ends then."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "home1")])
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(end - timedelta(days=400))
        .not_valid_after(end)
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(built.public_bytes(serialization.Encoding.PEM))


@pytest.fixture
async def parts(tmp_path: Path) -> Parts:
    told = small_parts(tmp_path)
    certificate(tmp_path / "host.crt", datetime.now(UTC) + timedelta(days=100))
    (tmp_path / "hook").write_text("#!/bin/sh\n")
    (tmp_path / "hook").chmod(0o755)
    await told.source.protect(Protection("web1", "backup1", 15.0, 50, None, False))
    return told


async def results(parts: Parts, tmp_path: Path) -> dict[str, list[CheckResult]]:
    found: dict[str, list[CheckResult]] = {}
    for result in await run_checks(parts, hook=tmp_path / "hook"):
        found.setdefault(result.check, []).append(result)
    return found


async def test_all_well(parts: Parts, tmp_path: Path) -> None:
    found = await results(parts, tmp_path)
    assert set(found) == {
        "libvirt", "link", "clock", "certificate", "rpo", "disks", "scrub", "store-space", "scratch",
        "hook", "starts", "evacuations",
    }  # fmt: skip
    bad = [result for several in found.values() for result in several if result.severity is not Severity.OK]
    assert bad == []


@pytest.mark.parametrize(
    ("lag", "generation", "severity", "words"),
    [
        (14.0, 7, Severity.OK, "lag 14.0 s of 15.0 s"),
        (16.0, 7, Severity.WARNING, "lag 16.0 s is over the RPO of 15.0 s"),
        (61.0, 7, Severity.CRITICAL, "is over the RPO"),
        (None, 0, Severity.WARNING, "no sealed generation yet (seeding, 50% covered)"),
    ],
)
async def test_rpo(
    parts: Parts, tmp_path: Path, lag: float | None, generation: int, severity: Severity, words: str
) -> None:
    state = "protected" if generation else "seeding"
    parts.source.spoil(WEB, lag_seconds=lag, generation=generation, coverage=0.5, state=state)
    (result,) = (await results(parts, tmp_path))["rpo"]
    assert (result.subject, result.severity) == ("web1", severity)
    assert words in result.sentence


@pytest.mark.parametrize(
    ("offset", "severity"), [(0.0, Severity.OK), (5.0, Severity.WARNING), (-3600.0, Severity.CRITICAL)]
)
async def test_clock(parts: Parts, tmp_path: Path, offset: float, severity: Severity) -> None:
    parts.channel.links["backup1"].clock_offset_seconds = offset
    first, second = (await results(parts, tmp_path))["clock"]
    assert (first.subject, first.severity, second.severity) == ("backup1", severity, Severity.OK)
    assert first.seconds is not None


async def test_link_that_is_down_is_told_once(parts: Parts, tmp_path: Path) -> None:
    link = parts.channel.links["backup2"]
    link.state, link.sentence = "refused", "the certificate of backup2 is signed by another CA"
    found = await results(parts, tmp_path)
    assert [(one.subject, one.severity) for one in found["link"]] == [
        ("backup1", Severity.OK),
        ("backup2", Severity.CRITICAL),
    ]
    assert "another CA" in found["link"][1].sentence
    assert [one.subject for one in found["clock"]] == ["backup1"], "a dead link's clock is not asked for"


@pytest.mark.parametrize(
    ("days", "severity"), [(20, Severity.WARNING), (3, Severity.CRITICAL), (-1, Severity.CRITICAL)]
)
async def test_certificate_ends(parts: Parts, tmp_path: Path, days: int, severity: Severity) -> None:
    certificate(tmp_path / "host.crt", datetime.now(UTC) + timedelta(days=days, hours=1))
    (result,) = (await results(parts, tmp_path))["certificate"]
    assert result.severity is severity
    assert "run site_setup to renew it" in result.sentence


async def test_a_disk_that_no_pass_carries(parts: Parts, tmp_path: Path) -> None:
    parts.source.spoil(WEB, cause="disk-left-out", refused_disks=["vdb"])
    [result] = (await results(parts, tmp_path))["disks"]
    assert (result.subject, result.severity) == ("web1", Severity.CRITICAL)
    assert "disk vdb cannot be protected" in result.sentence


async def test_a_vm_that_waits_to_start_with_its_host(parts: Parts, tmp_path: Path) -> None:
    parts.source.spoil(WEB, start_waits="waits for backup1 to say that it does not run there")
    [result] = (await results(parts, tmp_path))["starts"]
    assert (result.subject, result.severity) == ("web1", Severity.CRITICAL)
    assert "does not run yet: waits for backup1" in result.sentence
    assert any("waits for backup1" in line for line in vms(vms_answer(parts), 80))


async def test_what_is_left_over_or_missing(parts: Parts, tmp_path: Path) -> None:
    scratch = parts.config.source.scratch_directory
    for name in ("old.vda.scratch", "open.vda.scratch", "young.vda.scratch"):
        (scratch / name).write_bytes(b"x")
    for name in ("old.vda.scratch", "open.vda.scratch"):
        os.utime(scratch / name, (time.time() - 3600, time.time() - 3600))
    passes = parts.config.paths.run / "passes"
    passes.mkdir()
    (passes / "x.json").write_text(f'{{"scratch": ["{scratch}/open.vda.scratch"]}}')
    (tmp_path / "hook").chmod(0o644)
    parts.source.spoil(WEB, scrub={"turns": 1, "different_blocks": 9, "recent_different_blocks": 3})
    job = await parts.evacuation.begin("web1", options=None)
    parts.evacuation.undecide(job.id)
    parts.hypervisor.connected, parts.hypervisor.sentence = False, "no answer"
    found = await results(parts, tmp_path)
    assert "1 scratch file(s) of no open pass: old.vda.scratch" in found["scratch"][0].sentence
    assert "a VM could start twice" in found["hook"][0].sentence
    assert found["scrub"][0].severity is Severity.CRITICAL
    assert "3 blocks differed" in found["scrub"][0].sentence
    parts.source.spoil(WEB, scrub={"turns": 2, "different_blocks": 9, "recent_different_blocks": 0})
    [healed] = (await results(parts, tmp_path))["scrub"]
    assert (healed.severity, "9 blocks before that" in healed.sentence) == (Severity.OK, True)
    assert "undecided: no contact with backup1" in found["evacuations"][0].sentence
    assert found["libvirt"][0].severity is Severity.CRITICAL


@pytest.mark.parametrize(
    ("state", "severity"),
    [("prepared", Severity.CRITICAL), ("released", Severity.CRITICAL), ("activated", Severity.OK)],
)
async def test_a_vm_that_runs_here_waits_for_no_word(
    parts: Parts, tmp_path: Path, state: str, severity: Severity
) -> None:
    """Its record may be of a release that kept the sentence."""
    arrival = Arrival("j2", WEB, "web1", "home1", 1, 7, ArrivalState(state), cause="no-contact", sentence="x")
    parts.evacuation.arrived = [arrival]
    [result] = (await results(parts, tmp_path))["evacuations"]
    assert result.severity is severity


def test_worst_is_what_counts() -> None:
    assert worst([Severity.OK, Severity.UNKNOWN, Severity.WARNING]) is Severity.WARNING
    assert worst([Severity.CRITICAL, Severity.UNKNOWN]) is Severity.CRITICAL
    assert worst([]) is Severity.UNKNOWN


def test_forms_of_output() -> None:
    told = as_json(
        [
            CheckResult("link", "backup1", Severity.OK, "up"),
            CheckResult("rpo", "a|b", Severity.WARNING, "late"),
            CheckResult("hook", "x", Severity.CRITICAL, "missing"),
        ]
    )
    assert [line.split()[1] for line in check_output.console(told, 80)[1:]] == ["CRITICAL", "WARNING", "OK"]
    assert check_output.nagios("home1", told) == [
        "LIFEBOAT CRITICAL - home1: hook x: missing (and 1 more)",
        "CRITICAL: hook x: missing",
        "WARNING: rpo a/b: late",
    ]
    assert check_output.severity(told) == 2
    assert check_output.nagios("home1", told[:1]) == ["LIFEBOAT OK - home1: 1 results, all good"]


def test_certificate_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "host.crt"
    end = datetime(2051, 3, 4, 5, 6, 7, tzinfo=UTC)
    certificate(path, end)  # after 2049 the date is written in another form
    assert expires_at(path) == end.timestamp()
    whole = path.read_text()
    for text in (
        "",
        "nonsense",
        whole[:200] + whole[-26:],
        "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----",
    ):
        path.write_text(text)
        with pytest.raises(ConfigurationError, match="not a PEM certificate"):
            expires_at(path)
