# SPDX-License-Identifier: GPL-3.0-or-later
"""Our octets, read by people who did not write them: scapy's layers and tshark's dissector."""

from __future__ import annotations

import hashlib
import hmac
import json
import shutil
import struct
import subprocess
from collections.abc import Callable
from ipaddress import IPv6Address, IPv6Network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobility_agent.messages import headers, options
from mobility_agent.messages.codec import MOBILITY_PROTOCOL, Key, decode, encode
from mobility_agent.messages.registration import Acknowledgement, Loss, Registration, acknowledge_loss

Dissect = Callable[..., list[dict[str, list[str]]]]
scapy = pytest.importorskip("scapy.layers.inet6", reason="python3-scapy is not installed")

SOURCE = IPv6Address("2001:db8:b::2")
DESTINATION = IPv6Address("2001:db8:a::2")
KEY = Key(256, b"a secret of the test", "hmac-sha1-96")
VM = "11111111-2222-3333-4444-555555555555"
HOMES = (IPv6Network("2001:db8:100::5/128"), IPv6Network("2001:db8:100:7::/64"))
REGISTRATION = Registration(
    vm=VM,
    homes=HOMES,
    care_of=IPv6Address("2001:db8:b::d"),
    epoch=3,
    ticks=options.Timestamp.of_seconds(1_700_000_000.5).ticks,
    lifetime_seconds=120,
    handoff=options.HandoffIndicator.BETWEEN_GATEWAYS,
    link_local=IPv6Address("fe80::1"),
)
REVOCATION = Loss(VM, HOMES, 4, REGISTRATION.ticks, IPv6Address("2001:db8:c::d")).message(11)


def _ipv6(payload: bytes, source: IPv6Address = SOURCE, destination: IPv6Address = DESTINATION) -> bytes:
    head = struct.pack(">IHBB", 6 << 28, len(payload), MOBILITY_PROTOCOL, 64)
    return head + source.packed + destination.packed + payload


@pytest.fixture(scope="module")
def tshark(tmp_path_factory: pytest.TempPathFactory) -> Dissect:
    """Dissects payloads of protocol 135; gives for each message all its fields with every value."""
    program = shutil.which("tshark")
    if program is None:
        pytest.skip("tshark is not installed")

    def dissect(*payloads: bytes) -> list[dict[str, list[str]]]:
        path = tmp_path_factory.mktemp("capture") / "messages.pcap"
        # LINKTYPE_IPV6: packets without any link layer.
        content = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 229)
        for payload in payloads:
            packet = _ipv6(payload)
            content += struct.pack("<IIII", 0, 0, len(packet), len(packet)) + packet
        path.write_bytes(content)
        command = [program, "-r", str(path), "-T", "json", "--no-duplicate-keys"]
        told = subprocess.run(command, capture_output=True, check=True, timeout=120)
        return [_flat(packet["_source"]["layers"]) for packet in json.loads(told.stdout)]

    return dissect


def _flat(layers: object) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}

    def walk(node: object) -> None:
        if isinstance(node, list):
            for item in node:
                walk(item)
        elif isinstance(node, dict):
            for name, value in node.items():
                for leaf in value if isinstance(value, list) else [value]:
                    if isinstance(leaf, str):
                        found.setdefault(name, []).append(leaf)
                walk(value)

    walk(layers)
    return found


def test_tshark_reads_a_registration(tshark: Dissect) -> None:
    data = encode(REGISTRATION.update(513), SOURCE, DESTINATION, KEY)
    (told,) = tshark(data)
    assert told["mip6.mhtype"] == ["5"]
    assert told["mip6.bu.seqnr"] == ["513"]
    assert told["mip6.bu.lifetime"] == ["30"]  # units of 4 s
    assert (told["mip6.bu.a_flag"], told["mip6.bu.h_flag"], told["mip6.bu.p_flag"]) == (["1"], ["1"], ["1"])
    assert told["mip6.mnid.identifier"] == [VM]
    assert told["mip6.nemo.mnp.pfl"] == ["128", "64"]
    assert told["mip6.nemo.mnp.mnp"] == ["2001:db8:100::5", "2001:db8:100:7::"]
    assert told["mip6.hi"] == ["3"]
    assert told["mip6.att"] == ["1"]
    assert told["mip6.acoa.acoa"] == ["2001:db8:b::d"]
    assert told["mip6.lila_lla"] == ["fe80::1"]
    assert told["mip6.vsm.vendorId"] == ["32473"]
    assert told["mip6.auth.mobility_spi"] == ["256"]
    # tshark 4.0 shows two octets less than there are.
    shown = bytes.fromhex(told["mip6.auth.auth_data"][0].replace(":", ""))
    assert len(shown) >= 10
    assert data[-12:].startswith(shown)
    assert "_ws.malformed" not in told
    assert not any("expert" in name for name in told)


def test_tshark_reads_every_other_message(tshark: Dissect) -> None:
    answer = Acknowledgement(
        VM, headers.Status.TIMESTAMP_MISMATCH, 513, 0, REGISTRATION.ticks, HOMES, 3, SOURCE
    )
    beat = headers.Heartbeat(70_000, response=True, options=(options.RestartCounter(17),))
    messages = [answer.message(), beat, REVOCATION, acknowledge_loss(REVOCATION)]
    told = tshark(*(encode(message, SOURCE, DESTINATION, KEY) for message in messages))
    acknowledged, heartbeat, revoked, confirmed = told
    assert (acknowledged["mip6.mhtype"], acknowledged["mip6.ba.status"]) == (["6"], ["156"])
    assert acknowledged["mip6.ba.p_flag"] == ["1"]
    assert acknowledged["mip6.ba.seqnr"] == ["513"]
    assert (heartbeat["mip6.mhtype"], heartbeat["mip6.hb.seqnr"]) == (["13"], ["70000"])
    assert (heartbeat["mip6.hb.r_flag"], heartbeat["mip6.rc"]) == (["1"], ["17"])
    assert (revoked["mip6.mhtype"], revoked["mip6.bri_br.type"]) == (["16"], ["1"])
    assert revoked["mip6.bri_r.trigger"] == ["2"]
    assert revoked["mip6.mnid.identifier"] == [VM]
    assert confirmed["mip6.bri_br.type"] == ["2"]
    for message in told:
        assert "_ws.malformed" not in message


def test_scapy_reads_a_registration() -> None:
    data = encode(REGISTRATION.update(513), SOURCE, DESTINATION, KEY)
    packet = scapy.IPv6(_ipv6(data))
    update = packet[scapy.MIP6MH_BU]
    # The lifetime field is in seconds there; P, H and A.
    assert (update.seq, update.mhtime, update.len) == (513, 30, len(data) // 8 - 1)
    assert {"P", "H", "A"} == set(str(update.flags))
    by_kind = {option.otype: option for option in update.options}
    assert by_kind[8].id.decode() == VM
    assert by_kind[3].acoa == "2001:db8:b::d"
    assert by_kind[9].mspi == 256
    assert len(by_kind[9].authdata) == 12
    # scapy computes the checksum by itself and comes to the same.
    update.cksum = None
    assert bytes(packet)[40:46] == data[:6]


def test_scapy_reads_an_acknowledgement_and_the_authenticator_is_the_rfcs() -> None:
    answer = Acknowledgement(VM, headers.Status.ACCEPTED, 513, 120, REGISTRATION.ticks, HOMES, 3)
    care_of, home = SOURCE, HOMES[0].network_address
    data = encode(answer.message(), SOURCE, DESTINATION, KEY, care_of=care_of, home=home)
    packet = scapy.IPv6(_ipv6(data))
    told = packet[scapy.MIP6MH_BA]
    assert (told.status, told.seq, told.mhtime) == (0, 513, 30)
    authdata = told.options[-1].authdata
    # RFC 4285 section 5.1, computed from scapy's own octets with the checksum field zero.
    covered = bytearray(bytes(told)[: -len(authdata)])
    covered[4:6] = b"\0\0"
    expected = hmac.new(KEY.secret, care_of.packed + home.packed + bytes(covered), hashlib.sha1).digest()[:12]
    assert authdata == expected


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 0xFFFF), st.integers(0, 0xFFFE), st.integers(0, 2**128 - 1), st.text("abc@.-", min_size=1)
)
def test_what_scapy_writes_we_read(sequence: int, units: int, care_of: int, identifier: str) -> None:
    tunnel_end = IPv6Address(care_of)
    written = scapy.IPv6(src=str(SOURCE), dst=str(DESTINATION)) / scapy.MIP6MH_BU(
        seq=sequence,
        flags="PHA",
        mhtime=units,
        options=[scapy.MIP6OptMNID(id=identifier.encode()), scapy.MIP6OptAltCoA(acoa=str(tunnel_end))],
    )
    message = decode(bytes(written)[40:], SOURCE, DESTINATION).message
    assert isinstance(message, headers.BindingUpdate)
    assert (message.sequence, message.lifetime_seconds, message.proxy) == (sequence, 4 * units, True)
    assert message.options == (options.NodeIdentifier(identifier), options.AlternateCareOf(tunnel_end))
