# SPDX-License-Identifier: GPL-3.0-or-later
"""When a certificate ends, read from its DER (RFC 5280, 4.1): one date needs no cryptography library."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path

from precache_proxy.errors import ConfigurationError

_SEQUENCE, _VERSION, _UTC_TIME, _GENERALIZED_TIME = 0x30, 0xA0, 0x17, 0x18


def expires_at(path: Path) -> float:
    """Seconds since 1970 at which the first certificate in ``path`` ends.

    Raises ConfigurationError for a file that cannot be read or is no certificate.
    """
    way_out = "run the role lifeboat.evacuation.pki again"
    try:
        text = path.read_text(encoding="ascii")
        begin = text.index("-----BEGIN CERTIFICATE-----")
        end = text.index("-----END CERTIFICATE-----", begin) + len("-----END CERTIFICATE-----")
        return _not_after(ssl.PEM_cert_to_DER_cert(text[begin:end]))
    except OSError as error:
        raise ConfigurationError(
            f"certificate {path}: cannot be read ({error.strerror}); {way_out}"
        ) from error
    except (ValueError, IndexError) as error:
        raise ConfigurationError(f"certificate {path}: not a PEM certificate; {way_out}") from error


def _element(data: bytes, offset: int) -> tuple[int, int, int]:
    """Tag, start and end of the content of the element at ``offset``."""
    tag, length, start = data[offset], data[offset + 1], offset + 2
    if length & 0x80:
        size = length & 0x7F
        length = int.from_bytes(data[start : start + size], "big")
        start += size
    if start + length > len(data):
        raise ValueError("element longer than its file")
    return tag, start, start + length


def _not_after(der: bytes) -> float:
    certificate = _element(der, 0)[1]
    position = _element(der, certificate)[1]
    # version [0] (optional), serialNumber, signature, issuer come before validity.
    if der[position] == _VERSION:
        position = _element(der, position)[2]
    for _unused in range(3):
        position = _element(der, position)[2]
    tag, start, _end = _element(der, position)
    if tag != _SEQUENCE:
        raise ValueError("no validity where it should be")
    after = _element(der, start)[2]
    tag, start, end = _element(der, after)
    text = der[start:end].decode("ascii")
    if tag == _UTC_TIME:
        # Two digits of the year: 50 and above belong to the last century (RFC 5280, 4.1.2.5.1).
        text = ("19" if int(text[:2]) >= 50 else "20") + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError("no time where it should be")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()
