# SPDX-License-Identifier: GPL-3.0-or-later
"""Two whole proxies on two lab hosts, and guests that tell: what tests of evacuations share."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from integration import run_watch
from integration.proxy_pair import BACKUP, HOME, RUN, STATE, Answer, ProxyPair, Refused, other_host, wait_for
from lifeboat_lab.guests.guests import Guest
from lifeboat_lab.guests.plan import GuestPlan
from lifeboat_lab.lab import Lab

# Long: passes run when an evacuation asks, so that what a test sees is the evacuation's own.
RPO_SECONDS = 600


def sampled(sample: set[str], *points: str) -> list[object]:
    """Parameters of a test: those of the sample for each test run, all the others for long ones."""
    return [pytest.param(point, marks=[] if point in sample else [pytest.mark.soak]) for point in points]


class EvacuationPair(ProxyPair):
    """Both proxies and the guests of one test."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.guests: list[Guest] = []

    # -- guests

    def make_guest(self, name: str, **plan: Any) -> Guest:
        """A running, protected guest at home."""
        for left in self.lab.guests.all():
            # of a test run that was killed
            if left.name == name:
                left.remove()
        guest = self.lab.guests.define(HOME, GuestPlan(name, **plan))
        self.guests.append(guest)
        guest.start()
        guest.wait_ready()
        self.protect(guest)
        return guest

    def protect(self, guest: Guest, host: str = HOME) -> Answer:
        """Protect and wait until the replica is sealed."""
        options = {"peer": other_host(host), "rpo_seconds": RPO_SECONDS}
        self.ask(host, "PUT", f"/v1/vms/{guest.plan.uuid}", options)
        return self.wait_protected(guest, host)

    def wait_protected(self, guest: Guest, host: str) -> Answer:
        """Until a generation is sealed at the peer and nothing is open."""

        def state() -> Answer:
            try:
                return self.ask(host, "GET", f"/v1/vms/{guest.plan.uuid}")
            except Refused:
                return {}

        return wait_for(  # type: ignore[no-any-return]
            state,
            lambda told: told.get("state") == "protected" and told["generation"] and not told["pass_open"],
            timeout_seconds=120,
        )

    def begin(self, host: str, guest: Guest, **options: Any) -> Answer:
        """Command an evacuation."""
        return self.ask(host, "POST", "/v1/evacuations", {"vm": guest.plan.uuid, **options})

    def begin_until(self, guest: Guest, host: str, point: str) -> str:
        """Command an evacuation from home whose proxy on that host stops at a point; the job's number, once
        it stands there."""
        self.restart(host, stop_at=point)
        self.wait_links()
        job_id = str(self.begin(HOME, guest)["id"])
        self.wait_stopped(host)
        return job_id

    def hide_processes(self, host: str) -> None:
        """Take libvirt's pid files of running VMs away: what cannot be found cannot be halted, and a move is
        ended by libvirt alone."""
        self.shell(host, "mkdir -p /run/hidden && mv /run/libvirt/qemu/*.pid /run/hidden/")

    def begin_until_killed(self, guest: Guest, host: str, point: str, **options: Any) -> str:
        """The same with a proxy that is killed at the point; the job's number, once it is dead ("" where it
        did not live to tell it)."""
        self.restart(host, crash_at=point)
        self.wait_links()
        job_id = ""
        with suppress(OSError):
            job_id = str(self.begin(HOME, guest, **options)["id"])
        wait_for(lambda: not self.alive(host), timeout_seconds=120)
        return job_id

    def crash(self, guest: Guest, host: str, point: str, **options: Any) -> str:
        """The same, and the proxy started again. The job's number."""
        job_id = self.begin_until_killed(guest, host, point, **options)
        assert job_id or point == "departure-admitted"
        time.sleep(0.5)
        self.start(host)
        return job_id or str(self.ask(HOME, "GET", "/v1/evacuations")["evacuations"][-1]["id"])

    def job(self, host: str, job_id: str) -> Answer:
        """What the source says of a job."""
        for told in self.ask(host, "GET", "/v1/evacuations")["evacuations"]:
            if told["id"] == job_id:
                return dict(told)
        raise AssertionError(f"{host} does not know job {job_id}")

    def wait_job(self, host: str, job_id: str, *, timeout_seconds: float = 180) -> Answer:
        """The job once it has ended and owes nothing."""
        return wait_for(  # type: ignore[no-any-return]
            lambda: self.job(host, job_id),
            lambda told: told["step"] in {"done", "stayed"} and not told["owes_abort"],
            timeout_seconds=timeout_seconds,
        )

    def wait_step(self, host: str, job_id: str, step: str) -> Answer:
        """Until the job is at a step; one that ends elsewhere fails at once."""
        told: Answer = wait_for(
            lambda: self.job(host, job_id),
            lambda told: told["step"] in {step, "done", "stayed"},
            timeout_seconds=240,
        )
        assert told["step"] == step, told
        return told

    def wait_landed(self, host: str, guest: Guest) -> Answer:
        """Until the newest arrival of the guest has landed."""
        return wait_for(  # type: ignore[no-any-return]
            lambda: self.arrival(host, guest), lambda told: told.get("state") == "landed", timeout_seconds=120
        )

    def arrival(self, host: str, guest: Guest) -> Answer:
        """The newest arrival of a guest, {} where there is none."""
        told = [
            arrival
            for arrival in self.ask(host, "GET", "/v1/arrivals")["arrivals"]
            if arrival["vm"] == guest.plan.uuid
        ]
        return dict(max(told, key=lambda arrival: (arrival["epoch"], arrival["since"]))) if told else {}

    @contextmanager
    def never_twice(self, guest: Guest) -> Iterator[None]:
        """Ask both hosts all the time who runs the guest; both at once is the worst that can happen."""
        with run_watch.never_twice(guest.states):
            yield

    def check_settled(
        self, guest: Guest, job_id: str, canary: str, where: str, *, source: str = HOME
    ) -> Answer:
        """What must hold once a job has ended and both proxies hear each other: one guest, whole, with its
        memory, and nobody holding it elsewhere. The job."""
        destination = other_host(source)
        job = self.wait_job(source, job_id)
        verdict = "evacuated" if where == destination else "stayed"
        assert (job["verdict"], job["memory_lost"]) == (verdict, False), (job, self.log(source))
        assert guest.running_on() == [where]
        if where == destination:
            self.wait_landed(destination, guest)
            assert self.guarded(source, guest)
            assert source not in guest.states(), "undefined at its old home"
        else:
            wait_for(lambda: not self.guarded(destination, guest))
            assert destination not in guest.states()
            # While a pause of ours may still be obeyed late, one of somebody else is undone as well: ours.
            wait_for(lambda: not self.job(source, job_id)["pause_unanswered"], timeout_seconds=180)
        assert not self.guarded(where, guest)
        found = guest.verify(where, canary=canary)
        assert found.intact, found.findings
        return job

    def check_healed(self, guest: Guest, job_id: str, canary: str, where: str) -> Answer:
        """The same once a trouble is over, which may take its time: nothing left over, and protected. The
        job."""
        job = self.check_settled(guest, job_id, canary, where)
        wait_for(lambda: self.leftovers(HOME) + self.leftovers(BACKUP), lambda found: found == [])
        self.wait_links()
        self.wait_protected(guest, where)
        return job

    def evacuate(self, guest: Guest, source: str = HOME) -> Answer:
        """To the other host, with everything that must hold afterwards. The job."""
        canary = guest.canary(source)
        with self.never_twice(guest):
            job = self.wait_job(source, self.begin(source, guest)["id"])
        assert job["step"] == "done", (job, self.log(source))
        job = self.check_settled(guest, job["id"], canary, other_host(source), source=source)
        assert self.leftovers(source) == self.leftovers(other_host(source)) == []
        return job

    def leftovers(self, host: str) -> list[str]:
        """Overlays, sockets and exceptions that no job needs any more."""
        found = self.shell(
            host,
            f"ls -d /var/lib/libvirt/images/*.lifeboat-* {RUN}/jobs/* {RUN}/arriving/* "
            f"{STATE}/disks/*/*-arrival.qcow2 2>/dev/null",
            check=False,
        )
        return found.split("\n")[:-1]

    def guarded(self, host: str, guest: Guest) -> bool:
        """Whether a start of the guest is forbidden on a host."""
        return (self.root(host) / STATE.lstrip("/") / "guard" / f"{guest.plan.uuid}.json").exists()

    def start_is_refused(self, host: str, guest: Guest) -> str:
        """Try to start the guest on a host where it must not run; what virsh says."""
        told = self.lab.exec(host, "virsh", "start", guest.plan.uuid, check=False, timeout_seconds=60)
        assert told.returncode != 0, f"the guest was started on {host}"
        # By the hook, whose sentence libvirt hands on, and not for want of memory or of a domain.
        assert f"VM {guest.name}" in told.stderr, told.stderr
        return str(told.stderr)

    # -- the end

    def give_power(self) -> None:
        """Start the hosts that have none."""
        for host in (HOME, BACKUP):
            if not self.lab.host(host).running:
                self.lab.start_host(host)

    def remove_guests(self) -> None:
        """Remove the test's guests and all that the proxies know of them: the next test begins anew."""
        for guest in self.guests:
            for host in (HOME, BACKUP):
                uuid = guest.plan.uuid
                if self.lab.host(host).running:
                    self.virsh(host, "destroy", uuid, check=False)
                    self.virsh(
                        host, "undefine", uuid, "--nvram", "--checkpoints-metadata", "--snapshots-metadata",
                        check=False,
                    )  # fmt: skip
            guest.remove()
        self.guests.clear()
        for host in (HOME, BACKUP):
            self.kill(host)
            left = "/var/lib/libvirt/images/*.lifeboat-*"
            self.shell(host, f"rm -rf {shlex.quote(STATE)}/* {shlex.quote(RUN)}/* {left}", check=False)


@contextmanager
def installed_pair(lab: Lab) -> Iterator[EvacuationPair]:
    """Both proxies on their hosts, not started; nothing of them is left afterwards."""
    pair = EvacuationPair(lab)
    pair.install()
    yield pair
    pair.close()


@contextmanager
def running_pair(installed: EvacuationPair) -> Iterator[EvacuationPair]:
    """Hosts and proxies running as installed and hearing each other; no guest is left afterwards."""
    installed.give_power()
    for host in (HOME, BACKUP):
        installed.configure(host)
        installed.start(host)
    installed.wait_links()
    yield installed
    installed.lab.wan.heal()
    # A test that failed half way may leave a host without power; what is there would stand in others' way.
    installed.give_power()
    installed.remove_guests()
