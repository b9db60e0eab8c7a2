# SPDX-License-Identifier: GPL-3.0-or-later
"""Certificates made on the spot, and pairs of channels on loopback."""

from __future__ import annotations

import asyncio
import datetime
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from precache_proxy.channel import Channel, ChannelConfig, PeerAddress
from small_parts.ports import free_port

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


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki")


class Cable:
    """A TCP relay in front of a port, that can be cut, frozen and healed like the way between two sites."""

    def __init__(self, target_port: int) -> None:
        self.port = free_port()
        self.carried_bytes = 0
        self._target = target_port
        self._server: asyncio.Server | None = None
        self._pairs: list[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = []
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._mute_ports: set[int] = set()
        self._deaf_ports: set[int] = set()

    async def start(self) -> None:
        """Begin to relay."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def refuse(self) -> None:
        """Accept no new connections."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def cut(self, count: int | None = None) -> int:
        """Reset ``count`` connections (all); what the kernel holds of them is lost. Says how many."""
        pairs, self._pairs = self._pairs[:count], [] if count is None else self._pairs[count:]
        for both in pairs:
            for writer in both:
                raw = writer.get_extra_info("socket")
                if raw is not None and raw.fileno() >= 0:
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
        return len(pairs)

    def freeze(self) -> None:
        """Carry nothing, but close nothing either: what a dead router does."""
        self._flowing.clear()

    def thaw(self) -> None:
        """Carry again."""
        self._flowing.set()

    def lose_answers(self, local_port: int) -> None:
        """Carry nothing more to the dialler whose socket has this port; what it sends arrives."""
        self._mute_ports.add(local_port)

    def lose_questions(self, local_port: int) -> None:
        """Carry nothing more of what the dialler whose socket has this port sends; answers arrive."""
        self._deaf_ports.add(local_port)

    async def stop(self) -> None:
        """End everything."""
        await self.refuse()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._flowing.wait()
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._pairs.append((writer, far_writer))
        port = writer.get_extra_info("peername")[1]
        for source, sink, lossy in (
            (reader, far_writer, self._deaf_ports),
            (far_reader, writer, self._mute_ports),
        ):
            task = asyncio.create_task(self._carry(source, sink, port, lossy))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, port: int, lossy: set[int]
    ) -> None:
        try:
            while data := await source.read(65536):
                await self._flowing.wait()
                if port in lossy:
                    continue
                self.carried_bytes += len(data)
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        sink.transport.abort()


Start = Callable[[Channel], Awaitable[Channel]]
WiredFactory = Callable[..., Awaitable[tuple[Channel, Channel, Cable]]]
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
async def start() -> AsyncIterator[Start]:
    """Starts channels that are stopped at the end."""
    started: list[Channel] = []

    async def begin(channel: Channel) -> Channel:
        started.append(channel)
        await channel.start()
        return channel

    yield begin
    for channel in started:
        await channel.stop()


@pytest.fixture
async def wired(authority: Authority, start: Start) -> AsyncIterator[WiredFactory]:
    """``home`` dials ``backup`` through a Cable; both are up."""
    cables: list[Cable] = []

    async def make(**options: Any) -> tuple[Channel, Channel, Cable]:
        ports = free_port(), free_port()
        connections = options.pop("connections", 4)
        cable = Cable(ports[1])
        cables.append(cable)
        await cable.start()
        home = Channel(
            make_config(
                authority,
                "home",
                ports[0],
                {"backup": PeerAddress("127.0.0.1", cable.port, connections)},
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
        await start(home)
        await start(backup)
        await home.links["backup"].wait_up(10)
        await until(lambda: home.links["backup"].status()["connections"] == connections)
        return home, backup, cable

    yield make
    for cable in cables:
        await cable.stop()


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for something to become true."""
    async with asyncio.timeout(seconds):
        # Conditions of several objects, which have no event in common.
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


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
