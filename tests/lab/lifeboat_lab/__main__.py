# SPDX-License-Identifier: GPL-3.0-or-later
"""Command line of the lab: `python3 -m lifeboat_lab up | down | status | wan | exec | kill-host | ...`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from lifeboat_lab.errors import LabError
from lifeboat_lab.guests import commands as guest_commands
from lifeboat_lab.lab import Lab, clean
from lifeboat_lab.profiles import PROFILES


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(
        prog="lab",
        description="A two-site lab on this machine. LIFEBOAT_LAB names it (default lab), "
        "LIFEBOAT_LAB_HOSTS chooses hosts, LIFEBOAT_LAB_SUITE is trixie or bookworm.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("up", help="build the lab, or what is missing of it, and switch everything on")
    commands.add_parser("down", help="remove it: processes, mounts, namespaces, disks (cached images stay)")
    commands.add_parser("clean", help="delete cached images that no lab is built on")
    commands.add_parser("status", help="what there is, as JSON")
    execute = commands.add_parser("exec", help="run a command on a host, or in router, client or controller")
    execute.add_argument("member")
    execute.add_argument("arguments", nargs=argparse.REMAINDER, metavar="COMMAND ...")
    for name, text in (
        ("kill-host", "power cut: links down, every process killed"),
        ("shut-down-host", "orderly power-off"),
        ("start-host", "switch a host on again"),
    ):
        commands.add_parser(name, help=text).add_argument("host")
    guest_commands.add_parser(commands)
    wan = commands.add_parser(
        "wan",
        help=f"{', '.join(PROFILES)}, rate=..,rtt=..,loss=.. | cut | heal | status | counters | check",
    )
    wan.add_argument("action")
    wan.add_argument("--from", dest="source", help="cut: only what leaves this site; check: from this host")
    wan.add_argument(
        "--to", dest="destination", help="cut: only what is sent to this site; check: to this host"
    )
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it was done, 1 with one sentence when it was not."""
    options = parser().parse_args(arguments)
    try:
        return _run(options)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lab: interrupted", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    lab = Lab(say=lambda text: print(f"lab: {text}", flush=True))
    name = lab.settings.name
    if options.command == "up":
        changed = lab.up()
        print(f"lab: {name} is up{'' if changed else ' already'}: {', '.join(lab.hosts)}")
    elif options.command == "down":
        print(f"lab: {name} is gone" if lab.down() else f"lab: there is no lab {name}")
    elif options.command == "clean":
        print("\n".join(f"lab: deleted {path}" for path in clean()) or "lab: nothing to delete")
    elif options.command == "status":
        print(json.dumps(lab.status(), indent=2))
    elif options.command == "exec":
        return _exec(lab, options)
    elif options.command == "guest":
        return guest_commands.run(lab, options)
    elif options.command == "wan":
        return _wan(lab, options)
    elif options.command == "kill-host":
        lab.kill_host(options.host)
    elif options.command == "shut-down-host":
        lab.shut_down_host(options.host)
    elif options.command == "start-host":
        lab.start_host(options.host)
    return 0


def _exec(lab: Lab, options: argparse.Namespace) -> int:
    command = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    if not command:
        raise LabError(f"exec {options.member}: no command given; write it after the name")
    line = lab.command(options.member, command)
    # In place of this process: signals, terminal and exit code are the command's own.
    os.execvpe(line[0], line, os.environ | {"LIFEBOAT_LAB": lab.settings.name})


def _wan(lab: Lab, options: argparse.Namespace) -> int:
    wan = lab.wan
    if options.action == "cut":
        wan.cut(options.source, options.destination)
    elif options.action == "heal":
        wan.heal()
    elif options.action == "status":
        print(json.dumps(wan.status(), indent=2))
    elif options.action == "counters":
        print(json.dumps(wan.counters(), indent=2))
    elif options.action == "check":
        hosts = lab.hosts
        source = options.source or next(name for name, host in hosts.items() if host.plan.site == "home")
        destination = options.destination or next(
            (name for name, host in hosts.items() if host.plan.site == "backup"), "client"
        )
        check = wan.check(source, destination)
        print(
            f"{check.profile}: round trip {check.round_trip_seconds * 1000:.2f} ms "
            f"(profile {check.expected_round_trip_seconds * 1000:g}), goodput "
            f"{check.goodput_bits_per_second / 1e6:.1f} Mbit/s "
            f"(profile {check.expected_bits_per_second / 1e6 or 'unlimited'}), relay "
            f"{check.relay_processor_share:.0%} of one processor: "
            f"{'holds' if check.holds else 'DOES NOT HOLD'}"
        )
        return 0 if check.holds else 1
    else:
        wan.set(options.action)
    return 0


if __name__ == "__main__":
    sys.exit(main())
