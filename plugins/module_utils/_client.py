# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The precache proxy's control API (HTTP and JSON on a UNIX socket), as modules use it on a host."""

from __future__ import annotations

import http.client
import json
import socket
import typing as t
from urllib.parse import quote, urlencode

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule

DEFAULT_SOCKET = "/run/lifeboat/control.sock"
# Requests that hold until something happened are held this much shorter than the socket's patience.
REQUEST_TIMEOUT_SECONDS = 120.0


class ProxyError(Exception):
    """What the proxy, or the way to it, refused: a cause word, a sentence, and every finding."""

    def __init__(self, cause: str, message: str, findings: t.Sequence[t.Mapping[str, str]] = ()) -> None:
        super().__init__(message)
        self.cause = cause
        self.message = message
        self.findings = [dict(finding) for finding in findings]


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_seconds: float) -> None:
        super().__init__("localhost", timeout=timeout_seconds)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class ProxyClient:
    """Requests to the proxy of the host that the module runs on."""

    def __init__(self, path: str = DEFAULT_SOCKET, timeout_seconds: float = REQUEST_TIMEOUT_SECONDS) -> None:
        self._path = path
        self._timeout_seconds = timeout_seconds

    def get(self, path: str, **query: object) -> t.Any:
        """The answer to GET. Raises ProxyError."""
        return self.request("GET", path, query=query)

    def request(
        self,
        method: str,
        path: str,
        body: t.Mapping[str, object] | None = None,
        query: t.Mapping[str, object] | None = None,
    ) -> t.Any:
        """The JSON answer to one request; ``query`` values are written as in JSON. Raises ProxyError."""
        if query:
            words = {
                key: value if isinstance(value, str) else json.dumps(value) for key, value in query.items()
            }
            path = f"{path}?{urlencode(words)}"
        connection = _UnixConnection(self._path, self._timeout_seconds)
        try:
            payload = None if body is None else json.dumps(body).encode()
            connection.request(method, path, payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
        except PermissionError as error:
            raise ProxyError(
                "proxy-down",
                f"control socket {self._path}: not for this user; use become or the group lifeboat",
            ) from error
        except (OSError, http.client.HTTPException, UnicodeDecodeError) as error:
            raise ProxyError(
                "proxy-down",
                f"control socket {self._path}: the precache proxy does not answer "
                f"({getattr(error, 'strerror', None) or error}); see systemctl status precache-proxy "
                "on this host, or set it up with lifeboat.evacuation.site_setup",
            ) from error
        finally:
            connection.close()
        return read_answer(f"control socket {self._path}:", response.status, text)


def read_answer(subject: str, status: int, text: str) -> t.Any:
    """The JSON in a response of the control API. Raises ProxyError: what the proxy refused, or in the name
    of ``subject`` that it spoke no JSON."""
    try:
        answer = json.loads(text)
    except ValueError as error:
        raise ProxyError("protocol", f"{subject} answered with something that is no JSON") from error
    if status >= 400:
        raise ProxyError(
            str(answer.get("cause", "error")),
            str(answer.get("message", "the proxy gave no reason")),
            answer.get("findings", ()),
        )
    return answer


def in_words(findings: t.Iterable[t.Mapping[str, t.Any]]) -> str:
    """Findings as a proxy tells them, one after the other; '' where there is none."""
    return "; ".join("{subject}: {fact}; {way_out}".format(**finding) for finding in findings)


def vm_path(vm: str) -> str:
    """The path of a VM by name or UUID; a name may hold spaces and letters beyond ASCII."""
    return "/v1/vms/{}".format(quote(vm, safe=""))


def fail_over_path(vm: str) -> str:
    """Where a VM is run from its replica, or is told what that would run."""
    return "/v1/replicas/{}/fail-over".format(quote(vm, safe=""))


def job_path(job: str, action: str = "") -> str:
    """The path of an evacuation job, or of one of its actions."""
    path = "/v1/evacuations/{}".format(quote(job, safe=""))
    return f"{path}/{action}" if action else path


def proxy_arguments() -> dict[str, t.Any]:
    """Argument specification shared by all modules of the action group."""
    return {"socket": {"type": "path", "default": DEFAULT_SOCKET}}


def wait_arguments(timeout_seconds: int) -> dict[str, t.Any]:
    """Argument specification of modules that can wait."""
    return {
        "wait": {"type": "bool", "default": False},
        "wait_timeout": {"type": "int", "default": timeout_seconds},
        "wait_sleep": {"type": "float", "default": 2.0},
    }


def fail(module: AnsibleModule, error: ProxyError) -> t.NoReturn:
    """End the module with the proxy's sentence, its cause word and all findings."""
    module.fail_json(msg=error.message, cause=error.cause, findings=error.findings)
    raise AssertionError("fail_json returned")
