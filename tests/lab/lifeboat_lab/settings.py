# SPDX-License-Identifier: GPL-3.0-or-later
"""Names, addresses and places of a lab: everything that has to be agreed on and nothing that acts."""

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lifeboat_lab.errors import LabError

CACHE = Path("/var/cache/lifeboat-lab")
STATE = Path("/var/lib/lifeboat-lab")
RUNTIME = Path("/run/lifeboat-lab")
SUITES = ("trixie", "bookworm")

# RFC 3849 addresses: documentation only, so nothing of a lab could be routed anywhere by mistake.
HOST_INTERFACES = ("site0", "mgmt0")
SITE_NUMBERS = {"home": 1, "backup": 2, "client": 3}
CLIENT_ADDRESS = "2001:db8:3::2"
CONTROLLER_ADDRESS = "2001:db8:ff::1"
# Ethernet addresses of our own: a bridge that is given none changes its address with its ports, a host's link
# with each boot, and their neighbours then go on sending to the old one for up to a minute.
CONTROLLER_MAC = "52:54:00:ff:ff:01"


def site_prefix(site: str) -> str:
    """All addresses of a site: its hosts' network is the first /64, its guests' networks follow."""
    return f"2001:db8:{SITE_NUMBERS[site]}::/48"


def site_router(site: str) -> str:
    """The router's address in the network of the site's hosts."""
    return f"2001:db8:{SITE_NUMBERS[site]}::1"


def site_ipv4_prefix(site: str) -> str:
    """The network of the site's hosts by IPv4, without guests. RFC 2544: for measuring, not routed."""
    return f"198.18.{SITE_NUMBERS[site]}.0/24"


def site_ipv4_router(site: str) -> str:
    """The router's IPv4 address in the network of the site's hosts."""
    return f"198.18.{SITE_NUMBERS[site]}.1"


def router_mac(site: str) -> str:
    """The router's Ethernet address in the network of the site's hosts."""
    return f"52:54:00:ff:{SITE_NUMBERS[site]:02x}:01"


@dataclass(frozen=True)
class HostPlan:
    """What a host is, before there is one."""

    name: str
    site: str
    number: int
    peer: str | None
    image: str = "full"

    @property
    def address(self) -> str:
        """Address in the site's network: the one that other hosts use, across the WAN."""
        return f"2001:db8:{SITE_NUMBERS[self.site]}::{self.number + 10:x}"

    @property
    def ipv4_address(self) -> str:
        """The same by IPv4."""
        return f"198.18.{SITE_NUMBERS[self.site]}.{self.number + 10}"

    @property
    def peer_address(self) -> str:
        """Address at which its peer reaches it: proxies of the second pair speak IPv4, all others IPv6."""
        return self.ipv4_address if self.number == 2 else self.address

    @property
    def management_address(self) -> str:
        """Address on the controller's own network, which the WAN never slows down."""
        return f"2001:db8:ff::{SITE_NUMBERS[self.site]}:{self.number + 10:x}"

    def mac(self, interface: str) -> str:
        """Ethernet address of `site0` or `mgmt0`: a host that is switched on again has it still."""
        link = HOST_INTERFACES.index(interface)
        return f"52:54:00:{link:02x}:{SITE_NUMBERS[self.site]:02x}:{self.number:02x}"

    @property
    def guest_prefix(self) -> str:
        """Network of the guests that live behind this host's bridge."""
        return f"2001:db8:{SITE_NUMBERS[self.site]}:{self.number}::/64"


HOSTS = {
    plan.name: plan
    for plan in (
        HostPlan("home1", "home", 1, "backup1"),
        HostPlan("home2", "home", 2, "backup2"),
        HostPlan("backup1", "backup", 1, "home1"),
        HostPlan("backup2", "backup", 2, "home2"),
        # Built on demand only: a host that lacks every package that the roles install.
        HostPlan("bare1", "home", 9, None, "bare"),
    )
}
DEFAULT_HOSTS = ("home1", "home2", "backup1", "backup2")


@dataclass(frozen=True)
class Settings:
    """Which lab, of what, with which hosts."""

    name: str = "lab"
    suite: str = "trixie"
    hosts: tuple[str, ...] = DEFAULT_HOSTS
    mirror: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,20}", self.name):
            raise LabError(
                f"lab name {self.name!r}: must be 1 to 21 lower-case letters, digits or hyphens and begin "
                "with a letter; set LIFEBOAT_LAB"
            )
        if self.suite not in SUITES:
            raise LabError(
                f"suite {self.suite!r}: not known; set LIFEBOAT_LAB_SUITE to one of {', '.join(SUITES)}"
            )
        unknown = [host for host in self.hosts if host not in HOSTS]
        if unknown or not self.hosts:
            raise LabError(
                f"hosts {', '.join(unknown) or '(none)'}: not known; set LIFEBOAT_LAB_HOSTS to some of "
                f"{', '.join(HOSTS)}"
            )

    @classmethod
    def from_environment(cls, **overrides: object) -> "Settings":
        """LIFEBOAT_LAB, LIFEBOAT_LAB_SUITE, LIFEBOAT_LAB_HOSTS (comma separated), LIFEBOAT_LAB_MIRROR.

        Raises LabError naming the variable whose value cannot be used.
        """
        values: dict[str, object] = {}
        for key, variable in (
            ("name", "LIFEBOAT_LAB"),
            ("suite", "LIFEBOAT_LAB_SUITE"),
            ("mirror", "LIFEBOAT_LAB_MIRROR"),
        ):
            if os.environ.get(variable):
                values[key] = os.environ[variable]
        if os.environ.get("LIFEBOAT_LAB_HOSTS"):
            values["hosts"] = tuple(
                h.strip() for h in os.environ["LIFEBOAT_LAB_HOSTS"].split(",") if h.strip()
            )
        return cls(**(values | overrides))  # type: ignore[arg-type]

    @cached_property
    def state(self) -> Path:
        """Disks of the hosts and keys: survives a restart of the machine, not a `down`."""
        return STATE / self.name

    @cached_property
    def runtime(self) -> Path:
        """Process ids, sockets, logs of this run."""
        return RUNTIME / self.name

    def namespace(self, member: str) -> str:
        """Name of the network namespace of a host, `router`, `client` or `controller`."""
        return f"{self.name}-{member}"

    def control_group(self, member: str = "") -> str:
        """Name of the control group of a host, of `daemons`, or of the whole lab."""
        return f"lifeboat-lab/{self.name}/{member}".rstrip("/")

    def plans(self) -> list[HostPlan]:
        """The hosts of this lab."""
        return [HOSTS[name] for name in self.hosts]
