# SPDX-License-Identifier: GPL-3.0-or-later
"""A peer whose certificate is wrong is refused by both sides with the reason; renewal heals it."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from integration.lab_host import lab_host
from integration.playbook_runner import PlaybookResult
from integration.source_pair import wait_for
from lifeboat_lab.lab import Lab
from lifeboat_lab.proxy import Proxy

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

NAME, PEER = "backup1", "home1"
CERTIFICATE = "/etc/lifeboat/pki/host.crt"
SERVICE = "precache-proxy"


def issue(
    host_key: bytes, authority: Path | None, *, name: str = NAME, days: tuple[int, int] = (-2, 90)
) -> bytes:
    """A certificate for the host's own key; ``authority`` None: of a CA that nobody knows."""
    if authority is None:
        signer: Any = ec.generate_private_key(ec.SECP256R1())
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "another CA")])
    else:
        signer = serialization.load_pem_private_key((authority / "ca.key").read_bytes(), None)
        issuer = x509.load_pem_x509_certificate((authority / "ca.crt").read_bytes()).subject
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(serialization.load_pem_private_key(host_key, None).public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=days[0]))
        .not_valid_after(now + datetime.timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
            critical=False,
        )
        .sign(signer, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM)


def wait_link(lab: Lab, host: str, peer: str, state: str) -> dict[str, Any]:
    """How a link stands once it is in that state."""
    deadline = time.monotonic() + 60
    while (link := Proxy(lab.host(host)).link(peer))["state"] != state:
        assert time.monotonic() < deadline, f"{host}: {link}"
        time.sleep(0.5)
    return link


WRONG = {
    "expired": ({"days": (-9, -1)}, "its certificate has expired; renew it (role pki)"),
    "another-ca": ({"authority": None}, "its certificate comes from another CA"),
    "another-name": ({"name": "web1.example"}, "its certificate is for web1.example, not for backup1"),
}


SOAK = pytest.mark.soak


@pytest.mark.parametrize(
    "case", ["another-ca", pytest.param("expired", marks=SOAK), pytest.param("another-name", marks=SOAK)]
)
def test_a_wrong_certificate_is_refused_with_the_reason_and_healed_by_renewal(
    lab: Lab, lab_playbook: Callable[..., PlaybookResult], site_setup: PlaybookResult, case: str
) -> None:
    assert site_setup.return_code == 0
    changed, told = WRONG[case]
    host, peer = lab_host(lab, NAME), lab_host(lab, PEER)
    wait_link(lab, PEER, NAME, "up")
    key = (lab.host(NAME).root / "etc/lifeboat/pki/host.key").read_bytes()
    wrong = issue(key, **{"authority": lab.settings.state / "pki", **changed})  # type: ignore[arg-type]
    (lab.host(NAME).root / CERTIFICATE.lstrip("/")).write_bytes(wrong)
    since = peer.check_output("date +%s")
    # Connections that stand are not asked again for who they are.
    host.check_output(f"systemctl restart {SERVICE}")

    link = wait_link(lab, PEER, NAME, "refused")
    assert (link["cause"], told in link["sentence"]) == ("refused", True), link
    back = wait_link(lab, NAME, PEER, "refused")
    assert back["cause"] == "refused"
    # As one that was called, and as a caller, too.
    wait_for(
        lambda: peer.check_output(f"journalctl -u {SERVICE} --no-pager --since=@{since}"),
        lambda log: told in log and "was turned away: " in log,
        timeout_seconds=30,
    )
    check = host.run("precache-proxy check --json")
    assert check.rc != 0, "both hosts' checks say so"
    assert peer.run("precache-proxy check --json").rc != 0

    healed = lab_playbook("site_setup", options=("--limit", NAME)).require_success()
    assert any("certificate" in task for task in healed.changed_tasks), healed.changed_tasks
    assert (lab.host(NAME).root / CERTIFICATE.lstrip("/")).read_bytes() != wrong
    wait_link(lab, PEER, NAME, "up")
    wait_link(lab, NAME, PEER, "up")
    assert lab_playbook("site_setup", options=("--limit", NAME)).require_success().changed_tasks == []


def test_an_unreadable_certificate_is_named_with_the_way_out_and_all_goes_on(
    lab: Lab, lab_playbook: Callable[..., PlaybookResult], site_setup: PlaybookResult
) -> None:
    assert site_setup.return_code == 0
    host = lab_host(lab, NAME)
    wait_link(lab, PEER, NAME, "up")
    since = host.check_output("date +%s")
    host.check_output(f"echo rubbish > {CERTIFICATE}")
    host.run(f"systemctl reload {SERVICE}")
    told = host.run("precache-proxy check")
    assert told.rc != 0
    assert f"{CERTIFICATE}: not a PEM certificate; run the role" in told.stdout
    log = wait_for(
        lambda: host.check_output(f"journalctl -u {SERVICE} --no-pager --since=@{since}"),
        lambda log: "all goes on as before" in log,
        timeout_seconds=30,
    )
    assert "Traceback" not in log
    assert Proxy(lab.host(PEER)).link(NAME)["state"] == "up"
    lab_playbook("site_setup", options=("--limit", NAME)).require_success()
    assert CERTIFICATE not in host.run("precache-proxy check").stdout
