# SPDX-License-Identifier: GPL-3.0-or-later
"""The pki role, from the installed collection against two "hosts" that are directories here."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from integration.playbook_runner import ROOT, PlaybookResult, run_playbook

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="the role gives files to root; run as root"),
    pytest.mark.timeout(600),
]

PLAY = [
    {
        "name": "Certificates",
        "hosts": "all",
        "gather_facts": False,
        "roles": [{"role": "lifeboat.evacuation.pki"}],
    }
]


ADDRESSES = {"alpha": "2001:db8:1::11", "beta": "beta.example.org"}


class Site:
    """One host or two, a CA directory and the ways to run the role on them."""

    def __init__(self, work: Path, names: tuple[str, ...] = ("alpha",)) -> None:
        self.work = work
        self.ca = work / "ca"
        self.directories = {name: work / name / "pki" for name in names}
        self.inventory: dict[str, Any] = {
            "all": {
                "hosts": {
                    name: {"pki_directory": str(self.directories[name]), "pki_address": ADDRESSES[name]}
                    for name in names
                },
                "vars": {
                    "ansible_connection": "local",
                    "ansible_python_interpreter": str(ROOT / ".venv" / "bin" / "python"),
                    "pki_ca_directory": str(self.ca),
                    "pki_packages": [],
                    "pki_reload_services": [],
                },
            }
        }

    def run(self, *, check: bool = False, **variables: object) -> PlaybookResult:
        return run_playbook(PLAY, self.inventory, self.work, variables=variables, check=check)

    def certificate(self, host: str) -> x509.Certificate:
        return x509.load_pem_x509_certificate((self.directories[host] / "host.crt").read_bytes())


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("fresh"), ("alpha", "beta"))


@pytest.fixture(scope="module")
def site(fresh: Site) -> Site:
    """A site that the role has set up; module-wide, as each run takes seconds."""
    fresh.run().require_success()
    return fresh


def snapshot(site: Site) -> dict[str, tuple[bytes, int]]:
    """Content and modification time of every file of the site, CA and hosts."""
    roots = [site.ca, *site.directories.values()]
    files = [path for root in roots if root.exists() for path in sorted(root.rglob("*")) if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_dry_run_on_new_hosts_tells_changes_and_makes_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path)
    result = site.run(check=True).require_success()
    assert result.changed > 0
    assert snapshot(site) == {}
    assert not site.ca.exists()


def test_certificates_are_good_for_name_and_address(site: Site) -> None:
    for host, address in ADDRESSES.items():
        directory = site.directories[host]
        subprocess.run(
            ["openssl", "verify", "-x509_strict", "-CAfile", directory / "ca.crt", directory / "host.crt"],
            check=True,
            capture_output=True,
        )
        for purpose in ("sslserver", "sslclient"):
            subprocess.run(
                [
                    "openssl",
                    "verify",
                    "-purpose",
                    purpose,
                    "-CAfile",
                    directory / "ca.crt",
                    directory / "host.crt",
                ],
                check=True,
                capture_output=True,
            )
        names = site.certificate(host).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        told = [str(name.value) for name in names]
        assert told == [host, address]


def test_files_have_the_modes_that_keep_keys_private(site: Site) -> None:
    expected = {"ca.crt": 0o644, "host.crt": 0o644, "host.csr": 0o644, "host.key": 0o600}
    for directory in site.directories.values():
        assert stat.S_IMODE(directory.stat().st_mode) == 0o750
        found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}
        assert found == expected
    assert stat.S_IMODE(site.ca.stat().st_mode) == 0o700
    assert stat.S_IMODE((site.ca / "ca.key").stat().st_mode) == 0o600
    assert (site.ca / ".gitignore").read_text() == "*.key\n"


def test_keys_stay_where_they_were_made(site: Site) -> None:
    keys = [(directory / "host.key").read_bytes() for directory in site.directories.values()]
    assert keys[0] != keys[1]
    on_controller = b"".join(path.read_bytes() for path in site.ca.iterdir())
    assert not any(key in on_controller for key in keys)


@pytest.mark.parametrize("check", [False, True], ids=["run", "dry-run"])
def test_second_run_changes_nothing(site: Site, check: bool) -> None:
    before = snapshot(site)
    result = site.run(check=check).require_success()
    assert result.changed_tasks == []
    assert result.changed == 0
    assert snapshot(site) == before


def test_certificate_near_its_end_is_renewed_with_the_same_key(site: Site) -> None:
    before = snapshot(site)
    serials = {host: site.certificate(host).serial_number for host in site.directories}
    # They were made for 365 days: with 370 asked for as reserve they are due, and a dry run says so.
    due = {"pki_certificate_days": 400, "pki_renew_before_days": 370}
    dry = site.run(check=True, **due).require_success()
    assert dry.changed > 0
    assert snapshot(site) == before
    site.run(**due).require_success()
    for host, directory in site.directories.items():
        assert site.certificate(host).serial_number != serials[host]
        assert (directory / "host.key").read_bytes() == before[str(directory / "host.key")][0]
    assert (site.ca / "ca.crt").read_bytes() == before[str(site.ca / "ca.crt")][0]
    assert site.run(**due).require_success().changed == 0


def test_authority_is_renewed_before_a_certificate_could_outlive_it(site: Site) -> None:
    key = (site.ca / "ca.key").read_bytes()
    certificate = (site.ca / "ca.crt").read_bytes()
    due = {"pki_ca_days": 8000, "pki_certificate_days": 3640, "pki_renew_before_days": 20}
    site.run(**due).require_success()
    assert (site.ca / "ca.key").read_bytes() == key
    renewed = (site.ca / "ca.crt").read_bytes()
    assert renewed != certificate
    for directory in site.directories.values():
        assert (directory / "ca.crt").read_bytes() == renewed
        # What was issued under the old certificate is good under the new one: same name, same key.
        subprocess.run(
            ["openssl", "verify", "-CAfile", directory / "ca.crt", directory / "host.crt"],
            check=True,
            capture_output=True,
        )


def test_unreadable_certificate_is_replaced(site: Site) -> None:
    broken = site.directories["beta"] / "host.crt"
    broken.write_text("not a certificate\n")
    site.run().require_success()
    assert site.certificate("beta").subject.rfc4514_string() == "CN=beta"


def test_other_authority_is_refused_unless_allowed(site: Site) -> None:
    before = snapshot(site)
    other = site.work / "other-ca"
    refused = site.run(pki_ca_directory=str(other))
    assert refused.return_code != 0
    assert "trusts another authority than that of" in refused.messages
    assert "pki_allow_new_authority" in refused.messages
    assert snapshot(site) == before
    site.run(pki_ca_directory=str(other), pki_allow_new_authority=True).require_success()
    for directory in site.directories.values():
        subprocess.run(
            ["openssl", "verify", "-CAfile", other / "ca.crt", directory / "host.crt"],
            check=True,
            capture_output=True,
        )
    # And back, so that the other tests find what they expect.
    site.run(pki_allow_new_authority=True).require_success()


def test_passphrase_encrypts_the_authority_and_a_wrong_one_replaces_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.run(pki_ca_passphrase="correct horse").require_success()
    assert b"ENCRYPTED" in (site.ca / "ca.key").read_bytes()
    before = snapshot(site)
    wrong = site.run(pki_ca_passphrase="battery staple")
    assert wrong.return_code != 0
    assert "battery staple" not in wrong.output
    assert snapshot(site) == before
    assert site.run(pki_ca_passphrase="correct horse").require_success().changed == 0


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"pki_renew_before_days": 400}, "pki_renew_before_days=400"),
        ({"pki_name": "two words"}, "pki_name=two words"),
        ({"pki_certificate_days": "soon"}, "pki_certificate_days"),
    ],
    ids=["renewal-before-issue", "name", "not-a-number"],
)
def test_bad_input_is_named_and_changes_nothing(
    tmp_path: Path, variables: dict[str, object], told: str
) -> None:
    site = Site(tmp_path)
    result = site.run(**variables)
    assert result.return_code != 0
    assert told in result.messages
    assert snapshot(site) == {}
