# SPDX-License-Identifier: GPL-3.0-or-later
"""Home addresses of IPv4: read where they may stand, told apart from IPv6, announced by ARP."""

from __future__ import annotations

from ipaddress import IPv4Address, ip_network

import pytest
from scapy.layers.l2 import ARP, Ether

from mobility_agent.datapath.ipv4 import announcement
from mobility_agent.gateway.attachments import Attachment
from mobility_agent.gateway.definition import METADATA_URI, read_definition
from mobility_agent.homes import only_ipv6, within
from mobility_agent.typed_reader import parse_home

ROUTER, VM = "00:00:5e:00:52:13", "52:54:00:00:00:01"


def test_an_announcement_is_what_others_take_for_one() -> None:
    frame = Ether(announcement(ROUTER, IPv4Address("198.51.100.5"), VM))
    assert (frame.src, frame.dst) == (ROUTER, "ff:ff:ff:ff:ff:ff")
    told = frame[ARP]
    assert (told.hwtype, told.ptype, told.op) == (1, 0x0800, 1)
    assert (told.hwsrc, told.psrc, told.pdst) == (VM, "198.51.100.5", "198.51.100.5")


@pytest.mark.parametrize(
    ("text", "home"),
    [
        ("198.51.100.5", "198.51.100.5/32"),
        ("198.51.100.4/30", "198.51.100.4/30"),
        ("198.51.100.5/30", None),
        ("224.0.0.1", None),
        ("169.254.1.1", None),
        ("2001:db8::5", "2001:db8::5/128"),
    ],
)
def test_home_addresses_of_both_kinds_are_read(text: str, home: str | None) -> None:
    assert parse_home(text) == (None if home is None else ip_network(home))


def test_what_is_of_the_other_kind_is_in_no_prefix() -> None:
    one, other = ip_network("198.51.100.5"), ip_network("2001:db8::5")
    assert within(one, ip_network("198.51.100.0/24"))
    assert not within(one, ip_network("::/0"))
    assert not within(other, ip_network("0.0.0.0/0"))
    assert only_ipv6([one, other]) == (other,)


def test_both_kinds_come_out_of_a_definition_and_are_kept() -> None:
    text = (
        f'<domain><uuid>u</uuid><metadata><m:addresses xmlns:m="{METADATA_URI}">'
        "<m:address>2001:db8::5</m:address><m:address>198.51.100.5</m:address>"
        "</m:addresses></metadata></domain>"
    )
    homes = read_definition(text).homes
    assert [str(home) for home in homes] == ["2001:db8::5/128", "198.51.100.5/32"]
    kept = Attachment("vm", homes, VM, "vmbr0", 1, 0.0)
    assert Attachment.from_record("vm", kept.as_record()) == kept
