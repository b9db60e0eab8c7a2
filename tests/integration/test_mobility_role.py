# SPDX-License-Identifier: GPL-3.0-or-later
"""What the role mobility leaves on real hosts, and a real VM that keeps its address between them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from testinfra.host import Host

from integration.lab_host import lab_host
from integration.mobility_lab import ANCHORS, GATEWAYS, PLAY, found_by_agent, inventory, wait
from integration.playbook_runner import INSTALLED, PlaybookResult
from lifeboat_lab.lab import Lab
from lifeboat_lab.mobility import ask, open_settings

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

RunPlaybook = Callable[..., PlaybookResult]
ROLE = INSTALLED / "ansible_collections/lifeboat/evacuation/roles/mobility"


@pytest.fixture(scope="module")
def mobility(
    lab: Lab, lab_playbook: RunPlaybook, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunPlaybook]:
    """Runs the role on two gateways and two anchors; it has run once."""
    path = tmp_path_factory.mktemp("mobility") / "mobility.yml"
    path.write_text(yaml.safe_dump(inventory()))

    def run(**arguments: Any) -> PlaybookResult:
        return lab_playbook(PLAY, options=("-i", str(path)), **arguments)

    open_settings(lab, (*GATEWAYS, *ANCHORS))
    run().require_success()
    yield run
    for name in (*GATEWAYS, *ANCHORS):
        lab.exec(name, "systemctl", "disable", "--now", "mobility-agent", check=False)


@pytest.fixture(params=[*GATEWAYS, *ANCHORS])
def host(lab: Lab, mobility: RunPlaybook, request: pytest.FixtureRequest) -> Host:
    return lab_host(lab, request.param)


def test_the_agent_runs_sandboxed_and_comes_back_at_boot(host: Host) -> None:
    service = host.service("mobility-agent")
    assert service.is_running
    assert service.is_enabled
    told = host.check_output(
        "systemctl show mobility-agent "
        "-p ProtectSystem,NoNewPrivileges,CapabilityBoundingSet,MemoryDenyWriteExecute,NRestarts,"
        "DevicePolicy,DeviceAllow"
    )
    assert "CapabilityBoundingSet=cap_net_admin cap_net_raw" in told
    assert "ProtectSystem=strict" in told
    assert "NRestarts=0" in told
    assert "DevicePolicy=closed" in told
    assert "DeviceAllow=/dev/net/tun rw" in told


@pytest.mark.parametrize("name", GATEWAYS)
def test_a_gateway_has_where_packets_wait_while_a_vm_is_moved(
    lab: Lab, mobility: RunPlaybook, name: str
) -> None:
    host = lab_host(lab, name)
    assert "state UNKNOWN" in host.check_output("ip link show dev lbhold0")
    lab.exec(name, "systemctl", "kill", "--signal=KILL", "mobility-agent")
    wait(lambda: host.run("mobility-agent status").rc == 0)
    assert host.run("ip link show dev lbhold0").rc == 0


def test_keys_are_private_and_the_socket_is_the_groups(host: Host) -> None:
    keys = host.file("/etc/lifeboat/mobility_keys.toml")
    assert (keys.mode, keys.user) == (0o600, "root")
    socket = host.file("/run/lifeboat/mobility.sock")
    assert (socket.mode, socket.user, socket.group) == (0o660, "root", "lifeboat")
    assert host.run("mobility-agent test-config").rc == 0


def test_the_installed_package_is_the_collections(host: Host) -> None:
    package = ROLE / "files" / "mobility_agent"
    expected = {
        f"/usr/lib/lifeboat/mobility_agent/{path.relative_to(package)}": hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in package.rglob("*.py")
    }
    listed = host.check_output("find /usr/lib/lifeboat/mobility_agent/ -name '*.py' -exec sha256sum {} +")
    assert {line.split(maxsplit=1)[1]: line.split()[0] for line in listed.splitlines()} == expected


def test_gateways_hear_anchors_and_nothing_stands_in_the_way(lab: Lab, mobility: RunPlaybook) -> None:
    for name in GATEWAYS:
        wait(lambda name=name: found_by_agent(lab, name) == [] and anchor_states(lab, name) == {"up"})


def anchor_states(lab: Lab, name: str) -> set[str]:
    """What this gateway thinks of its anchors."""
    return {told["state"] for told in ask(lab, name, "status")["gateway"]["anchors"].values()}


def test_a_second_run_changes_nothing(mobility: RunPlaybook) -> None:
    assert mobility().require_success().changed_tasks == []
    assert mobility(check=True).require_success().changed_tasks == []


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"mobility_prefixes": [{"prefix": "2001:db8:1::/48"}]}, ["tunnels would lead into themselves"]),
        (
            {"mobility_prefixes": [{"prefix": "2001:db8:7::/48"}, {"prefix": "2001:db8:7:1::/64"}]},
            ["a prefix is on one link only"],
        ),
        (
            {"mobility_prefixes": [{"prefix": "198.51.100.0/24", "router": "198.51.100.1"}]},
            ["is IPv4, which the tunnels of anchors do not carry"],
        ),
        ({"mobility_keys": []}, ["holds no key"]),
        ({"mobility_keys": [{"index": 256, "secret": "abcd"}]}, ["is shorter than 16 octets"]),
        ({"mobility_address": "2001:db8:9::9"}, ["has no address 2001:db8:9::9"]),
        ({"mobility_gateway": False, "mobility_anchor": False}, ["neither a gateway nor an anchor"]),
        ({"mobility_uplink": "eth7"}, ["has no device eth7"]),
    ],
)
def test_bad_input_is_told_and_changes_nothing(
    mobility: RunPlaybook, variables: dict[str, object], told: list[str]
) -> None:
    result = mobility(variables=variables)
    assert result.return_code != 0
    assert result.changed_tasks == []
    for sentence in told:
        assert sentence in result.messages
    assert "abcd" not in result.messages
