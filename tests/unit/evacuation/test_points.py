# SPDX-License-Identifier: GPL-3.0-or-later
"""The means of the crash tests: a process stops at a named line, and one reply of libvirt's is found."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precache_proxy.evacuation.libvirt_frames import DOMAIN_MIGRATE_FINISH3_PARAMS
from precache_proxy.evacuation.libvirt_replies import Replies

PROGRAM, REPLY, CALL = 0x20008086, 1, 0


def packet(procedure: int, kind: int, payload: bytes) -> bytes:
    return struct.pack(">IIIIIII", 28 + len(payload), PROGRAM, 1, procedure, kind, 7, 0) + payload


PACKETS = st.lists(
    st.builds(
        packet,
        st.sampled_from([1, 305, 307, DOMAIN_MIGRATE_FINISH3_PARAMS + 1]),
        st.sampled_from([CALL, REPLY]),
        # a payload that looks like the reply's header is none
        st.binary(max_size=40) | st.just(packet(DOMAIN_MIGRATE_FINISH3_PARAMS, REPLY, b"")),
    ),
    max_size=6,
)


@given(PACKETS, PACKETS, st.lists(st.integers(1, 60), min_size=1, max_size=20))
def test_the_reply_is_found_in_whatever_pieces_it_comes(
    before: list[bytes], after: list[bytes], cuts: list[int]
) -> None:
    def found(data: bytes) -> bool:
        replies, at, number = Replies(DOMAIN_MIGRATE_FINISH3_PARAMS), 0, 0
        while at < len(data):
            size = cuts[number % len(cuts)]
            if replies.contain(data[at : at + size]):
                return True
            at, number = at + size, number + 1
        return False

    wanted = packet(DOMAIN_MIGRATE_FINISH3_PARAMS, REPLY, b"domain")
    asked = packet(DOMAIN_MIGRATE_FINISH3_PARAMS, CALL, b"domain")
    assert not found(b"".join([*before, asked, *after]))
    assert found(b"".join([*before, asked, wanted, *after]))


def run(**environment: str) -> subprocess.Popen[bytes]:
    program = (
        "from precache_proxy.crash_points import crash_point, drops\n"
        "crash_point('arrival-tracked')\n"
        "crash_point('arrival-released')\n"
        "print(drops('relay-finish-reply'))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_process_stops_at_its_line_and_goes_on_when_told_to() -> None:
    with run(LIFEBOAT_STOP_AT="arrival-released", LIFEBOAT_DROP_AT="relay-finish-reply") as process:
        _pid, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)
        told, _errors = process.communicate(timeout=20)
    assert (process.returncode, told) == (0, b"True\n")


@pytest.mark.parametrize("variable", ["LIFEBOAT_CRASH_AT", "LIFEBOAT_STOP_AT", "LIFEBOAT_DROP_AT"])
def test_a_point_that_is_none_is_refused(variable: str) -> None:
    with run(**{variable: "nowhere"}) as process:
        _told, errors = process.communicate(timeout=20)
    assert process.returncode != 0
    assert f"{variable}=nowhere: no such point".encode() in errors
