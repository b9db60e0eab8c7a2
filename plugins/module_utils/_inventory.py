# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which hypervisors are whose peers, read from the inventory's variables.

``hosts`` maps each hypervisor's name to its variables: ``lifeboat_site``, ``lifeboat_peer`` or, where
replicas may be placed at several, ``lifeboat_peers``, and, where they are not the usual ones,
``lifeboat_address``, ``lifeboat_port``, ``lifeboat_connections``, ``lifeboat_rate`` and
``lifeboat_rate_windows``.
"""

from __future__ import annotations

import typing as t

Variables = t.Mapping[str, t.Any]

DEFAULT_PORT = 4747
DEFAULT_CONNECTIONS = 5


def address_of(name: str, variables: Variables) -> str:
    """Where peers reach a hypervisor: its own word, else where Ansible reaches it."""
    return str(variables.get("lifeboat_address") or variables.get("ansible_host") or name)


def port_of(variables: Variables) -> int:
    """The TCP port of a hypervisor's proxy."""
    return int(variables.get("lifeboat_port") or DEFAULT_PORT)


def findings(hosts: t.Mapping[str, Variables]) -> list[str]:
    """Everything that is wrong with sites, peers and addresses, a sentence each."""
    told: list[str] = []
    if not hosts:
        told.append(
            "no hypervisor: the inventory's pattern lifeboat_hosts matches none; name yours in hypervisors"
        )
    taken: dict[tuple[str, int], str] = {}
    for name in sorted(hosts):
        variables = hosts[name]
        told += _peer_findings(name, variables, hosts)
        if not variables.get("lifeboat_site"):
            told.append(f"{name}: has no site; set lifeboat_site to the name of the place that it stands at")
        where = (address_of(name, variables), port_of(variables))
        if where in taken:
            told.append(
                f"{name}: has the address {where[0]} port {where[1]} of {taken[where]}; "
                "set lifeboat_address on both"
            )
        taken.setdefault(where, name)
    return told


def peers_of(variables: Variables) -> list[str]:
    """The peers that a hypervisor names: ``lifeboat_peer``, and those of ``lifeboat_peers``."""
    several = variables.get("lifeboat_peers") or []
    named = [variables.get("lifeboat_peer"), *([several] if isinstance(several, str) else several)]
    return list(dict.fromkeys(str(peer) for peer in named if peer))


def _peer_findings(name: str, variables: Variables, hosts: t.Mapping[str, Variables]) -> list[str]:
    peers = peers_of(variables)
    if not peers:
        return [f"{name}: has no peer; set lifeboat_peer to a hypervisor at another site"]
    several = variables.get("lifeboat_peers")
    if several and isinstance(several, str):
        return [f"{name}: lifeboat_peers {several!r} is no list; write [{several}], or set lifeboat_peer"]
    return [told for peer in peers for told in _findings_of_peer(name, peer, variables, hosts)]


def _findings_of_peer(
    name: str, peer: str, variables: Variables, hosts: t.Mapping[str, Variables]
) -> list[str]:
    what = "lifeboat_peer" if peer == variables.get("lifeboat_peer") else "lifeboat_peers"
    if peer == name:
        return [f"{name}: is its own peer; set {what} to a hypervisor at another site"]
    if peer not in hosts:
        known = ", ".join(sorted(set(hosts) - {name})) or "none"
        return [f"{name}: its peer {peer} is not among the hypervisors; set {what} to one of them ({known})"]
    site = variables.get("lifeboat_site")
    if site and site == hosts[peer].get("lifeboat_site"):
        return [f"{name}: its peer {peer} stands at the same site, {site}; set {what} to one at another site"]
    return []


def proxy_peers(hosts: t.Mapping[str, Variables], name: str) -> list[dict[str, t.Any]]:
    """Whom the proxy of ``name`` talks to, as the role precache_proxy wants it.

    That is its own peers and whoever has it for a peer: a replica's way back leads there.
    """
    own = hosts[name]
    names = {other for other, variables in hosts.items() if name in peers_of(variables)}
    names.update(peer for peer in peers_of(own) if peer in hosts)
    return [
        {
            "name": other,
            "address": address_of(other, hosts[other]),
            "port": port_of(hosts[other]),
            "connections": int(own.get("lifeboat_connections") or DEFAULT_CONNECTIONS),
            "rate": str(own.get("lifeboat_rate") or ""),
            "windows": list(own.get("lifeboat_rate_windows") or []),
        }
        for other in sorted(names - {name})
    ]
