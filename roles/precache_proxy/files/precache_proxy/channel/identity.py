# SPDX-License-Identifier: GPL-3.0-or-later
"""Who speaks: certificates, names, and sentences that say what is wrong with them."""

from __future__ import annotations

import os
import socket
import ssl
from typing import Any

from precache_proxy.channel.settings import ChannelConfig
from precache_proxy.errors import ConfigurationError, Finding, LifeboatError, PeerRefused, PeerUnreachable

# OpenSSL's X509_V_ERR_* (x509_vfy.h).
_VERIFY_WAY_OUT = {
    9: "is not valid yet; set the clocks, or renew it",
    10: "has expired; renew it (role pki) and reload the proxy there",
    18: "is signed by itself, not by our CA; give both hosts certificates of the same CA (role pki)",
    19: "comes from another CA; give both hosts certificates of the same CA (role pki)",
    20: "comes from another CA; give both hosts certificates of the same CA (role pki)",
    21: "comes from another CA; give both hosts certificates of the same CA (role pki)",
    7: "bears a signature that our CA did not make; give both hosts certificates of the same CA (role pki)",
}
# How OpenSSL names the alert by which the other side refuses ours.
_ALERTS = {
    "CERTIFICATE_EXPIRED": "has expired; renew it (role pki) and reload the proxy here",
    "UNKNOWN_CA": "comes from a CA that it does not know; give both hosts certificates of the "
    "same CA (role pki)",
    "BAD_CERTIFICATE": "is bad in its eyes; see its log, and renew ours (role pki)",
    "DECRYPT_ERROR": "bears a signature that it cannot verify; give both hosts certificates of "
    "the same CA (role pki)",
    "CERTIFICATE_REVOKED": "was revoked; renew it (role pki)",
    "CERTIFICATE_UNKNOWN": "is not acceptable to it; see its log",
    "CERTIFICATE_REQUIRED": "was not sent; see [tls] in our configuration",
}


def make_context(config: ChannelConfig, *, server: bool) -> ssl.SSLContext:
    """TLS 1.3, both sides with a certificate of our CA. Raises ConfigurationError with all findings."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Names are compared by peer_names(), to say which name was found.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    findings = []
    try:
        context.load_verify_locations(cafile=str(config.ca_path))
    except (OSError, ssl.SSLError) as error:
        findings.append(
            Finding(
                str(config.ca_path),
                f"cannot be used as CA ({_plain(error)})",
                "run the role pki",
                "configuration",
            )
        )
    unreadable = False
    for path in (config.certificate_path, config.key_path):
        try:
            path.read_bytes()
        except OSError as error:
            unreadable = True
            findings.append(
                Finding(str(path), f"cannot be read ({_plain(error)})", "run the role pki", "configuration")
            )
    if not unreadable:
        try:
            context.load_cert_chain(str(config.certificate_path), str(config.key_path))
        except (OSError, ssl.SSLError) as error:
            findings.append(
                Finding(
                    str(config.certificate_path),
                    f"and {config.key_path} cannot be used together ({_plain(error)})",
                    "run the role pki",
                    "configuration",
                )
            )
    if findings:
        raise ConfigurationError("; ".join(map(str, findings)), findings)
    if server:
        # A session ticket would let an expired certificate in again.
        context.num_tickets = 0
    return context


def _plain(error: OSError) -> str:
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return "connection closed"
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).replace("_", " ").lower()
    return os.strerror(error.errno) if error.errno else str(error)


def peer_names(certificate: dict[str, Any] | None) -> list[str]:
    """The DNS names in a certificate, lower case."""
    names = (certificate or {}).get("subjectAltName", ())
    return [str(value).lower() for kind, value in names if kind == "DNS"]


def refused(peer: str, where: str, certificate: dict[str, Any] | None) -> PeerRefused:
    """Another name than the peer's is in the certificate."""
    found = ", ".join(peer_names(certificate)) or "nobody"
    return PeerRefused(
        f"peer {peer} at {where}: its certificate is for {found}, not for {peer}; "
        "correct the peer's name or address, or its certificate (role pki)"
    )


def explain(peer: str, where: str, error: BaseException) -> LifeboatError:
    """What went wrong on the way to a peer: PeerRefused when it is about who speaks, else PeerUnreachable."""
    if isinstance(error, LifeboatError):
        return error
    if isinstance(error, ssl.SSLCertVerificationError):
        way_out = _VERIFY_WAY_OUT.get(
            error.verify_code, f"is refused ({error.verify_message}); renew it (role pki)"
        )
        return PeerRefused(f"peer {peer} at {where}: its certificate {way_out}")
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        reason = (error.reason or "").upper()
        for alert, way_out in _ALERTS.items():
            if "ALERT" in reason and reason.endswith(alert):
                return PeerRefused(f"peer {peer} at {where} refuses our certificate: it {way_out}")
        return PeerUnreachable(
            f"peer {peer} at {where}: no TLS 1.3 there ({_plain(error)}); is it a precache proxy "
            f"that listens?"
        )
    if isinstance(error, TimeoutError):
        return PeerUnreachable(
            f"peer {peer} at {where}: no answer in time; is the host up and the port open?"
        )
    if isinstance(error, socket.gaierror):
        return PeerUnreachable(
            f"peer {peer}: the address {where} does not resolve ({error.strerror}); correct it"
        )
    if isinstance(error, OSError):
        return PeerUnreachable(
            f"peer {peer} at {where}: {_plain(error).lower() or 'connection lost'}; is the proxy "
            f"there running and the port open?"
        )
    return PeerUnreachable(f"peer {peer} at {where}: {error}")


def describe_caller(error: BaseException) -> str:
    """One sentence about a caller that was turned away."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return "its certificate " + _VERIFY_WAY_OUT.get(
            error.verify_code, f"is refused ({error.verify_message})"
        )
    if isinstance(error, ssl.SSLError):
        return f"no TLS 1.3 with a certificate of our CA ({_plain(error)})"
    if isinstance(error, TimeoutError):
        return "it did not say who it is in time"
    return str(error) or type(error).__name__
