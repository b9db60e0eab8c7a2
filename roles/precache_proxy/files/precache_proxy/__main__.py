# SPDX-License-Identifier: GPL-3.0-or-later
"""The command ``precache-proxy``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from precache_proxy import __version__
from precache_proxy.config import DEFAULT_PATH, load
from precache_proxy.control import commands
from precache_proxy.control.client import Client
from precache_proxy.errors import LifeboatError

DEFAULT_SOCKET = Path("/run/lifeboat/control.sock")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="precache-proxy",
        description="Copies running VMs' disks to a peer ahead of time and hands the VMs over.",
    )
    top.add_argument("--version", action="version", version=f"precache-proxy {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--socket", type=Path, default=DEFAULT_SOCKET, help="control socket (default: %(default)s)"
    )
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--json", action="store_true", help="print the answer as JSON")
    configured = argparse.ArgumentParser(add_help=False)
    configured.add_argument(
        "--config", type=Path, default=DEFAULT_PATH, help="configuration file (default: %(default)s)"
    )
    sub = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = sub.add_parser("run", parents=[configured], help="serve (systemd starts this)")
    run.add_argument("--check-config", action="store_true", help="judge the configuration and end")
    run.add_argument(
        "--log-level", choices=("debug", "info", "warning"), default="info", help="default: %(default)s"
    )

    status = sub.add_parser("status", parents=[common, output], help="links, VMs, lag, replicas, jobs")
    status.add_argument("vm", nargs="?", help="only this protected VM (name or UUID)")

    check = sub.add_parser(
        "check",
        parents=[common, output],
        help="is all well? ends with 0 ok, 1 warning, 2 critical, 3 unknown",
    )
    check.add_argument("--nagios", action="store_true", help="print as a Nagios plugin does")

    verify = sub.add_parser(
        "verify",
        parents=[common, output],
        help="compare a replica with its source by digests; 1 if they differ",
    )
    verify.add_argument("vm", help="name or UUID of a VM that is protected here")

    settle = sub.add_parser("settle", parents=[common, output], help="decide an undecided evacuation")
    settle.add_argument("job", help="the job, or the VM's name or UUID")
    settle.add_argument(
        "decision",
        choices=("source-dead", "keep-at-source"),
        help="source-dead: the source has lost power for good, start the VM here, at the destination (if you "
        "are not sure that it is off, do not say so); keep-at-source: the VM stays where it was",
    )

    fail_over = sub.add_parser(
        "fail-over",
        parents=[common, output],
        help="run a VM whose home is dead here, from the last sealed generation of its replica",
    )
    fail_over.add_argument("vm", help="name or UUID of a VM whose replica is here")
    fail_over.add_argument(
        "--source-is-dead",
        action="store_true",
        help="you vouch that its home has lost power, or surely does not run it, and accept that what was "
        "written there since that generation is lost; without it you are only told which one it is",
    )

    sub.add_parser("connect", parents=[common], help="bridge standard input and output to the control socket")
    sub.add_parser(
        "watchdog", parents=[configured], help="end backups that a dead proxy left open (systemd starts this)"
    )
    return top


def _execute(arguments: argparse.Namespace) -> int:
    if arguments.command == "run":
        config = load(arguments.config)
        if arguments.check_config:
            print(f"{arguments.config}: good")
            return 0
        # Only here, so that status and check work where libvirt's or libnbd's bindings do not.
        from precache_proxy.daemon import run  # noqa: PLC0415

        return run(config, arguments.config, arguments.log_level)
    if arguments.command == "watchdog":
        from precache_proxy.control import watchdog  # noqa: PLC0415

        return watchdog.run(load(arguments.config))
    if arguments.command == "connect":
        return commands.connect(arguments.socket)
    client = Client(arguments.socket)
    output = commands.Output.of_terminal(as_json=arguments.json)
    if arguments.command == "status":
        return commands.status(client, output, arguments.vm)
    if arguments.command == "check":
        return commands.check(client, output, nagios=arguments.nagios)
    if arguments.command == "verify":
        return commands.verify(client, output, arguments.vm)
    if arguments.command == "fail-over":
        return commands.fail_over(client, output, arguments.vm, source_is_dead=arguments.source_is_dead)
    return commands.settle(client, output, arguments.job, arguments.decision)


def main(argv: list[str] | None = None) -> int:
    """Run one command; every error a person can cause or mend is one sentence on stderr."""
    arguments = parser().parse_args(argv)
    try:
        return _execute(arguments)
    except LifeboatError as error:
        print(f"precache-proxy: {error.message}", file=sys.stderr)
        for finding in error.findings:
            if str(finding) not in error.message:
                print(f"  {finding}", file=sys.stderr)
        # `check` speaks Nagios: whatever went wrong there is "unknown".
        return 3 if arguments.command == "check" else error.exit_code
    except BrokenPipeError:
        # The reader (head, less) has seen enough; Python must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
