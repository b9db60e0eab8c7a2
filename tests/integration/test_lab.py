# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab itself, on one of this module's own: building, power cuts, WAN, guests, leaving nothing behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lifeboat_lab.control_group import hierarchy
from lifeboat_lab.guests.guests import Guest
from lifeboat_lab.guests.plan import GuestPlan
from lifeboat_lab.hosts import wait_for
from lifeboat_lab.lab import Lab
from lifeboat_lab.settings import HOSTS, RUNTIME, STATE, Settings

LAB = Path(__file__).resolve().parents[1] / "lab"
NAME = f"own{os.getpid()}"

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


def leftovers(name: str) -> list[str]:
    """Everything that a lab of this name has on the machine."""
    found = [
        str(path)
        for path in (STATE / name, RUNTIME / name, hierarchy() / "lifeboat-lab" / name)
        if path.exists()
    ]
    for directory in (Path("/run/netns"), Path("/etc/netns")):
        found += [str(path) for path in directory.glob(f"{name}-*")]
    found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f"/{name}/" in line]
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if f"/{name}/" in command or f"{name}-" in command:
            found.append(command)
    return found


@pytest.fixture(scope="module")
def own_lab() -> Iterator[Lab]:
    lab = Lab(Settings(name=NAME, hosts=("home1", "backup1")), say=print)
    lab.up(owner=os.getpid())
    yield lab
    lab.down()
    assert leftovers(NAME) == []


@pytest.fixture
def guest(own_lab: Lab) -> Iterator[Guest]:
    guest = own_lab.guests.define("home1", GuestPlan("probe", disks=2, content_mib=4, disk_mib=64))
    guest.start()
    guest.wait_ready()
    yield guest
    guest.remove()


def test_hosts_are_whole_systems(own_lab: Lab) -> None:
    for name, host in own_lab.hosts.items():
        assert host.exec("systemctl", "is-system-running").stdout.strip() == "running", name
        assert host.exec("virsh", "uri").stdout.strip() == "qemu:///system"
        # Each has an identity of its own, or libvirt would not migrate between them.
    identities = {
        host.exec("virsh", "capabilities").stdout.split("<uuid>")[1][:36] for host in own_lab.hosts.values()
    }
    assert len(identities) == len(own_lab.hosts)


def test_hosts_have_no_way_out(own_lab: Lab) -> None:
    for name in own_lab.hosts:
        for version, network in (("-6", " 2001:db8:"), ("-4", " 198.18.")):
            addresses = own_lab.exec(name, "ip", "-o", version, "addr", "show", "scope", "global").stdout
            assert addresses, (name, version)
            assert all(network in line for line in addresses.splitlines()), addresses
    # The router knows the lab's own networks and nothing else.
    for version in ("-6", "-4"):
        routes = own_lab.exec("router", "ip", version, "route", "show", "table", "main").stdout
        assert routes, version
        assert "default" not in routes
    refused = own_lab.exec("home1", "ping", "-c", "1", "-W", "1", "192.0.2.1", check=False)
    assert "Net Unreachable" in refused.stdout


def test_building_again_changes_nothing(own_lab: Lab) -> None:
    leaders = {name: host.leader for name, host in own_lab.hosts.items()}
    begun = time.monotonic()
    assert own_lab.up() is False
    assert time.monotonic() - begun < 10
    assert {name: host.leader for name, host in own_lab.hosts.items()} == leaders


def test_controller_reaches_hosts_over_ssh(own_lab: Lab) -> None:
    for name in own_lab.hosts:
        answer = own_lab.exec("controller", "ssh", "-F", str(own_lab.keys.config), name, "hostname")
        assert answer.stdout.strip() == name


def test_power_cut_keeps_the_disk_and_loses_the_memory(own_lab: Lab) -> None:
    host = own_lab.host("backup1")
    host.exec("sh", "-c", "echo kept > /var/tmp/kept; sync; echo lost > /run/lost")
    identity = host.read("/etc/machine-id")
    # Its neighbours know its Ethernet addresses now, and use them for up to a minute.
    own_lab.exec("home1", "ping", "-c", "1", "backup1")
    own_lab.exec("controller", "ping", "-c", "1", "backup1")
    own_lab.kill_host("backup1")
    assert not host.running
    own_lab.start_host("backup1")
    for member in ("home1", "controller"):
        own_lab.exec(member, "ping", "-c", "1", "-W", "1", "backup1")
    assert host.read("/var/tmp/kept") == "kept\n"
    assert not (host.root / "run/lost").exists()
    assert host.read("/etc/machine-id") == identity
    own_lab.exec("home1", "ping", "-c", "3", "-i", "0.2", "backup1")


def test_peers_hear_nothing_of_a_power_cut(own_lab: Lab) -> None:
    """A connection to a dead host hangs: a reset would tell the peer what no real host could."""
    server = subprocess.Popen(own_lab.command("backup1", ["socat", "-u", "TCP6-LISTEN:6000", "STDOUT"]))
    wait_for(lambda: ":6000" in own_lab.exec("backup1", "ss", "-Htln").stdout, 20, 0.1)
    client = subprocess.Popen(
        own_lab.command("home1", ["socat", "-u", "EXEC:sleep 600", "TCP6:backup1:6000"]),
        stdin=subprocess.DEVNULL,
    )
    try:
        wait_for(
            lambda: "6000" in own_lab.exec("home1", "ss", "-Htn", "state", "established").stdout, 20, 0.1
        )
        own_lab.kill_host("backup1")
        time.sleep(1)
        assert "6000" in own_lab.exec("home1", "ss", "-Htn", "state", "established").stdout
    finally:
        client.terminate()
        client.wait()
        server.wait()
        own_lab.start_host("backup1")


@pytest.mark.parametrize("profile", ["metro", "trans-pacific"])
def test_wan_is_what_its_profile_says(own_lab: Lab, profile: str) -> None:
    own_lab.wan.set(profile)
    try:
        check = own_lab.wan.check("home1", "backup1")
        # Not `holds`: under the load of other tests a processor may come late. The queueing itself is tested
        # to the byte elsewhere; here the packets must really pass through it.
        assert check.round_trip_seconds >= 0.99 * check.expected_round_trip_seconds
        assert 0 < check.goodput_bits_per_second <= 1.05 * check.expected_bits_per_second
    finally:
        own_lab.wan.set("none")


@pytest.mark.parametrize("address", ["backup1", HOSTS["backup1"].ipv4_address])
def test_wan_counts_bytes_per_direction(own_lab: Lab, address: str) -> None:
    before = own_lab.wan.counters()
    for profile in ("none", "rate=100mbit,rtt=2ms"):
        own_lab.wan.set(profile)
        own_lab.exec("home1", "ping", "-c", "10", "-i", "0.02", "-s", "1000", address)
    own_lab.wan.set("none")
    after = own_lab.wan.counters()
    for pair in ("home-backup", "backup-home"):
        for kind in ("sent_bytes", "delivered_bytes"):
            # 20 packets of 1000 + 8 + 40 bytes (by IPv4 20), and neighbour discovery of the router at most
            # beside.
            least = 20 * (1008 + (40 if address == "backup1" else 20))
            assert least <= after[pair][kind] - before[pair][kind] <= least + 1040, (pair, kind)
    assert after["client-backup"] == before["client-backup"]


def test_wan_delays_ipv4_too(own_lab: Lab) -> None:
    own_lab.wan.set("rate=100mbit,rtt=150ms")
    try:
        told = own_lab.exec("home1", "ping", "-c", "3", "-i", "0.2", HOSTS["backup1"].ipv4_address)
        least, average = (float(text) for text in told.stdout.rsplit(" = ", 1)[1].split("/")[:2])
        assert 149 <= least <= average, told.stdout
    finally:
        own_lab.wan.set("none")


def test_wan_is_cut_one_way_and_healed(own_lab: Lab) -> None:
    def reaches(source: str, destination: str) -> bool:
        """By IPv6, and by IPv4 just as well; the client has no IPv4."""
        addresses = [destination, *([HOSTS[destination].ipv4_address] if source in HOSTS else [])]
        answers = {
            own_lab.exec(source, "ping", "-c", "1", "-W", "1", address, check=False).returncode == 0
            for address in addresses
        }
        assert len(answers) == 1, (source, destination)
        return answers.pop()

    own_lab.wan.cut("home", "backup")
    try:
        assert own_lab.wan.status()["cut"] == ["home-backup"]
        # A datagram from backup arrives although nothing comes back.
        before = own_lab.wan.counters()["backup-home"]["delivered_packets"]
        assert not reaches("backup1", "home1")
        assert own_lab.wan.counters()["backup-home"]["delivered_packets"] > before
        assert reaches("client", "home1")
        own_lab.wan.cut()
        assert not reaches("client", "home1")
    finally:
        own_lab.wan.heal()
    assert reaches("home1", "backup1")
    assert reaches("client", "home1")


def test_guest_tells_what_it_wrote(own_lab: Lab, guest: Guest) -> None:
    wait_for(lambda: guest.told().highest_acknowledged > 5, 180, 0.2)
    assert guest.canary() == guest.told().canaries[-1]
    assert guest.running_on() == ["home1"]
    tag = guest.plan.tag
    wait_for(lambda: len(own_lab.guests.collector.arrivals(tag, "ack")) > 2, 180, 0.2)
    assert own_lab.guests.collector.arrivals(tag, "beat")
    verdict = guest.verify("home1", canary=guest.canary())
    assert verdict.intact, verdict.findings
    assert verdict.acknowledged > 5


def test_guest_that_lost_something_is_found_out(own_lab: Lab, guest: Guest) -> None:
    """The check that everything relies on must fail when it ought to."""
    wait_for(lambda: guest.told().highest_acknowledged > 20, 180, 0.2)
    host = own_lab.host("home1")
    older = "/var/tmp/older.qcow2"
    host.exec("qemu-img", "convert", "--force-share", "-O", "qcow2", guest.plan.disk_path("vda"), older)
    told_then = guest.told().highest_acknowledged
    wait_for(lambda: guest.told().highest_acknowledged > told_then + 20, 180, 0.2)
    guest.destroy()
    images = {"vda": (older, "qcow2"), "vdb": (guest.plan.disk_path("vdb"), "qcow2")}
    findings = guest.verify("home1", images=images, one_instant=True).findings
    assert any("were acknowledged" in finding and "lost" in finding for finding in findings), findings
    assert any("not of one instant" in finding for finding in findings), findings
    # Damage below /content.
    raw = "/var/tmp/older.raw"
    host.exec("qemu-img", "convert", "-O", "raw", older, raw)
    block = host.exec("debugfs", "-R", "blocks /content/000/00001", raw).stdout.split()[0]
    host.exec("dd", "if=/dev/zero", f"of={raw}", "bs=4096", f"seek={block}", "count=1",
              "conv=notrunc")  # fmt: skip
    images["vda"] = (raw, "raw")
    findings = guest.verify("home1", images=images, acknowledged=0).findings
    assert any("content 000/00001 differs" in finding for finding in findings), findings
    host.exec("rm", older, raw)


def test_guest_survives_the_power_cut_of_its_host(own_lab: Lab, guest: Guest) -> None:
    wait_for(lambda: guest.told().highest_acknowledged > 10, 180, 0.2)
    own_lab.kill_host("home1")
    told = guest.told().highest_acknowledged
    own_lab.start_host("home1")
    verdict = guest.verify("home1", acknowledged=told, one_instant=True)
    assert verdict.intact, verdict.findings
    guest.start()
    guest.wait_ready()
    assert guest.told().boots == 2
    wait_for(lambda: guest.told().highest_acknowledged > told + 5, 180, 0.2)
    assert guest.verify("home1").intact


def test_guest_is_watched_through_a_move(own_lab: Lab, guest: Guest) -> None:
    canary = guest.canary()
    for target in guest.plan.targets:
        size = f"{guest.plan.disk_mib}M"
        own_lab.exec("backup1", "qemu-img", "create", "-q", "-f", "qcow2", guest.plan.disk_path(target), size)
    with guest.watch() as watch:
        own_lab.exec(
            "home1", "virsh", "migrate", "--live", "--copy-storage-all", "--persistent", "--undefinesource",
            guest.name, "qemu+ssh://backup1/system", timeout_seconds=300,
        )  # fmt: skip
        moved = len(watch.beats)
        wait_for(lambda: len(watch.beats) > moved + 20, 60, 0.1)
    assert guest.running_on() == ["backup1"]
    assert 0 < watch.longest_gap_seconds() < 60
    verdict = guest.verify("backup1", canary=canary)
    assert verdict.intact, verdict.findings
    assert guest.told().doubled_beats <= 1


@pytest.mark.soak
def test_debian_guest_keeps_its_database_through_a_power_cut(own_lab: Lab) -> None:
    plan = GuestPlan("debian", system="debian", workload="fsync-log,database", ram_mib=320, disk_mib=1024)
    guest = own_lab.guests.define("home1", plan)
    try:
        guest.start()
        guest.wait_ready()
        wait_for(lambda: guest.told().highest_committed > 20, 180, 0.5)
        own_lab.kill_host("home1")
        told = guest.told()
        own_lab.start_host("home1")
        verdict = guest.verify(
            "home1", committed=told.highest_committed, acknowledged=told.highest_acknowledged
        )
        assert verdict.intact, verdict.findings
        # The check must notice a row that is not there.
        lacking = guest.verify("home1", committed=verdict.disks[0].rows + 1, acknowledged=0)
        assert any("rows, but" in finding for finding in lacking.findings), lacking
    finally:
        guest.remove()


def test_lab_of_a_killed_run_is_cleaned_up_by_the_next(own_lab: Lab) -> None:
    name = f"lost{os.getpid()}"
    code = (
        "import os, time; from lifeboat_lab.lab import Lab; from lifeboat_lab.settings import Settings; "
        f"Lab(Settings(name='{name}', hosts=('home2',))).up(owner=os.getpid()); print('up', flush=True); "
        "time.sleep(900)"
    )
    environment = os.environ | {"PYTHONPATH": str(LAB)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"up\n"
        assert leftovers(name) != []
        run.send_signal(signal.SIGKILL)
    own_lab.up()
    assert leftovers(name) == []


def test_half_built_lab_is_replaced(own_lab: Lab) -> None:
    """Killed in the middle of `up`: the next one begins anew and the last one leaves nothing."""
    name = f"half{os.getpid()}"
    environment = os.environ | {"PYTHONPATH": str(LAB), "LIFEBOAT_LAB": name, "LIFEBOAT_LAB_HOSTS": "home2"}
    command = [sys.executable, "-m", "lifeboat_lab", "up"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as run:
        wait_for(lambda: Path(f"/run/netns/{name}-home2").exists(), 60, 0.002)
        run.send_signal(signal.SIGKILL)
    assert not Lab(Settings(name=name)).built
    subprocess.run(command, env=environment, check=True, timeout=600, stdout=subprocess.DEVNULL)
    lab = Lab(Settings(name=name, hosts=("home2",)))
    assert lab.host("home2").exec("systemctl", "is-system-running").stdout.strip() == "running"
    # Whoever still sits in one of its namespaces goes with it.
    visitor = subprocess.Popen(lab.command("client", ["sleep", "600"]))
    assert lab.down() is True
    assert visitor.wait(timeout=10) == -signal.SIGKILL
    assert lab.down() is False
    assert leftovers(name) == []
