# SPDX-License-Identifier: GPL-3.0-or-later
"""What the role mobility leaves on real hosts, and a real VM that keeps its address between them."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from testinfra.host import Host

from integration.lab_host import lab_host
from integration.playbook_runner import INSTALLED, PlaybookResult
from lifeboat_lab.lab import Lab
from lifeboat_lab.settings import HOSTS

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

RunPlaybook = Callable[..., PlaybookResult]
ROLE = INSTALLED / "ansible_collections/lifeboat/evacuation/roles/mobility"
GATEWAYS = ("home1", "backup1")
# The second is at the site that is evacuated: told as a warning, and good enough to be the one that dies.
ANCHORS = ("backup2", "home2")
PREFIX = HOSTS["home1"].guest_prefix
PLAY: list[dict[str, object]] = [
    {
        "name": "Let VMs keep their addresses",
        "hosts": "mobility",
        "gather_facts": False,
        "become": True,
        "roles": ["lifeboat.evacuation.mobility"],
    }
]


def _inventory(lab: Lab) -> dict[str, Any]:
    def tunnel(name: str) -> str:
        return f"{HOSTS[name].address.rpartition(':')[0]}:{0xD000 + HOSTS[name].number:x}"

    hosts = {
        name: {
            "mobility_address": HOSTS[name].address,
            "mobility_tunnel_address": tunnel(name),
            "mobility_gateway": name in GATEWAYS,
            "mobility_anchor": name in ANCHORS,
        }
        for name in (*GATEWAYS, *ANCHORS)
    }
    common = {
        "mobility_keys": [{"index": 256, "secret": secrets.token_hex(32)}],
        "mobility_prefixes": [{"prefix": PREFIX}],
        "mobility_bridges": [{"name": "vmbr0", "mac": "52:54:00:fe:80:01"}],
        "mobility_uplink": "site0",
    }
    return {"mobility": {"hosts": hosts, "vars": common}}


@pytest.fixture(scope="module")
def mobility(
    lab: Lab, lab_playbook: RunPlaybook, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunPlaybook]:
    """Runs the role on two gateways and two anchors; it has run once."""
    path = tmp_path_factory.mktemp("mobility") / "mobility.yml"
    path.write_text(yaml.safe_dump(_inventory(lab)))

    def run(**arguments: Any) -> PlaybookResult:
        return lab_playbook(PLAY, options=("-i", str(path)), **arguments)

    for name in (*GATEWAYS, *ANCHORS):
        # As on a host of one's own; a container has it read-only.
        lab.exec(name, "mount", "-o", "remount,bind,rw", "/proc/sys")
    run().require_success()
    yield run
    for name in (*GATEWAYS, *ANCHORS):
        lab.exec(name, "systemctl", "disable", "--now", "mobility-agent", check=False)


@pytest.fixture(params=[*GATEWAYS, *ANCHORS])
def host(lab: Lab, mobility: RunPlaybook, request: pytest.FixtureRequest) -> Host:
    return lab_host(lab, request.param)


def ask(host: Host, *words: str) -> Any:
    """What the host's agent answers."""
    return json.loads(host.check_output(f"mobility-agent --json {' '.join(words)}"))


def wait(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """The first truth that ``condition`` gives."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.3)
    return value


def test_the_agent_runs_sandboxed_and_comes_back_at_boot(host: Host) -> None:
    service = host.service("mobility-agent")
    assert service.is_running
    assert service.is_enabled
    told = host.check_output(
        "systemctl show mobility-agent "
        "-p ProtectSystem,NoNewPrivileges,CapabilityBoundingSet,MemoryDenyWriteExecute,NRestarts"
    )
    assert "CapabilityBoundingSet=cap_net_admin cap_net_raw" in told
    assert "ProtectSystem=strict" in told
    assert "NRestarts=0" in told


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
        gateway = lab_host(lab, name)
        wait(lambda gateway=gateway: ask(gateway, "check")["findings"] == [])
        anchors = ask(gateway, "status")["gateway"]["anchors"]
        assert {told["state"] for told in anchors.values()} == {"up"}


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
