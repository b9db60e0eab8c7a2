# SPDX-License-Identifier: GPL-3.0-or-later
"""The daemon as systemd runs it: a real process, real parts, libvirt's test driver."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from precache_proxy.control.client import Client
from precache_proxy.errors import LifeboatError
from small_parts.ports import free_port

ROOT = Path(__file__).resolve().parents[3]
WAIT_SECONDS = 60.0


def wait_until(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not true():
        assert time.monotonic() < end, f"{what} did not happen within {WAIT_SECONDS} s"
        time.sleep(0.1)


def make_certificates(directory: Path, name: str) -> None:
    """A CA and one certificate of it."""
    now = datetime.now(UTC)

    def certificate(subject: str, key: ec.EllipticCurvePrivateKey, *, ca: bool) -> x509.Certificate:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ca")]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=90))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(subject)]), critical=False)
            .sign(authority, hashes.SHA256())
        )

    authority, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    (directory / "ca.crt").write_bytes(certificate("ca", authority, ca=True).public_bytes(pem))
    (directory / "host.crt").write_bytes(certificate(name, own, ca=False).public_bytes(pem))
    plain = serialization.NoEncryption()
    (directory / "host.key").write_bytes(own.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))


class Proxy:
    """A configured proxy on this machine, listening on a free loopback port."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.run = directory / "run"
        self.client = Client(self.run / "control.sock")
        self.processes: list[subprocess.Popen[str]] = []
        self.notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notified.bind(str(directory / "notify"))
        self.notified.setblocking(False)
        self.messages = ""
        make_certificates(directory, "home1")
        self.port = free_port()
        self.configure()

    def configure(self, more: str = "") -> None:
        (self.directory / "proxy.toml").write_text(
            f'name = "home1"\nsite = "home"\n{more}'
            f'[listen]\naddress = "127.0.0.1"\nport = {self.port}\n'
            f'[tls]\nca = "{self.directory}/ca.crt"\ncertificate = "{self.directory}/host.crt"\n'
            f'key = "{self.directory}/host.key"\n'
            f'[paths]\nstate = "{self.directory}/state"\nrun = "{self.run}"\n[control]\ngroup = "root"\n'
            '[hypervisor]\nuri = "test:///default"\nqemu_user = "root"\n'
            '[[peers]]\nname = "backup1"\naddress = "127.0.0.1"\nport = 9\n'
        )

    def start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "precache_proxy", "run", "--config", str(self.directory / "proxy.toml")],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT / "roles/precache_proxy/files"),
                "NOTIFY_SOCKET": str(self.directory / "notify"),
                "WATCHDOG_USEC": "900000",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.processes.append(process)
        return process

    def told(self, text: str, times: int = 1) -> bool:
        """Whether systemd was told that, so often, by now."""
        while True:
            try:
                self.messages += self.notified.recv(4096).decode() + "\n"
            except BlockingIOError:
                return self.messages.count(text) >= times

    def wait_ready(self) -> None:
        wait_until(lambda: self.told("READY=1"), "READY=1")


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    told = Proxy(tmp_path)
    yield told
    for process in told.processes:
        if process.poll() is None:
            process.kill()
            process.communicate()
    told.notified.close()


def test_starts_serves_reloads_and_stops(proxy: Proxy) -> None:
    process = proxy.start()
    proxy.wait_ready()
    status = proxy.client.request("GET", "/v1/status")
    assert (status["state"], status["hypervisor"]["connected"]) == ("running", True)
    assert status["links"][0]["state"] == "down"
    assert 80 * 86400 < status["certificate"]["seconds_left"] < 90 * 86400
    wait_until(lambda: proxy.told("WATCHDOG=1"), "a sign of life")

    second = proxy.start()
    output, _ = second.communicate(timeout=WAIT_SECONDS)
    assert second.returncode == 4
    assert "held by a running precache proxy" in output
    assert "Traceback" not in output

    path = proxy.directory / "proxy.toml"
    path.write_text(path.read_text().replace("port = 9\n", 'port = 9\nrate_bytes_per_second = "8Mbit/s"\n'))
    process.send_signal(signal.SIGHUP)
    wait_until(
        lambda: proxy.client.request("GET", "/v1/links")["links"][0]["rate_bytes_per_second"] == 1_000_000,
        "the new rate",
    )
    path.write_text("nonsense")
    process.send_signal(signal.SIGHUP)
    wait_until(lambda: proxy.told("RELOADING=1", 2) and proxy.told("READY=1", 3), "the second reload")
    assert proxy.client.request("GET", "/v1/status")["state"] == "running", "a bad file ends nothing"

    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    assert "all goes on as before" in output
    assert proxy.told("STOPPING=1")
    assert not (proxy.run / "control.sock").exists()


def test_killed_proxy_starts_again(proxy: Proxy) -> None:
    process = proxy.start()
    proxy.wait_ready()
    process.kill()
    process.communicate()
    assert (proxy.run / "control.sock").exists(), "nobody was there to remove it"
    proxy.messages = ""
    proxy.start()
    proxy.wait_ready()
    assert proxy.client.request("GET", "/v1/status")["state"] == "running"


def test_unreadable_certificate_is_one_sentence(proxy: Proxy) -> None:
    (proxy.directory / "host.crt").write_text("nonsense")
    process = proxy.start()
    output, _ = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode not in {0, 1}
    assert str(proxy.directory / "host.crt") in output
    assert "Traceback" not in output
    with pytest.raises(LifeboatError, match="does not answer"):
        proxy.client.request("GET", "/v1/status")
