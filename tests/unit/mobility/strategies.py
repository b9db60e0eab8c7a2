# SPDX-License-Identifier: GPL-3.0-or-later
"""Random mobility messages for the property tests."""

from __future__ import annotations

from ipaddress import IPv6Address, IPv6Network

from hypothesis import strategies as st

from mobility_agent.messages import headers, options
from mobility_agent.messages.codec import Key
from mobility_agent.messages.options import HandoffIndicator
from mobility_agent.messages.registration import Registration

addresses = st.integers(0, 2**128 - 1).map(IPv6Address)
homes = st.builds(
    lambda address, length: IPv6Network((int(address), length), strict=False), addresses, st.integers(48, 128)
)
uuids = st.uuids().map(str)
ticks = st.integers(0, 2**64 - 1)
keys = st.builds(
    Key,
    st.integers(256, 2**32 - 1),
    st.binary(min_size=1, max_size=64),
    st.sampled_from(["hmac-sha1-96", "hmac-sha256-128"]),
)
_UNKNOWN_KINDS = [4, 5, 6, 7, 10, 11, 12, 25, 29, 77, 255]

single_options = st.one_of(
    st.builds(options.AlternateCareOf, addresses),
    st.builds(
        options.NodeIdentifier, st.one_of(uuids, st.text(min_size=1, max_size=60)), st.integers(0, 255)
    ),
    st.builds(options.VendorSpecific, st.integers(0, 255), st.binary(max_size=60), st.integers(0, 2**32 - 1)),
    st.builds(options.HomeNetworkPrefix, homes),
    st.builds(options.Handoff, st.integers(0, 255)),
    st.builds(options.AccessTechnologyType, st.integers(0, 255)),
    st.builds(options.LinkLocalAddress, addresses),
    st.builds(options.Timestamp, ticks),
    st.builds(options.RestartCounter, st.integers(0, 2**32 - 1)),
    st.builds(options.UnknownOption, st.sampled_from(_UNKNOWN_KINDS), st.binary(max_size=60)),
)
option_lists = st.lists(single_options, max_size=8).map(tuple)
sequences = st.integers(0, 0xFFFF)
lifetimes = st.integers(0, 0xFFFF).map(lambda units: 4 * units)
octets = st.integers(0, 255)

messages = st.one_of(
    st.builds(
        headers.BindingUpdate,
        sequences,
        lifetimes,
        option_lists,
        st.booleans(),
        st.booleans(),
        st.booleans(),
        st.sampled_from([0, 0x2000, 0x1C00, 0x0001]),
    ),
    st.builds(
        headers.BindingAcknowledgement,
        octets,
        sequences,
        lifetimes,
        option_lists,
        st.booleans(),
        st.sampled_from([0, 0x80, 0x5F]),
    ),
    st.builds(headers.Heartbeat, st.integers(0, 2**32 - 1), st.booleans(), option_lists, st.booleans()),
    st.builds(headers.Revocation, octets, sequences, option_lists, st.booleans()),
    st.builds(headers.RevocationAcknowledgement, octets, sequences, option_lists, st.booleans()),
)

registrations = st.builds(
    Registration,
    uuids,
    st.lists(homes, min_size=1, max_size=4).map(tuple),
    addresses,
    st.integers(0, 2**64 - 1),
    ticks,
    lifetimes,
    st.sampled_from([h for h in HandoffIndicator if h]),
    st.none() | addresses,
)
