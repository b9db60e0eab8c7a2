# SPDX-License-Identifier: GPL-3.0-or-later
"""Who may send into our tunnel's end: registered peers, and nobody else (nftables, one table of our own)."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from ipaddress import IPv6Address

from mobility_agent.errors import KernelRefused, Unsupported

TABLE = "lifeboat_mobility"

# Before connection tracking (-200) sees it; seg6 takes the packet right after this hook.
_RULESET = """\
table ip6 {table}
delete table ip6 {table}
table ip6 {table} {{
  set peers {{
    type ipv6_addr
    {elements}
  }}
  chain decapsulation {{
    type filter hook prerouting priority -310; policy accept;
    ip6 daddr {tunnel} ip6 nexthdr ipv6 ip6 saddr @peers counter accept
    ip6 daddr {tunnel} counter drop
  }}
}}
"""


def _run(script: str, subject: str) -> None:
    program = shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if program is None:
        raise Unsupported(f"{subject}: nft is not installed; install the package nftables")
    done = subprocess.run(
        [program, "-f", "-"], input=script, text=True, capture_output=True, check=False, timeout=30
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        raise KernelRefused(f"{subject}: nft refused: {reason}; the agent needs CAP_NET_ADMIN")


def install(tunnel: IPv6Address, peers: Iterable[IPv6Address]) -> None:
    """Let only ``peers`` send to ``tunnel``; in one step, whatever stood there before.

    Raises KernelRefused, Unsupported.
    """
    addresses = ", ".join(str(peer) for peer in sorted(set(peers)))
    elements = f"elements = {{ {addresses} }}" if addresses else ""
    script = _RULESET.format(table=TABLE, tunnel=tunnel, elements=elements)
    _run(script, f"filter for {tunnel}")


def remove() -> None:
    """Take our table away. Raises KernelRefused, Unsupported."""
    _run(f"table ip6 {TABLE}\ndelete table ip6 {TABLE}\n", f"filter table {TABLE}")
