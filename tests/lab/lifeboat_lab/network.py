# SPDX-License-Identifier: GPL-3.0-or-later
"""Network namespaces, bridges and routes. Nothing here ever touches the machine's own interfaces:
both ends of every link are made inside namespaces of the lab.

    controller -- management network ---- every host (mgmt0)
    home1, home2     -- br-home   \
    backup1, backup2 -- br-backup  > router
    client           -- br-client /
"""

import shutil
from pathlib import Path

from lifeboat_lab.settings import (
    CLIENT_ADDRESS,
    CONTROLLER_ADDRESS,
    CONTROLLER_MAC,
    HOSTS,
    SITE_NUMBERS,
    HostPlan,
    Settings,
    router_mac,
    site_ipv4_prefix,
    site_ipv4_router,
    site_prefix,
    site_router,
)
from lifeboat_lab.shell import run

NAMESPACES = Path("/run/netns")
RESOLVER_FILES = Path("/etc/netns")
# The same first-hop router on every hypervisor, so that a guest that moves keeps its default route.
GUEST_GATEWAY = "fe80::1"
GUEST_GATEWAY_MAC = "52:54:00:fe:80:01"


class Network:
    """The namespaces of one lab and the links between them."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def build_core(self) -> None:
        """Router, client and controller; does nothing where they are there."""
        router, client, controller = (self._settings.namespace(n) for n in ("router", "client", "controller"))
        if not self.exists("router"):
            self._add_namespace("router")
            # What goes by the WAN's devices comes from another interface than it would leave by.
            sysctl(router, {
                "net.ipv6.conf.all.forwarding": 1, "net.ipv4.ip_forward": 1,
                "net.ipv4.conf.all.rp_filter": 0, "net.ipv4.conf.default.rp_filter": 0,
            })  # fmt: skip
            lines = []
            for site in SITE_NUMBERS:
                lines += [
                    f"link add br-{site} address {router_mac(site)} type bridge",
                    f"link set br-{site} up",
                ]
            ip(router, lines)
            # The bridge has no port yet; duplicate address detection would wait for one.
            ip(router, [f"addr add {site_router(site)}/64 dev br-{site} nodad" for site in SITE_NUMBERS])
            ip(router, [f"addr add {site_ipv4_router(site)}/24 dev br-{site}" for site in SITE_NUMBERS], 4)
            self._count_traffic()
        if not self.exists("client"):
            self._add_namespace("client")
            ip(router, [
                f"link add client type veth peer name site0 netns {client}",
                "link set client master br-client up",
            ])  # fmt: skip
            ip(client, [
                "link set site0 up",
                f"addr add {CLIENT_ADDRESS}/64 dev site0 nodad",
                f"route add default via {site_router('client')}",
            ])  # fmt: skip
        if not self.exists("controller"):
            self._add_namespace("controller")
            ip(controller, [
                f"link add br-mgmt address {CONTROLLER_MAC} type bridge", "link set br-mgmt up",
                f"addr add {CONTROLLER_ADDRESS}/64 dev br-mgmt nodad",
            ])  # fmt: skip
        self._write_names()

    def connect(self, plan: HostPlan) -> None:
        """A host's namespace with its two links and the bridge for its guests; replaces one left by a dead
        host."""
        self.disconnect(plan)
        router, controller = self._settings.namespace("router"), self._settings.namespace("controller")
        host = self._settings.namespace(plan.name)
        self._add_namespace(plan.name)
        sysctl(host, {"net.ipv6.conf.all.forwarding": 1})
        ip(router, [
            f"link add {plan.name} type veth peer name site0 address {plan.mac('site0')} netns {host}",
            f"link set {plan.name} master br-{plan.site} up",
        ])  # fmt: skip
        ip(controller, [
            f"link add {plan.name} type veth peer name mgmt0 address {plan.mac('mgmt0')} netns {host}",
            f"link set {plan.name} master br-mgmt up",
        ])  # fmt: skip
        guest_network = plan.guest_prefix
        ip(host, [
            "link set site0 up", "link set mgmt0 up",
            f"addr add {plan.address}/64 dev site0 nodad",
            f"addr add {plan.management_address}/64 dev mgmt0 nodad",
            f"route add default via {site_router(plan.site)} dev site0",
            f"link add vmbr0 address {GUEST_GATEWAY_MAC} type bridge",
            "link set vmbr0 up",
            f"addr add {GUEST_GATEWAY}/64 dev vmbr0 nodad",
            f"route add {guest_network} dev vmbr0",
        ])  # fmt: skip
        self.connect_ipv4(plan)
        ip(router, [f"route replace {guest_network} via {plan.address} dev br-{plan.site}"])

    def connect_ipv4(self, plan: HostPlan) -> None:
        """A host's address and way out by IPv4, also where they were taken away."""
        ip(self._settings.namespace(plan.name), [
            f"addr replace {plan.ipv4_address}/24 dev site0",
            f"route replace default via {site_ipv4_router(plan.site)} dev site0",
        ], 4)  # fmt: skip

    def disconnect(self, plan: HostPlan) -> None:
        """Take a host off the network: first its links, so that no peer hears a reset from it, as in a power
        cut."""
        for member in ("router", "controller"):
            if self.exists(member):
                run(["ip", "-n", self._settings.namespace(member), "link", "del", plan.name], check=False)
        if self.exists(plan.name):
            run(["ip", "netns", "del", self._settings.namespace(plan.name)])

    def exists(self, member: str) -> bool:
        """Is there a namespace of this member?"""
        return (NAMESPACES / self._settings.namespace(member)).exists()

    def remove(self) -> None:
        """Remove every namespace of this lab, whichever build left it."""
        for member in (*HOSTS, "client", "controller", "router"):
            if self.exists(member):
                run(["ip", "netns", "del", self._settings.namespace(member)])
            shutil.rmtree(RESOLVER_FILES / self._settings.namespace(member), ignore_errors=True)

    def processes(self, member: str) -> list[int]:
        """Process ids inside a member's namespace."""
        if not self.exists(member):
            return []
        return [
            int(pid) for pid in run(["ip", "netns", "pids", self._settings.namespace(member)]).stdout.split()
        ]

    def _add_namespace(self, member: str) -> None:
        name = self._settings.namespace(member)
        run(["ip", "netns", "add", name])
        ip(name, ["link set lo up"])

    def _write_names(self) -> None:
        """`ip netns exec` shows these files as /etc/hosts and /etc/resolv.conf, to controller and client."""
        for member in ("controller", "client"):
            directory = RESOLVER_FILES / self._settings.namespace(member)
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "hosts").write_text(hosts_file(management=member == "controller"))
            (directory / "resolv.conf").write_text("")

    def _count_traffic(self) -> None:
        """Byte counters for each ordered pair of sites: offered to the WAN, and delivered by it."""
        counters, rules = [], []
        for source in SITE_NUMBERS:
            for destination in SITE_NUMBERS:
                if source == destination:
                    continue
                pair = f"{source}-{destination}"
                counters += [f"counter {pair}-sent {{}}", f"counter {pair}-delivered {{}}"]
                rules += [
                    f'iifname "br-{source}" ip6 daddr {site_prefix(destination)} counter name "{pair}-sent"',
                    f'iifname "br-{source}" ip daddr {site_ipv4_prefix(destination)} '
                    f'counter name "{pair}-sent"',
                    f'iifname {{ "br-{source}", "wan-{source}" }} oifname "br-{destination}" '
                    f'counter name "{pair}-delivered"',
                ]
        table = (
            "table inet lab {\n"
            + "\n".join(counters)
            + (
                "\nchain forward { type filter hook forward priority 0; policy accept;\n"
                + "\n".join(rules)
                + "\n}\n}\n"
            )
        )
        in_namespace = ["nsenter", f"--net={NAMESPACES / self._settings.namespace('router')}"]
        run([*in_namespace, "nft", "-f", "-"], stdin=table)


def hosts_file(*, management: bool) -> str:
    """/etc/hosts: by the sites' addresses for hosts and client, by the management network for the
    controller."""
    lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"]
    for plan in HOSTS.values():
        lines.append(f"{plan.management_address if management else plan.address} {plan.name}")
    lines += [f"{CLIENT_ADDRESS} client", f"{CONTROLLER_ADDRESS} controller"]
    return "\n".join(lines) + "\n"


def ip(namespace: str, lines: list[str], version: int = 6) -> None:
    """Run `ip -6` (`-4`) commands in a namespace, in one process. Raises LabError with the line that
    failed."""
    run(["ip", "-n", namespace, f"-{version}", "-batch", "-"], stdin="\n".join(lines) + "\n")


def sysctl(namespace: str, values: dict[str, int]) -> None:
    """Set kernel variables that belong to a network namespace."""
    settings = [f"{key}={value}" for key, value in values.items()]
    run(["nsenter", f"--net={NAMESPACES / namespace}", "sysctl", "-q", "-w", *settings])
