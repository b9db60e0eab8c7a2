# SPDX-License-Identifier: GPL-3.0-or-later
"""Mobility headers: what is encoded comes back, and nothing else is ever believed."""

from __future__ import annotations

import contextlib
from ipaddress import IPv6Address, IPv6Network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobility_agent.errors import MalformedMessage, NotAuthentic
from mobility_agent.messages import headers, options
from mobility_agent.messages.codec import UNSPECIFIED, Key, checksum, decode, encode
from mobility_agent.messages.registration import (
    Acknowledgement,
    Incomplete,
    Loss,
    Registration,
    acknowledge_loss,
    read_acknowledgement,
    read_loss,
    read_registration,
    refusal,
)
from unit.mobility import strategies as some

SOURCE = IPv6Address("2001:db8:b::2")
DESTINATION = IPv6Address("2001:db8:a::2")
KEY = Key(256, b"a secret of the test")


@given(some.messages, some.addresses, some.addresses, st.none() | some.keys, some.addresses, some.addresses)
def test_what_is_encoded_comes_back(
    message: headers.Message,
    source: IPv6Address,
    destination: IPv6Address,
    key: Key | None,
    care_of: IPv6Address,
    home: IPv6Address,
) -> None:
    data = encode(message, source, destination, key, care_of=care_of, home=home)
    assert len(data) % 8 == 0
    packet = decode(data, source, destination)
    assert packet.message == message
    if key:
        packet.authenticate(key, care_of, home)
    else:
        assert packet.authentication is None


@given(some.messages, some.keys)
def test_every_option_stands_where_its_rfc_wants_it(message: headers.Message, key: Key) -> None:
    data = encode(message, SOURCE, DESTINATION, key)
    alignments = {o.kind: o.alignment for o in (*message.options, options.MessageAuthentication(0, b""))}
    at = 12
    while at < len(data):
        if data[at] == options.PAD1:
            at += 1
            continue
        if data[at] != options.PADN:
            multiple, offset = alignments[data[at]]
            assert (at - offset) % multiple == 0
        at += 2 + data[at + 1]
    assert at == len(data)


@given(some.messages, some.keys, st.data())
def test_one_changed_octet_is_noticed(message: headers.Message, key: Key, data: st.DataObject) -> None:
    encoded = bytearray(encode(message, SOURCE, DESTINATION, key))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(MalformedMessage):
        packet = decode(bytes(encoded), SOURCE, DESTINATION)
        with pytest.raises(NotAuthentic):
            packet.authenticate(key, UNSPECIFIED, UNSPECIFIED)


@settings(max_examples=300)
@given(st.binary(max_size=200), st.integers(0, 20), st.booleans())
def test_garbage_is_refused_and_raises_nothing_else(garbage: bytes, kind: int, repaired: bool) -> None:
    data = bytearray(garbage)
    if repaired and len(data) >= 16:
        # Past length and checksum, so that the options' parser gets its share.
        del data[len(data) // 8 * 8 :]
        data[0:4] = bytes([59, len(data) // 8 - 1, kind, 0])
        data[4:6] = b"\0\0"
        data[4:6] = checksum(SOURCE, DESTINATION, bytes(data)).to_bytes(2, "big")
    with contextlib.suppress(MalformedMessage):
        decode(bytes(data), SOURCE, DESTINATION)


@given(some.messages, some.keys, st.data())
def test_a_truncated_message_is_refused(message: headers.Message, key: Key, data: st.DataObject) -> None:
    encoded = encode(message, SOURCE, DESTINATION, key)
    cut = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(MalformedMessage):
        decode(encoded[:cut], SOURCE, DESTINATION)


def _update() -> headers.BindingUpdate:
    home = options.HomeNetworkPrefix(IPv6Network("2001:db8:100::5/128"))
    return headers.BindingUpdate(7, 120, (options.NodeIdentifier("x"), home))


def test_the_authenticator_covers_addresses_and_key() -> None:
    care_of, home = IPv6Address("2001:db8::1"), IPv6Address("2001:db8::2")
    packet = decode(
        encode(_update(), SOURCE, DESTINATION, KEY, care_of=care_of, home=home), SOURCE, DESTINATION
    )
    packet.authenticate(KEY, care_of, home)
    for key, wrong_care_of, wrong_home in (
        (KEY, home, home),
        (KEY, care_of, care_of),
        (Key(256, b"another"), care_of, home),
        (Key(257, KEY.secret), care_of, home),
        (Key(256, KEY.secret, "hmac-sha1-96"), care_of, home),
    ):
        with pytest.raises(NotAuthentic):
            packet.authenticate(key, wrong_care_of, wrong_home)


def test_a_message_without_authenticator_is_not_authentic() -> None:
    packet = decode(encode(_update(), SOURCE, DESTINATION), SOURCE, DESTINATION)
    with pytest.raises(NotAuthentic, match="no authenticator"):
        packet.authenticate(KEY, SOURCE, DESTINATION)


def test_nothing_may_stand_behind_the_authenticator() -> None:
    data = bytearray(encode(_update(), SOURCE, DESTINATION, KEY))
    data += bytes([options.PADN, 6]) + bytes(6)
    data[1] += 1
    data[4:6] = b"\0\0"
    data[4:6] = checksum(SOURCE, DESTINATION, bytes(data)).to_bytes(2, "big")
    with pytest.raises(MalformedMessage, match="behind the authenticator"):
        decode(bytes(data), SOURCE, DESTINATION)


def test_a_secret_is_not_shown() -> None:
    assert "secret" not in repr(KEY)


def test_more_addresses_than_fit_are_told_at_once() -> None:
    many = tuple(options.HomeNetworkPrefix(IPv6Network((i, 128))) for i in range(120))
    with pytest.raises(ValueError, match="register fewer addresses"):
        encode(headers.BindingUpdate(1, 4, many), SOURCE, DESTINATION, KEY)


@given(some.registrations, some.sequences)
def test_a_registration_comes_back(registration: Registration, sequence: int) -> None:
    update = registration.update(sequence)
    packet = decode(encode(update, SOURCE, DESTINATION, KEY), SOURCE, DESTINATION)
    assert isinstance(packet.message, headers.BindingUpdate)
    assert read_registration(packet.message, SOURCE) == registration


@given(some.registrations, some.octets, st.none() | some.addresses)
def test_acknowledgement_and_loss_come_back(
    registration: Registration, status: int, holder: IPv6Address | None
) -> None:
    answer = Acknowledgement(
        registration.vm, status, 9, 120, registration.ticks, registration.homes, registration.epoch, holder
    )
    packet = decode(encode(answer.message(), SOURCE, DESTINATION, KEY), SOURCE, DESTINATION)
    assert isinstance(packet.message, headers.BindingAcknowledgement)
    assert read_acknowledgement(packet.message) == answer
    loss = Loss(registration.vm, registration.homes, registration.epoch, registration.ticks, holder)
    packet = decode(encode(loss.message(3), SOURCE, DESTINATION, KEY), SOURCE, DESTINATION)
    assert isinstance(packet.message, headers.Revocation)
    assert read_loss(packet.message) == loss
    assert acknowledge_loss(packet.message).sequence == 3


@pytest.mark.parametrize(
    ("missing", "status"),
    [
        (options.NodeIdentifier, headers.Status.MISSING_NODE_IDENTIFIER),
        (options.HomeNetworkPrefix, headers.Status.MISSING_PREFIX),
        (options.Handoff, headers.Status.MISSING_HANDOFF_INDICATOR),
        (options.AccessTechnologyType, headers.Status.MISSING_ACCESS_TECHNOLOGY),
        (options.Timestamp, headers.Status.TIMESTAMP_MISMATCH),
    ],
)
def test_what_an_update_lacks_is_answered_by_the_rfcs_status(
    missing: type[options.Option], status: headers.Status
) -> None:
    registration = some_registration()
    update = registration.update(5)
    kept = tuple(option for option in update.options if not isinstance(option, missing))
    update = headers.BindingUpdate(5, 120, kept)
    with pytest.raises(Incomplete) as told:
        read_registration(update, SOURCE)
    assert told.value.status is status
    answer = refusal(update, status)
    assert (answer.status, answer.sequence, answer.lifetime_seconds) == (status, 5, 0)


def some_registration() -> Registration:
    return Registration(
        vm="11111111-2222-3333-4444-555555555555",
        homes=(IPv6Network("2001:db8:100::5/128"),),
        care_of=IPv6Address("2001:db8:b::d"),
        epoch=3,
        ticks=options.Timestamp.of_seconds(1_700_000_000).ticks,
        lifetime_seconds=120,
        handoff=options.HandoffIndicator.BETWEEN_GATEWAYS,
    )


def test_the_care_of_address_is_the_source_where_no_other_is_given() -> None:
    update = some_registration().update(1)
    kept = tuple(option for option in update.options if not isinstance(option, options.AlternateCareOf))
    assert read_registration(headers.BindingUpdate(1, 120, kept), SOURCE).care_of == SOURCE


def test_an_identifier_that_is_no_uuid_is_not_taken() -> None:
    update = headers.BindingUpdate(
        1, 120, (options.NodeIdentifier("../../etc"), *some_registration().update(1).options[1:])
    )
    with pytest.raises(Incomplete):
        read_registration(update, SOURCE)
