# SPDX-License-Identifier: GPL-3.0-or-later
"""The control API ``/v1``: HTTP and JSON on a UNIX socket (docs/mobility.md describes every answer)."""

from __future__ import annotations

import contextlib
import grp
import json
import logging
import os
import xml.etree.ElementTree as ET
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from aiohttp import web

from mobility_agent.control import metrics
from mobility_agent.control.parts import Parts
from mobility_agent.errors import Conflict, Finding, InvalidInput, MobilityError, NotFound
from mobility_agent.gateway import outlook
from mobility_agent.gateway.definition import Place, VmNetwork, bridges_elsewhere, read_definition
from mobility_agent.messages.options import HandoffIndicator
from mobility_agent.typed_reader import conclude
from mobility_agent.typed_reader import request as reader_of

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_MAX_EPOCH = (1 << 63) - 1


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except MobilityError as error:
        return web.json_response(error.as_dict(), status=error.http_status)
    except web.HTTPException as error:
        told: dict[str, Any] = {
            "cause": "not-found" if error.status == 404 else "invalid",
            "message": f"{request.method} {request.path}: {error.reason}; see docs/mobility.md",
            "findings": [],
        }
        return web.json_response(told, status=error.status)
    except Exception:
        logger.exception("request %s %s failed", request.method, request.path)
        failed = MobilityError(
            f"{request.method} {request.path}: failed inside the agent; see journalctl -u mobility-agent"
        )
        return web.json_response(failed.as_dict(), status=500)


async def _body(request: web.Request) -> Any:
    text = await request.text()
    if not text.strip():
        return {}
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidInput(f"request: the body is no JSON ({error}); see docs/mobility.md") from error


def _defined(text: Any) -> VmNetwork:
    try:
        return read_definition(str(text))
    except ET.ParseError as error:
        raise InvalidInput(f"request: the definition is no XML ({error}); give the domain's") from error


def _as_json(findings: list[Finding]) -> list[dict[str, str]]:
    return [{"subject": f.subject, "fact": f.fact, "way_out": f.way_out, "cause": f.cause} for f in findings]


class Api:
    """The handlers; every one reads the parts as they are now."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def application(self) -> web.Application:
        """The aiohttp application with all routes."""
        application = web.Application(middlewares=[_errors_as_json], client_max_size=1 << 20)
        application.add_routes(
            [
                web.get("/v1/status", self._status),
                web.get("/v1/check", self._check),
                web.get("/v1/vms", self._vms),
                web.get("/v1/vms/{vm}", self._vm),
                web.post("/v1/vms/{vm}/arrive", self._arrive),
                web.post("/v1/vms/{vm}/depart", self._depart),
                web.post("/v1/vms/{vm}/hold", self._hold),
                web.post("/v1/vms/{vm}/outlook", self._outlook),
                web.get("/v1/bindings", self._bindings),
                web.get("/v1/bindings/{vm}", self._binding),
                web.get("/metrics", self._metrics),
            ]
        )
        return application

    async def _status(self, _unused: web.Request) -> web.Response:
        parts, config = self._parts, self._parts.config
        answer: dict[str, Any] = {
            "name": config.name,
            "state": parts.state,
            "address": str(config.address),
            "tunnel_address": str(config.tunnel_address),
            "messages": dict(sorted(parts.transport.counters.items())),
            "gateway": None if parts.gateway is None else parts.gateway.status(),
            "anchor": None if parts.anchor is None else parts.anchor.status(),
        }
        if parts.moves is not None:
            answer["hypervisor"] = "up" if parts.moves.hypervisor.up else "down"
        return web.json_response(answer)

    async def _check(self, _unused: web.Request) -> web.Response:
        findings = list(self._parts.path.findings())
        gateway = self._parts.gateway
        for name, told in gateway.status()["anchors"].items() if gateway is not None else ():
            subject = f"anchor {name}"
            if told["state"] != "up":
                way_out = "see its journal: it is down, unreachable, or has another key"
                findings.append(Finding(subject, "does not answer", way_out, "unreachable"))
            elif abs(told["clock_offset_seconds"]) > 1:
                fact = f"its clock is {told['clock_offset_seconds']:.1f} s off this host's"
                findings.append(Finding(subject, fact, "set both by NTP", "clock"))
        for bridge in self._parts.config.bridges if gateway is not None else ():
            if not self._parts.path.has_device(bridge.name):
                findings.append(
                    Finding(f"bridge {bridge.name}", "is not there", "start its network", "not-found")
                )
        findings += gateway.holds.findings() if gateway is not None else []
        findings += self._parts.learner.findings() if self._parts.learner is not None else []
        return web.json_response({"name": self._parts.config.name, "findings": _as_json(findings)})

    async def _vms(self, _unused: web.Request) -> web.Response:
        gateway = self._parts.the_gateway()
        return web.json_response({"vms": [gateway.describe(known) for known in gateway.attachments.all()]})

    async def _vm(self, request: web.Request) -> web.Response:
        gateway, vm = self._parts.the_gateway(), request.match_info["vm"]
        known = gateway.attachments.get(vm)
        if known is None:
            raise NotFound(f"VM {vm}: not known to this gateway; see `mobility-agent status`")
        return web.json_response(gateway.describe(known))

    async def _arrive(self, request: web.Request) -> web.Response:
        """A VM is about to run here; what the request leaves out is taken from its definition."""
        gateway = self._parts.the_gateway()
        gateway.give_way()
        findings: list[Finding] = []
        values = await _body(request)
        place: Place | None = None
        if isinstance(values, dict):
            vm, defined = request.match_info["vm"], "definition" in values
            values, place = await self._completed(vm, values)
            if defined and not values.get("addresses"):
                # Whoever tells of every VM need not know which of them keep their addresses.
                return web.json_response({"vm": vm, "state": "no-home-address"})
        told = reader_of(values, findings)
        vm = told.uuid("vm")
        homes, mac, bridge = told.homes("addresses"), told.mac("mac"), told.text("bridge")
        epoch = told.whole("epoch", None, 0, _MAX_EPOCH)
        wait_seconds = told.seconds("wait_seconds", 0, 0, 60)
        evident = told.boolean("evident", default=False)
        conclude(told, findings)
        answer = await gateway.arrive(
            vm,
            homes,
            mac,
            bridge,
            epoch,
            handoff=HandoffIndicator.BETWEEN_GATEWAYS,
            evident=evident,
            wait_seconds=wait_seconds,
            cards=None if place is None else place.cards,
        )
        for complaint in place.complaints(vm) if place is not None else ():
            logger.warning("%s", complaint)
        return web.json_response(answer)

    async def _completed(self, vm: str, values: dict[str, Any]) -> tuple[dict[str, Any], Place | None]:
        """What the request says, then its definition, then libvirt, then what was known before."""
        whole = {"vm": vm, **values}
        definition = whole.pop("definition", None)
        moves, gateway = self._parts.moves, self._parts.the_gateway()
        found = _defined(definition) if definition is not None else None
        if {"addresses", "mac", "bridge"} <= whole.keys():
            return whole, None
        place = self._place(found)
        # An interface of a libvirt network has its bridge in the live definition only.
        if moves is not None and (found is None or (found.homes and place is None)):
            live = await moves.hypervisor.read(vm)
            found, place = found or live, self._place(live)
        if "addresses" not in whole:
            known = gateway.attachments.get(vm)
            homes = gateway.follows(vm, found.homes) if found is not None else ()
            if not homes and definition is None and known is not None:
                homes = known.homes
            if homes:
                whole["addresses"] = [str(home) for home in homes]
        if place is not None:
            whole.setdefault("bridge", place.bridge)
            whole.setdefault("mac", place.mac)
        return whole, place

    def _place(self, network: VmNetwork | None) -> Place | None:
        """On which of our bridges it is, and with which MACs."""
        ours = {bridge.name for bridge in self._parts.config.bridges}
        return network.place(ours) if network else None

    async def _depart(self, request: web.Request) -> web.Response:
        """A VM runs here no more: it went ``to`` a gateway, or was stopped (``withdraw``)."""
        gateway = self._parts.the_gateway()
        findings: list[Finding] = []
        told = reader_of(await _body(request), findings)
        to = told.text("to") if told.has("to") else None
        withdraw = told.boolean("withdraw", default=False)
        conclude(told, findings)
        if to is not None and withdraw:
            raise InvalidInput(
                "request: both to and withdraw are given; a VM that went elsewhere is not withdrawn"
            )
        tunnel = None if to is None else self._parts.tunnel_of(to)
        return web.json_response(await gateway.depart(request.match_info["vm"], tunnel, withdraw=withdraw))

    async def _hold(self, request: web.Request) -> web.Response:
        """A VM stands still here for the end of its move, still does (``longer``), or goes on (``end``)."""
        gateway, vm = self._parts.the_gateway(), request.match_info["vm"]
        findings: list[Finding] = []
        told = reader_of(await _body(request), findings)
        end, longer = told.boolean("end", default=False), told.boolean("longer", default=False)
        conclude(told, findings)
        if end and longer:
            raise InvalidInput(
                "request: both end and longer are given; a VM that goes on stands still no longer"
            )
        if gateway.attachments.get(vm) is None:
            raise NotFound(f"VM {vm}: not known to this gateway; see `mobility-agent status`")
        if end:
            gateway.runs_again(vm)
        held = gateway.hold_longer(vm) if longer else not end and gateway.hold(vm)
        return web.json_response({"vm": vm, "held": held})

    async def _outlook(self, request: web.Request) -> web.Response:
        """Would this VM keep its addresses, coming here (``arriving``) or leaving from here?"""
        gateway = self._parts.the_gateway()
        findings: list[Finding] = []
        told = reader_of(await _body(request), findings)
        definition = told.text("definition")
        arriving = told.boolean("arriving", default=False)
        conclude(told, findings)
        found = replace(_defined(definition), vm=request.match_info["vm"])
        facts: list[Finding] = []
        if found.homes and arriving:
            facts = outlook.of_arrival(gateway, found, bridges_elsewhere(definition, gateway.bridges))
        elif found.homes:
            facts = outlook.of_departure(gateway, found)
        homes = [str(home) for home in found.homes]
        return web.json_response({"vm": found.vm, "addresses": homes, "findings": _as_json(facts)})

    async def _bindings(self, request: web.Request) -> web.Response:
        anchor = self._parts.the_anchor()
        every = request.query.get("all") == "true"
        shown = [binding for binding in anchor.table.all() if binding.active or every]
        return web.json_response({"bindings": [anchor.describe(binding) for binding in shown]})

    async def _binding(self, request: web.Request) -> web.Response:
        anchor, vm = self._parts.the_anchor(), request.match_info["vm"]
        binding = anchor.table.get(vm)
        if binding is None:
            raise NotFound(f"VM {vm}: no binding here; see `mobility-agent bindings`")
        return web.json_response(anchor.describe(binding))

    async def _metrics(self, _unused: web.Request) -> web.Response:
        text = metrics.render(self._parts)
        return web.Response(
            body=text.encode(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )


class ControlServer:
    """The API on its socket: 0660, root and the operators' group."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen. Raises Conflict when the socket cannot be made."""
        path = self._parts.config.control_socket
        runner = web.AppRunner(Api(self._parts).application(), access_log=None, handle_signals=False)
        await runner.setup()
        # The lock says that no other agent serves here: what lies there is left over.
        path.unlink(missing_ok=True)
        # Never open to more than it shall be, not even for an instant.
        before = os.umask(0o117)
        try:
            await web.UnixSite(runner, str(path)).start()
        except OSError as error:
            await runner.cleanup()
            raise Conflict(
                f"control socket {path}: cannot be made ({error}); is {path.parent} there?"
            ) from error
        finally:
            os.umask(before)
        try:
            os.chown(path, -1, grp.getgrnam(self._parts.config.group).gr_gid)
        except (KeyError, PermissionError) as error:
            logger.warning("control socket %s: is root's alone (%s)", path, error)
        self._runner = runner

    async def stop(self) -> None:
        """Answer no more."""
        if self._runner is None:
            return
        await self._runner.cleanup()
        self._runner = None
        with contextlib.suppress(OSError):
            self._parts.config.control_socket.unlink()
