# SPDX-License-Identifier: GPL-3.0-or-later
"""What registrations, acknowledgements and revocations say, apart from their octets."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from ipaddress import IPv6Address, IPv6Network

from mobility_agent.errors import MobilityError
from mobility_agent.messages.codec import UNSPECIFIED
from mobility_agent.messages.headers import (
    BindingAcknowledgement,
    BindingUpdate,
    Revocation,
    RevocationAcknowledgement,
    RevocationTrigger,
    Status,
)
from mobility_agent.messages.options import (
    AccessTechnology,
    AccessTechnologyType,
    AlternateCareOf,
    Handoff,
    HandoffIndicator,
    HomeNetworkPrefix,
    LinkLocalAddress,
    NodeIdentifier,
    Option,
    Timestamp,
    VendorSpecific,
    VendorSubtype,
    find,
    find_vendor,
)

_UUID = re.compile(r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")


class Incomplete(MobilityError):
    """An update that lacks what RFC 5213 section 5.3.1 requires; ``status`` is the answer to give."""

    cause = "incomplete"

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Registration:
    """One VM's claim to be reached at ``care_of``.

    ``ticks``: when it was made, in 1/65536 s since 1970. ``lifetime_seconds`` of 0 withdraws it.
    """

    vm: str
    homes: tuple[IPv6Network, ...]
    care_of: IPv6Address
    epoch: int
    ticks: int
    lifetime_seconds: int
    handoff: HandoffIndicator
    link_local: IPv6Address | None = None

    @property
    def refresh(self) -> bool:
        """Whether it only confirms what should be known: such a one never takes a binding over."""
        return self.handoff is HandoffIndicator.UNCHANGED

    def update(self, sequence: int) -> BindingUpdate:
        """The proxy binding update that says this."""
        options: list[Option] = [NodeIdentifier(self.vm)]
        options += [HomeNetworkPrefix(home) for home in self.homes]
        options += [
            Handoff(self.handoff),
            AccessTechnologyType(AccessTechnology.VIRTUAL),
            Timestamp(self.ticks),
            AlternateCareOf(self.care_of),
            _epoch_option(self.epoch),
        ]
        if self.link_local is not None:
            options.append(LinkLocalAddress(self.link_local))
        return BindingUpdate(sequence, self.lifetime_seconds, tuple(options))


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """An anchor's answer. ``epoch`` and ``holder``: what the anchor now holds for this VM."""

    vm: str
    status: int
    sequence: int
    lifetime_seconds: int
    ticks: int
    homes: tuple[IPv6Network, ...] = ()
    epoch: int | None = None
    holder: IPv6Address | None = None

    @property
    def accepted(self) -> bool:
        """Whether the binding is as was asked for."""
        return self.status < 128

    def message(self) -> BindingAcknowledgement:
        """The proxy binding acknowledgement that says this."""
        options: list[Option] = [NodeIdentifier(self.vm)]
        options += [HomeNetworkPrefix(home) for home in self.homes]
        options.append(Timestamp(self.ticks))
        options += _holder_options(self.epoch, self.holder)
        return BindingAcknowledgement(self.status, self.sequence, self.lifetime_seconds, tuple(options))


@dataclass(frozen=True, slots=True)
class Loss:
    """An anchor's word that a VM is bound elsewhere: to ``holder``, in ``epoch``, by a claim of ``ticks``."""

    vm: str
    homes: tuple[IPv6Network, ...]
    epoch: int
    ticks: int
    holder: IPv6Address | None

    def message(self, sequence: int) -> Revocation:
        """The binding revocation indication that says this."""
        options: list[Option] = [NodeIdentifier(self.vm)]
        options += [HomeNetworkPrefix(home) for home in self.homes]
        options.append(Timestamp(self.ticks))
        options += _holder_options(self.epoch, self.holder)
        return Revocation(RevocationTrigger.HANDOVER_SAME_ACCESS, sequence, tuple(options))


def _epoch_option(epoch: int) -> VendorSpecific:
    return VendorSpecific(VendorSubtype.EPOCH, epoch.to_bytes(8, "big"))


def _holder_options(epoch: int | None, holder: IPv6Address | None) -> list[Option]:
    options: list[Option] = []
    if epoch is not None:
        options.append(_epoch_option(epoch))
    if holder is not None:
        options.append(VendorSpecific(VendorSubtype.HOLDER, holder.packed))
    return options


def _vm(options: tuple[Option, ...]) -> str | None:
    identifier = find(options, NodeIdentifier)
    # What is no UUID is not one of ours; it must not reach log lines and file names either.
    known = identifier is not None and identifier.subtype == 1 and _UUID.match(identifier.identifier)
    return identifier.identifier if identifier is not None and known else None


def _homes(options: tuple[Option, ...]) -> tuple[IPv6Network, ...]:
    return tuple(option.network for option in options if isinstance(option, HomeNetworkPrefix))


def _epoch(options: tuple[Option, ...]) -> int | None:
    content = find_vendor(options, VendorSubtype.EPOCH)
    return int.from_bytes(content, "big") if content is not None and len(content) == 8 else None


def _holder(options: tuple[Option, ...]) -> IPv6Address | None:
    content = find_vendor(options, VendorSubtype.HOLDER)
    return IPv6Address(content) if content is not None and len(content) == 16 else None


def home_address(
    message: BindingUpdate | BindingAcknowledgement | Revocation | RevocationAcknowledgement,
) -> IPv6Address:
    """The home address that the authenticator covers: the first one named, ``::`` where none is."""
    homes = _homes(message.options)
    return homes[0].network_address if homes else UNSPECIFIED


def read_registration(update: BindingUpdate, source: IPv6Address) -> Registration:
    """What ``update``, which came from ``source``, asks for. Raises Incomplete."""
    options = update.options
    if not update.proxy:
        raise Incomplete(Status.PROXY_REGISTRATION_NOT_ENABLED, "a binding update without the P flag")
    vm = _vm(options)
    if vm is None:
        raise Incomplete(Status.MISSING_NODE_IDENTIFIER, "no mobile node identifier, or one that is no UUID")
    homes = _homes(options)
    if not homes:
        raise Incomplete(Status.MISSING_PREFIX, f"VM {vm}: no home network prefix")
    handoff, technology = find(options, Handoff), find(options, AccessTechnologyType)
    if handoff is None or handoff.indicator not in range(1, 6):
        raise Incomplete(
            Status.MISSING_HANDOFF_INDICATOR, f"VM {vm}: no handoff indicator, or a reserved one"
        )
    if technology is None:
        raise Incomplete(Status.MISSING_ACCESS_TECHNOLOGY, f"VM {vm}: no access technology type")
    timestamp = find(options, Timestamp)
    if timestamp is None:
        raise Incomplete(Status.TIMESTAMP_MISMATCH, f"VM {vm}: no timestamp")
    care_of, link_local = find(options, AlternateCareOf), find(options, LinkLocalAddress)
    return Registration(
        vm=vm,
        homes=homes,
        care_of=care_of.address if care_of else source,
        # A gateway that knows of no epochs can hold what nobody has handed off yet.
        epoch=_epoch(options) or 0,
        ticks=timestamp.ticks,
        lifetime_seconds=update.lifetime_seconds,
        handoff=HandoffIndicator(handoff.indicator),
        link_local=link_local.address if link_local else None,
    )


def read_acknowledgement(message: BindingAcknowledgement) -> Acknowledgement | None:
    """What the anchor answered; None when it does not say for which VM."""
    vm, timestamp = _vm(message.options), find(message.options, Timestamp)
    if vm is None or timestamp is None:
        return None
    return Acknowledgement(
        vm=vm,
        status=message.status,
        sequence=message.sequence,
        lifetime_seconds=message.lifetime_seconds,
        ticks=timestamp.ticks,
        homes=_homes(message.options),
        epoch=_epoch(message.options),
        holder=_holder(message.options),
    )


def refusal(update: BindingUpdate, status: Status) -> BindingAcknowledgement:
    """The answer to an update that could not be read whole: what it named is named again."""
    named = (NodeIdentifier, HomeNetworkPrefix, Timestamp)
    kept = tuple(option for option in update.options if isinstance(option, named))
    return BindingAcknowledgement(status, update.sequence, 0, kept)


def read_loss(message: Revocation) -> Loss | None:
    """What the anchor took away; None when it does not say whose."""
    vm, epoch, timestamp = _vm(message.options), _epoch(message.options), find(message.options, Timestamp)
    if vm is None or epoch is None or timestamp is None:
        return None
    return Loss(vm, _homes(message.options), epoch, timestamp.ticks, _holder(message.options))


def acknowledge_loss(message: Revocation) -> RevocationAcknowledgement:
    """The gateway's answer to a revocation (RFC 5846 section 5.2: status 0 is success)."""
    kept = tuple(
        option for option in message.options if isinstance(option, (NodeIdentifier, HomeNetworkPrefix))
    )
    return RevocationAcknowledgement(0, message.sequence, kept)


def later(registration: Registration, ticks: int) -> Registration:
    """The same claim, made again at ``ticks``."""
    return replace(registration, ticks=ticks)
