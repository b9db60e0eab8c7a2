# SPDX-License-Identifier: GPL-3.0-or-later
"""The WAN's arithmetic, on a clock that the test moves: rate, delay, queue, loss, order."""

import socket
import struct
import time
from contextlib import ExitStack

import pytest

from lifeboat_lab.profiles import Profile
from lifeboat_lab.shaper import VNET_HEADER_BYTES, Shaper, Site

HOME, BACKUP = 0, 1


def packet(number: int, size_bytes: int = 1000) -> bytes:
    """A packet of this size on the line, recognisable by its number."""
    return bytes(VNET_HEADER_BYTES) + number.to_bytes(4, "big") + bytes(size_bytes - 4)


def shaper(profile: Profile, *, seed: int = 1) -> Shaper:
    """Two sites; no device is ever read, the packets are offered by hand."""
    made = Shaper([Site(-1, bytes(6), bytes(3)), Site(-1, b"\1" * 6, b"\1" * 3)], seed=seed)
    made.set(profile)
    return made


def drain(line: Shaper, now: float) -> list[int]:
    """Numbers of the packets that are due by then."""
    numbers = []
    while (data := line.take(HOME, BACKUP, now)) is not None:
        numbers.append(int.from_bytes(data[VNET_HEADER_BYTES : VNET_HEADER_BYTES + 4], "big"))
    return numbers


def test_delay_is_half_the_round_trip() -> None:
    line = shaper(Profile(round_trip_seconds=0.2))
    assert line.offer(HOME, BACKUP, packet(7), 10.0)
    assert drain(line, 10.0999) == []
    assert drain(line, 10.1) == [7]


def test_rate_spaces_packets_to_the_byte() -> None:
    line = shaper(Profile(rate_bits_per_second=8e6))  # 1000 bytes take 1 ms
    for number in range(10):
        assert line.offer(HOME, BACKUP, packet(number), 5.0)
    assert drain(line, 5.0009) == []
    assert drain(line, 5.00401) == [0, 1, 2, 3]
    assert drain(line, 5.01001) == list(range(4, 10))


def test_directions_do_not_share_a_line() -> None:
    line = shaper(Profile(rate_bits_per_second=8e3))
    assert line.offer(HOME, BACKUP, packet(1), 0.0)
    assert line.offer(BACKUP, HOME, packet(2), 0.0)
    assert line.take(BACKUP, HOME, 1.0) == packet(2)
    assert line.take(HOME, BACKUP, 1.0) == packet(1)


def test_a_full_queue_drops_and_counts() -> None:
    profile = Profile(rate_bits_per_second=8e6)
    line = shaper(profile)
    room = profile.queue_bytes // 1000
    taken = sum(line.offer(HOME, BACKUP, packet(number), 0.0) for number in range(room + 50))
    assert taken == room
    assert line.counters(HOME, BACKUP)["dropped_queue_full"] == 50
    # As the line drains there is room again.
    assert line.offer(HOME, BACKUP, packet(999), 0.0011)


def test_a_shorter_delay_does_not_overtake() -> None:
    line = shaper(Profile(round_trip_seconds=1.0))
    assert line.offer(HOME, BACKUP, packet(1), 0.0)
    line.set(Profile(round_trip_seconds=0.01))
    assert line.offer(HOME, BACKUP, packet(2), 0.1)
    assert drain(line, 0.4999) == []
    assert drain(line, 0.5) == [1, 2]


def test_loss_hits_the_share_that_was_asked_for() -> None:
    line = shaper(Profile(loss=0.1))
    lost = sum(not line.offer(HOME, BACKUP, packet(number), 0.0) for number in range(20_000))
    assert lost == line.counters(HOME, BACKUP)["dropped_loss"]
    assert 1800 < lost < 2200  # seeded: the same in every run
    assert len(drain(line, 0.0)) == 20_000 - lost


def test_a_cut_loses_what_is_on_its_way() -> None:
    line = shaper(Profile(round_trip_seconds=1.0))
    for number in range(5):
        assert line.offer(HOME, BACKUP, packet(number), 0.0)
    line.clear(HOME, BACKUP)
    assert drain(line, 100.0) == []
    assert line.counters(HOME, BACKUP)["dropped_cut"] == 5


@pytest.mark.parametrize(
    ("prefix", "ipv4_prefix", "lengths"), [(bytes(4), bytes(3), "4 and 3"), (bytes(6), bytes(4), "6 and 4")]
)
def test_a_prefix_of_another_length_is_refused(prefix: bytes, ipv4_prefix: bytes, lengths: str) -> None:
    with pytest.raises(ValueError, match=f"prefixes of {lengths} bytes"):
        Shaper([Site(-1, prefix, ipv4_prefix)])


@pytest.mark.parametrize(("kind", "network_header"), [(1, 20), (4, 40), (4 | 0x80, 40)])
def test_what_the_kernel_has_not_split_takes_the_line_as_long_as_its_packets(
    kind: int, network_header: int
) -> None:
    segments, segment, tcp_header = 7, 1400, 32
    line = shaper(Profile(rate_bits_per_second=8e6))  # 1000 bytes take 1 ms
    # struct virtio_net_hdr: flags, type, headers, payload of each, where checksums begin and go.
    unsplit = struct.pack("=BBHHHH", 1, kind, 0, segment, network_header, 16)
    tcp = bytes(12) + bytes([tcp_header // 4 << 4]) + bytes(tcp_header - 13)
    payload = bytes((segments - 1) * segment + 100)
    assert line.offer(HOME, BACKUP, unsplit + bytes(network_header) + tcp + payload, 0.0)
    assert line.offer(HOME, BACKUP, packet(1), 0.0)
    seconds = (segments * (network_header + tcp_header) + len(payload)) / 1e6
    assert line.take(HOME, BACKUP, seconds - 0.00001) is None
    assert line.take(HOME, BACKUP, seconds + 0.00001) is not None
    assert drain(line, seconds + 0.00099) == []
    assert drain(line, seconds + 0.00101) == [1]


def test_packets_go_to_the_site_whose_network_they_are_for() -> None:
    with ExitStack() as stack:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2)]
        for pair in pairs:
            for end in pair:
                stack.enter_context(end)
                end.setblocking(False)
        sites = [
            (b"\x20\x01\x0d\xb8\x00\x01", b"\xc6\x12\x01"),
            (b"\x20\x01\x0d\xb8\x00\x02", b"\xc6\x12\x02"),
        ]
        line = Shaper([Site(pair[0].fileno(), *site) for pair, site in zip(pairs, sites, strict=True)])
        line.set(Profile())
        control, other = socket.socketpair()
        stack.enter_context(control)
        stack.enter_context(other)
        for site, (prefix, ipv4_prefix) in enumerate(sites):
            ipv6 = b"\x60" + bytes(23) + prefix + bytes(10)
            ipv4 = b"\x45" + bytes(15) + ipv4_prefix + b"\x0b" + bytes(8)
            for content in (ipv6, ipv4):
                pairs[1 - site][1].send(bytes(VNET_HEADER_BYTES) + content)
        # For nobody here, and too short to tell for whom.
        pairs[0][1].send(bytes(VNET_HEADER_BYTES) + b"\x45" + bytes(27))
        pairs[0][1].send(bytes(VNET_HEADER_BYTES) + b"\x60" + bytes(20))
        assert not line.run(control.fileno(), time.monotonic() + 0.2)
        for source, destination in ((HOME, BACKUP), (BACKUP, HOME)):
            assert line.counters(source, destination)["delivered_packets"] == 2
            # Written to the device that it came by: the router's own tables lead it on.
            sizes = [len(pairs[source][1].recv(100)) - VNET_HEADER_BYTES for _ in range(2)]
            assert sizes == [40, 28]
            with pytest.raises(BlockingIOError):
                pairs[source][1].recv(100)
