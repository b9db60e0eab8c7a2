# SPDX-License-Identifier: GPL-3.0-or-later
"""The keys of mobility_keys.toml, and which of them a configuration names for whom."""

from __future__ import annotations

from pathlib import Path

from mobility_agent.messages.codec import ALGORITHMS, Key
from mobility_agent.typed_reader import Reader

_SECRET_OCTETS = 16
# Below 256 the numbers of keys are reserved (RFC 4285 section 5.1).
_LOWEST_INDEX, _HIGHEST_INDEX = 256, 0xFFFFFFFF


class Ring:
    """The keys, found by the numbers that a configuration names. Faults are noted on the readers."""

    def __init__(self, reader: Reader, path: Path) -> None:
        self.keys = _keys(reader)
        self._path = path

    def _key(self, reader: Reader, name: str, index: int, *, needed: bool) -> Key:
        if needed and self.keys and index not in self.keys:
            way_out = "put that key there, or name one that is (mobility_keys, mobility_key)"
            reader.note(name, f"is {index}, which is not in {self._path}", way_out)
        return self.keys.get(index, Key(index, b""))

    def _accepted(self, reader: Reader, otherwise: tuple[Key, ...], *, needed: bool) -> tuple[Key, ...]:
        name = "accepted_keys"
        if not reader.has(name):
            return otherwise
        indexes = reader.wholes(name, _LOWEST_INDEX, _HIGHEST_INDEX)
        return tuple(self._key(reader, name, index, needed=needed) for index in indexes)

    def own(self, reader: Reader, *, needed: bool) -> tuple[Key, tuple[Key, ...]]:
        """The key of this host, and those by which it may be answered."""
        index = reader.whole("key", min(self.keys, default=_LOWEST_INDEX), _LOWEST_INDEX, _HIGHEST_INDEX)
        key = self._key(reader, "key", index, needed=needed)
        # Any of ours, so that keys can be changed without a moment of silence.
        return key, self._accepted(reader, tuple(self.keys.values()), needed=needed)

    def of_peer(self, reader: Reader, own: Key, *, needed: bool) -> tuple[Key, tuple[Key, ...]]:
        """The key of a peer, and those by which it may speak: where one is named it alone, so that no gateway
        can speak for another; else any of ours."""
        named = reader.has("key")
        index = reader.whole("key", own.security_parameter_index, _LOWEST_INDEX, _HIGHEST_INDEX)
        key = self._key(reader, "key", index, needed=needed)
        return key, self._accepted(reader, (key,) if named else tuple(self.keys.values()), needed=needed)


def _keys(reader: Reader) -> dict[int, Key]:
    keys: dict[int, Key] = {}
    for item in reader.tables("keys"):
        index = item.whole("index", None, _LOWEST_INDEX, _HIGHEST_INDEX)
        algorithm = item.choice("algorithm", "hmac-sha256-128", tuple(ALGORITHMS))
        try:
            secret = bytes.fromhex(item.text("secret"))
        except ValueError:
            secret = b""
        if len(secret) < _SECRET_OCTETS:
            # Never shown, not even when it is wrong.
            item.note(
                "secret", f"is shorter than {_SECRET_OCTETS} octets, or not hexadecimal", "make a new one"
            )
        if index in keys:
            item.note("index", f"{index} is there twice", "give each key a number of its own")
        keys[index] = Key(index, secret, algorithm)
    reader.finish()
    return keys
