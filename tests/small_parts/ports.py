# SPDX-License-Identifier: GPL-3.0-or-later
"""Ports of loopback for tests that must know a port before anything listens on it."""

from __future__ import annotations

import itertools
import os
import socket

_FIRST, _PORTS_OF_A_WORKER = 20000, 1500
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
_START = os.getpid() % _PORTS_OF_A_WORKER
_steps = itertools.count()


def free_port() -> int:
    """A TCP port that nobody holds now and that this process tells only once.

    It lies below the range from which the kernel takes a port for an outgoing connection (32768 and
    up, /proc/sys/net/ipv4/ip_local_port_range): a port of that range, asked for and given back, may be
    the near end of somebody's connection by the time that it is listened on. Each worker of
    pytest-xdist has ports of its own.
    """
    for step in _steps:
        if step >= _PORTS_OF_A_WORKER:
            break
        port = _FIRST + _WORKER * _PORTS_OF_A_WORKER + (_START + step) % _PORTS_OF_A_WORKER
        try:
            # As a server does it: the near end of a connection that is over does not count.
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
    raise RuntimeError(f"no port is left of the {_PORTS_OF_A_WORKER} of this worker")
