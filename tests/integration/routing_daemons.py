# SPDX-License-Identifier: GPL-3.0-or-later
"""FRR and radvd in namespaces: installed here, or unpacked by ``tests/frame/unpack-routing-daemons``."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pytest

from integration.mobility_net import eventually

ROOT = Path(__file__).parents[2]
UNPACKED = ROOT / "build" / "routing-daemons"


def _root(program: str) -> Path:
    return next((root for root in (UNPACKED, Path("/")) if (root / program).exists()), UNPACKED)


FRR, RADVD = _root("usr/lib/frr/bgpd"), _root("usr/sbin/radvd") / "usr/sbin/radvd"
needs_frr = pytest.mark.skipif(
    not (FRR / "usr/lib/frr/bgpd").exists(),
    reason=f"no FRR here: tests/frame/unpack-routing-daemons {UNPACKED} (make test does)",
)
needs_radvd = pytest.mark.skipif(
    not RADVD.exists(),
    reason=f"no radvd here: tests/frame/unpack-routing-daemons {UNPACKED} (make test does)",
)


def from_template(name: str, variables: Mapping[str, Any]) -> str:
    """What the role mobility makes of one of its templates."""
    template = (ROOT / "roles/mobility/templates" / name).read_text()
    # As Ansible has Jinja.
    environment = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined, autoescape=False)
    return environment.from_string(template).render(ansible_managed="# test", **variables)


def frr_configuration(
    name: str, number: int, neighbours: Sequence[tuple[str, int]], prefixes: Sequence[str]
) -> str:
    """What the role writes into frr.conf on a host whose autonomous system is ``number`` (65000 and up)."""
    variables = {
        "mobility_name": name,
        "mobility_prefixes": [{"prefix": prefix} for prefix in prefixes],
        "mobility_bgp_as": number,
        "mobility_bgp_router_id": f"192.0.2.{number - 64999}",
        "mobility_bgp_neighbors": [{"address": address, "as": system} for address, system in neighbours],
    }
    return from_template("frr.conf.j2", variables)


class Routing:
    """zebra and bgpd where ``command`` runs programs: in one namespace."""

    def __init__(self, command: Callable[..., list[str]], directory: Path, configuration: str) -> None:
        directory.mkdir(parents=True)
        path = directory / "frr.conf"
        path.write_text(configuration)
        library = FRR / "usr/lib/x86_64-linux-gnu"
        environment = os.environ | {"LD_LIBRARY_PATH": f"{library}:{library / 'frr'}"}
        # Where FRR is only unpacked nobody has made its group.
        group = directory / "group"
        group.write_text(Path("/etc/group").read_text() + "frrvty:x:65533:root\n")
        common = ["-f", str(path), "-z", str(directory / "zserv.api"), "--vty_socket", str(directory)]
        common += ["-u", "root", "-g", "root", "--log", f"file:{directory / 'log'}"]
        self.processes = []
        for daemon in ("zebra", "bgpd"):
            program = FRR / "usr/lib/frr" / daemon
            words = [str(program), *common, "-i", str(directory / f"{daemon}.pid")]
            script = f"mount --bind {group} /etc/group && exec {shlex.join(words)}"
            process = subprocess.Popen(
                command("unshare", "--mount", "sh", "-c", script),
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            self.processes.append(process)
            eventually((directory / "zserv.api").exists, 20)

    def end(self) -> None:
        """End both."""
        for process in reversed(self.processes):
            process.terminate()
            process.wait(20)
