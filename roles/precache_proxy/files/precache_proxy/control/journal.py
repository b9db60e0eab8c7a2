# SPDX-License-Identifier: GPL-3.0-or-later
"""Log lines to the systemd journal, with VM, generation and job as fields that can be searched.

``journalctl -u precache-proxy LIFEBOAT_VM=<uuid>`` is one VM's story. Code logs with the standard library:
``logger.info("sealed", extra={"vm": uuid, "generation": 7})``.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

# Attribute of the log record -> field of the journal.
FIELDS = {
    "vm": "LIFEBOAT_VM",
    "generation": "LIFEBOAT_GENERATION",
    "job": "LIFEBOAT_JOB",
    "peer": "LIFEBOAT_PEER",
}
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))


def priority(level: int) -> int:
    """The syslog priority of a log level."""
    return next(number for lowest, number in _PRIORITIES if level >= lowest)


def fields(record: logging.LogRecord) -> dict[str, str]:
    """The journal fields that a record carries; its own spelling (LIFEBOAT_VM) is taken as well."""
    told: dict[str, str] = {}
    for attribute, name in FIELDS.items():
        value = getattr(record, attribute, None)
        if value is None:
            value = getattr(record, name, None)
        if value is not None:
            told[name] = str(value)
    return told


class JournalHandler(logging.Handler):
    """Sends records to journald through python3-systemd."""

    def __init__(self, send: Any) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record; a journal that does not take it must not end the proxy."""
        try:
            self._send(
                self.format(record),
                PRIORITY=priority(record.levelno),
                SYSLOG_IDENTIFIER="precache-proxy",
                LOGGER=record.name,
                CODE_FILE=record.pathname,
                CODE_LINE=record.lineno,
                **fields(record),
            )
        except Exception:  # noqa: BLE001 logging must never raise
            self.handleError(record)


class StreamFormatter(logging.Formatter):
    """For standard error: systemd's ``<N>`` prefix under a service manager, a clock on a terminal."""

    def __init__(self, *, prefix: bool) -> None:
        super().__init__("%(message)s" if prefix else "%(asctime)s %(levelname)-7s %(message)s")
        self._prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        """One record with its fields at the end."""
        told = " ".join(f"{name}={value}" for name, value in fields(record).items())
        line = super().format(record) + (f" [{told}]" if told else "")
        return f"<{priority(record.levelno)}>{line}" if self._prefix else line


def set_up(level: str = "info") -> None:
    """Log to the journal where we run under systemd and python3-systemd is there, else to stderr."""
    under_systemd = "JOURNAL_STREAM" in os.environ
    handler: logging.Handler | None = None
    if under_systemd:
        try:
            from systemd import journal  # noqa: PLC0415 only there with python3-systemd
        except ImportError:
            pass
        else:
            handler = JournalHandler(journal.send)
    if handler is None:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(StreamFormatter(prefix=under_systemd))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # One line for each request of a status page every few seconds helps nobody.
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
