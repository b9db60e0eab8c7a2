# SPDX-License-Identifier: GPL-3.0-or-later
"""The modules about home addresses and bindings: on libvirt's test driver, and on a served socket."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from ipaddress import IPv6Network
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any

import pytest

from mobility_agent.gateway.definition import read_definition

Run = Callable[..., dict[str, Any]]
PREFIXES = ["2001:db8:100::/64"]
VM = "11111111-2222-4333-8444-555555555501"


@pytest.fixture
def hypervisor(tmp_path: Path) -> Iterator[str]:
    """A libvirt with two VMs, kept as long as somebody is connected to it."""
    libvirt = pytest.importorskip("libvirt")
    domain = "<domain type='test'><name>{}</name><memory>8192</memory><os><type>hvm</type></os></domain>"
    path = tmp_path / "host.xml"
    path.write_text("<node>" + domain.format("web1") + domain.format("db ünd co") + "</node>")
    uri = f"test://{path}"
    # The driver's state goes with the connection: the modules get this very one.
    connection = libvirt.open(uri)
    opened = {"open": libvirt.open, "openReadOnly": libvirt.openReadOnly}
    libvirt.open = libvirt.openReadOnly = lambda _uri: connection
    yield uri
    libvirt.open, libvirt.openReadOnly = opened["open"], opened["openReadOnly"]
    connection.close()


CARDS = """<domain type='test'><name>cards</name><memory>8192</memory><os><type>hvm</type></os><devices>
<interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='vmbr0'/></interface>
<interface type='bridge'><mac address='52:54:00:00:00:02'/><source bridge='vmbr1'/></interface>
</devices></domain>"""


def test_an_address_is_given_to_a_card(run: Run, hypervisor: str) -> None:
    libvirt = pytest.importorskip("libvirt")
    libvirt.open(hypervisor).defineXML(CARDS)
    asked = {"libvirt_uri": hypervisor, "vm": "cards", "addresses": ["2001:db8:100::5", "2001:db8:100::6"]}
    by_mac = asked | {"cards": {"2001:DB8:100::6": "52:54:00:00:00:02"}}
    done = run("home_address", **by_mac)
    assert (done["changed"], done["vm"]["cards"]) == (True, {"2001:db8:100::6": "52:54:00:00:00:02"})
    assert run("home_address", **by_mac)["changed"] is False
    (told,) = run("home_address_info", libvirt_uri=hypervisor, vm="cards")["vms"]
    assert told["cards"] == done["vm"]["cards"]
    # Written as the agent reads it.
    place = read_definition(libvirt.open(hypervisor).lookupByName("cards").XMLDesc()).place(
        ["vmbr0", "vmbr1"]
    )
    assert place is not None
    assert place.cards == {IPv6Network("2001:db8:100::6"): ("vmbr1", "52:54:00:00:00:02")}
    assert run("home_address", **asked)["vm"]["cards"] == {}
    refused = run("home_address", **asked, cards={"2001:db8:100::6": "vmbr7", "2001:db8:100::7": "vmbr1"})
    assert refused["findings"] == [
        "VM cards: card of 2001:db8:100::7: is none of its addresses; add it to them",
        "VM cards: 2001:db8:100::6: the VM has no card vmbr7; give one of 52:54:00:00:00:01, "
        "52:54:00:00:00:02, vmbr0, vmbr1",
    ]


@pytest.mark.parametrize("vm", ["web1", "db ünd co"])
def test_addresses_are_given_kept_and_taken(run: Run, hypervisor: str, vm: str) -> None:
    options = {"libvirt_uri": hypervisor, "vm": vm, "prefixes": PREFIXES}
    asked = options | {"addresses": ["2001:DB8:100:0::5", "2001:db8:100::/80"]}
    expected = ["2001:db8:100::5", "2001:db8:100::/80"]
    asked["addresses"] = ["2001:DB8:100:0::5", "2001:db8:100:0:1::/80"]
    expected = ["2001:db8:100::5", "2001:db8:100:0:1::/80"]

    def present() -> list[str]:
        (told,) = run("home_address_info", libvirt_uri=hypervisor, vm=vm)["vms"]
        addresses: list[str] = told["addresses"]
        return addresses

    planned = run("home_address", check=True, **asked)
    assert (planned["changed"], planned["vm"]["addresses"], present()) == (True, expected, [])
    done = run("home_address", **asked)
    assert (done["changed"], present()) == (True, expected)
    assert done["diff"] == {"before": {"addresses": []}, "after": {"addresses": expected}}
    assert run("home_address", **asked)["changed"] is False
    assert run("home_address", check=True, **asked)["changed"] is False
    assert run("home_address", **options, addresses=[])["changed"] is True
    assert present() == []


def test_the_inventory_wins_over_what_was_learnt(run: Run, hypervisor: str) -> None:
    import libvirt

    domain = libvirt.open(hypervisor).lookupByName("web1")
    element = "<addresses learnt='yes'><address>2001:db8:100::5</address></addresses>"

    def learn() -> None:
        domain.setMetadata(
            libvirt.VIR_DOMAIN_METADATA_ELEMENT,
            element,
            "mobility",
            "urn:lifeboat:mobility:1",
            libvirt.VIR_DOMAIN_AFFECT_CONFIG,
        )

    def told() -> tuple[list[str], bool]:
        (vm,) = run("home_address_info", libvirt_uri=hypervisor, vm="web1")["vms"]
        return vm["addresses"], vm["learnt"]

    asked = {"libvirt_uri": hypervisor, "vm": "web1", "prefixes": PREFIXES}
    learn()
    assert told() == (["2001:db8:100::5"], True)
    # The same, but said by somebody now.
    assert run("home_address", **asked, addresses=["2001:db8:100::5"])["changed"] is True
    assert told() == (["2001:db8:100::5"], False)
    assert run("home_address", **asked, addresses=["2001:db8:100::5"])["changed"] is False
    learn()
    # "None" is a word, too: it is kept, and said once.
    assert run("home_address", **asked, addresses=[])["changed"] is True
    assert told() == ([], False)
    assert run("home_address", **asked, addresses=[])["changed"] is False


@pytest.mark.parametrize(
    ("addresses", "told"),
    [
        (["2001:db8:101::5"], "2001:db8:101::5 is in no home prefix (2001:db8:100::/64)"),
        (["192.0.2.1"], "is IPv4, which only BGP leads to a VM"),
        (["fe80::5"], "give a global one"),
        (["2001:db8:100::g"], "write it like 2001:db8:100::5"),
        (["2001:db8:100::5/64"], "has host bits set"),
        (["2001:db8:100::5", "2001:db8:100::5"], "give each VM addresses of its own"),
        (["2001:db8:100::77"], "is VM db ünd co's too"),
    ],
)
def test_what_cannot_be_meant_is_told_and_changes_nothing(
    run: Run, hypervisor: str, addresses: list[str], told: str
) -> None:
    run("home_address", libvirt_uri=hypervisor, vm="db ünd co", addresses=["2001:db8:100::77"])
    asked = {"libvirt_uri": hypervisor, "vm": "web1", "prefixes": PREFIXES, "addresses": addresses}
    for check in (True, False):
        answer = run("home_address", check=check, **asked)
        assert answer["failed"]
        assert told in answer["msg"], answer["msg"]
    (web1,) = run("home_address_info", libvirt_uri=hypervisor, vm="web1")["vms"]
    assert web1["addresses"] == []


def test_an_unknown_vm_and_a_silent_libvirt_are_one_sentence(run: Run, hypervisor: str) -> None:
    answer = run("home_address", libvirt_uri=hypervisor, vm="web9", addresses=[])
    assert "VM web9: libvirt of this host knows none" in answer["msg"]
    names = [vm["name"] for vm in run("home_address_info", libvirt_uri=hypervisor)["vms"]]
    assert names == ["db ünd co", "web1"]


def test_a_vm_that_is_undefined_while_all_are_read_hides_none_of_the_others(
    run: Run, hypervisor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = pytest.importorskip("libvirt").open(hypervisor)
    listed = connection.listAllDomains()
    leaving = connection.lookupByName("web1")
    leaving.destroy()
    leaving.undefine()
    monkeypatch.setattr(connection, "listAllDomains", lambda *_flags: listed)
    assert [vm["name"] for vm in run("home_address_info", libvirt_uri=hypervisor)["vms"]] == ["db ünd co"]
    assert run("home_address_info", libvirt_uri=hypervisor, vm="web1")["failed"]


class _Server(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True


BINDING = {"vm": VM, "addresses": ["2001:db8:100::5/128"], "state": "bound", "gateway": "home1", "epoch": 3}
ANSWERS: dict[str, tuple[int, Any]] = {
    "/v1/bindings?all=false": (200, {"bindings": [BINDING]}),
    f"/v1/bindings/{VM}": (200, BINDING),
    "/v1/status": (200, {"name": "home1", "gateway": {"vms_here": 1}, "anchor": None}),
    "/v1/check": (200, {"findings": [{"subject": "anchor a", "fact": "b", "way_out": "c", "cause": "d"}]}),
    "/v1/vms": (200, {"vms": [{"vm": VM}]}),
}


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[str]:
    """An agent's socket that answers what is above."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            missing = (
                404,
                {"cause": "not-found", "message": f"{self.path}: no binding here", "findings": []},
            )
            status, answer = ANSWERS.get(self.path, missing)
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def address_string(self) -> str:
            return "unix"

        def log_message(self, *_words: object) -> None:
            """Say nothing."""

    path = str(tmp_path / "agent.sock")
    with _Server(path, Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield path
        server.shutdown()


def test_bindings_are_told(run: Run, agent: str) -> None:
    assert run("binding_info", socket=agent)["bindings"] == [BINDING]
    assert run("binding_info", socket=agent, vm=VM)["bindings"] == [BINDING]
    answer = run("binding_info", socket=agent, vm="other")
    assert (answer["failed"], answer["cause"]) == (True, "not-found")


def test_an_agent_tells_how_it_stands(run: Run, agent: str, tmp_path: Path) -> None:
    told = run("mobility_agent_info", socket=agent)
    assert told["vms"] == [{"vm": VM}]
    assert told["findings"][0]["sentence"] == "anchor a: b; c"
    silent = run("mobility_agent_info", socket=str(tmp_path / "none.sock"))
    assert silent["cause"] == "agent-down"
    assert "systemctl status mobility-agent" in silent["msg"]
