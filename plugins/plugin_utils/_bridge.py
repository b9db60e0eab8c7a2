# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Requests to a host's proxy through SSH: HTTP over the standard streams of ``precache-proxy connect``."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import shlex
import socket
import subprocess
import threading
import typing as t

from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import (
    DEFAULT_SOCKET,
    ProxyError,
    read_answer,
)
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._become import (
    Become,
    ChannelStreams,
    LocalStreams,
    SudoError,
)
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._reach import Reach

try:
    import paramiko
except ImportError:
    # The action plugin says so before anything here is used.
    paramiko = None  # type: ignore[assignment]

KEEP_ALIVE_SECONDS = 5
REQUEST_TIMEOUT_SECONDS = 30.0


class Unreachable(ProxyError):
    """No way to the host, or to its proxy: whatever runs there goes on without us."""

    def __init__(self, message: str) -> None:
        super().__init__("unreachable", message)


class _ChannelReader(io.RawIOBase):
    """An SSH channel as http.client wants to read it."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: t.Any) -> int:
        data = self._channel.recv(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _ChannelSocket:
    """The part of a socket that http.client uses, over an SSH channel."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel

    def makefile(self, _mode: str = "rb", _bufsize: int = -1) -> t.Any:
        return io.BufferedReader(_ChannelReader(self._channel))

    def sendall(self, data: bytes) -> None:
        self._channel.sendall(data)

    def close(self) -> None:
        self._channel.close()


class _Connection(http.client.HTTPConnection):
    """Speaks over a socket that is there already."""

    def __init__(self, made: t.Any) -> None:
        super().__init__("localhost")
        self.sock = made
        self.auto_open = 0


class Bridge:
    """One host's proxy. Safe to use from several threads, one request at a time."""

    def __init__(
        self, reach: Reach, control_socket: str = DEFAULT_SOCKET, command: str = "precache-proxy"
    ) -> None:
        self.name = reach.name
        self._reach = reach
        self._command = [command, "connect"]
        if control_socket != DEFAULT_SOCKET:
            self._command += ["--socket", control_socket]
        self._lock = threading.Lock()
        self._closed = False
        self._clients: list[paramiko.SSHClient] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: _Connection | None = None
        self._channel: paramiko.Channel | None = None
        self._errors: socket.socket | None = None

    def request(
        self,
        method: str,
        path: str,
        body: t.Mapping[str, object] | None = None,
        timeout_seconds: float = REQUEST_TIMEOUT_SECONDS,
    ) -> t.Any:
        """The JSON answer. Raises ProxyError as the proxy says it, Unreachable when it cannot be asked."""
        with self._lock:
            fresh = self._connection is None
            try:
                return self._ask(method, path, body, timeout_seconds)
            except Unreachable:
                self._drop_bridge()
                # A connection that idled away is no news; one that was just made is. What is asked for twice
                # does no harm: a job begun twice is the same job.
                if fresh:
                    raise
            try:
                return self._ask(method, path, body, timeout_seconds)
            except Unreachable:
                self._drop_bridge()
                raise

    def get(self, path: str) -> t.Any:
        """The JSON answer to GET."""
        return self.request("GET", path)

    def close(self) -> None:
        """Hang up. Jobs at the host go on. A request that still waits for an answer is not waited for."""
        self._closed = True
        waited = self._lock.acquire(timeout=1.0)
        try:
            self._drop_bridge()
            self._hang_up()
        finally:
            if waited:
                self._lock.release()

    def _ask(
        self, method: str, path: str, body: t.Mapping[str, object] | None, timeout_seconds: float
    ) -> t.Any:
        if self._closed:
            raise Unreachable(f"{self.name}: was hung up on; what runs there goes on")
        connection = self._connection or self._open()
        if self._channel is not None:
            self._channel.settimeout(timeout_seconds)
        payload = None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
        except (
            OSError,
            EOFError,
            http.client.HTTPException,
            paramiko.SSHException,
            UnicodeDecodeError,
        ) as error:
            said = self._said() or getattr(error, "strerror", None) or repr(error)
            raise Unreachable(
                f"{self.name}: its proxy does not answer ({said}); "
                "see `systemctl status precache-proxy` there; what runs there goes on"
            ) from error
        if response.will_close:
            self._drop_bridge()
        return read_answer(f"{self.name}: its proxy", response.status, text)

    def _said(self) -> str:
        """What the bridge command complained of, if it did."""
        if self._errors is not None:
            with contextlib.suppress(OSError):
                self._errors.settimeout(1.0)
                return (
                    self._errors.recv(2000).decode(errors="replace").strip().removeprefix("precache-proxy: ")
                )
        if self._channel is None:
            return ""
        with contextlib.suppress(Exception):
            self._channel.settimeout(1.0)
            return (
                self._channel.recv_stderr(2000)
                .decode(errors="replace")
                .strip()
                .removeprefix("precache-proxy: ")
            )
        return ""

    # -- the way there

    def _open(self) -> _Connection:
        made = self._open_locally() if self._reach.local else self._open_remotely()
        self._connection = _Connection(made)
        return self._connection

    def _as_root(self, *, is_root: bool) -> tuple[list[str], Become | None]:
        """The command, and how sudo is answered where it may ask."""
        if not self._reach.become or is_root:
            return self._command, None
        if not self._reach.become_password:
            return ["sudo", "-n", "--", *self._command], None
        become = Become(self._command, self._reach.become_password)
        return become.command, become

    def _open_locally(self) -> socket.socket:
        command, become = self._as_root(is_root=os.geteuid() == 0)
        ours, theirs = socket.socketpair()
        # What sudo asks is read until the bridge runs; what is said later stays in the socket's buffer.
        errors, their_errors = socket.socketpair() if become is not None else (None, None)
        try:
            self._process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=theirs.fileno(),
                stderr=None if their_errors is None else their_errors.fileno(),
            )  # fmt: skip
        except OSError as error:
            ours.close()
            raise Unreachable(f"{self.name}: {command[0]} cannot be run here ({error.strerror})") from error
        finally:
            theirs.close()
            if their_errors is not None:
                their_errors.close()
        if become is not None and errors is not None:
            self._errors = errors
            try:
                become.wait(LocalStreams(ours, errors), self.name, REQUEST_TIMEOUT_SECONDS)
            except (OSError, SudoError) as error:
                ours.close()
                self._drop_bridge()
                raise Unreachable(str(error)) from error
        ours.settimeout(REQUEST_TIMEOUT_SECONDS)
        return ours

    def _open_remotely(self) -> _ChannelSocket:
        for attempt in (0, 1):
            client = self._client()
            transport = client.get_transport()
            command, become = self._as_root(is_root=self._reach.user == "root")
            try:
                if transport is None:
                    raise paramiko.SSHException("not connected")
                channel = transport.open_session(timeout=self._reach.timeout_seconds)
                channel.settimeout(REQUEST_TIMEOUT_SECONDS)
                channel.exec_command(shlex.join(command))
                if become is not None:
                    become.wait(ChannelStreams(channel), self.name, REQUEST_TIMEOUT_SECONDS)
                    channel.settimeout(REQUEST_TIMEOUT_SECONDS)
            except SudoError as error:
                channel.close()
                raise Unreachable(str(error)) from error
            except (OSError, EOFError, paramiko.SSHException) as error:
                self._hang_up()
                if attempt:
                    raise Unreachable(f"{self.name}: SSH lost ({error}); what runs there goes on") from error
                continue
            self._channel = channel
            return _ChannelSocket(channel)
        raise AssertionError("two attempts were made")

    def _client(self) -> paramiko.SSHClient:
        if self._clients:
            transport = self._clients[-1].get_transport()
            if transport is not None and transport.is_active():
                return self._clients[-1]
            self._hang_up()
        reach, way = self._reach, None
        for hop in reach.hops:
            way = self._connect(hop, way)
        return self._connect(reach, way).client

    def _connect(self, reach: Reach, through: _Hop | None) -> _Hop:
        client = paramiko.SSHClient()
        _know_hosts(client, reach)
        try:
            sock = None if through is None else through.channel_to(reach)
            client.connect(
                reach.host,
                port=reach.port,
                username=reach.user or None,
                password=reach.password,
                key_filename=t.cast(t.Any, list(reach.keys) or None),
                allow_agent=not reach.only_keys,
                look_for_keys=not reach.only_keys and not reach.keys,
                timeout=reach.timeout_seconds,
                banner_timeout=reach.timeout_seconds * 2,
                auth_timeout=reach.timeout_seconds * 2,
                sock=sock,
            )
        except (OSError, EOFError, paramiko.SSHException) as error:
            client.close()
            self._hang_up()
            raise Unreachable(_why_not(reach, error)) from error
        self._clients.append(client)
        transport = client.get_transport()
        if transport is not None:
            transport.set_keepalive(KEEP_ALIVE_SECONDS)
        return _Hop(client)

    def _drop_bridge(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(Exception):
                self._connection.close()
        self._connection = None
        self._channel = None
        if self._errors is not None:
            self._errors.close()
            self._errors = None
        if self._process is not None:
            # What runs by sudo is not ours to end; it ends by itself, for we hung up on it.
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self._process.terminate()
                self._process.wait(5)
            self._process = None

    def _hang_up(self) -> None:
        for client in reversed(self._clients):
            with contextlib.suppress(Exception):
                client.close()
        self._clients.clear()


class _Hop:
    def __init__(self, client: paramiko.SSHClient) -> None:
        self.client = client

    def channel_to(self, reach: Reach) -> paramiko.Channel:
        transport = self.client.get_transport()
        if transport is None:
            raise paramiko.SSHException("the jump host hung up")
        return transport.open_channel(
            "direct-tcpip", (reach.host, reach.port), ("localhost", 0), timeout=reach.timeout_seconds
        )


def _know_hosts(client: paramiko.SSHClient, reach: Reach) -> None:
    for path in (
        *(reach.known_hosts or (os.path.expanduser("~/.ssh/known_hosts"),)),
        *(reach.global_known_hosts or ("/etc/ssh/ssh_known_hosts",)),
    ):
        if os.path.isfile(path):
            client.load_system_host_keys(path)
    policy: paramiko.MissingHostKeyPolicy = paramiko.RejectPolicy()
    if not reach.check_host_key or reach.accept_new_host_key:
        policy = paramiko.AutoAddPolicy()
    client.set_missing_host_key_policy(policy)


def _why_not(reach: Reach, error: Exception) -> str:
    if isinstance(error, paramiko.BadHostKeyException):
        fact = "its host key is another than the known one; if that is right, mend known_hosts"
    elif isinstance(error, paramiko.AuthenticationException):
        fact = f"user {reach.user} is not let in; see keys, agent and ansible_user"
    elif "not found in known_hosts" in str(error):
        fact = "its host key is not known; log in once, or set ansible_host_key_checking"
    else:
        fact = f"not reached at {reach.host} port {reach.port} ({error}); see that it is on and SSH runs"
    return f"{reach.name}: {fact}"
