# SPDX-License-Identifier: GPL-3.0-or-later
"""What libvirt is asked in more than one call: the VM may end, or start, between any two of them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import libvirt
import pytest

from precache_proxy.errors import HypervisorError
from precache_proxy.evacuation.domains import Domains
from precache_proxy.evacuation.reconcile import Life, Presence
from precache_proxy.hypervisor.connection import map_error

VM = "11111111-2222-4333-8444-555555555555"
RUNNING = [libvirt.VIR_DOMAIN_RUNNING, 0]
ENDED_IN_ORDER = [libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN]
DESTROYED = [libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED]

CRASHED = [libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_CRASHED]


class Domain:
    """A VM with something that happens once its ``call`` was answered."""

    def __init__(self, now: list[int], call: str = "", then: list[int] | None = None) -> None:
        self.now, self._call, self._then = now, call, then
        self.refusal: libvirt.libvirtError | None = None

    def _answered(self, call: str) -> None:
        if call == self._call and self._then is not None:
            self.now = self._then

    def state(self) -> list[int]:
        told = list(self.now)
        self._answered("state")
        return told

    def isActive(self) -> bool:  # noqa: N802
        told = self.now == RUNNING
        self._answered("isActive")
        return told

    def ID(self) -> int:  # noqa: N802
        return 7

    def abortJob(self) -> None:  # noqa: N802
        raise libvirt.libvirtError("no job")

    def destroy(self) -> None:
        if self.now != RUNNING or self.refusal is not None:
            raise self.refusal or libvirt.libvirtError("domain is not running")
        self.now = DESTROYED


def domains_of(domain: Domain) -> Domains:
    """A libvirt that knows this one."""

    class Hypervisor:
        connection = SimpleNamespace(lookupByUUIDString=lambda _vm: domain)

        async def call(self, work: Callable[[], Any], *, subject: str, **_unused: Any) -> Any:
            try:
                return work()
            except libvirt.libvirtError as error:
                raise map_error(error, subject) from error

    return Domains(cast(Any, Hypervisor()))


@pytest.mark.parametrize(
    ("domain", "life"),
    [
        (Domain(RUNNING), Life(Presence.RUNNING, 7)),
        (Domain(ENDED_IN_ORDER), Life(Presence.ENDED, None, in_order=True)),
        (Domain(DESTROYED), Life(Presence.ENDED)),
        (Domain(CRASHED), Life(Presence.SHUT_OFF)),
        (Domain(RUNNING, "isActive", ENDED_IN_ORDER), Life(Presence.ENDED, None, in_order=True)),
        (Domain(RUNNING, "state", ENDED_IN_ORDER), Life(Presence.RUNNING, 7)),
        (Domain(ENDED_IN_ORDER, "isActive", RUNNING), Life(Presence.UNKNOWN)),
    ],
)
async def test_how_a_vm_ended_is_told_though_it_ends_while_one_asks(domain: Domain, life: Life) -> None:
    assert await domains_of(domain).life(VM) == life


async def test_a_vm_that_ends_by_itself_just_before_its_end_is_no_failure() -> None:
    domain = Domain(RUNNING, "isActive", ENDED_IN_ORDER)
    await domains_of(domain).destroy(VM)
    assert domain.now == ENDED_IN_ORDER


async def test_a_vm_that_libvirt_does_not_end_is_one() -> None:
    domain = Domain(RUNNING)
    domain.refusal = libvirt.libvirtError("a device is busy")
    with pytest.raises(HypervisorError, match="VM"):
        await domains_of(domain).destroy(VM)
    await domains_of(Domain(ENDED_IN_ORDER)).destroy(VM)
