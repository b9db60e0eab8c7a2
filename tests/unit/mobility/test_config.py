# SPDX-License-Identifier: GPL-3.0-or-later
"""What the configuration may say together."""

from __future__ import annotations

import pytest

from mobility_agent.config import parse
from mobility_agent.errors import ConfigurationError

KEYS = '[[keys]]\nindex = 256\nsecret = "00112233445566778899aabbccddeeff"\n'
GATEWAY = """
name = "kvm1"
address = "2001:db8:1::b"
tunnel_address = "2001:db8:1::d"
gateway = true
{}
[[prefixes]]
prefix = "2001:db8:100::/64"
[[bridges]]
name = "vmbr0"
[[peers]]
name = "kvm2"
address = "2001:db8:2::b"
tunnel_address = "2001:db8:2::d"
{}
"""


def test_a_gateway_has_anchors_or_a_routing_daemon() -> None:
    assert parse(GATEWAY.format("", "anchor = true"), KEYS).anchors
    announcing = parse(GATEWAY.format("announce = true", "gateway = true"), KEYS)
    assert announcing.path_settings().announce
    with pytest.raises(ConfigurationError, match="a gateway without any anchor"):
        parse(GATEWAY.format("", "gateway = true"), KEYS)
    with pytest.raises(ConfigurationError, match="use either anchors or a routing daemon"):
        parse(GATEWAY.format("announce = true", "anchor = true"), KEYS)


def test_learning_needs_somebody_who_would_notice_a_clash() -> None:
    learning = 'hypervisor = "qemu:///system"\nlearn_addresses = true\n'
    assert parse(GATEWAY.format(learning, "anchor = true"), KEYS).learn_addresses
    for settings, peer in (
        ("learn_addresses = true", "anchor = true"),
        (learning + "announce = true", "gateway = true"),
    ):
        with pytest.raises(ConfigurationError, match="needs a gateway with anchors and libvirt"):
            parse(GATEWAY.format(settings, peer), KEYS)


def test_tunnels_are_made_by_seg6_unless_told_otherwise() -> None:
    assert parse(GATEWAY.format("", "anchor = true"), KEYS).path_settings().encapsulation == "seg6"
    other = parse(GATEWAY.format('encapsulation = "ip6tnl"', "anchor = true"), KEYS)
    assert other.path_settings().encapsulation == "ip6tnl"
    with pytest.raises(ConfigurationError, match="encapsulation"):
        parse(GATEWAY.format('encapsulation = "gre"', "anchor = true"), KEYS)


IPV4 = """
[[ipv4_prefixes]]
prefix = "198.51.100.0/24"
router = "{}"
"""


def test_ipv4_prefixes_are_for_a_routing_daemon() -> None:
    text = GATEWAY.format("announce = true", "gateway = true") + IPV4.format("198.51.100.1")
    config = parse(text, KEYS)
    assert [str(network) for network in config.networks] == ["2001:db8:100::/64", "198.51.100.0/24"]
    assert [str(router) for router in config.path_settings().ipv4_routers] == ["198.51.100.1"]
    with pytest.raises(ConfigurationError, match="is IPv4, which the tunnels of anchors do not carry"):
        parse(GATEWAY.format("", "anchor = true") + IPV4.format("198.51.100.1"), KEYS)
    for router, words in (("192.0.2.1", "does not contain its router"), ("2001:db8::1", "like 192.0.2.1")):
        with pytest.raises(ConfigurationError, match=words):
            parse(GATEWAY.format("announce = true", "gateway = true") + IPV4.format(router), KEYS)
    twice = text + IPV4.format("198.51.100.1")
    with pytest.raises(ConfigurationError, match=r"overlaps 198\.51\.100\.0/24"):
        parse(twice, KEYS)


def test_all_faults_are_told_at_once_and_no_secret() -> None:
    text = GATEWAY.replace("2001:db8:100::/64", "2001:db8:1::/48").format(
        "lifetime_seconds = 1", "rubbish = 1"
    )
    with pytest.raises(ConfigurationError) as told:
        parse(text, KEYS.replace("00112233445566778899aabbccddeeff", "abcd"))
    for fact in (
        "tunnels would lead into themselves",
        "lifetime_seconds",
        "rubbish",
        "shorter than 16 octets",
    ):
        assert fact in told.value.message
    assert "abcd" not in told.value.message


ANCHOR = """
name = "anchor1"
address = "2001:db8:a::2"
tunnel_address = "2001:db8:a::d"
anchor = true
[[prefixes]]
prefix = "2001:db8:100::/64"
{}
[[peers]]
name = "kvm1"
address = "2001:db8:1::b"
tunnel_address = "2001:db8:1::d"
gateway = true
"""


def test_a_home_link_says_which_gateways_stand_on_it() -> None:
    prefix = parse(ANCHOR.format('link = "lan0"\nlink_gateways = ["kvm1"]'), KEYS).prefixes[0]
    assert prefix.link_gateways == {"kvm1"}
    assert (
        parse(ANCHOR.format('link = "lan0"\nlink_gateways = []'), KEYS).prefixes[0].link_gateways
        == frozenset()
    )
    for text, words in (
        ('link = "lan0"', "link_gateways"),
        ('link = "lan0"\nlink_gateways = ["kvm9"]', "names kvm9, which is no gateway"),
        ('link_gateways = ["kvm1"]', "no such setting"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            parse(ANCHOR.format(text), KEYS)


def test_each_prefix_may_have_a_home_router_of_its_own_to_watch() -> None:
    anchor = """
name = "anchor1"
address = "2001:db8:a1::2"
tunnel_address = "2001:db8:a1::d"
anchor = true
[attraction]
mode = "when-silent"
{}
[[prefixes]]
prefix = "2001:db8:100::/64"
watch = "2001:db8:1::1"
[[prefixes]]
prefix = "2001:db8:200::/64"
{}
"""
    own = 'watch = "2001:db8:2::1"'
    told = parse(anchor.format("", own), KEYS)
    assert [str(prefix.watch) for prefix in told.prefixes] == ["2001:db8:1::1", "2001:db8:2::1"]
    assert str(parse(anchor.format(own, ""), KEYS).attraction.watch) == "2001:db8:2::1"
    with pytest.raises(ConfigurationError, match="watch"):
        parse(anchor.format("", ""), KEYS)
