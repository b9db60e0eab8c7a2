# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""How the inventory says that a host is reached: understood whole, or refused with every finding.

What is ignored in silence would show in the worst hour; so a connection variable that matters and that is not
understood here is a finding.
"""

from __future__ import annotations

import math
import os
import shlex
import typing as t
from dataclasses import dataclass, replace

from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import Finding

try:
    import paramiko
except ImportError:
    # The action plugin says so before anything here is used.
    paramiko = None  # type: ignore[assignment]

Variables = t.Mapping[str, t.Any]

CONNECTIONS = (
    "ssh",
    "smart",
    "paramiko",
    "paramiko_ssh",
    "ansible.builtin.ssh",
    "local",
    "ansible.builtin.local",
)
# Understood; what else begins with these is refused.
_ARGUMENTS = ("ansible_ssh_args", "ansible_ssh_common_args", "ansible_ssh_extra_args")
_REFUSED = {
    "ansible_ssh_executable": "paramiko is used instead",
    "ansible_pkcs11_provider": "keys on tokens are reached through an agent",
    "ansible_ssh_pkcs11_provider": "keys on tokens are reached through an agent",
    "ansible_private_key": "a key is read from a file, or held by an agent",
    "ansible_ssh_private_key": "a key is read from a file, or held by an agent",
    "ansible_private_key_passphrase": "a key with a passphrase is held by an agent",
    "ansible_ssh_private_key_passphrase": "a key with a passphrase is held by an agent",
    "ansible_paramiko_proxy_command": "a jump host is named by ProxyJump",
    "ansible_paramiko_host": "the host is named by ansible_host",
    "ansible_paramiko_port": "the port is named by ansible_port",
    "ansible_paramiko_user": "the user is named by ansible_user",
    "ansible_paramiko_pass": "the password is named by ansible_password",
    "ansible_paramiko_password": "the password is named by ansible_password",
    "ansible_paramiko_private_key_file": "the key is named by ansible_private_key_file",
    "ansible_ssh_proxy_command": "a jump host is named by ProxyJump",
    "ansible_become_exe": "sudo is used",
    "ansible_become_flags": "sudo is used as it is",
    "ansible_sudo_flags": "sudo is used as it is",
}
# They change how ssh behaves, not whom it reaches and as whom.
_HARMLESS_OPTIONS = frozenset({
    "controlmaster", "controlpath", "controlpersist", "batchmode", "loglevel", "serveraliveinterval",
    "serveralivecountmax", "tcpkeepalive", "compression", "addressfamily", "forwardagent",
    "forwardx11", "preferredauthentications", "passwordauthentication", "kbdinteractiveauthentication",
    "pubkeyauthentication", "gssapiauthentication", "visualhostkey", "requesttty", "host",
    "hashknownhosts", "sendenv", "updatehostkeys", "checkhostip", "numberofpasswordprompts",
})  # fmt: skip
_TIMEOUT_SECONDS = 10.0
_TIMEOUT = ("ansible_timeout", "ansible_ssh_timeout", "ansible_paramiko_timeout")
_HOST_KEY_CHECKING = (
    "ansible_host_key_checking",
    "ansible_ssh_host_key_checking",
    "ansible_paramiko_host_key_checking",
)

Note = t.Callable[[str, str, str], None]


@dataclass(frozen=True)
class Reach:
    """Everything that it takes to run a command on a host."""

    name: str
    local: bool = False
    host: str = ""
    port: int = 22
    user: str = ""
    password: str | None = None
    keys: tuple[str, ...] = ()
    only_keys: bool = False
    known_hosts: tuple[str, ...] = ()
    global_known_hosts: tuple[str, ...] = ()
    check_host_key: bool = True
    accept_new_host_key: bool = False
    jumps: tuple[str, ...] = ()
    # The jump hosts, each as it is reached through the one before it.
    hops: tuple[Reach, ...] = ()
    timeout_seconds: float = _TIMEOUT_SECONDS
    become: bool = False
    become_password: str | None = None


def read(name: str, variables: Variables) -> tuple[Reach, list[Finding]]:
    """How a host is reached, and what of its variables cannot be followed."""
    findings: list[Finding] = []

    def note(variable: str, fact: str, way_out: str) -> None:
        findings.append(Finding(f"{name}: {variable}", fact, way_out))

    connection = str(variables.get("ansible_connection") or "ssh")
    if connection not in CONNECTIONS:
        note(
            "ansible_connection",
            f"is {connection!r}",
            "use ssh (or local): the coordinator speaks SSH itself",
        )
    for variable, why in _REFUSED.items():
        if variables.get(variable) and str(variables[variable]) not in {"ssh", "sudo"}:
            note(variable, f"is not followed: {why}", "take it out, or use the module host_evacuation")
    become, findings_of_become = _become(name, variables)
    findings += findings_of_become
    told = Reach(
        name,
        local=connection.endswith("local"),
        host=str(variables.get("ansible_host") or variables.get("ansible_ssh_host") or name),
        user=str(variables.get("ansible_user") or variables.get("ansible_ssh_user") or ""),
        password=_secret(variables, "ansible_password", "ansible_ssh_password", "ansible_ssh_pass"),
        check_host_key=_flag(_first(variables, _HOST_KEY_CHECKING), True),
        become=become,
        become_password=_secret(
            variables, "ansible_become_password", "ansible_become_pass", "ansible_sudo_pass"
        ),
    )
    timeout = _number(_first(variables, _TIMEOUT), "ansible_timeout", note)
    if timeout is not None:
        told = replace(told, timeout_seconds=timeout)
    key = variables.get("ansible_private_key_file") or variables.get("ansible_ssh_private_key_file")
    if key:
        told = replace(told, keys=(os.path.expanduser(str(key)),))
    options: list[tuple[str, str]] = []
    config = ""
    for variable in _ARGUMENTS:
        try:
            parsed, file, wrong = _arguments(str(variables.get(variable) or ""))
        except ValueError as error:
            note(variable, f"cannot be read as a command line ({error})", "close the quotes")
            continue
        options += parsed
        config = file or config
        for argument in wrong:
            note(
                variable,
                f"holds {argument!r}, which is not understood",
                "see docs/coordination.md for what is",
            )
    port = variables.get("ansible_port") or variables.get("ansible_ssh_port")
    # As ssh does: the command line first, then the configuration file, first come first served.
    for option, value in options + _configured(config, told.host, told, note):
        told = _apply(told, option, value, note)
    number = _number(port, "ansible_port", note)
    if number is not None:
        told = replace(told, port=int(number))
    if not told.user and not told.local:
        told = replace(told, user=str(variables.get("remote_user") or os.environ.get("USER") or "root"))
    return replace(told, hops=tuple(_hop(told, jump, config, note) for jump in told.jumps)), findings


def _hop(target: Reach, jump: str, config: str, note: Note) -> Reach:
    """How a jump host is reached: as its own entry of the configuration says, else as its target is.

    The password is offered to it, too, as Ansible's ssh does: whoever asks for one is answered.
    """
    user, _at, address = jump.rpartition("@")
    try:
        name, port = host_and_port(address)
    except ValueError:
        note("ProxyJump", f"is {jump!r}, whose port is no number", "write user@host:port")
        return target
    hop = Reach(
        f"{target.name}: jump host {name}",
        host=name,
        user=user,
        password=target.password,
        check_host_key=target.check_host_key,
        accept_new_host_key=target.accept_new_host_key,
        timeout_seconds=target.timeout_seconds,
    )

    def of_hop(variable: str, fact: str, way_out: str) -> None:
        note(f"jump host {name}: {variable}", fact, way_out)

    for option, value in _configured(config, name, hop, of_hop):
        hop = _apply(hop, option, value, of_hop)
    if hop.jumps:
        of_hop("ProxyJump", f"is {','.join(hop.jumps)!r}", f"name them all at {target.name}, with commas")
    return replace(
        hop,
        port=port or hop.port,
        user=hop.user or target.user,
        keys=hop.keys or target.keys,
        only_keys=hop.only_keys or target.only_keys,
        known_hosts=hop.known_hosts or target.known_hosts,
    )


def host_and_port(address: str) -> tuple[str, int | None]:
    """The parts of ``host``, ``host:port``, ``[IPv6]:port``; no port is None. Raises ValueError."""
    if address.startswith("["):
        host, _bracket, rest = address[1:].partition("]")
        text = rest.removeprefix(":")
    else:
        host, mark, text = address.partition(":")
        # Several colons: an IPv6 address without a port.
        if mark and ":" in text:
            return address, None
    if not text:
        return host, None
    if not 0 < int(text) < 65536:
        raise ValueError(text)
    return host, int(text)


def _first(variables: Variables, names: t.Sequence[str]) -> object:
    return next((variables[name] for name in names if variables.get(name) is not None), None)


def _number(value: object, variable: str, note: Note) -> float | None:
    """A number above 0; a finding where something else is written; None where nothing is."""
    if value is None or value == "":
        return None
    try:
        number = float(str(value))
    except ValueError:
        number = -1.0
    if math.isfinite(number) and number > 0:
        return number
    note(variable, f"is {value!r}, which is no number above 0", "write one")
    return None


def _secret(variables: Variables, *names: str) -> str | None:
    for name in names:
        if variables.get(name):
            return str(variables[name])
    return None


def _flag(value: object, usual: bool) -> bool:
    if value is None:
        return usual
    return str(value).strip().lower() not in {"false", "no", "off", "0", ""}


def _become(name: str, variables: Variables) -> tuple[bool, list[Finding]]:
    findings: list[Finding] = []
    become = _flag(variables.get("ansible_become"), True)
    method = str(variables.get("ansible_become_method") or "sudo")
    if become and method not in {"sudo", "ansible.builtin.sudo"}:
        findings.append(
            Finding(f"{name}: ansible_become_method", f"is {method!r}", "use sudo, or log in as root")
        )
    user = str(variables.get("ansible_become_user") or "root")
    if become and user != "root":
        findings.append(
            Finding(
                f"{name}: ansible_become_user",
                f"is {user!r}",
                "use root; or set ansible_become=false for a user in the group lifeboat",
            )
        )
    return become, findings


def _arguments(text: str) -> tuple[list[tuple[str, str]], str, list[str]]:
    """Options, the configuration file and what was not understood, of arguments of ssh."""
    options: list[tuple[str, str]] = []
    config, wrong = "", []
    words = shlex.split(text)
    letters = {"-i": "identityfile", "-p": "port", "-l": "user", "-J": "proxyjump"}
    while words:
        word = words.pop(0)
        flag, value = word[:2], word[2:]
        if flag in {"-F", "-o", *letters} and not value:
            if not words:
                wrong.append(word)
                break
            value = words.pop(0)
        if flag == "-F":
            config = os.path.expanduser(value)
        elif flag == "-o":
            key, mark, setting = value.partition("=")
            if not mark:
                key, _space, setting = value.partition(" ")
            options.append((key.strip().lower(), setting.strip().strip('"')))
        elif flag in letters:
            options.append((letters[flag], value))
        elif word not in {"-C", "-q", "-T", "-4", "-6", "-A", "-a", "-x"}:
            wrong.append(word)
    return options, config, wrong


def _configured(config: str, host: str, told: Reach, note: Note) -> list[tuple[str, str]]:
    """What an ssh configuration file says of a host; the user's own where no other is named."""
    path = config or os.path.expanduser("~/.ssh/config")
    if told.local or (not config and not os.path.exists(path)):
        return []
    try:
        parsed = paramiko.SSHConfig.from_path(path).lookup(host)
    except (OSError, paramiko.SSHException) as error:
        note(
            "ansible_ssh_common_args",
            f"names {path}, which cannot be read ({error})",
            "mend it or take it out",
        )
        return []
    told_options: list[tuple[str, str]] = []
    for key, value in parsed.items():
        # paramiko gives some as lists, and the host's name always.
        if key == "hostname" and value == host:
            continue
        values: t.Any = value
        told_options += [(key, str(item)) for item in (values if isinstance(values, list) else [values])]
    return told_options


def _apply(told: Reach, option: str, value: str, note: Note) -> Reach:
    if option in _HARMLESS_OPTIONS:
        return told
    if option == "hostname":
        return replace(told, host=value)
    if option == "user":
        return told if told.user else replace(told, user=value)
    if option == "port":
        number = _number(value, f"SSH option {option}", note)
        return replace(told, port=int(number)) if told.port == 22 and number is not None else told
    if option == "identityfile":
        return replace(told, keys=(*told.keys, os.path.expanduser(value)))
    if option == "identitiesonly":
        return replace(told, only_keys=_flag(value, False))
    if option == "userknownhostsfile":
        files = tuple(os.path.expanduser(path) for path in value.split())
        return told if told.known_hosts else replace(told, known_hosts=files)
    if option == "globalknownhostsfile":
        files = tuple(os.path.expanduser(path) for path in value.split())
        return told if told.global_known_hosts else replace(told, global_known_hosts=files)
    if option == "stricthostkeychecking":
        mode = value.lower()
        return replace(
            told,
            check_host_key=told.check_host_key and mode not in {"no", "off"},
            accept_new_host_key=mode == "accept-new",
        )
    if option == "connecttimeout":
        number = _number(value, f"SSH option {option}", note)
        return told if number is None else replace(told, timeout_seconds=number)
    if option == "proxyjump":
        return told if told.jumps or value == "none" else replace(told, jumps=tuple(value.split(",")))
    note(
        f"SSH option {option}", f"is {value!r}, which is not followed", "see docs/coordination.md for what is"
    )
    return told
