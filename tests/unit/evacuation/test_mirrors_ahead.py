# SPDX-License-Identifier: GPL-3.0-or-later
"""The handshakes of mirrors, made ahead: by QEMU's own server and client, and by a server of our own."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precache_proxy.evacuation import nbd_frames
from precache_proxy.evacuation.relay import DISK, LIBVIRT
from unit.evacuation.openings_ground import JOB, OPENING, REST, Ground, converse, ground, soon, with_serials

VERSION_LINE = "qemu-img version "


def emulator_version() -> int:
    told = subprocess.run(["qemu-img", "--version"], check=True, capture_output=True, text=True).stdout
    major, minor, micro = told.removeprefix(VERSION_LINE).split()[0].split("+")[0].split(".")[:3]
    return int(major) * 1_000_000 + int(minor) * 1_000 + int(micro)


async def run(*words: str) -> str:
    """A program to its good end; what it says."""
    process = await asyncio.create_subprocess_exec(
        *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    told, _ = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0, told
    return told.decode()


@asynccontextmanager
async def qemu_listens(made: Ground, *, export: str = "drive-virtio-disk0") -> AsyncIterator[Path]:
    image = made.far_directory / "disk.qcow2"
    await run("qemu-img", "create", "-q", "-f", "qcow2", str(image), "16M")
    server = await asyncio.create_subprocess_exec(
        "qemu-nbd", "-k", str(made.far_directory / JOB / "disk.sock"), "-x", export, "-f", "qcow2",
        "-t", "-e", "4", str(image),
    )  # fmt: skip
    try:
        await soon((made.far_directory / JOB / "disk.sock").exists)
        yield image
    finally:
        server.terminate()
        await server.wait()


async def prepare_passes(made: Ground) -> None:
    """Libvirt's reply to Prepare crosses: from now on QEMU listens."""
    await converse(made, with_serials([*OPENING, REST]))


async def qemu_writes(made: Ground, export: str = "drive-virtio-disk0") -> str:
    """QEMU's client at the source writes and flushes; what it says."""
    target = f"nbd+unix:///{export}?socket={made.sockets.path(DISK)}"
    return await run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 2M", "-c", "flush", target)


needs_qemu = pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="qemu-utils is not installed")


@needs_qemu
async def test_qemus_handshake_is_over_before_it_begins() -> None:
    async with ground() as made, qemu_listens(made) as image:
        made.ahead.begin_libvirt()
        made.ahead.begin(DISK, nbd_frames.opening("drive-virtio-disk0", emulator_version()))
        await asyncio.sleep(0.1)
        assert made.relays.carried(JOB) == [DISK, LIBVIRT], "waits until libvirt has prepared the VM"
        await prepare_passes(made)
        await qemu_writes(made)
        assert made.plain == []
        assert made.failures == []
        told = await run("qemu-io", "-U", "-r", "-f", "qcow2", "-c", "read -P 7 1M 2M", str(image))
        assert "verification failed" not in told


@needs_qemu
@pytest.mark.parametrize(
    "expected",
    [
        ("another-export", 0),
        # of another version, which begins in another way
        ("drive-virtio-disk0", 10_000_000 if emulator_version() < 8_002_000 else -10_000_000),
    ],
)
async def test_a_handshake_that_was_not_foreseen_is_made_over_the_wan(expected: tuple[str, int]) -> None:
    export, further = expected
    async with ground() as made, qemu_listens(made):
        made.ahead.begin_libvirt()
        made.ahead.begin(DISK, nbd_frames.opening(export, emulator_version() + further))
        await prepare_passes(made)
        await qemu_writes(made)
        assert made.plain == [DISK]
        assert made.failures == []


@needs_qemu
async def test_a_mirror_whose_held_connection_died_gets_another() -> None:
    async with ground() as made:
        made.ahead.begin_libvirt()
        made.ahead.begin(DISK, nbd_frames.opening("drive-virtio-disk0", emulator_version()))
        async with qemu_listens(made):
            await prepare_passes(made)
            await asyncio.sleep(0.2)
        (made.far_directory / JOB / "disk.sock").unlink(missing_ok=True)
        async with qemu_listens(made):
            await qemu_writes(made)
        assert made.plain == [DISK]


def exported(request: bytes) -> bytes:
    """The last character of the export's name in an option, after its header and the name's length."""
    return request[20:38][-1:]


def replies_of_server(request: bytes) -> bytes:
    """What an NBD server says to an option of QEMU's client: GO is answered with the export's own size."""
    _, number, _ = nbd_frames.OPTION.unpack_from(request)

    def reply(kind: int, data: bytes = b"") -> bytes:
        return nbd_frames.OPTION_REPLY.pack(nbd_frames.REPLY_MAGIC, number, kind, len(data)) + data

    told = b""
    if number == nbd_frames.SET_META_CONTEXT:
        told = reply(4, (1).to_bytes(4) + b"base:allocation")
    elif number == nbd_frames.GO:
        told = reply(3, b"\0\0 the size of " + exported(request))
    return told + reply(nbd_frames.ACKNOWLEDGED)


async def serve_two_exports(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An NBD server for whichever export is asked for; after the handshake it says which that was."""
    writer.write(nbd_frames.GREETING + b"\0\3")
    try:
        await reader.readexactly(nbd_frames.CLIENT_FLAGS_BYTES)
        number, export = 0, b""
        while number != nbd_frames.GO:
            start = await reader.readexactly(nbd_frames.OPTION.size)
            _, number, length = nbd_frames.OPTION.unpack(start)
            request = start + await reader.readexactly(length)
            export = exported(request)
            writer.write(replies_of_server(request))
        while piece := await reader.read(100):
            writer.write(export * len(piece))
    except (asyncio.IncompleteReadError, OSError):
        pass
    finally:
        writer.close()


@settings(max_examples=15)
@given(st.lists(st.integers(1, 40), max_size=12), st.permutations([0, 1, 2]))
def test_each_disk_gets_the_connection_of_its_own_export(cuts: list[int], order: list[int]) -> None:
    """However its client's questions are cut, and in whatever order disks come."""

    async def run_all() -> None:
        async with ground() as made:
            path = made.far_directory / JOB / "disk.sock"
            server = await asyncio.start_unix_server(serve_two_exports, path)
            made.ahead.begin_libvirt()
            for number in range(3):
                made.ahead.begin(DISK, nbd_frames.opening(f"drive-virtio-disk{number}", 10_000_000))
            await prepare_passes(made)
            for number in order:
                requests = nbd_frames.opening(f"drive-virtio-disk{number}", 10_000_000)
                content, pieces = b"".join(requests) + bytes(40), []
                for cut in cuts:
                    pieces.append(content[:cut])
                    content = content[cut:]
                reader, writer = await asyncio.open_unix_connection(made.sockets.path(DISK))
                for piece in [*pieces, content]:
                    writer.write(piece)
                    await asyncio.sleep(0)
                expected = nbd_frames.GREETING + b"\0\3"
                expected += b"".join(replies_of_server(raw) for raw in requests[2:])
                expected += f"{number}".encode() * 40
                assert await asyncio.wait_for(reader.readexactly(len(expected)), 5) == expected
                writer.close()
            assert made.plain == []
            server.close()

    asyncio.run(run_all())
