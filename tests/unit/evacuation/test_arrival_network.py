# SPDX-License-Identifier: GPL-3.0-or-later
"""How the proxy tells the mobility agent where a VM runs; the agent is a real server on a UNIX socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp import web

from precache_proxy.errors import Conflict, Finding
from precache_proxy.evacuation import addresses, confirm, standstill
from precache_proxy.evacuation.arrival import Arrival, ArrivalState
from precache_proxy.evacuation.arrival_network import MobilityAgent, NetworkNotInstalled, NothingToDo
from precache_proxy.evacuation.arrivals import Arrivals
from precache_proxy.evacuation.guard import Guard
from precache_proxy.evacuation.job import EvacuationOptions, Step, new_job
from precache_proxy.evacuation.reconcile import Presence
from precache_proxy.evacuation.standstill import Standstill
from precache_proxy.hypervisor.qemu_user import QemuUser

VM = "11111111-2222-4333-8444-555555555501"
JOB = new_job(VM, "web1", "backup1", 4, EvacuationOptions(), 0.0)


class Agent:
    """Answers with what ``answers`` holds, the last one for ever; keeps what it was asked."""

    def __init__(self, *answers: tuple[int, Any]) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, dict[str, Any]]] = []

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.append((request.path, await request.json()))
        status, body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return web.json_response(body, status=status)

    @asynccontextmanager
    async def serve(self, socket: Path) -> AsyncIterator[None]:
        application = web.Application()
        application.add_routes([web.post("/v1/vms/{vm}/{what}", self.answer)])
        runner = web.AppRunner(application)
        await runner.setup()
        await web.UnixSite(runner, str(socket)).start()
        yield
        await runner.cleanup()


def arrival() -> Arrival:
    return Arrival("j1", VM, "web1", "home1", 4, 7, ArrivalState.RELEASED)


async def test_an_arrival_is_told_with_its_epoch_and_definition(tmp_path: Path) -> None:
    agent, socket = Agent((200, {"state": "here"})), tmp_path / "agent.sock"
    told = arrival()
    async with agent.serve(socket):
        await MobilityAgent(socket, 2).install("<domain/>", told)
    expected = {"epoch": 4, "definition": "<domain/>", "evident": True}
    assert agent.asked == [(f"/v1/vms/{VM}/arrive", expected)]
    assert 0 < told.timings["network_seconds"] < 2


async def test_an_agent_that_is_just_starting_is_waited_for(tmp_path: Path) -> None:
    agent, socket = Agent((503, {"message": "starting"}), (200, {"state": "here"})), tmp_path / "agent.sock"
    async with agent.serve(socket):
        await MobilityAgent(socket, 5).install("<domain/>", arrival())
    assert len(agent.asked) == 2


@pytest.mark.parametrize(
    ("answer", "again"),
    [((200, {"held": True}), True), ((200, {"held": False}), True), ((503, {}), True),
     ((400, {"message": "longer: not known"}), False), ((404, {}), False)],
)  # fmt: skip
async def test_a_vm_that_stands_still_is_told_of_as_long_as_the_agent_can_make_use_of_it(
    tmp_path: Path, answer: tuple[int, Any], again: bool
) -> None:
    agent, socket = Agent(answer), tmp_path / "agent.sock"
    async with agent.serve(socket):
        assert await MobilityAgent(socket, 2).stands_still(JOB) is again
    assert agent.asked == [(f"/v1/vms/{VM}/hold", {"longer": True})]
    assert await MobilityAgent(socket, 2).stands_still(JOB), "it may be on its way back"
    assert not await NothingToDo().stands_still(JOB)


async def test_the_agent_is_told_while_it_stands_still_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standstill, "AGAIN_SECONDS", 0.05)
    agent, socket = Agent((200, {"held": True})), tmp_path / "agent.sock"
    async with agent.serve(socket):
        still = Standstill(MobilityAgent(socket, 2), JOB)
        await asyncio.sleep(0.2)
        assert agent.asked == []
        still.changed_here("suspended")
        still.changed_here("suspended")
        await asyncio.sleep(0.5)
        assert 3 <= len(agent.asked) <= 10
        still.changed_here("resumed")
        await asyncio.sleep(0.1)
        told = len(agent.asked)
        await asyncio.sleep(0.2)
        assert len(agent.asked) == told
        # Stopped once more, for its end.
        still.changed_here("suspended")
        await asyncio.sleep(0.3)
        await still.over()
        assert (now := len(agent.asked)) > told
        await asyncio.sleep(0.2)
        assert len(agent.asked) == now


async def test_a_silent_agent_holds_nothing_up_for_longer_than_it_may(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(NetworkNotInstalled, match=r"not within 0\.3 s.*mobility-agent check"):
        await MobilityAgent(tmp_path / "none.sock", 0.3).install("<domain/>", arrival())
    assert time.monotonic() - began < 2
    # What only makes things better must not keep a finished evacuation from ending.
    await MobilityAgent(tmp_path / "none.sock", 0.1).left(JOB)


async def test_a_refusal_is_told_at_once_in_the_agents_words(tmp_path: Path) -> None:
    agent, socket = Agent((400, {"message": "VM web1: 2001:db8::5 is in no home prefix"})), tmp_path / "a"
    async with agent.serve(socket):
        with pytest.raises(NetworkNotInstalled, match="is in no home prefix"):
            await MobilityAgent(socket, 30).install("<domain/>", arrival())
    assert len(agent.asked) == 1


async def test_the_source_has_sent_on_what_still_comes(tmp_path: Path) -> None:
    agent, socket = Agent((404, {"message": "not known"})), tmp_path / "agent.sock"
    async with agent.serve(socket):
        await MobilityAgent(socket, 2).left(JOB)
        await MobilityAgent(socket, 2).remove(arrival())
        await MobilityAgent(socket, 2).stayed("<domain/>", JOB)
    assert [(path.rpartition("/")[2], body) for path, body in agent.asked[:2]] == [
        ("depart", {"to": "backup1"}),
        ("depart", {"withdraw": True}),
    ]
    assert agent.asked[2][1] == {"epoch": JOB.epoch - 1, "definition": "<domain/>", "evident": True}


WITH_HOMES = """<domain><name>web1</name><metadata><m:addresses xmlns:m="urn:lifeboat:mobility:1">
<m:address>2001:db8::5</m:address></m:addresses></metadata></domain>"""


async def test_an_agent_is_asked_of_a_vm_that_has_home_addresses_and_of_no_other(tmp_path: Path) -> None:
    found = {"subject": "VM web1", "fact": "no gateway on br9", "way_out": "use vmbr0", "cause": "invalid"}
    agent, socket = Agent((200, {"findings": [found]})), tmp_path / "agent.sock"
    network = MobilityAgent(socket, 2)
    async with agent.serve(socket):
        assert await network.outlook(VM, "web1", "<domain/>", arriving=True) == []
        assert await network.outlook(VM, "web1", WITH_HOMES, arriving=True) == [Finding(**found)]
    assert agent.asked == [(f"/v1/vms/{VM}/outlook", {"definition": WITH_HOMES, "arriving": True})]


async def test_an_agent_that_says_nothing_is_a_finding_and_holds_nothing_up(tmp_path: Path) -> None:
    began = time.monotonic()
    [gone] = await MobilityAgent(tmp_path / "none.sock", 30).outlook(VM, "web1", WITH_HOMES, arriving=True)
    assert gone.fact.startswith("the mobility agent there cannot be asked of 2001:db8::5 (")
    agent, socket = Agent((404, {"message": "home1: is no gateway"})), tmp_path / "agent.sock"
    async with agent.serve(socket):
        [refused] = await MobilityAgent(socket, 2).outlook(VM, "web1", WITH_HOMES, arriving=False)
    assert "agent here cannot be asked of 2001:db8::5 (home1: is no gateway)" in refused.fact
    assert time.monotonic() - began < 5


async def test_an_agent_that_hangs_delays_no_evacuation_beyond_two_seconds(tmp_path: Path) -> None:
    """It accepts, and says nothing: with the longest ``wait_seconds`` the source's own limit would pass."""
    ended = asyncio.Event()

    async def hang(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), 60)
        writer.close()

    server = await asyncio.start_unix_server(hang, str(tmp_path / "agent.sock"))
    network, began = MobilityAgent(tmp_path / "agent.sock", 60), time.monotonic()
    try:
        answer = await asyncio.wait_for(addresses.at_destination(network, VM, "web1", WITH_HOMES), 10)
    finally:
        ended.set()
        server.close()
        await server.wait_closed()
    assert 1.5 < time.monotonic() - began < 5
    [found] = addresses.read_answer(answer, network, "web1", "backup1", WITH_HOMES)
    assert "cannot be asked of 2001:db8::5 (no answer within 2 s)" in found.fact
    assert not addresses.stops(found)


class Defective(NothingToDo):
    """Raises what nobody thought of."""

    leads_addresses = True

    async def outlook(self, *_unused: str, arriving: bool) -> list[Finding]:
        raise RuntimeError(f"arriving: {arriving}")


@pytest.mark.parametrize(
    "body", [[], None, "yes", {}, {"findings": 3}, {"findings": [3]}, {"findings": [{"subject": "VM web1"}]}]
)
async def test_an_answer_that_is_none_is_a_finding_that_stops_nothing(tmp_path: Path, body: Any) -> None:
    agent, network = Agent((200, body)), MobilityAgent(tmp_path / "agent.sock", 0.3)
    async with agent.serve(tmp_path / "agent.sock"):
        [found] = await addresses.at_source(network, VM, "web1", WITH_HOMES)
        if not isinstance(body, dict):
            await network.left(JOB)
            with pytest.raises(NetworkNotInstalled, match="no JSON object"):
                await network.install(WITH_HOMES, arrival())
    assert "cannot be asked of 2001:db8::5 (" in found.fact
    assert not addresses.stops(found)


async def test_no_question_about_addresses_raises(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torn = WITH_HOMES.removesuffix("</domain>")
    [found] = await addresses.at_source(MobilityAgent(tmp_path / "none.sock", 1), VM, "web1", torn)
    assert "cannot be asked of its home addresses (" in found.fact
    assert caplog.text == ""
    [here] = await addresses.at_source(Defective(), VM, "web1", WITH_HOMES)
    answer = await addresses.at_destination(Defective(), VM, "web1", WITH_HOMES)
    [there] = addresses.read_answer(answer, NothingToDo(), "web1", "backup1", WITH_HOMES)
    assert "RuntimeError('arriving: False')" in here.fact
    assert "RuntimeError('arriving: True')" in there.fact
    assert caplog.text.count("Traceback") == 2
    nonsense = {"address_findings": [{"of": "another version"}], "leads_addresses": True}
    [odd] = addresses.read_answer(nonsense, NothingToDo(), "web1", "backup1", WITH_HOMES)
    [cut] = addresses.read_answer({"leads_addresses": False}, Defective(), "web1", "backup1", torn)
    assert not any(addresses.stops(each) for each in (found, here, there, odd, cut))


async def test_what_the_destination_says_of_addresses_stops_nothing(tmp_path: Path) -> None:
    here, there = MobilityAgent(tmp_path / "a", 1), MobilityAgent(tmp_path / "b", 1)
    answer = json.loads(json.dumps(await addresses.at_destination(there, VM, "web1", WITH_HOMES)))
    [found] = addresses.read_answer(answer, here, "web1", "backup1", WITH_HOMES)
    assert str(found).startswith("VM web1: its addresses would not follow it to backup1: the mobility agent")
    assert not addresses.stops(found)
    assert addresses.stops(Finding("VM web1", "it is paused", "resume it", "conflict"))
    # Nobody leads addresses there, though somebody does here.
    answer = await addresses.at_destination(NothingToDo(), VM, "web1", WITH_HOMES)
    [found] = addresses.read_answer(answer, here, "web1", "backup1", WITH_HOMES)
    assert (found.cause, "no mobility agent is set up there" in found.fact) == ("network", True)
    for network, definition in ((NothingToDo(), WITH_HOMES), (here, "<domain/>")):
        assert addresses.read_answer(answer, network, "web1", "backup1", definition) == []
    # A peer of a version that does not say.
    assert addresses.read_answer({}, here, "web1", "backup1", WITH_HOMES) == []


@pytest.mark.parametrize(
    ("answer", "warning"),
    [
        ({"network_installed": True}, ""),
        (
            {"network_installed": False, "network": ""},
            "Its addresses may not lead there: VM web1: no agent; set one up",
        ),
        (
            {},
            "Whether its addresses lead there is not known (backup1's version does not say); before it left: "
            "VM web1: no agent; set one up",
        ),
        ({"network": "no answer"}, "Its addresses do not lead there yet; it is tried again: no answer"),
    ],
)
async def test_what_was_said_before_is_told_in_the_end_where_it_came_true(
    answer: dict[str, Any], warning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def call(*_arguments: object) -> dict[str, Any]:
        return {"state": "activated", **answer}

    async def enter(step: Step) -> None:
        entered.append(step)
        raise Conflict("no further here")

    entered: list[Step] = []
    job = replace(JOB, step=Step.RELEASED, address_findings=["VM web1: no agent; set one up"])
    measure = SimpleNamespace(activated=lambda _answer: None)
    departure = cast(
        Any, SimpleNamespace(job=job, call=call, measure=measure, around=None, enter=enter, unended=None)
    )
    for _time in range(2):
        with pytest.raises(Conflict, match="no further here"):
            await confirm.release(departure)
    assert entered == [Step.FINISH] * 2
    assert job.warning == warning
    # What was to be said already is said as well.
    job.warning = "It was cancelled."
    with pytest.raises(Conflict, match="no further here"):
        await confirm.release(departure)
    assert job.warning == f"It was cancelled. {warning}".strip()


async def test_an_answer_that_is_lost_leaves_it_open_whether_its_addresses_lead_there() -> None:
    async def enter(_step: Step) -> None:
        raise Conflict("no further here")

    departure = cast(Any, SimpleNamespace(job=replace(JOB, step=Step.RELEASED), around=None, enter=enter))
    with pytest.raises(Conflict):
        await confirm.finish(departure)
    assert departure.job.warning == "", "nothing was said against them"
    departure.job.address_findings = ["VM web1: no agent; set one up"]
    with pytest.raises(Conflict):
        await confirm.finish(departure)
    assert departure.job.warning == (
        "Whether its addresses lead there is not known (backup1's word on them was not heard); before it "
        "left: VM web1: no agent; set one up"
    )


async def test_a_memory_that_was_lost_is_told_to_the_operator() -> None:
    async def enter(_step: Step) -> None:
        raise Conflict("no further here")

    job = replace(JOB, step=Step.RELEASED, memory_lost=True)
    for _time in range(2):
        with pytest.raises(Conflict):
            await confirm.finish(cast(Any, SimpleNamespace(job=job, around=None, enter=enter)))
    assert job.warning == "It had to be started anew there: its memory was lost, its disks are whole."


class Network(NothingToDo):
    """Fails as often as it is told to."""

    def __init__(self, failures: int) -> None:
        self.failures, self.installed, self.removed = failures, 0, 0

    async def install(self, definition: str, arrival: Arrival) -> None:
        if self.failures:
            self.failures -= 1
            raise Conflict("the agent says no")
        self.installed += 1

    async def remove(self, arrival: Arrival) -> None:
        self.removed += 1


class Machines:
    """A libvirt with one VM that does as it is told."""

    presence_there = Presence.ARRIVED

    async def presence(self, _vm: str) -> Presence:
        return self.presence_there

    async def resume(self, _vm: str) -> None:
        self.presence_there = Presence.RUNNING

    async def destroy(self, _vm: str) -> None:
        self.presence_there = Presence.SHUT_OFF

    async def undefine(self, _vm: str) -> None:
        self.presence_there = Presence.ABSENT


async def _thaw(_vm: str) -> None:
    """A store that has nothing frozen."""


def arrivals(tmp_path: Path, network: Network) -> tuple[Arrivals, Machines]:
    state, run = tmp_path / "state", tmp_path / "run"
    state.mkdir()
    machines, guard = Machines(), Guard(state, run)
    guard.prepare_directories()
    made = Arrivals(
        state, run, cast(Any, machines), guard, cast(Any, SimpleNamespace(thaw=_thaw)), network,
        QemuUser(65534, 65534), presume_source_dead_after_seconds=None,
    )  # fmt: skip
    made.load()
    return made, machines


async def test_a_vm_runs_without_its_network_says_so_and_gets_it_later(tmp_path: Path) -> None:
    network = Network(failures=2)
    there, machines = arrivals(tmp_path, network)
    record = arrival()
    record.checkpoint = "tracked"
    await there.records.save(record)
    there.load()
    answer = await there.release("home1", {"job": "j1", "vm": VM})
    assert machines.presence_there is Presence.RUNNING
    assert "the agent says no" in answer["network"]
    (kept,) = there.records.all()
    await there.activation.install_owed_network(kept)
    assert kept.network_owed
    await there.activation.install_owed_network(kept)
    assert (kept.network_owed, kept.cause, network.installed) == (False, "", 1)
    there.load()
    assert [item.network_owed for item in there.records.all()] == [False]


@pytest.mark.parametrize("ends_as", [Presence.ARRIVED, Presence.ABSENT])
async def test_a_release_may_come_before_libvirt_has_ended_the_move(
    tmp_path: Path, ends_as: Presence
) -> None:
    """It is waited for; where it comes to nothing the VM is refused, and its source has it still."""
    there, machines = arrivals(tmp_path, Network(failures=0))
    record = arrival()
    record.state, record.checkpoint = ArrivalState.PREPARED, "tracked"
    await there.records.save(record)
    there.load()
    machines.presence_there = Presence.INCOMING
    releasing = asyncio.create_task(there.release("home1", {"job": "j1", "vm": VM}))
    await asyncio.sleep(0.1)
    assert not releasing.done()
    machines.presence_there = ends_as
    if ends_as is Presence.ABSENT:
        with pytest.raises(Conflict, match="did not arrive whole"):
            await asyncio.wait_for(releasing, 5)
        assert there.records.all()[0].state is ArrivalState.PREPARED
    else:
        assert (await asyncio.wait_for(releasing, 5))["state"] == "activated"
        assert machines.presence_there is Presence.RUNNING


async def test_a_release_that_is_taken_back_takes_its_network_back(tmp_path: Path) -> None:
    network = Network(failures=0)
    there, _unused = arrivals(tmp_path, network)
    await there.records.save(arrival())
    there.load()
    await there.abort("home1", {"job": "j1", "vm": VM, "kept_at_source": True})
    assert network.removed == 1
