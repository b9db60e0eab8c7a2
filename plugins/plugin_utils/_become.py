# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""sudo before a command whose streams are somebody else's: when it asks, and when the command runs."""

from __future__ import annotations

import secrets
import shlex
import socket
import time
import typing as t

if t.TYPE_CHECKING:
    import paramiko

# What sudo, or the shell that it runs, may say before the bridge begins: a lecture, a message of the day.
_MOST_SAID_BYTES = 65536


class SudoError(Exception):
    """sudo did not run the command; the text is the fact and the way out."""


class Streams(t.Protocol):
    """A command that was begun: what it says on both streams, and what it is told."""

    def output(self, seconds: float) -> bytes | None:
        """What it wrote within so long, b"" for nothing, None where it ended."""

    def complaints(self) -> bytes:
        """What it wrote to its error stream and nobody read yet; does not wait."""

    def tell(self, data: bytes) -> None:
        """Write to its input."""


class Become:
    """How sudo is asked for its password, and how it is known that it let the command run.

    sudo asks by a prompt that nothing else says, and only where its policy wants a password; the command is
    preceded by a word of its own. So the password goes to whoever asked for it, and never to the proxy.
    """

    def __init__(self, command: t.Sequence[str], password: str) -> None:
        word = secrets.token_hex(8)
        self._prompt = f"[lifeboat sudo {word}]"
        self._begins = f"LIFEBOAT-BEGINS-{word}"
        self._password = password
        run = f"echo {self._begins}; exec {shlex.join(command)}"
        self.command = ["sudo", "-S", "-p", self._prompt, "--", "/bin/sh", "-c", run]

    def wait(self, streams: Streams, name: str, timeout_seconds: float) -> None:
        """Answer the prompt if there is one. Returns when the command runs. Raises SudoError."""
        until = time.monotonic() + timeout_seconds
        said, complained, told = b"", b"", False
        while len(said) < _MOST_SAID_BYTES and time.monotonic() < until:
            got = streams.output(0.05)
            complained += streams.complaints()
            if got:
                said += got
                if f"{self._begins}\n".encode() in said:
                    return
            if complained.count(self._prompt.encode()) > told:
                if told:
                    way_out = "see ansible_become_password (--ask-become-pass, AWX credential)"
                    raise SudoError(f"{name}: sudo does not take the become password; {way_out}")
                streams.tell(f"{self._password}\n".encode())
                told = True
            if got is None:
                break
        complained += streams.complaints()
        text = complained.decode(errors="replace").replace(self._prompt, "").strip()
        fact = text.splitlines()[-1] if text else "it neither asked for a password nor ran the command"
        raise SudoError(f"{name}: sudo did not run the bridge ({fact}); see `sudo -l` of its user there")


class ChannelStreams:
    """Of an SSH channel."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel

    def output(self, seconds: float) -> bytes | None:
        self._channel.settimeout(seconds)
        try:
            return self._channel.recv(4096) or None
        except TimeoutError:
            return b""

    def complaints(self) -> bytes:
        return self._channel.recv_stderr(4096) if self._channel.recv_stderr_ready() else b""

    def tell(self, data: bytes) -> None:
        self._channel.sendall(data)


class LocalStreams:
    """Of a process here; its error stream is a socket, too."""

    def __init__(self, ours: socket.socket, errors: socket.socket) -> None:
        self._ours = ours
        self._errors = errors

    def output(self, seconds: float) -> bytes | None:
        self._ours.settimeout(seconds)
        try:
            return self._ours.recv(4096) or None
        except TimeoutError:
            return b""

    def complaints(self) -> bytes:
        self._errors.setblocking(False)
        try:
            return self._errors.recv(4096)
        except BlockingIOError:
            return b""

    def tell(self, data: bytes) -> None:
        self._ours.sendall(data)
