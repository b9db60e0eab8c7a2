# SPDX-License-Identifier: GPL-3.0-or-later
"""The mutual-TLS bundle of TCP connections between two proxies.

Use :class:`Channel`; ``channel.links[peer]`` opens streams and makes calls.
"""

from precache_proxy.channel.channel import Channel
from precache_proxy.channel.frames import MAX_MESSAGE_BYTES
from precache_proxy.channel.link import Link
from precache_proxy.channel.reset import LinkLost, StreamReset
from precache_proxy.channel.settings import ChannelConfig, PeerAddress, RateWindow, TrafficClass
from precache_proxy.channel.stream import Stream

__all__ = [
    "MAX_MESSAGE_BYTES",
    "Channel",
    "ChannelConfig",
    "Link",
    "LinkLost",
    "PeerAddress",
    "RateWindow",
    "Stream",
    "StreamReset",
    "TrafficClass",
]
