# SPDX-License-Identifier: GPL-3.0-or-later
"""The command line: ``mobility-agent run|status|check|vms|bindings|arrive|depart``."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from pathlib import Path
from typing import Any

from mobility_agent import __version__
from mobility_agent.config import DEFAULT_PATH, DEFAULT_RUN, load, parse
from mobility_agent.datapath.bridges import judge_host
from mobility_agent.errors import ConfigurationError, MobilityError, Unreachable


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mobility-agent", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--config", type=Path, default=DEFAULT_PATH, help="default: %(default)s")
    parser.add_argument(
        "--socket", type=Path, default=DEFAULT_RUN / "mobility.sock", help="default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print the answer as it came")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="serve; what systemd starts")
    run.add_argument("--verbose", action="store_true", help="log routine refreshes too")
    test = commands.add_parser("test-config", help="read the configuration and say what is wrong with it")
    test.add_argument(
        "--stdin", action="store_true", help='{"config": ..., "keys": ..., "host": ...} from standard input'
    )
    commands.add_parser("status", help="what this agent does")
    commands.add_parser("check", help="what stands in the way; ends with 2 when something does")
    commands.add_parser("vms", help="on a gateway: VMs here, and gone from here")
    bindings = commands.add_parser("bindings", help="on an anchor: who is where")
    bindings.add_argument("--all", action="store_true", help="withdrawn ones too")
    arrive = commands.add_parser("arrive", help="a VM is about to run here")
    arrive.add_argument("vm", help="its UUID")
    arrive.add_argument("--epoch", type=int, required=True)
    arrive.add_argument(
        "--address", action="append", dest="addresses", help="a home address; may be repeated"
    )
    arrive.add_argument("--mac")
    arrive.add_argument("--bridge")
    arrive.add_argument("--wait-seconds", type=float)
    depart = commands.add_parser("depart", help="a VM runs here no more")
    depart.add_argument("vm", help="its UUID")
    depart.add_argument("--to", help="the gateway that it went to")
    depart.add_argument("--withdraw", action="store_true", help="it runs nowhere")
    return parser.parse_args()


async def _ask(socket: Path, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    # Not where a configuration is only judged: the controller has no aiohttp.
    import aiohttp  # noqa: PLC0415

    connector = aiohttp.UnixConnector(path=str(socket))
    try:
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.request(method, f"http://agent{path}", json=body) as response,
        ):
            answer: dict[str, Any] = await response.json()
    except (aiohttp.ClientError, OSError) as error:
        raise Unreachable(
            f"{socket}: no agent answers ({error}); see `systemctl status mobility-agent`"
        ) from error
    if response.status >= 400:
        failure = MobilityError(str(answer.get("message", "the agent gave no reason")))
        raise failure
    return answer


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in padded)


def _render(command: str, answer: dict[str, Any]) -> str:
    if command == "bindings":
        rows = [["VM", "ADDRESSES", "GATEWAY", "CARE-OF", "EPOCH", "STATE"]]
        rows += [
            [b["vm"], " ".join(b["addresses"]), b["gateway"], b["care_of"], str(b["epoch"]), b["state"]]
            for b in answer["bindings"]
        ]
        return _table(rows)
    if command == "vms":
        rows = [["VM", "ADDRESSES", "BRIDGE", "EPOCH", "STATE", "ACKNOWLEDGED BY"]]
        rows += [
            [
                v["vm"],
                " ".join(v["addresses"]),
                v["bridge"],
                str(v["epoch"]),
                f"{v['state']} to {v['to']}" if v["to"] else v["state"],
                " ".join(v["acknowledged"]),
            ]
            for v in answer["vms"]
        ]
        return _table(rows)
    if command == "check":
        findings = answer["findings"]
        return "\n".join(f"{f['subject']}: {f['fact']}; {f['way_out']}" for f in findings) or "all is well"
    return json.dumps(answer, indent=2)


def _judge_host(told: dict[str, Any]) -> None:
    """Judge what is not on a host yet, and the host for it. Raises ConfigurationError with everything."""
    sentences: list[str] = []
    try:
        parse(told["config"], told["keys"])
    except ConfigurationError as error:
        sentences.append(error.message)
    sentences += [str(finding) for finding in judge_host(told["host"])] if "host" in told else []
    if sentences:
        raise ConfigurationError("\n".join(sentences))


async def _client(arguments: argparse.Namespace) -> int:
    match arguments.command:
        case "status" | "check" | "vms":
            answer = await _ask(arguments.socket, "GET", f"/v1/{arguments.command}")
        case "bindings":
            answer = await _ask(arguments.socket, "GET", f"/v1/bindings?all={str(arguments.all).lower()}")
        case "arrive":
            keys = ("epoch", "addresses", "mac", "bridge", "wait_seconds")
            body = {key: value for key in keys if (value := getattr(arguments, key)) is not None}
            answer = await _ask(arguments.socket, "POST", f"/v1/vms/{arguments.vm}/arrive", body)
        case _:
            body = {"withdraw": arguments.withdraw} | ({"to": arguments.to} if arguments.to else {})
            answer = await _ask(arguments.socket, "POST", f"/v1/vms/{arguments.vm}/depart", body)
    print(json.dumps(answer) if arguments.json else _render(arguments.command, answer))
    return 2 if answer.get("findings") else 0


def main() -> int:
    """Run the command; returns the exit code."""
    arguments = _arguments()
    try:
        if arguments.command == "test-config":
            if arguments.stdin:
                _judge_host(json.load(sys.stdin))
            else:
                load(arguments.config)
            print("no fault found")
            return 0
        if arguments.command == "run":
            level = logging.DEBUG if arguments.verbose else logging.INFO
            logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
            logging.getLogger("asyncio").setLevel(logging.WARNING)
            config = load(arguments.config)
            # Anchors need neither libvirt nor the rest of the daemon to answer a question.
            from mobility_agent.daemon import serve  # noqa: PLC0415

            asyncio.run(serve(config))
            return 0
        return asyncio.run(_client(arguments))
    except MobilityError as error:
        print(f"mobility-agent: {error.message}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
