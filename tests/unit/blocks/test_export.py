# SPDX-License-Identifier: GPL-3.0-or-later
"""Real images behind real qemu-nbd processes, read and written through libnbd."""

# ruff: noqa: ASYNC220, ASYNC221, PT012, SIM117

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from precache_proxy.blocks import images
from precache_proxy.blocks.export import Export, open_export
from precache_proxy.blocks.nbd import (
    ALLOCATION,
    ALLOCATION_DEPTH,
    NbdClient,
    dirty_bitmap,
    is_dirty,
    reads_zero,
)
from precache_proxy.errors import Conflict, HypervisorError, InvalidInput, NoSpace, NotFound
from precache_proxy.units import KIB, MIB

AWKWARD_NAMES = [
    "plain.qcow2",
    "with space.qcow2",
    "a,b,,c.qcow2",
    "json:{}.qcow2",
    "nbd:x:y.qcow2",
    "Würfel 骰子.qcow2",
    "q\"uo'te%s\\.qcow2",
]


def alive(pid: int) -> bool:
    try:
        # A zombie that nobody waited for has ended too.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:  # gone before it was opened, or before it was read
        return False


async def wait_gone(pid: int) -> None:
    for _ in range(100):
        if not alive(pid):
            return
        await asyncio.sleep(0.05)
    pytest.fail(f"process {pid} is still there")


@pytest.mark.parametrize("name", AWKWARD_NAMES)
async def test_any_file_name_can_be_written_and_read(tmp_path: Path, name: str) -> None:
    image = tmp_path / name
    await images.create(image, MIB)
    async with await open_export(
        image, format="qcow2", writable=True, socket_directory=tmp_path / "s"
    ) as export:
        async with await NbdClient.connect(export.socket) as client:
            await client.write(4096, b"x" * 4096)
            await client.flush()
        assert not (tmp_path / "s" / "nothing").exists()
    assert list((tmp_path / "s").iterdir()) == [], "a socket was left behind"
    overlay = tmp_path / ("top " + name)
    await images.create(overlay, MIB, backing=name if ":" not in name else str(image))
    async with await open_export(overlay, format="qcow2", socket_directory=tmp_path / "s") as export:
        async with await NbdClient.connect(export.socket) as client:
            assert bytes(await client.read(4095, 3)) == b"\0xx"
    chain = await images.info(overlay, "qcow2")
    assert [entry.size_bytes for entry in chain] == [MIB, MIB]


async def test_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    image = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.img"))
    image.write_bytes(b"\0" * 512)
    with pytest.raises(InvalidInput, match="UTF-8"):
        await open_export(image, format="raw", socket_directory=tmp_path)


async def test_errors_name_the_image_and_say_what_qemu_said(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="gone"):
        await open_export(tmp_path / "gone.qcow2", format="qcow2", socket_directory=tmp_path)
    (tmp_path / "raw").write_bytes(b"no header" * 512)
    with pytest.raises(HypervisorError, match="not in qcow2 format"):
        await open_export(tmp_path / "raw", format="qcow2", socket_directory=tmp_path)
    image = tmp_path / "used.qcow2"
    await images.create(image, MIB)
    async with await open_export(image, format="qcow2", writable=True, socket_directory=tmp_path):
        assert images.locked(image)
        assert images.open_elsewhere([image, tmp_path / "raw"]) == {image}
        with pytest.raises(Conflict, match=r"used\.qcow2.*in use"):
            await open_export(image, format="qcow2", writable=True, socket_directory=tmp_path)
    assert not images.locked(image)
    assert images.open_elsewhere([image]) == set()
    with pytest.raises(InvalidInput, match="107 bytes"):
        await open_export(image, format="qcow2", socket_directory=tmp_path / ("d" * 120))
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".sock"] == []


@pytest.mark.parametrize("size", [512, 1536, 4096, 5 * 512, 64 * KIB + 512, MIB + 7 * 512])
@pytest.mark.parametrize("format_", ["qcow2", "raw"])
async def test_sizes_that_are_no_multiple_of_anything(tmp_path: Path, size: int, format_: str) -> None:
    image = tmp_path / "image"
    if format_ == "raw":
        image.write_bytes(b"\0" * size)
    else:
        await images.create(image, size)
    content = random.Random(size).randbytes(size)
    async with await open_export(image, format=format_, writable=True, socket_directory=tmp_path) as export:
        async with await NbdClient.connect(export.socket, contexts=[ALLOCATION]) as client:
            assert client.size_bytes == size
            await client.write(0, content)
            assert await client.read(0, size) == content
            assert await client.read(size - 1, 1) == content[-1:]
            await client.zero(size - 512, 512)
            assert await client.read(size - 512, 512) == b"\0" * 512
            await client.flush()
            statuses = await client.block_status(ALLOCATION)
            assert sum(length for _, length, _ in statuses) == size
            with pytest.raises(InvalidInput, match="not inside"):
                await client.read(size, 1)
    assert image.exists()


async def test_bitmap_and_allocation_depth(tmp_path: Path) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    await images.create(base, 4 * MIB)
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", str(base)], check=True, capture_output=True
    )
    await images.create(top, 4 * MIB, backing="base")
    await images.add_bitmap(top, "lifeboat-e1-g1")
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -P 2 2M 128k", "-c", "write -z 3M 64k", str(top)],
        check=True, capture_output=True,
    )  # fmt: skip
    contexts = [ALLOCATION, ALLOCATION_DEPTH, dirty_bitmap("lifeboat-e1-g1")]
    async with (
        await open_export(
            top, format="qcow2", bitmap="lifeboat-e1-g1", allocation_depth=True, socket_directory=tmp_path
        ) as export,
        await NbdClient.connect(export.socket, contexts=contexts) as client,
    ):
        assert client.read_only
        dirty = await client.extents(contexts[2], is_dirty)
        assert list(dirty) == [(2 * MIB, 2 * MIB + 128 * KIB), (3 * MIB, 3 * MIB + 64 * KIB)]
        depth = await client.block_status(ALLOCATION_DEPTH)
        assert [entry for entry in depth if entry[2] == 1] == [
            (2 * MIB, 128 * KIB, 1),
            (3 * MIB, 64 * KIB, 1),
        ]
        assert (0, MIB, 2) in depth
        zero = await client.extents(ALLOCATION, reads_zero)
        assert list(zero.intersection(dirty)) == [(3 * MIB, 3 * MIB + 64 * KIB)]
    with pytest.raises(HypervisorError, match="bitmap"):
        await open_export(top, format="qcow2", bitmap="other", socket_directory=tmp_path)
    async with await open_export(top, format="qcow2", socket_directory=tmp_path) as export:
        with pytest.raises(HypervisorError, match="does not offer"):
            await NbdClient.connect(export.socket, contexts=[dirty_bitmap("lifeboat-e1-g1")])
    # The same image alone: what is below it reads as zeroes, but its own clusters are told apart.
    async with (
        await open_export(
            top, format="qcow2", backing=[], allocation_depth=True, socket_directory=tmp_path
        ) as export,
        await NbdClient.connect(export.socket, contexts=[ALLOCATION_DEPTH]) as client,
    ):
        assert await client.read(0, 4096) == b"\0" * 4096
        assert [flags for _, _, flags in await client.block_status(ALLOCATION_DEPTH)] == [0, 1, 0, 1, 0]


async def test_block_status_of_a_very_fragmented_image_is_complete(tmp_path: Path) -> None:
    image = tmp_path / "raw"
    with image.open("wb") as file:
        file.truncate(400 * MIB)
        for block in range(0, 400 * MIB // (32 * KIB), 2):
            os.pwrite(file.fileno(), b"x", block * 32 * KIB)
    async with await open_export(image, format="raw", socket_directory=tmp_path) as export:
        async with await NbdClient.connect(export.socket, contexts=[ALLOCATION]) as client:
            statuses = await client.block_status(ALLOCATION)
    assert len(statuses) > 12000
    assert statuses[0][0] == 0
    assert all(a + b == c for (a, b, _), (c, _, _) in itertools.pairwise(statuses))
    assert sum(length for _, length, _ in statuses) == 400 * MIB


async def test_reading_extents_in_order_with_bounded_memory(tmp_path: Path) -> None:
    image = tmp_path / "raw"
    content = random.Random(1).randbytes(24 * MIB + 512)
    image.write_bytes(content)
    async with await open_export(image, format="raw", socket_directory=tmp_path) as export:
        async with await NbdClient.connect(export.socket) as client:
            kept, at = [], 0
            async for offset, length, data in client.read_extents(
                [(0, len(content))], request_bytes=256 * KIB
            ):
                assert (offset, length) == (at, len(data))
                kept.append(data)  # what the caller still holds must not be written over
                at += length
            assert b"".join(kept) == content
            del kept, data
            gc.collect()
            before = memory_bytes()
            for _ in range(30):
                async for _ in client.read_extents([(0, len(content))]):
                    pass
            assert memory_bytes() - before < 40 * MIB, "buffers are not given back"
            async for _ in client.read_extents([(0, len(content))]):
                break  # a reader that stops early leaves nothing in flight that hurts
            assert await client.read(5, 4) == content[5:9]


def memory_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_a_server_that_dies_fails_what_is_in_flight(tmp_path: Path) -> None:
    image = tmp_path / "raw"
    image.write_bytes(b"\1" * MIB)
    export = await open_export(image, format="raw", socket_directory=tmp_path)
    client = await NbdClient.connect(export.socket, subject="web1/vda")
    os.kill(export.pid, signal.SIGSTOP)
    reading = asyncio.ensure_future(client.read(0, MIB))
    await asyncio.sleep(0.05)
    os.kill(export.pid, signal.SIGKILL)
    with pytest.raises(HypervisorError, match="web1/vda"):
        await reading
    with pytest.raises(HypervisorError, match="web1/vda"):
        await client.read(0, 1)
    await client.close()
    with pytest.raises(HypervisorError, match="exit code"):
        await export.close()


async def test_full_file_system_is_no_space(tmp_path: Path, small_disk: Path) -> None:
    image = small_disk / "full.qcow2"
    await images.create(image, 256 * MIB)
    async with await open_export(image, format="qcow2", writable=True, socket_directory=tmp_path) as export:
        async with await NbdClient.connect(export.socket, subject="web1/vda") as client:
            data = os.urandom(MIB)
            with pytest.raises(NoSpace, match="web1/vda"):
                for number in range(128):
                    await client.write(number * MIB, data)
                    await client.flush()


async def test_a_killed_owner_leaves_no_qemu_nbd(tmp_path: Path) -> None:
    image = tmp_path / "image"
    await images.create(image, MIB)
    program = textwrap.dedent("""
        import asyncio, sys
        from pathlib import Path
        from precache_proxy.blocks.export import open_export
        async def main():
            image, sockets = Path(sys.argv[1]), Path(sys.argv[2])
            export = await open_export(image, format="qcow2", writable=True, socket_directory=sockets)
            print(export.pid, flush=True)
            await asyncio.sleep(60)
        asyncio.run(main())
    """)
    owner = subprocess.Popen(
        [sys.executable, "-c", program, str(image), str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    assert alive(pid)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    await wait_gone(pid)
    for _ in range(100):  # its main thread may be gone while another still holds the file
        if not images.locked(image):
            break
        await asyncio.sleep(0.05)
    assert not images.locked(image)


async def test_many_exports_at_once(tmp_path: Path) -> None:
    image = tmp_path / "raw"
    image.write_bytes(b"\1" * MIB)

    async def one() -> Export:
        return await open_export(image, format="raw", socket_directory=tmp_path, name="vda")

    exports = await asyncio.gather(*(one() for _ in range(5)))
    assert len({export.socket for export in exports}) == 5
    for export in exports:
        await export.kill()
        await export.close()  # twice is no error
        assert not alive(export.pid)


@pytest.mark.parametrize("idle", [True, False], ids=["idle", "asking"])
async def test_a_server_that_went_costs_nobody_else_his_descriptor(tmp_path: Path, idle: bool) -> None:
    """Libnbd closes its descriptor with the server, and the next socket of this process gets the number."""
    path = tmp_path / "disk.qcow2"
    await images.create(path, MIB)
    export = await open_export(path, format="qcow2", socket_directory=tmp_path / "nbd", name="read")
    client = await NbdClient.connect(export.socket, contexts=[ALLOCATION], subject="disk")
    os.kill(export.pid, signal.SIGKILL)
    if idle:
        await wait_gone(export.pid)
        await asyncio.sleep(0.1)
    else:
        while alive(export.pid):
            time.sleep(0.02)  # noqa: ASYNC251 - the loop must not run: the next request is the first to notice
        requests = [asyncio.ensure_future(client.read(0, 4096)) for _ in range(4)]
        outcome = await asyncio.gather(*requests, return_exceptions=True)
        assert all(isinstance(error, HypervisorError) for error in outcome)
    others = [socket.socketpair() for _ in range(8)]
    ends = []
    try:
        ends = [(await asyncio.open_connection(sock=ours), theirs) for ours, theirs in others]
        await client.close()
        for (reader, _writer), theirs in ends:
            theirs.sendall(b"still heard\n")
            assert await asyncio.wait_for(reader.readline(), 5) == b"still heard\n"
    finally:
        for (_reader, writer), theirs in ends:
            writer.close()
            theirs.close()
        await export.kill()


async def test_an_idle_connection_whose_server_went_does_not_spin(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    await images.create(path, MIB)
    export = await open_export(path, format="qcow2", socket_directory=tmp_path / "nbd", name="read")
    client = await NbdClient.connect(export.socket, contexts=[ALLOCATION], subject="disk")
    os.kill(export.pid, signal.SIGKILL)
    await wait_gone(export.pid)
    used = time.process_time()
    await asyncio.sleep(0.5)
    assert time.process_time() - used < 0.25
    with pytest.raises(HypervisorError):
        await client.read(0, 4096)
    await client.close()
    await export.kill()
