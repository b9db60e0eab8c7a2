# SPDX-License-Identifier: GPL-3.0-or-later
"""What the opener of a stream says of it: the content of an OPEN frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from precache_proxy.channel.frames import MAX_JSON_BYTES, pack_json, unpack_json
from precache_proxy.errors import InvalidInput, ProtocolError


@dataclass(frozen=True, slots=True)
class Opening:
    """``kind`` chooses the peer's handler, ``label`` is what bytes are counted under, ``window_bytes`` bounds
    the window of both sides (None: the class's)."""

    kind: str
    header: dict[str, Any]
    label: str
    window_bytes: int | None

    def pack(self) -> bytes:
        """The frame's payload. Raises InvalidInput."""
        payload = pack_json({
            "kind": self.kind, "header": self.header, "label": self.label, "window_bytes": self.window_bytes,
        })  # fmt: skip
        if len(payload) > MAX_JSON_BYTES:
            raise InvalidInput(
                f"header of a stream {self.kind!r}: {len(payload)} bytes, at most {MAX_JSON_BYTES} are "
                "allowed; send what is long as a message"
            )
        return payload

    @classmethod
    def unpack(cls, payload: bytes | bytearray, peer: str) -> Opening:
        """From a peer's frame. Raises ProtocolError."""
        content = unpack_json(payload, "OPEN frame")
        kind, header, label = content.get("kind"), content.get("header"), content.get("label")
        window = content.get("window_bytes")
        if not isinstance(kind, str) or not isinstance(header, dict) or not isinstance(label, str):
            raise ProtocolError(f"OPEN frame of {peer} without kind, header or label")
        bounded = isinstance(window, int) and not isinstance(window, bool) and window > 0
        return cls(kind, header, label, window if bounded else None)
