# SPDX-License-Identifier: GPL-3.0-or-later
"""What the playbook site_setup and the role precache_proxy leave on real hosts."""

from __future__ import annotations

import hashlib
import json
import time
import tomllib
import uuid
from collections.abc import Callable, Iterator

import pytest
from testinfra.host import Host

from integration.lab_host import lab_host, proxy_status
from integration.playbook_runner import INSTALLED, PlaybookResult
from lifeboat_lab.lab import Lab

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

RunPlaybook = Callable[..., PlaybookResult]
ROLE = INSTALLED / "ansible_collections/lifeboat/evacuation/roles/precache_proxy"
PEERS = {"home1": "backup1", "backup1": "home1"}


@pytest.fixture(params=sorted(PEERS))
def host(lab: Lab, site_setup: PlaybookResult, request: pytest.FixtureRequest) -> Host:
    """One hypervisor of each site, set up."""
    assert site_setup.return_code == 0
    return lab_host(lab, request.param)


def test_services_run_and_come_back_at_boot(host: Host) -> None:
    for name in ("precache-proxy", "precache-watchdog"):
        service = host.service(name)
        assert service.is_running
        assert service.is_enabled
        assert service.is_valid


def test_control_socket_is_for_root_and_the_group(host: Host) -> None:
    socket = host.file("/run/lifeboat/control.sock")
    assert socket.is_socket
    assert socket.mode == 0o660
    assert (socket.user, socket.group) == ("root", "lifeboat")


def test_directories_let_qemu_pass_and_nobody_look(host: Host) -> None:
    for path in ("/run/lifeboat", "/var/lib/lifeboat"):
        directory = host.file(path)
        assert directory.is_directory
        assert directory.mode == 0o711
        assert directory.user == "root"
    tmpfiles = host.file("/etc/tmpfiles.d/lifeboat.conf")
    assert "d /run/lifeboat 0711 root root" in tmpfiles.content_string


def test_configuration_names_the_proxy_and_its_peer(host: Host) -> None:
    name = host.backend.hostname
    file = host.file("/etc/lifeboat/precache_proxy.toml")
    assert file.mode == 0o640
    assert (file.user, file.group) == ("root", "lifeboat")
    told = tomllib.loads(file.content_string)
    assert told["name"] == name
    assert PEERS[name] in {peer["name"] for peer in told["peers"]}
    assert host.run("precache-proxy run --check-config").rc == 0


def test_keys_are_private(host: Host) -> None:
    directory = host.file("/etc/lifeboat/pki")
    assert directory.mode == 0o750
    key = host.file("/etc/lifeboat/pki/host.key")
    assert key.mode == 0o600
    assert key.user == "root"
    assert "BEGIN" in key.content_string


def test_installed_package_is_the_collections(host: Host) -> None:
    package = ROLE / "files" / "precache_proxy"
    expected = {
        f"/usr/lib/lifeboat/precache_proxy/{path.relative_to(package)}": hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in package.rglob("*.py")
    }
    listed = host.check_output(
        "find /usr/lib/lifeboat/precache_proxy/ -name '*.py' -type f -exec sha256sum {} +"
    )
    found = {line.split(maxsplit=1)[1]: line.split()[0] for line in listed.splitlines()}
    assert found == expected
    releases = host.file("/usr/lib/lifeboat/releases").listdir()
    assert len(releases) == 1


def test_command_imports_nothing_from_where_root_stands(host: Host) -> None:
    """A file that bears a module's name in the working directory must not be run by root."""
    host.check_output("mkdir -p /tmp/trap && echo 'raise SystemExit(66)' > /tmp/trap/json.py")
    assert host.run("cd /tmp/trap && PYTHONPATH=/tmp/trap precache-proxy --version").rc == 0


def test_proxy_is_sandboxed(host: Host) -> None:
    told = host.check_output(
        "systemctl show precache-proxy "
        "-p ProtectSystem,NoNewPrivileges,CapabilityBoundingSet,MemoryDenyWriteExecute"
    )
    assert "ProtectSystem=full" in told
    assert "NoNewPrivileges=yes" in told
    assert "MemoryDenyWriteExecute=yes" in told
    assert "cap_sys_admin" not in told
    pid = host.check_output("systemctl show precache-proxy -p MainPID --value")
    # Seen from inside: the system is read-only for it.
    refused = host.run(f"nsenter -t {pid} -m touch /usr/lifeboat-was-here")
    assert refused.rc != 0
    assert "Read-only" in refused.stderr


def test_killed_proxy_is_started_again(host: Host) -> None:
    before = host.check_output("systemctl show precache-proxy -p MainPID --value")
    host.check_output(f"kill -KILL {before}")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        state = host.run("systemctl is-active precache-proxy").stdout.strip()
        if state == "active" and host.run("precache-proxy status --json").rc == 0:
            break
        time.sleep(0.5)
    after = host.check_output("systemctl show precache-proxy -p MainPID --value")
    assert after not in {before, "0"}
    assert proxy_status(host)["name"] == host.backend.hostname


def test_proxies_reach_each_other(host: Host) -> None:
    peer = PEERS[host.backend.hostname]
    deadline = time.monotonic() + 60
    links: dict[str, object] = {}
    while time.monotonic() < deadline:
        links = {link["peer"]: link["state"] for link in proxy_status(host)["links"]}
        if links.get(peer) == "up":
            return
        time.sleep(0.5)
    pytest.fail(f"link to {peer} is not up: {links}")


def test_apparmor_lets_qemu_have_our_sockets(host: Host) -> None:
    """Debian 13's libvirt ships its rules whether AppArmor is at work or not."""
    rules = host.file("/etc/apparmor.d/abstractions/libvirt-qemu.d/lifeboat").content_string
    assert "/run/lifeboat/{jobs,nbd}/** rwk," in rules


@pytest.fixture
def domain(host: Host) -> Iterator[tuple[str, str]]:
    """A defined VM without disks: its name and UUID."""
    name, identifier = "forbidden start", str(uuid.uuid4())
    definition = f"""<domain type='qemu'><name>{name}</name><uuid>{identifier}</uuid>
        <memory unit='MiB'>16</memory><os><type arch='x86_64'>hvm</type></os></domain>"""
    host.check_output("printf '%%s' %s > /tmp/domain.xml && virsh define /tmp/domain.xml", definition)
    yield name, identifier
    host.run("virsh destroy %s", name)
    host.run("rm -f %s", f"/var/lib/lifeboat/guard/{identifier}.json")
    host.check_output("virsh undefine %s", name)


def test_libvirt_asks_the_hook(host: Host, domain: tuple[str, str]) -> None:
    """Libvirt knows of the hook without having been restarted: a guarded VM is refused with the reason."""
    name, identifier = domain
    guard = {
        "cause": "released",
        "sentence": "it runs at backup1 since its evacuation",
        "job": "test",
        "epoch": 2,
        "since": 0,
    }
    host.check_output("mkdir -p /var/lib/lifeboat/guard")
    host.check_output("printf '%%s' %s > %s", json.dumps(guard), f"/var/lib/lifeboat/guard/{identifier}.json")
    refused = host.run("virsh start %s", name)
    assert refused.rc != 0
    assert guard["sentence"] in refused.stderr
    host.check_output("rm %s", f"/var/lib/lifeboat/guard/{identifier}.json")
    host.check_output("virsh start %s", name)


def test_second_run_changes_nothing(lab_playbook: RunPlaybook, site_setup: PlaybookResult) -> None:
    assert site_setup.return_code == 0
    # Since then other tests on the same lab may have set it up otherwise.
    lab_playbook("site_setup").require_success()
    again = lab_playbook("site_setup").require_success()
    assert again.changed_tasks == []
    dry = lab_playbook("site_setup", check=True).require_success()
    assert dry.changed_tasks == []


def test_changed_setting_restarts_the_proxy_once(
    lab: Lab, lab_playbook: RunPlaybook, site_setup: PlaybookResult
) -> None:
    assert site_setup.return_code == 0
    host = lab_host(lab, "home1")
    before = host.check_output("systemctl show precache-proxy -p MainPID --value")
    settings = {"precache_proxy_rpo_seconds": 33, "precache_proxy_image_directories": ["/var/lib/libvirt"]}
    change = {"variables": settings, "options": ("--limit", "home1")}
    dry = lab_playbook("site_setup", check=True, **change).require_success()
    assert any("Configure the proxy" in task for task in dry.changed_tasks)
    assert host.check_output("systemctl show precache-proxy -p MainPID --value") == before
    lab_playbook("site_setup", **change).require_success()
    assert host.check_output("systemctl show precache-proxy -p MainPID --value") != before
    assert "rpo_seconds = 33.0" in host.file("/etc/lifeboat/precache_proxy.toml").content_string
    # Told where images lie, it may write nowhere else, and still serves.
    assert "ProtectSystem=strict" in host.check_output("systemctl show precache-proxy -p ProtectSystem")
    pid = host.check_output("systemctl show precache-proxy -p MainPID --value")
    assert host.run(f"nsenter -t {pid} -m touch /srv/lifeboat-was-here").rc != 0
    assert host.run(f"nsenter -t {pid} -m touch /var/lib/libvirt/images/.lifeboat-test").rc == 0
    host.check_output("rm /var/lib/libvirt/images/.lifeboat-test")
    assert proxy_status(host)["name"] == "home1"
    lab_playbook("site_setup", options=("--limit", "home1")).require_success()


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"lifeboat_peer": ""}, ["home1: has no peer", "backup1: has no peer"]),
        ({"lifeboat_peer": "home1"}, ["home1: is its own peer"]),
        ({"lifeboat_peer": "nowhere"}, ["home1: its peer nowhere is not among the hypervisors"]),
        ({"lifeboat_site": "same"}, ["stands at the same site, same"]),
        ({"precache_proxy_rpo_seconds": 0}, ["rpo_seconds"]),
        ({"lifeboat_rate": "0Mbit/s"}, ["rate_bytes_per_second"]),
        (
            {"precache_proxy_scratch_limit": "many", "precache_proxy_slice": "1GB/s"},
            ["scratch_limit", "slice"],
        ),
    ],
    ids=["no-peer", "peer-is-self", "unknown-peer", "same-site", "rpo-0", "rate-0", "two-sizes"],
)
def test_bad_input_is_told_and_changes_nothing(
    lab_playbook: RunPlaybook,
    site_setup: PlaybookResult,
    variables: dict[str, object],
    told: list[str],
) -> None:
    assert site_setup.return_code == 0
    result = lab_playbook("site_setup", variables=variables)
    assert result.return_code != 0
    assert result.changed_tasks == []
    for sentence in told:
        assert sentence in result.messages
