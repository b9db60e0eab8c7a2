# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""All sites' home prefixes and home addresses judged together, on the controller.

Hosts judge one VM at a time with what Python brings (:mod:`_home_addresses`); the controller has netaddr.
Both say the same of the same address.
"""

from __future__ import annotations

import typing as t

from ansible_collections.lifeboat.evacuation.plugins.module_utils._home_addresses import IS_IPV4

try:
    import netaddr
except ImportError as _error:
    MISSING: ImportError | None = _error
else:
    MISSING = None

_BITS = 128
_IPV4 = 4
# Who wants addresses: (whom to name, the addresses as they were written)
Wanted = t.Sequence[tuple[str, t.Sequence[str]]]


class NetaddrMissing(Exception):
    """The controller's Python has no netaddr."""


def _network(text: str) -> t.Any:
    """An address or a prefix as netaddr has it. Raises ValueError with what is wrong with it."""
    try:
        network = netaddr.IPNetwork(text.strip())
    except (netaddr.AddrFormatError, ValueError) as error:
        raise ValueError(str(error)) from error
    if network.ip != network.network:
        raise ValueError(f"{text.strip()} has host bits set")
    return network


def _home(text: str) -> t.Any:
    try:
        network = _network(text)
    except ValueError as error:
        raise ValueError(f"{text}: {error}; write it like 2001:db8:100::5") from error
    address = network.network
    if address.is_multicast() or address.is_link_local() or address.is_loopback() or int(address) == 0:
        raise ValueError(f"{text}: is no address that others could reach the VM by; give a global one")
    return network


def _shown(network: t.Any) -> str:
    return str(network.network) if network.size == 1 else str(network.cidr)


def _mapped(network: t.Any) -> t.Any:
    """IPv4 as IPv6 writes it (RFC 4291 section 2.5.5.2), so that both kinds have places of one length."""
    return network.ipv6() if network.version == _IPV4 else network


class _Taken:
    """Who has which address. Prefixes nest or are apart, so a look-up for each length tells every clash."""

    def __init__(self) -> None:
        self._holders: dict[tuple[int, int], list[str]] = {}
        self._lengths: set[int] = set()

    @staticmethod
    def _place(network: t.Any, length: int) -> tuple[int, int]:
        return length, int(network.first) >> (_BITS - length)

    def holders(self, network: t.Any) -> list[str]:
        """Who has anything of ``network`` already."""
        network = _mapped(network)
        own = network.prefixlen
        found = []
        for length in sorted(self._lengths):
            if length <= own:
                found += self._holders.get(self._place(network, length), [])
            else:
                # A whole prefix is rarely one VM's: then, and only then, all are looked at.
                inside = [
                    names
                    for (other, value), names in self._holders.items()
                    if other == length and value >> (length - own) == self._place(network, own)[1]
                ]
                found += [name for names in inside for name in names]
        return found

    def put(self, network: t.Any, who: str) -> None:
        """Remember that ``who`` has it."""
        network = _mapped(network)
        self._lengths.add(network.prefixlen)
        self._holders.setdefault(self._place(network, network.prefixlen), []).append(who)


def findings(wanted: Wanted, prefixes: t.Sequence[str]) -> list[str]:
    """Everything that is wrong: prefixes that clash, addresses, those in no prefix, those wanted twice.

    ``prefixes`` empty: they are not known here, and not asked about. Raises NetaddrMissing.
    """
    if not wanted and not prefixes:
        return []
    if MISSING is not None:
        raise NetaddrMissing(
            f"home addresses: the controller's Python has no netaddr ({MISSING}); install it there, as "
            "meta/ee-requirements.txt says"
        )
    told: list[str] = []
    homes = _prefixes(prefixes, told)
    taken = _Taken()
    for who, texts in wanted:
        for text in texts:
            try:
                network = _home(text)
            except ValueError as error:
                told.append(f"{who}: {error}")
                continue
            if network.version == _IPV4 and all(home.version != _IPV4 for home in homes):
                told.append(f"{who}: {_shown(network)} {IS_IPV4}")
            elif homes and not any(network in home for home in homes):
                known = ", ".join(str(home) for home in homes)
                told.append(
                    f"{who}: {_shown(network)} is in no home prefix ({known}); "
                    "correct it, or add its prefix to mobility_prefixes"
                )
            told += [
                f"{who}: {_shown(network)} is {other}'s too; give each VM addresses of its own"
                for other in taken.holders(network)
            ]
            taken.put(network, who)
    return told


def _prefixes(texts: t.Sequence[str], told: list[str]) -> list[t.Any]:
    homes: list[t.Any] = []
    for text in texts:
        try:
            home = _network(text)
        except ValueError as error:
            told.append(f"home prefix {text}: {error}; correct mobility_prefixes")
            continue
        if home not in homes:
            # Two hosts may have the same one; two that overlap would be one address on two links.
            told += [
                f"home prefix {home}: overlaps {other}; a prefix is on one link; correct mobility_prefixes"
                for other in homes
                if home in other or other in home
            ]
            homes.append(home)
    return homes
