# SPDX-License-Identifier: GPL-3.0-or-later
"""The control API ``/v1``: HTTP and JSON on a UNIX socket (docs/control-api.md describes every answer)."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web

from precache_proxy.control import answers, link_measurement, metrics, requests
from precache_proxy.control.checks import run_checks
from precache_proxy.control.hypervisor_room import room_answer
from precache_proxy.control.parts import Parts
from precache_proxy.control.workload import measure_workload
from precache_proxy.errors import Conflict, Finding, InvalidInput, LifeboatError, NotFound
from precache_proxy.evacuation.addresses import stops
from precache_proxy.evacuation.job import Mode
from precache_proxy.processor_wait import processor_wait
from precache_proxy.typed_reader import REQUIRED

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_POLL_SECONDS = 0.2
_MEASURE_SECONDS = 2.0
_HTTP_CAUSES = {404: "not-found", 405: "invalid", 413: "invalid"}


def _failure(error: LifeboatError, status: int | None = None) -> web.Response:
    return web.json_response(error.as_dict(), status=status or error.http_status)


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except LifeboatError as error:
        return _failure(error)
    except web.HTTPException as error:
        told = {
            "cause": _HTTP_CAUSES.get(error.status, "invalid"),
            "message": f"{request.method} {request.path}: {error.reason}; see docs/control-api.md",
            "findings": [],
        }
        return web.json_response(told, status=error.status)
    except Exception:
        logger.exception("request %s %s failed", request.method, request.path)
        return _failure(
            LifeboatError(
                f"{request.method} {request.path}: failed inside the proxy; see journalctl -u precache-proxy"
            )
        )


class Api:
    """The handlers; every one reads the parts as they are now."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._measured_at = float("-inf")

    async def _measure(self) -> None:
        """Ask QEMU how far the replicas are behind, not more often than that means something."""
        now = time.monotonic()
        if now - self._measured_at < _MEASURE_SECONDS:
            return
        self._measured_at = now
        # A libvirt that hangs must not take the status with it: the last known lag is told then.
        with contextlib.suppress(LifeboatError, TimeoutError):
            async with asyncio.timeout(_MEASURE_SECONDS):
                await self._parts.source.measure_lags()

    def application(self) -> web.Application:
        """The aiohttp application with all routes."""
        application = web.Application(middlewares=[_errors_as_json], client_max_size=1 << 20)
        application.add_routes(
            [
                web.get("/v1/status", self._status),
                web.get("/v1/check", self._check),
                web.get("/v1/hypervisor", self._hypervisor),
                web.get("/v1/vms", self._vms),
                web.get("/v1/vms/{vm}", self._vm),
                web.put("/v1/vms/{vm}", self._protect),
                web.delete("/v1/vms/{vm}", self._unprotect),
                web.post("/v1/vms/{vm}/pass", self._pass),
                web.post("/v1/vms/{vm}/postpone", self._postpone),
                web.post("/v1/vms/{vm}/verify", self._verify),
                web.post("/v1/vms/{vm}/resync", self._resync),
                web.get("/v1/replicas", self._replicas),
                web.get("/v1/replicas/{vm}", self._replica),
                web.get("/v1/replicas/{vm}/fail-over", self._look_at_fail_over),
                web.post("/v1/replicas/{vm}/fail-over", self._fail_over),
                web.get("/v1/evacuations", self._evacuations),
                web.post("/v1/evacuations", self._begin),
                web.post("/v1/evacuations/check", self._preflight),
                web.post("/v1/workload", self._workload),
                web.post("/v1/coordinator", self._coordinator),
                web.get("/v1/evacuations/{job}", self._evacuation),
                web.post("/v1/evacuations/{job}/cancel", self._cancel),
                web.post("/v1/evacuations/{job}/steer", self._steer),
                web.post("/v1/evacuations/{job}/settle", self._settle),
                web.get("/v1/links", self._links),
                web.patch("/v1/links/{peer}", self._set_link),
                web.post("/v1/links/{peer}/measure", self._measure_link),
                web.get("/v1/arrivals", self._arrivals),
                web.get("/metrics", self._metrics),
            ]
        )
        return application

    async def _status(self, _request: web.Request) -> web.Response:
        await self._measure()
        return web.json_response(await answers.proxy_answer(self._parts))

    async def _check(self, _request: web.Request) -> web.Response:
        await self._measure()
        results = await run_checks(self._parts)
        return web.json_response({"name": self._parts.config.name, "checks": answers.as_json(results)})

    async def _hypervisor(self, _request: web.Request) -> web.Response:
        return web.json_response(await room_answer(self._parts))

    async def _vms(self, _request: web.Request) -> web.Response:
        await self._measure()
        unprotected = await answers.unprotected_answer(self._parts)
        return web.json_response({"vms": answers.vms_answer(self._parts), "unprotected": unprotected})

    async def _vm(self, request: web.Request) -> web.Response:
        await self._measure()
        return web.json_response(answers.find_vm(self._parts, request.match_info["vm"]))

    async def _protect(self, request: web.Request) -> web.Response:
        vm = request.match_info["vm"]
        values = await requests.body(request)
        try:
            present: answers.Answer | None = answers.find_vm(self._parts, vm)
        except NotFound:
            present = None
        wanted = requests.protection(vm, values, present, self._parts)
        if requests.flag(request, "check_only", default=False):
            notes = await self._parts.source.check(wanted)
            plan = {"present": requests.present_protection(present), "wanted": requests.as_plan(wanted)}
            return web.json_response({**plan, "notes": notes})
        status = await self._parts.source.protect(wanted)
        return web.json_response(answers.vm_answer(status), status=200 if present else 201)

    async def _unprotect(self, request: web.Request) -> web.Response:
        vm = answers.find_vm(self._parts, request.match_info["vm"])
        keep = requests.flag(request, "keep_replica", default=True)
        await self._parts.source.unprotect(vm["uuid"], keep_replica=keep)
        return web.json_response(
            {"uuid": vm["uuid"], "name": vm["name"], "state": "unprotected", "replica_kept": keep}
        )

    async def _pass(self, request: web.Request) -> web.Response:
        vm = answers.find_vm(self._parts, request.match_info["vm"])
        result = await self._parts.source.run_pass(vm["uuid"], reason="asked for")
        return web.json_response(answers.as_json(result))

    async def _postpone(self, request: web.Request) -> web.Response:
        values = self._obeyed(await requests.body(request))
        vm = answers.find_vm(self._parts, request.match_info["vm"])
        seconds = requests.postponement(values)
        status = self._parts.source.postpone(vm["uuid"], seconds)
        return web.json_response(answers.vm_answer(status))

    async def _verify(self, request: web.Request) -> web.Response:
        vm = answers.find_vm(self._parts, request.match_info["vm"])
        return web.json_response(answers.as_json(await self._parts.source.verify(vm["uuid"])))

    async def _resync(self, request: web.Request) -> web.Response:
        vm = answers.find_vm(self._parts, request.match_info["vm"])
        return web.json_response(answers.as_json(await self._parts.source.resync(vm["uuid"])))

    async def _replicas(self, _request: web.Request) -> web.Response:
        return web.json_response({"replicas": await answers.replicas_answer(self._parts)})

    async def _replica(self, request: web.Request) -> web.Response:
        vm = request.match_info["vm"]
        for replica in await answers.replicas_answer(self._parts):
            if vm in {replica.get("vm"), replica.get("uuid"), replica.get("name")}:
                return web.json_response(replica)
        raise NotFound(f"replica of {vm!r}: none on {self._parts.config.name}; see `precache-proxy status`")

    async def _look_at_fail_over(self, request: web.Request) -> web.Response:
        told = await self._parts.evacuation.look_at_fail_over(request.match_info["vm"])
        return web.json_response(answers.as_json(told))

    async def _fail_over(self, request: web.Request) -> web.Response:
        findings: list[Finding] = []
        told = requests.reader(await requests.body(request), findings)
        source_is_dead = told.boolean("source_is_dead", default=False)
        requests.conclude(told, findings)
        vm = request.match_info["vm"]
        arrival = await self._parts.evacuation.fail_over(vm, source_is_dead=source_is_dead)
        return web.json_response(arrival.as_dict())

    async def _evacuations(self, request: web.Request) -> web.Response:
        vm = request.query.get("vm")
        jobs = answers.jobs_answer(self._parts)
        if vm is not None:
            jobs = [job for job in jobs if vm in {job.get("vm"), job.get("name")}]
        return web.json_response({"evacuations": jobs})

    async def _begin(self, request: web.Request) -> web.Response:
        vm, options = requests.evacuation(self._obeyed(await requests.body(request)))
        job = await self._parts.evacuation.begin(vm, options=options)
        return web.json_response(answers.job_answer(job), status=202)

    async def _preflight(self, request: web.Request) -> web.Response:
        findings: list[Finding] = []
        told = requests.reader(await requests.body(request), findings)
        vm = told.text("vm", REQUIRED)
        restarts = requests.mode(told, findings) is Mode.RESTART
        requests.conclude(told, findings)
        facts = await self._parts.evacuation.check(vm, restarts=restarts)
        found = [answers.as_json(finding) | {"stops": stops(finding)} for finding in facts]
        return web.json_response({"vm": vm, "findings": found})

    async def _evacuation(self, request: web.Request) -> web.Response:
        """One job; held until it ends, its step is not ``?step=``, or ``?wait_seconds=`` are over."""
        identifier, step = request.match_info["job"], request.query.get("step")
        until = time.monotonic() + requests.wait_seconds(request)
        while True:
            job = answers.find_job(self._parts, identifier)
            moved = step is not None and job.get("step") != step
            # An undecided job may stay so for ever, until a person decides.
            settled = job["ended"] or job.get("step") == "undecided"
            if settled or moved or time.monotonic() >= until or self._parts.state != "running":
                return web.json_response(job)
            await asyncio.sleep(_POLL_SECONDS)

    async def _cancel(self, request: web.Request) -> web.Response:
        self._obeyed(await requests.body(request))
        identifier = answers.find_job(self._parts, request.match_info["job"])["id"]
        job = await self._parts.evacuation.cancel(identifier)
        return web.json_response(answers.job_answer(job), status=202)

    async def _steer(self, request: web.Request) -> web.Response:
        wanted = requests.steering(self._obeyed(await requests.body(request)))
        identifier = answers.find_job(self._parts, request.match_info["job"])["id"]
        evacuation = self._parts.evacuation
        if wanted.shares:
            job = evacuation.share(identifier, wanted.share_bytes_per_second, wanted.for_seconds)
        if wanted.bandwidth_bytes_per_second is not None:
            job = await evacuation.steer(identifier, wanted.bandwidth_bytes_per_second)
        if wanted.pause_guest:
            job = await evacuation.pause_guest(identifier)
        return web.json_response(answers.job_answer(job))

    async def _workload(self, request: web.Request) -> web.Response:
        findings: list[Finding] = []
        told = requests.reader(await requests.body(request), findings)
        seconds = told.duration("seconds", 1.0, 1.0, 10.0)
        requests.conclude(told, findings)
        names = {str(vm["uuid"]): str(vm["name"]) for vm in answers.vms_answer(self._parts)}
        return web.json_response(await measure_workload(self._parts.hypervisor, names, round(seconds)))

    async def _coordinator(self, request: web.Request) -> web.Response:
        """Ask for the lease; no error where another has it, for whoever asks wants to know who that is."""
        asked = requests.coordination(await requests.body(request))
        lease = self._parts.lease
        granted = lease.ask(asked.coordinator, asked.who, asked.for_seconds, take_over=asked.take_over)
        told = {"granted": granted, "coordinator": lease.told()}
        await lease.keep()
        return web.json_response(told)

    def _obeyed(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """An order's body without the epoch that it was decided under. Raises TakenOver, InvalidInput."""
        epoch, rest = requests.under(values)
        self._parts.lease.check(epoch, self._parts.config.name)
        return rest

    async def _settle(self, request: web.Request) -> web.Response:
        findings: list[Finding] = []
        told = requests.reader(await requests.body(request), findings)
        decision = told.text("decision", REQUIRED)
        if decision and decision not in requests.DECISIONS:
            way_out = f"write one of {', '.join(requests.DECISIONS)}"
            findings.append(Finding("request: decision", f"is {decision!r}", way_out))
        requests.conclude(told, findings)
        settled = await self._parts.evacuation.settle(request.match_info["job"], decision)
        return web.json_response(answers.find_job(self._parts, str(settled["id"])))

    async def _links(self, _request: web.Request) -> web.Response:
        links = answers.links_answer(self._parts)
        return web.json_response({"links": links, "processor_wait": processor_wait()})

    async def _set_link(self, request: web.Request) -> web.Response:
        peer = request.match_info["peer"]
        answers.link_answer(self._parts, peer)
        values = await requests.body(request)
        if "rate_bytes_per_second" not in values:
            raise InvalidInput(
                f"peer {peer}: no rate_bytes_per_second given; give a rate, or null for no limit"
            )
        findings: list[Finding] = []
        told = requests.reader(values, findings)
        rate = told.rate("rate_bytes_per_second")
        requests.conclude(told, findings)
        self._parts.channel.links[peer].set_rate(rate)
        logger.info("rate to %s set to %s", peer, rate or "no limit", extra={"peer": peer})
        return web.json_response(answers.link_answer(self._parts, peer))

    async def _measure_link(self, request: web.Request) -> web.Response:
        peer = request.match_info["peer"]
        answers.link_answer(self._parts, peer)
        findings: list[Finding] = []
        told = requests.reader(await requests.body(request), findings)
        seconds = told.duration("seconds", 3.0, 0.5, link_measurement.LONGEST_SECONDS)
        requests.conclude(told, findings)
        measured = await link_measurement.measure(self._parts.channel.links[peer], seconds)
        return web.json_response({"peer": peer, **measured})

    async def _arrivals(self, _request: web.Request) -> web.Response:
        return web.json_response({"arrivals": answers.arrivals_answer(self._parts)})

    async def _metrics(self, _request: web.Request) -> web.Response:
        await self._measure()
        text = metrics.render(await answers.proxy_answer(self._parts))
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


class ControlServer:
    """The API on its socket: 0660, root and the operators' group."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen. Raises Conflict when the socket cannot be made."""
        path = self._parts.config.paths.control_socket
        runner = web.AppRunner(Api(self._parts).application(), access_log=None, handle_signals=False)
        await runner.setup()
        # The flock on proxy.lock says that no other proxy serves here: what lies there is left over.
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
        self._give_to_group()
        self._runner = runner

    def _give_to_group(self) -> None:
        path, group = self._parts.config.paths.control_socket, self._parts.config.control.group
        try:
            os.chown(path, -1, grp.getgrnam(group).gr_gid)
        except KeyError:
            logger.warning("group %s: not on this host; the control socket is root's alone", group)
        except PermissionError:
            logger.warning("control socket %s: not given to group %s: not running as root", path, group)

    async def stop(self) -> None:
        """Answer no more; requests under way are cut after a moment."""
        if self._runner is None:
            return
        await self._runner.cleanup()
        self._runner = None
        with contextlib.suppress(OSError):
            self._parts.config.paths.control_socket.unlink()
