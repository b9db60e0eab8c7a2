# SPDX-License-Identifier: GPL-3.0-or-later
"""sudo before the bridge: the password goes to whoever asks for it, and never to the proxy."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils import _bridge
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._bridge import Bridge, Unreachable
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._reach import Reach

from small_parts.parts import serving, small_parts
from unit.plugins.coordination.conftest import ROOT

PASSWORD = "correct horse"
# As sudo takes its options: -n, or -S -p PROMPT; a lecture first, three tries, a line of its input for each.
_SUDO = """#!/bin/bash
while [ "$1" != "--" ]; do
  case "$1" in -n) quiet=1;; -p) shift; prompt=$1;; esac
  shift
done
shift
if [ "{asks}" = yes ]; then
  [ -n "$quiet" ] && {{ echo "sudo: a password is required" >&2; exit 1; }}
  echo "We trust you have received the usual lecture." >&2
  for try in 1 2 3; do
    printf '%s' "$prompt" >&2
    IFS= read -r given || exit 1
    echo "$given" >>{log}
    [ "$given" = "{password}" ] && break
    [ $try = 3 ] && {{ echo "sudo: 3 incorrect password attempts" >&2; exit 1; }}
    echo "Sorry, try again." >&2
  done
fi
echo "message of the day"
exec "$@"
"""


class _Channel:
    """An SSH channel whose other end is this machine."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._ours, self._theirs = socket.socketpair()
        self._errors, self._their_errors = socket.socketpair()

    def exec_command(self, command: str) -> None:
        self.process = subprocess.Popen(
            shlex.split(command), stdin=self._theirs, stdout=self._theirs, stderr=self._their_errors
        )
        self._theirs.close()
        self._their_errors.close()

    def settimeout(self, seconds: float) -> None:
        self._ours.settimeout(seconds)

    def recv(self, count: int) -> bytes:
        return self._ours.recv(count)

    def recv_stderr_ready(self) -> bool:
        self._errors.setblocking(False)
        try:
            return bool(self._errors.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return False

    def recv_stderr(self, count: int) -> bytes:
        return self._errors.recv(count) if self.recv_stderr_ready() else b""

    def sendall(self, data: bytes) -> None:
        self._ours.sendall(data)

    def close(self) -> None:
        self._ours.close()
        self._errors.close()
        if self.process is not None:
            self.process.wait(5)


@pytest.fixture
def serves(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "proxy").mkdir()
    with serving(small_parts(tmp_path / "proxy")) as path:
        yield path


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Not root, the commands first in the path, and what sudo was told for a password."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    command = binaries / "precache-proxy"
    package = ROOT / "roles" / "precache_proxy" / "files"
    command.write_text(
        f'#!/bin/sh\nPYTHONPATH="{package}" exec "{ROOT}/.venv/bin/python" -m precache_proxy "$@"\n'
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    return tmp_path / "told"


def sudo(log: Path, *, asks: bool) -> None:
    path = log.parent / "bin" / "sudo"
    path.write_text(_SUDO.format(asks="yes" if asks else "no", log=log, password=PASSWORD))
    path.chmod(0o755)


def bridge(socket_path: Path, where: str, monkeypatch: pytest.MonkeyPatch, **how: Any) -> Bridge:
    if where == "remote":
        transport = SimpleNamespace(open_session=lambda timeout: _Channel())
        client = SimpleNamespace(get_transport=lambda: transport, close=lambda: None)
        monkeypatch.setattr(Bridge, "_client", lambda _self: client)
    reach = Reach("home1", local=where == "local", host="home1", user="ops", become=True, **how)
    return Bridge(reach, str(socket_path))


@pytest.mark.parametrize("where", ["local", "remote"])
@pytest.mark.parametrize("asks", [True, False], ids=["asks", "nopasswd"])
def test_the_password_goes_to_sudo_if_it_asks_and_to_nobody_else(
    serves: Path, log: Path, asks: bool, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sudo(log, asks=asks)
    made = bridge(serves, where, monkeypatch, become_password=PASSWORD)
    try:
        assert made.get("/v1/status")["name"] == "home1"
        assert [vm["name"] for vm in made.get("/v1/status")["vms"]] == [], "the same bridge goes on"
    finally:
        made.close()
    assert (log.read_text() if log.exists() else "") == (f"{PASSWORD}\n" if asks else "")


@pytest.mark.parametrize("where", ["local", "remote"])
def test_a_wrong_password_is_said_once_and_tried_once(
    serves: Path, log: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sudo(log, asks=True)
    made = bridge(serves, where, monkeypatch, become_password="wrong")
    try:
        with pytest.raises(Unreachable, match="sudo does not take the become password; see ansible_become"):
            made.get("/v1/status")
    finally:
        made.close()
    assert log.read_text() == "wrong\n", "no account is locked for it"


@pytest.mark.parametrize("where", ["local", "remote"])
def test_a_sudo_that_refuses_is_quoted(
    serves: Path, log: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = log.parent / "bin" / "sudo"
    path.write_text("#!/bin/sh\necho 'ops is not in the sudoers file' >&2\nexit 1\n")
    path.chmod(0o755)
    made = bridge(serves, where, monkeypatch, become_password=PASSWORD)
    try:
        with pytest.raises(Unreachable, match="did not run the bridge \\(ops is not in the sudoers file\\)"):
            made.get("/v1/status")
    finally:
        made.close()


def test_one_that_neither_asks_nor_runs_is_given_up(
    serves: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_bridge, "REQUEST_TIMEOUT_SECONDS", 0.5)
    path = log.parent / "bin" / "sudo"
    path.write_text("#!/bin/sh\nexec sleep 5\n")
    path.chmod(0o755)
    made = bridge(serves, "local", monkeypatch, become_password=PASSWORD)
    try:
        with pytest.raises(Unreachable, match="neither asked for a password nor ran the command"):
            made.get("/v1/status")
    finally:
        made.close()
