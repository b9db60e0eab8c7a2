# SPDX-License-Identifier: GPL-3.0-or-later
"""HTTP over the control socket, for the command line; standard library only, for hosts where little works."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any
from urllib.parse import quote

from precache_proxy.errors import LifeboatError, ProtocolError, from_dict


class ProxyDown(LifeboatError):
    """Nobody answers on the control socket."""

    cause = "proxy-down"
    exit_code = 14
    http_status = 503


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_seconds: float | None) -> None:
        super().__init__("localhost", timeout=timeout_seconds)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Client:
    """Requests to the proxy of this host, one at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        timeout_seconds: float | None = 30,
    ) -> Any:
        """The JSON answer to one request.

        Raises ProxyDown, ProtocolError, or the error that the proxy answered with.
        """
        connection = _UnixConnection(self._path, timeout_seconds)
        try:
            payload = None if body is None else json.dumps(body).encode()
            connection.request(method, path, payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
        except PermissionError as error:
            raise ProxyDown(
                f"control socket {self._path}: not for you; run as root or as a member of the group lifeboat"
            ) from error
        except TimeoutError as error:
            raise ProxyDown(
                f"control socket {self._path}: no answer within {timeout_seconds:g} s; "
                "see journalctl -u precache-proxy"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise ProxyDown(
                f"control socket {self._path}: the precache proxy does not answer "
                f"({getattr(error, 'strerror', None) or error}); see systemctl status precache-proxy"
            ) from error
        finally:
            connection.close()
        try:
            answer = json.loads(text)
        except ValueError as error:
            raise ProtocolError(
                f"control socket {self._path}: answered with something that is no JSON"
            ) from error
        if response.status >= 400:
            raise from_dict(answer)
        return answer


def segment(text: str) -> str:
    """A name as one segment of a path: VMs may be called anything."""
    return quote(text, safe="")
