# SPDX-License-Identifier: GPL-3.0-or-later
"""The `lab guest ...` commands."""

import argparse
import json
from dataclasses import MISSING, asdict, fields
from typing import TYPE_CHECKING, Any

from lifeboat_lab.guests.plan import WORKLOADS, GuestPlan

if TYPE_CHECKING:
    from lifeboat_lab.lab import Lab

# Options of `define`: every field of a plan that has a simple default.
_OPTIONS = [option for option in fields(GuestPlan) if option.default is not MISSING]


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `guest` and its own commands."""
    guest = commands.add_parser("guest", help="define, start, ask and check guests")
    actions = guest.add_subparsers(dest="action", required=True, metavar="ACTION")
    define = actions.add_parser("define", help="make disks with real content and define the domain")
    define.add_argument("host")
    define.add_argument("name")
    for option in _OPTIONS:
        name = "--" + option.name.replace("_", "-")
        if isinstance(option.default, bool):
            define.add_argument(name, action="store_true", default=option.default)
        else:
            text = f"some of {','.join(WORKLOADS)}; " if option.name == "workload" else ""
            define.add_argument(name, type=type(option.default), default=option.default,
                                help=f"{text}default {option.default}")  # fmt: skip
    for action, text in (
        ("start", "start it and wait until it is ready"),
        ("destroy", "pull its plug"),
        ("told", "what it told so far, in short"),
        ("verify", "check disks, records and content"),
    ):
        one = actions.add_parser(action, help=text)
        one.add_argument("name")
        one.add_argument("--host", help="default: where it was defined")
    ask = actions.add_parser("ask", help="canary | status | run COMMAND ... | poweroff")
    ask.add_argument("name")
    ask.add_argument("question", nargs=argparse.REMAINDER)
    actions.add_parser("remove", help="undefine it everywhere and delete its images").add_argument("name")
    actions.add_parser("list", help="all guests and where they are, as JSON")


def run(lab: "Lab", options: argparse.Namespace) -> int:
    """Run one `guest` command; 1 when a check found something missing."""
    if options.action == "define":
        values: dict[str, Any] = {option.name: getattr(options, option.name) for option in _OPTIONS}
        guest = lab.guests.define(options.host, GuestPlan(name=options.name, **values))
        print(f"lab: {guest.name} is defined on {options.host}, address {guest.address}")
        return 0
    if options.action == "list":
        print(json.dumps([{"name": g.name, "home": g.home, "address": g.address, "states": g.states()}
                          for g in lab.guests.all()], indent=2, ensure_ascii=False))  # fmt: skip
        return 0
    guest = lab.guests.get(options.name)
    if options.action == "start":
        guest.start(options.host)
        guest.wait_ready(host=options.host)
    elif options.action == "destroy":
        guest.destroy(options.host)
    elif options.action == "remove":
        guest.remove()
    elif options.action == "ask":
        print(guest.ask(" ".join(options.question)))
    elif options.action == "told":
        told = guest.told()
        print(f"boots {told.boots}, beats {len(told.beats)}, longest gap {told.longest_gap_seconds():.3f} s, "
              f"acknowledged {told.highest_acknowledged}, "
              f"committed {told.highest_committed}, canary {told.canaries[-1:]}, "
              f"errors {told.errors}")  # fmt: skip
    elif options.action == "verify":
        verdict = guest.verify(options.host or guest.home)
        print(json.dumps(asdict(verdict) | {"intact": verdict.intact}, indent=2, ensure_ascii=False))
        return 0 if verdict.intact else 1
    return 0
