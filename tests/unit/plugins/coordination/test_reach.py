# SPDX-License-Identifier: GPL-3.0-or-later
"""Connection variables: understood whole, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._reach import host_and_port, read


@pytest.fixture(autouse=True)
def no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


def test_what_is_usual_is_understood(tmp_path: Path) -> None:
    reach, findings = read(
        "kvm1",
        {
            "ansible_host": "2001:db8::1",
            "ansible_port": "2222",
            "ansible_user": "ops",
            "ansible_become": True,
            "ansible_private_key_file": "~/key",
            "ansible_become_password": "secret",
            "ansible_timeout": 5,
            "ansible_python_interpreter": "/usr/bin/python3",
            "ansible_ssh_pipelining": True,
            "ansible_ssh_common_args": "-J jump@gate:2200 -o ControlPersist=60s -o StrictHostKeyChecking=no",
        },
    )
    assert findings == []
    assert (reach.host, reach.port, reach.user, reach.jumps) == (
        "2001:db8::1",
        2222,
        "ops",
        ("jump@gate:2200",),
    )
    assert (reach.keys, reach.become, reach.become_password) == ((str(tmp_path / "key"),), True, "secret")
    assert not reach.check_host_key
    assert reach.timeout_seconds == 5.0


def test_a_configuration_file_is_read(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(
        f"Host kvm*\n  User root\n  Port 2201\n  IdentityFile {tmp_path}/id\n"
        f"  UserKnownHostsFile {tmp_path}/known\n"
        "  StrictHostKeyChecking accept-new\n  IdentitiesOnly yes\n  ControlMaster auto\n"
    )
    reach, findings = read("kvm1", {"ansible_ssh_common_args": f"-F {config}"})
    assert findings == []
    assert (reach.user, reach.port, reach.keys) == ("root", 2201, (f"{tmp_path}/id",))
    assert reach.known_hosts == (f"{tmp_path}/known",)
    assert reach.accept_new_host_key
    assert reach.only_keys


@pytest.mark.parametrize(
    ("variables", "subject"),
    [
        ({"ansible_connection": "community.docker.docker"}, "ansible_connection"),
        ({"ansible_become_method": "doas"}, "ansible_become_method"),
        ({"ansible_become_user": "operator"}, "ansible_become_user"),
        ({"ansible_ssh_executable": "/opt/ssh"}, "ansible_ssh_executable"),
        ({"ansible_private_key": "-----BEGIN"}, "ansible_private_key"),
        ({"ansible_ssh_private_key": "-----BEGIN"}, "ansible_ssh_private_key"),
        ({"ansible_private_key_passphrase": "secret"}, "ansible_private_key_passphrase"),
        ({"ansible_paramiko_proxy_command": "nc"}, "ansible_paramiko_proxy_command"),
        ({"ansible_ssh_common_args": "-o ProxyCommand=nc"}, "proxycommand"),
        ({"ansible_ssh_extra_args": "-W host:22"}, "ansible_ssh_extra_args"),
        ({"ansible_ssh_common_args": "-F /none/such"}, "cannot be read"),
    ],
)
def test_what_matters_and_is_not_understood_is_refused(variables: dict[str, object], subject: str) -> None:
    _reach, findings = read("kvm1", variables)
    assert findings
    assert subject in str(findings[0])
    assert all(finding.way_out for finding in findings)


def test_without_become_nothing_is_said_of_its_user() -> None:
    reach, findings = read("kvm1", {"ansible_become": "false", "ansible_become_user": "operator"})
    assert findings == []
    assert not reach.become


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("gate", ("gate", None)),
        ("gate:2200", ("gate", 2200)),
        ("2001:db8::1", ("2001:db8::1", None)),
        ("[2001:db8::1]", ("2001:db8::1", None)),
        ("[2001:db8::1]:2200", ("2001:db8::1", 2200)),
    ],
)
def test_addresses_of_jump_hosts(address: str, expected: tuple[str, int | None]) -> None:
    assert host_and_port(address) == expected


def test_a_jump_host_is_reached_as_its_own_entry_says(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(
        "Host gate\n  HostName gate.example.org\n  User gatekeeper\n  Port 2200\n"
        f"  IdentityFile {tmp_path}/gate\n  UserKnownHostsFile {tmp_path}/known-gate\n"
        "Host kvm*\n  User ops\n  ProxyJump gate\n"
    )
    variables = {"ansible_ssh_common_args": f"-F {config}", "ansible_password": "secret"}
    reach, findings = read("kvm1", variables)
    assert findings == []
    (hop,) = reach.hops
    assert (hop.host, hop.user, hop.port) == ("gate.example.org", "gatekeeper", 2200)
    assert (hop.keys, hop.known_hosts) == ((f"{tmp_path}/gate",), (f"{tmp_path}/known-gate",))
    assert hop.password == "secret", "as sshpass offers it to whoever asks"
    reach, _findings = read("kvm1", {**variables, "ansible_ssh_extra_args": "-J me@gate:2222,second"})
    assert [(hop.user, hop.port) for hop in reach.hops] == [("me", 2222), ("ops", 22)]
    config.write_text("Host gate\n  ProxyCommand nc %h %p\nHost kvm*\n  ProxyJump gate\n")
    _reach, (finding,) = read("kvm1", variables)
    assert "jump host gate: SSH option proxycommand: is 'nc" in str(finding)


def test_both_files_of_known_hosts_are_heeded(tmp_path: Path) -> None:
    reach, findings = read("kvm1", {"ansible_ssh_common_args": f"-o GlobalKnownHostsFile={tmp_path}/all"})
    assert (findings, reach.global_known_hosts) == ([], (f"{tmp_path}/all",))


def test_paramikos_own_word_for_the_host_key_is_heeded() -> None:
    assert not read("kvm1", {"ansible_paramiko_host_key_checking": "false"})[0].check_host_key
    assert read("kvm1", {})[0].check_host_key


def test_what_is_no_number_and_what_cannot_be_read_are_findings_all_at_once() -> None:
    _reach, findings = read(
        "kvm1",
        {
            "ansible_port": "ssh",
            "ansible_timeout": "soon",
            "ansible_ssh_common_args": "-o 'User=ops",
            "ansible_ssh_extra_args": "-o Port=many -o ConnectTimeout=-1 -J gate:none",
        },
    )
    told = " | ".join(map(str, findings))
    for part in (
        "ansible_port: is 'ssh'",
        "ansible_timeout: is 'soon'",
        "ansible_ssh_common_args: cannot be read as a command line",
        "SSH option port: is 'many'",
        "SSH option connecttimeout: is '-1'",
        "ProxyJump: is 'gate:none'",
    ):
        assert part in told, part
    assert len(findings) == 6
