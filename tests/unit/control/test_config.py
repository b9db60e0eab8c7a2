# SPDX-License-Identifier: GPL-3.0-or-later
"""The configuration file: what it takes, and that every fault is told at once."""

from __future__ import annotations

from contextlib import suppress
from datetime import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precache_proxy import config
from precache_proxy.errors import ConfigurationError

FULL = """
name = "home1.example"
site = "home"
[listen]
address = "2001:db8::1"
port = 4750
[tls]
ca = "/pki/ca.crt"
certificate = "/pki/host.crt"
key = "/pki/host.key"
[paths]
state = "/srv/lifeboat"
run = "/run/other"
[control]
group = "operators"
[hypervisor]
uri = "test:///default"
[store]
keep_generations = 2
minimum_free_bytes = "2GiB"
[source]
rpo_seconds = "30s"
scratch_limit_bytes = "1GiB"
pass_limit_seconds = 20
slice_bytes = 1048576
[evacuation]
stall_seconds = 12
presume_source_dead_after_seconds = "20m"
[[peers]]
name = "backup1.example"
address = "backup1.example"
connections = 8
rate_bytes_per_second = "400Mbit/s"
[[peers.windows]]
start = "08:00"
end = "18:30"
days = ["mon", "fri"]
rate_bytes_per_second = "50Mbit/s"
[[peers]]
name = "backup2"
address = "192.0.2.7"
"""


def test_full_file_is_read_with_its_units() -> None:
    told = config.parse(FULL)
    assert (told.name, told.site, told.listen.port) == ("home1.example", "home", 4750)
    assert told.paths.control_socket == Path("/run/other/control.sock")
    assert told.store.directory == Path("/srv/lifeboat/store"), "follows paths.state unless said otherwise"
    assert told.source.scratch_directory == Path("/srv/lifeboat/scratch")
    assert told.store.minimum_free_bytes == 2 * 1024**3
    assert told.source.rpo_seconds == 30.0
    assert told.evacuation.presume_source_dead_after_seconds == 1200.0
    first, second = told.peers
    assert first.rate_bytes_per_second == 50_000_000
    assert first.windows == (config.RateWindow(time(8), time(18, 30), frozenset({0, 4}), 6_250_000),)
    assert (second.port, second.connections, second.rate_bytes_per_second) == (4747, 5, None)
    assert told.peer("backup2") is second
    assert told.peer("nobody") is None


def test_least_file_has_the_documented_defaults() -> None:
    told = config.parse('name = "home1"\nsite = "home"\n')
    assert told.source == config.SourceConfig()
    assert told.store == config.StoreConfig()
    assert told.source.rpo_seconds == 15.0
    assert told.evacuation.presume_source_dead_after_seconds is None, "never, unless the operator says so"


def test_all_faults_are_told_at_once_with_a_way_out() -> None:
    with pytest.raises(ConfigurationError) as caught:
        config.parse(
            'name = "home1"\n'
            "[listen]\nport = 70000\n[source]\nrpo_second = 5\nrpo_seconds = 0\nslice_bytes = true\n"
            '[store]\ndirectory = "store"\n'
            '[[peers]]\nname = "home1"\naddress = ""\nrate_bytes_per_second = 0\n'
        )
    told = {
        finding.subject.removeprefix("precache_proxy.toml: "): finding for finding in caught.value.findings
    }
    assert set(told) == {
        "site", "listen.port", "source.rpo_second", "source.rpo_seconds", "source.slice_bytes",
        "store.directory", "peers[0].address", "peers[0].rate_bytes_per_second", "peer home1",
    }  # fmt: skip
    assert told["source.rpo_second"].way_out == "did you mean rpo_seconds?"
    assert "nothing could be sent" in told["peers[0].rate_bytes_per_second"].fact
    assert told["peer home1"].fact == "is this proxy itself"
    assert all(finding.way_out and finding.cause == "configuration" for finding in caught.value.findings)
    assert "9 fault(s), nothing was taken" in caught.value.message


def test_same_peer_twice_is_a_fault() -> None:
    peer = '[[peers]]\nname = "b"\naddress = "b"\n'
    with pytest.raises(ConfigurationError, match="is there twice"):
        config.parse('name = "a"\nsite = "s"\n' + peer + peer)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = ", "not valid TOML"),
        ('name = "a"\nsite = "s"\npeers = 3\n', "list of tables"),
        ('name = "a"\nsite = "s"\nlisten = 3\n', "not a table"),
        ('name = "../a"\nsite = "s"\n', "as in a host name"),
        ('name="a"\nsite="s"\n[[peers]]\nname="b"\naddress="b"\n[[peers.windows]]\nstart="25:00"', "time of"),
    ],
)  # fmt: skip
def test_unfit_text_is_one_clear_error(text: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        config.parse(text)


def test_missing_file_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no such file; the role"):
        config.load(tmp_path / "none.toml")


@given(st.text(max_size=200))
def test_no_text_makes_it_crash(text: str) -> None:
    with suppress(ConfigurationError):
        config.parse(text)
