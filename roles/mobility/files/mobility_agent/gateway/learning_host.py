# SPDX-License-Identifier: GPL-3.0-or-later
"""What libvirt and the kernel know of guests' addresses, and where learnt ones are kept."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping
from ipaddress import IPv6Address, IPv6Network
from typing import Any

from mobility_agent.datapath import neighbours
from mobility_agent.datapath.netlink import RouteSocket
from mobility_agent.errors import Unreachable
from mobility_agent.gateway.definition import METADATA_URI, VmNetwork, read_definition
from mobility_agent.gateway.learning import Heard, Sighting, Unnamed
from mobility_agent.homes import only_ipv6

logger = logging.getLogger(__name__)

_METADATA_KEY = "mobility"
_GUEST_AGENT = "devices/channel/target[@name='org.qemu.guest_agent.0'][@state='connected']"


class LibvirtHost:
    """A connection of its own: the agent's other one may only read, this one writes definitions."""

    def __init__(self, libvirt: Any, uri: str, bridges: frozenset[str], heard: Heard) -> None:
        self._libvirt = libvirt
        self._uri = uri
        self._bridges = bridges
        self._heard = heard
        self._held: Any = None
        self._kernel = RouteSocket()

    def close(self) -> None:
        """Let go of libvirt and of the kernel."""
        self._kernel.close()
        if self._held is not None:
            with contextlib.suppress(self._libvirt.libvirtError):
                self._held.close()

    def _connection(self) -> Any:
        try:
            if self._held is None or not self._held.isAlive():
                self._held = self._libvirt.open(self._uri)
        except self._libvirt.libvirtError as error:
            self._held = None
            raise Unreachable(f"libvirt at {self._uri}: no answer ({error}); see its journal") from error
        return self._held

    def _defined(self, domain: Any) -> tuple[VmNetwork, ET.Element] | None:
        # One that is just going away says nothing.
        with contextlib.suppress(self._libvirt.libvirtError, ET.ParseError):
            text = domain.XMLDesc(0)
            return read_definition(text), ET.fromstring(text)
        return None

    async def unnamed(self) -> list[Unnamed]:
        """The VMs that run on bridges of ours and of whose addresses nobody has said anything."""
        return await asyncio.to_thread(self._unnamed)

    def _unnamed(self) -> list[Unnamed]:
        libvirt, found = self._libvirt, []
        for domain in self._domains(libvirt.VIR_CONNECT_LIST_DOMAINS_RUNNING):
            read = self._defined(domain)
            if read is None or read[0].declared:
                continue
            network = read[0]
            place = next((pair for pair in network.interfaces if pair[0] in self._bridges), None)
            if place is not None:
                found.append(Unnamed(network.vm, network.name, *place))
        return found

    def _domains(self, flags: int) -> list[Any]:
        try:
            return list(self._connection().listAllDomains(flags))
        except self._libvirt.libvirtError as error:
            raise Unreachable(f"libvirt at {self._uri}: {error}; see its journal") from error

    async def claimed(self) -> Mapping[IPv6Network, str]:
        """What the definitions of all VMs here say, those that are off among them."""
        return await asyncio.to_thread(self._claimed)

    def _claimed(self) -> Mapping[IPv6Network, str]:
        found: dict[IPv6Network, str] = {}
        for domain in self._domains(0):
            read = self._defined(domain)
            if read is not None:
                found.update(dict.fromkeys(only_ipv6(read[0].homes), read[0].vm))
        return found

    async def sightings(self, vm: Unnamed) -> list[Sighting]:
        """Guest agent, DHCP leases, neighbour tables, and what was heard on the bridge."""
        told = await asyncio.to_thread(self._told_by_libvirt, vm.vm)
        seen = [
            Sighting(entry.mac, entry.address)
            for entry in neighbours.seen(self._kernel, vm.bridge)
            if entry.mac and isinstance(entry.address, IPv6Address)
        ]
        return told + seen + self._heard.of(vm.mac)

    def _told_by_libvirt(self, vm: str) -> list[Sighting]:
        libvirt = self._libvirt
        sources = [
            libvirt.VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_LEASE,
            libvirt.VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_ARP,
        ]
        found: list[Sighting] = []
        try:
            domain = self._connection().lookupByUUIDString(vm)
        except libvirt.libvirtError:
            return found
        read = self._defined(domain)
        if read is not None and read[1].find(_GUEST_AGENT) is not None:
            # Asked only where one is connected: libvirt would wait for it.
            sources.append(libvirt.VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_AGENT)
        for source in sources:
            try:
                interfaces = domain.interfaceAddresses(source, 0)
            except libvirt.libvirtError as error:
                logger.debug("VM %s: addresses by source %d: %s", vm, source, error)
                continue
            for interface in interfaces.values():
                mac = str(interface.get("hwaddr") or "").lower()
                for told in interface.get("addrs") or ():
                    with contextlib.suppress(ValueError):
                        found.append(Sighting(mac, IPv6Address(str(told["addr"]).partition("%")[0])))
        return found

    async def write(self, vm: str, homes: Iterable[IPv6Address]) -> None:
        """Into the running definition and the kept one, unless somebody has said something meanwhile."""
        await asyncio.to_thread(self._write, vm, [str(home) for home in homes])

    def _write(self, vm: str, homes: list[str]) -> None:
        libvirt = self._libvirt
        root = ET.Element("addresses", learnt="yes")
        for home in homes:
            ET.SubElement(root, "address").text = home
        try:
            domain = self._connection().lookupByUUIDString(vm)
            if read_definition(domain.XMLDesc(0)).declared:
                return
            flags = libvirt.VIR_DOMAIN_AFFECT_LIVE
            flags |= libvirt.VIR_DOMAIN_AFFECT_CONFIG if domain.isPersistent() else 0
            text, kind = ET.tostring(root, encoding="unicode"), libvirt.VIR_DOMAIN_METADATA_ELEMENT
            domain.setMetadata(kind, text, _METADATA_KEY, METADATA_URI, flags)
        except libvirt.libvirtError as error:
            raise Unreachable(f"VM {vm}: its definition did not take {', '.join(homes)}: {error}") from error
