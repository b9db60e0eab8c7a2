# SPDX-License-Identifier: GPL-3.0-or-later
"""Certificates made on the spot, and pairs of channels on loopback."""

from __future__ import annotations

import datetime
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from precache_proxy.channel import Channel, ChannelConfig, PeerAddress

_DAY = datetime.timedelta(days=1)


class Authority:
    """A CA that lives for one test run."""

    def __init__(self, directory: Path, name: str = "test CA") -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(self._name)
            .issuer_name(self._name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 30 * _DAY)
            .not_valid_after(now + 30 * _DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.path = directory / "ca.crt"
        self.path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, *, expired: bool = False, file: str | None = None) -> tuple[Path, Path]:
        """Paths of a certificate for ``name`` and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "host")]))
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 10 * _DAY)
            .not_valid_after(now + (-_DAY if expired else 10 * _DAY))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        stem = file or name
        certificate_path, key_path = self.directory / f"{stem}.crt", self.directory / f"{stem}.key"
        certificate_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        key_path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return certificate_path, key_path


def free_port() -> int:
    """A port that nobody holds now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki")


PairFactory = Callable[..., Awaitable[tuple[Channel, Channel]]]


def make_config(
    authority: Authority, name: str, port: int, peers: dict[str, PeerAddress], **options: Any
) -> ChannelConfig:
    """A channel configuration with a fresh certificate."""
    certificate, key = authority.issue(name)
    values: dict[str, Any] = {
        "name": name,
        "ca_path": authority.path,
        "certificate_path": certificate,
        "key_path": key,
        "peers": peers,
        "listen_address": "127.0.0.1",
        "listen_port": port,
        "reconnect_minimum_seconds": 0.05,
        "reconnect_maximum_seconds": 0.5,
    }
    return ChannelConfig(**(values | options))


@pytest.fixture
async def pair(authority: Authority) -> AsyncIterator[PairFactory]:
    """Two channels, ``home`` and ``backup``, that are up; options go into both configurations."""
    started: list[Channel] = []

    async def make(*, wait: bool = True, **options: Any) -> tuple[Channel, Channel]:
        ports = free_port(), free_port()
        connections = options.pop("connections", 4)
        home = Channel(
            make_config(
                authority,
                "home",
                ports[0],
                {"backup": PeerAddress("127.0.0.1", ports[1], connections)},
                **options,
            )
        )
        backup = Channel(
            make_config(
                authority,
                "backup",
                ports[1],
                {"home": PeerAddress("127.0.0.1", ports[0], connections)},
                **options,
            )
        )
        started.extend([home, backup])
        for channel in (home, backup):
            await channel.start()
        if wait:
            await home.links["backup"].wait_up(10)
            await backup.links["home"].wait_up(10)
        return home, backup

    yield make
    for channel in started:
        await channel.stop()
