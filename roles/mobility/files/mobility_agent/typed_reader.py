# SPDX-License-Identifier: GPL-3.0-or-later
"""Typed reading of one TOML table or JSON object: what is wrong becomes a finding, and reading goes on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from pathlib import Path
from typing import Any, TypeVar

from mobility_agent.errors import Finding, InvalidInput
from mobility_agent.homes import Home, is_single

T = TypeVar("T")
_MAC = re.compile(r"^[0-9a-f]{2}(:[0-9a-f]{2}){5}$")
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
_UUID = re.compile(r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")


def _is_whole(value: Any, low: int, high: int) -> bool:
    """A truth value is a whole number to Python, and to nobody who writes a configuration."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


class Reader:
    """One table. A key without default is required; a bad value is noted and the default stands in."""

    def __init__(
        self, values: Mapping[str, Any], where: str, findings: list[Finding], prefix: str = ""
    ) -> None:
        self._values = values
        self._where = where
        self._findings = findings
        self._prefix = prefix
        self._known: set[str] = set()
        self._children: list[Reader] = []

    def note(self, key: str, fact: str, way_out: str) -> None:
        """Say what is wrong with ``key``."""
        subject = f"{self._where}: {self._prefix}{key}"
        self._findings.append(Finding(subject, fact, way_out, "configuration"))

    def _take(self, key: str, default: T | None, fits: Callable[[Any], T | None], way_out: str) -> T | None:
        self._known.add(key)
        value = self._values.get(key)
        if value is None:
            if default is None:
                self.note(key, "is missing", way_out)
            return default
        result = fits(value)
        if result is None:
            self.note(key, f"is {value!r}", way_out)
            return default
        return result

    def has(self, key: str) -> bool:
        """Whether the key is there."""
        self._known.add(key)
        return self._values.get(key) is not None

    def text(self, key: str, default: str | None = None) -> str:
        """A text that is not empty."""
        taken = self._take(
            key, default, lambda v: v if isinstance(v, str) and v.strip() else None, "write a text in quotes"
        )
        return taken or ""

    def name(self, key: str) -> str:
        """A name of letters, digits and ``. - _``."""

        def fits(value: object) -> str | None:
            return value if isinstance(value, str) and _NAME.match(value) else None

        return self._take(key, None, fits, "write a name of letters, digits and . - _") or ""

    def names(self, key: str) -> frozenset[str]:
        """A required list of names, which may be empty."""

        def fits(value: Any) -> frozenset[str] | None:
            good = isinstance(value, list) and all(
                isinstance(item, str) and _NAME.match(item) for item in value
            )
            return frozenset(value) if good else None

        return self._take(key, None, fits, "write a list of names of agents; [] for none") or frozenset()

    def uuid(self, key: str) -> str:
        """A VM's UUID."""

        def fits(value: object) -> str | None:
            return value.lower() if isinstance(value, str) and _UUID.match(value.lower()) else None

        return self._take(key, None, fits, "write a UUID, as `virsh domuuid` shows it") or ""

    def choice(self, key: str, default: str, known: tuple[str, ...]) -> str:
        """One word out of ``known``."""
        way_out = f"write one of {', '.join(known)}"
        return self._take(key, default, lambda v: v if v in known else None, way_out) or default

    def boolean(self, key: str, *, default: bool) -> bool:
        """True or false."""
        taken = self._take(key, default, lambda v: v if isinstance(v, bool) else None, "write true or false")
        return default if taken is None else taken

    def whole(self, key: str, default: int | None, low: int, high: int) -> int:
        """A whole number in ``low..high``."""

        def fits(value: Any) -> int | None:
            return value if _is_whole(value, low, high) else None

        taken = self._take(key, default, fits, f"write a whole number from {low} to {high}")
        return low if taken is None else taken

    def wholes(self, key: str, low: int, high: int) -> tuple[int, ...]:
        """A required list of whole numbers in ``low..high``."""

        def fits(value: Any) -> tuple[int, ...] | None:
            good = isinstance(value, list) and all(_is_whole(item, low, high) for item in value)
            return tuple(value) if good else None

        return self._take(key, None, fits, f"write a list of whole numbers from {low} to {high}") or ()

    def seconds(self, key: str, default: float, low: float, high: float) -> float:
        """Seconds in ``low..high``."""

        def fits(value: Any) -> float | None:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            return float(value) if number and low <= value <= high else None

        taken = self._take(key, default, fits, f"write seconds, {low:g} to {high:g}")
        return default if taken is None else taken

    def path(self, key: str, default: Path) -> Path:
        """An absolute path."""

        def fits(value: object) -> Path | None:
            return Path(value) if isinstance(value, str) and value.startswith("/") else None

        return self._take(key, default, fits, f"write it in full, like {default}") or default

    def address(self, key: str) -> IPv6Address:
        """A required IPv6 address that may be another host's: no multicast, loopback, link-local."""

        def fits(value: Any) -> IPv6Address | None:
            try:
                address = IPv6Address(value)
            except ValueError:
                return None
            odd = address.is_multicast or address.is_loopback or address.is_unspecified
            return None if odd or address.is_link_local else address

        return self._take(key, None, fits, "write an IPv6 address like 2001:db8::1") or IPv6Address(0)

    def link_local(self, key: str, default: IPv6Address) -> IPv6Address:
        """A link-local address."""

        def fits(value: Any) -> IPv6Address | None:
            try:
                address = IPv6Address(value)
            except ValueError:
                return None
            return address if address.is_link_local else None

        return self._take(key, default, fits, f"write a link-local address like {default}") or default

    def mac(self, key: str, default: str | None = None) -> str:
        """A unicast MAC address, in lower case."""

        def fits(value: Any) -> str | None:
            lowered = value.lower() if isinstance(value, str) else ""
            return lowered if _MAC.match(lowered) and not int(lowered[1], 16) & 1 else None

        return self._take(key, default, fits, "write a MAC address like 52:54:00:12:34:56") or ""

    def network(self, key: str) -> IPv6Network:
        """A required IPv6 prefix."""

        def fits(value: Any) -> IPv6Network | None:
            network = parse_home(value)
            return network if isinstance(network, IPv6Network) else None

        taken = self._take(key, None, fits, "write a prefix like 2001:db8:100::/64, host bits zero")
        return taken or IPv6Network((0, 128))

    def ipv4_network(self, key: str) -> IPv4Network:
        """A required IPv4 prefix."""

        def fits(value: Any) -> IPv4Network | None:
            network = parse_home(value)
            return network if isinstance(network, IPv4Network) else None

        taken = self._take(key, None, fits, "write a prefix like 192.0.2.0/24, host bits zero")
        return taken or IPv4Network((0, 32))

    def ipv4_address(self, key: str) -> IPv4Address:
        """A required IPv4 address."""

        def fits(value: Any) -> IPv4Address | None:
            home = parse_home(value)
            return home.network_address if isinstance(home, IPv4Network) and is_single(home) else None

        return self._take(key, None, fits, "write an address like 192.0.2.1") or IPv4Address(0)

    def homes(self, key: str) -> tuple[Home, ...]:
        """A required list of home addresses or prefixes, each once."""

        def fits(value: Any) -> tuple[Home, ...] | None:
            if not isinstance(value, list) or not value:
                return None
            parsed = [parse_home(item) for item in value]
            good = [item for item in parsed if item is not None]
            return tuple(dict.fromkeys(good)) if len(good) == len(parsed) else None

        return (
            self._take(key, None, fits, "write a list of addresses like 2001:db8:100::5, or prefixes") or ()
        )

    def table(self, key: str) -> Reader:
        """The sub-table ``key``; an empty one where it is missing."""
        self._known.add(key)
        value = self._values.get(key, {})
        if not isinstance(value, dict):
            self.note(key, f"is {value!r}, not a table", f"write it as [{self._prefix}{key}]")
            value = {}
        return self._child(value, f"{self._prefix}{key}.")

    def tables(self, key: str) -> Iterator[Reader]:
        """The array of tables ``key``."""
        self._known.add(key)
        value = self._values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            self.note(key, f"is {value!r}, not a list of tables", f"write each as [[{self._prefix}{key}]]")
            return
        for index, item in enumerate(value):
            yield self._child(item, f"{self._prefix}{key}[{index}].")

    def _child(self, values: Mapping[str, Any], prefix: str) -> Reader:
        child = Reader(values, self._where, self._findings, prefix)
        self._children.append(child)
        return child

    def finish(self) -> None:
        """Note every key that nothing reads, here and below."""
        for key in self._values.keys() - self._known:
            near = get_close_matches(key, self._known, 1)
            way_out = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(self._known))}"
            self.note(key, "no such setting", way_out)
        for child in self._children:
            child.finish()


def parse_home(value: Any) -> Home | None:
    """A prefix, or an address as the network of it alone; None for anything else."""
    if not isinstance(value, str):
        return None
    try:
        network = ip_network(value)
    except ValueError:
        return None
    return None if network.is_multicast or network.is_link_local else network


def request(values: Any, findings: list[Finding]) -> Reader:
    """A reader for the body of a request. Raises InvalidInput when it is no object."""
    if not isinstance(values, dict):
        raise InvalidInput("request: the body is no JSON object; see docs/mobility.md")
    return Reader(values, "request", findings)


def conclude(reader: Reader, findings: list[Finding]) -> None:
    """Raises InvalidInput with everything that was found."""
    reader.finish()
    if findings:
        raise InvalidInput("; ".join(str(finding) for finding in findings), findings)
