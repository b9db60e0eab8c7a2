# SPDX-License-Identifier: GPL-3.0-or-later
"""The connection to libvirt: calls in threads, events in asyncio, and coming back after libvirtd restarts."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import re
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import libvirt

from precache_proxy.errors import HypervisorError, LifeboatError, NotFound
from precache_proxy.hypervisor.domain_xml import Definition, parse_definition
from precache_proxy.hypervisor.events import DomainEvent, EventRelay
from precache_proxy.hypervisor.features import Features, read_features
from precache_proxy.hypervisor.handles import ConnectionHandle, DomainHandle, Opaque
from precache_proxy.hypervisor.turns import Turns

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_URI = "qemu:///system"
DEFAULT_TIMEOUT_SECONDS = 60.0
CONNECT_TIMEOUT_SECONDS = 30.0
KEEPALIVE_INTERVAL_SECONDS = 5
KEEPALIVE_COUNT = 3
BACKOFF_SECONDS = (0.5, 1.0, 2.0, 5.0)
# A call that libvirt does not answer keeps its thread: enough of them that a few stuck ones do no harm.
MAXIMUM_THREADS = 32

_UUID = re.compile(r"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$")
_NOT_FOUND_CODES = {libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT}
_LOST_CODES = {
    libvirt.VIR_ERR_NO_CONNECT,
    libvirt.VIR_ERR_INVALID_CONN,
    libvirt.VIR_ERR_SYSTEM_ERROR,
    libvirt.VIR_ERR_RPC,
    libvirt.VIR_ERR_INTERNAL_ERROR,
}

Subscriber = Callable[[DomainEvent], Awaitable[None] | None]

_event_loop_lock = threading.Lock()
_event_loop_started = False


def _run_event_loop() -> None:
    while True:
        # a return of -1 means one bad handle: the next turn goes on with the others
        libvirt.virEventRunDefaultImpl()


def _start_event_loop() -> None:
    """Start the event loop of libvirt, one thread for the process: must stand before any connection."""
    global _event_loop_started  # noqa: PLW0603  (libvirt's own registration is process-wide and for ever)
    with _event_loop_lock:
        if _event_loop_started:
            return
        libvirt.virEventRegisterDefaultImpl()
        # libvirt prints every error on stderr unless told not to: ours arrive as exceptions
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        threading.Thread(target=_run_event_loop, name="libvirt-events", daemon=True).start()
        _event_loop_started = True


def libvirt_code(error: BaseException) -> int | None:
    """The error number of libvirt behind an error of ours (``VIR_ERR_...``), or None."""
    cause = error if isinstance(error, libvirt.libvirtError) else error.__cause__
    return int(cause.get_error_code()) if isinstance(cause, libvirt.libvirtError) else None


def map_error(error: libvirt.libvirtError, subject: str) -> LifeboatError:
    """An error of libvirt as ours: ``subject`` names the thing (``VM web1``)."""
    code = error.get_error_code()
    fact = error.get_error_message() or str(error)
    if code in _NOT_FOUND_CODES:
        return NotFound(f"{subject}: libvirt knows none such ({fact}); see `virsh list --all`")
    return HypervisorError(f"{subject}: libvirt refused or failed: {fact}")


class Hypervisor:
    """One libvirt connection that comes back by itself.

    Objects of libvirt (domains, checkpoints) belong to the connection they came from: look a domain up for
    each piece of work and do not keep it over a wait of unknown length.

    ``turns_directory``: where calls of other processes of ours (the watchdog) on the same VM wait.
    """

    def __init__(self, uri: str = DEFAULT_URI, turns_directory: Path | None = None) -> None:
        self.uri = uri
        self._turns = Turns(turns_directory)
        self.features: Features | None = None
        self._connection: ConnectionHandle = None
        self._executor: ThreadPoolExecutor | None = None
        self._subscribers: list[Subscriber] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._keeper: asyncio.Task[None] | None = None
        self._lost = asyncio.Event()
        self._up = asyncio.Event()
        self._relay: EventRelay | None = None
        self.sentence = "not yet connected to libvirt"

    @property
    def connected(self) -> bool:
        """Whether libvirt answered last time."""
        return self._up.is_set()

    @property
    def connection(self) -> ConnectionHandle:
        """The libvirt connection, for use in :meth:`call` only. Raises HypervisorError when down."""
        if self._connection is None:
            raise HypervisorError(f"libvirt at {self.uri}: {self.sentence}; see `systemctl status libvirtd`")
        return self._connection

    async def start(self, *, timeout_seconds: float | None = CONNECT_TIMEOUT_SECONDS) -> None:
        """Connect, and keep the connection from now on.

        Raises HypervisorError when libvirt does not answer within ``timeout_seconds``; None waits for ever.
        """
        if self._keeper is not None:
            return
        _start_event_loop()
        self._executor = ThreadPoolExecutor(MAXIMUM_THREADS, thread_name_prefix="libvirt-call")
        self._relay = EventRelay(asyncio.get_running_loop(), self._dispatch)
        self._keeper = asyncio.create_task(self._keep_connected(), name="libvirt-connection")
        try:
            await self.wait_connected(timeout_seconds)
        except TimeoutError as error:
            sentence = self.sentence
            await self.stop()
            raise HypervisorError(
                f"libvirt at {self.uri}: {sentence}; see `systemctl status libvirtd`"
            ) from error

    async def stop(self) -> None:
        """Close the connection; calls under way end with an error."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
            self._keeper = None
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._disconnect()
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None
        self.sentence = "connection closed"

    async def wait_connected(self, timeout_seconds: float | None = None) -> None:
        """Wait until libvirt answers. Raises TimeoutError."""
        async with asyncio.timeout(timeout_seconds):
            await self._up.wait()

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Deliver every :class:`DomainEvent` to ``subscriber``; the returned function ends that.

        After a reconnect an event ``connected`` comes: what happened in between raised no event, look again.
        """
        self._subscribers.append(subscriber)

        def unsubscribe() -> None:
            with contextlib.suppress(ValueError):
                self._subscribers.remove(subscriber)

        return unsubscribe

    async def call(
        self,
        function: Callable[..., T],
        *arguments: object,
        subject: str = "libvirt",
        timeout_seconds: float | None = DEFAULT_TIMEOUT_SECONDS,
        **keywords: object,
    ) -> T:
        """Run a blocking function (of libvirt) in a thread.

        Raises HypervisorError or NotFound, naming ``subject``.

        A call that is too late is given up, not undone: it may still take effect.
        """
        work = functools.partial(function, *arguments, **keywords)

        async def answer() -> T:
            running = asyncio.get_running_loop().run_in_executor(self._threads(subject), work)
            # not wait_for: before Python 3.12 it forgets a cancellation that comes with the answer
            async with asyncio.timeout(timeout_seconds):
                return await running

        return await self._mapped(answer(), function, subject, timeout_seconds)

    async def call_in_turn(
        self,
        vm: str,
        function: Callable[..., T],
        *arguments: object,
        subject: str,
        timeout_seconds: float | None = DEFAULT_TIMEOUT_SECONDS,
        **keywords: object,
    ) -> T:
        """:meth:`call` for what touches checkpoints, backups or layers of the VM with this UUID.

        One at a time for each VM. A call that is given up keeps its turn until libvirt has answered it.
        """
        work = functools.partial(function, *arguments, **keywords)
        answer = self._turns.run(
            self._threads(subject), vm, work, subject=subject, timeout_seconds=timeout_seconds
        )
        return await self._mapped(answer, function, subject, timeout_seconds)

    def _threads(self, subject: str) -> ThreadPoolExecutor:
        if self._executor is None:
            raise HypervisorError(f"{subject}: no connection to libvirt; start the proxy's connection first")
        return self._executor

    async def _mapped(
        self, answer: Awaitable[T], function: Callable[..., T], subject: str, timeout_seconds: float | None
    ) -> T:
        try:
            return await answer
        except TimeoutError as error:
            name = getattr(function, "__name__", "call")
            raise HypervisorError(
                f"{subject}: libvirt did not answer {name} within {timeout_seconds} s; "
                "see `systemctl status libvirtd` and `virsh domjobinfo`"
            ) from error
        except libvirt.libvirtError as error:
            await self._check_alive(error)
            raise map_error(error, subject) from error

    async def lookup(self, vm: str) -> DomainHandle:
        """The domain object for a name or a UUID. Raises NotFound, HypervisorError."""
        connection = self.connection
        if _UUID.match(vm):
            # a VM may be *named* like a UUID: the UUID wins, the name is tried after it
            with contextlib.suppress(NotFound):
                return await self.call(connection.lookupByUUIDString, vm.lower(), subject=f"VM {vm}")
        return await self.call(connection.lookupByName, vm, subject=f"VM {vm}")

    async def definition(self, vm: str, *, inactive: bool = False) -> Definition:
        """The VM's definition: live (with backing chains) or the persistent one."""
        domain = await self.lookup(vm)
        return await self.definition_of(domain, subject=f"VM {vm}", inactive=inactive)

    async def definition_of(
        self, domain: DomainHandle, *, subject: str, inactive: bool = False
    ) -> Definition:
        """:meth:`definition` for a domain object."""

        def read() -> Definition:
            flags = libvirt.VIR_DOMAIN_XML_INACTIVE if inactive else 0
            persistent = bool(domain.isPersistent())
            autostart = bool(domain.autostart()) if persistent else False
            return parse_definition(domain.XMLDesc(flags), autostart=autostart)

        return await self.call(read, subject=subject)

    async def transferable_xml(self, domain: DomainHandle, *, subject: str) -> str:
        """The persistent definition with its secrets (a console's password), as another host takes it."""
        flags = (
            libvirt.VIR_DOMAIN_XML_INACTIVE
            | libvirt.VIR_DOMAIN_XML_SECURE
            | libvirt.VIR_DOMAIN_XML_MIGRATABLE
        )
        return str(await self.call(domain.XMLDesc, flags, subject=subject))

    async def is_active(self, domain: DomainHandle, *, subject: str) -> bool:
        """Whether the domain has a QEMU process (running, paused, ...)."""
        return bool(await self.call(domain.isActive, subject=subject))

    async def list_domains(self) -> list[tuple[str, str, bool]]:
        """Every VM of this host as (UUID, name, active); one that is undefined meanwhile is none of them."""

        def read() -> list[tuple[str, str, bool]]:
            told = []
            for domain in self.connection.listAllDomains(0):
                try:
                    told.append((domain.UUIDString(), domain.name(), bool(domain.isActive())))
                except libvirt.libvirtError as error:
                    if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                        raise
            return told

        return await self.call(read, subject=f"libvirt at {self.uri}")

    async def _check_alive(self, error: libvirt.libvirtError) -> None:
        """An error may mean a dead connection: ask, so that the keeper need not wait for the keepalive."""
        connection = self._connection
        if connection is None or error.get_error_code() not in _LOST_CODES:
            return
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(10):
                alive = await loop.run_in_executor(self._executor, connection.isAlive)
        except (libvirt.libvirtError, TimeoutError, RuntimeError):
            alive = 0
        if not alive and connection is self._connection:
            self.sentence = error.get_error_message() or "connection lost"
            self._up.clear()
            self._lost.set()

    async def _keep_connected(self) -> None:
        attempt = 0
        while True:
            try:
                await self._connect()
            except (libvirt.libvirtError, TimeoutError) as error:
                self.sentence = f"no answer ({error})"
                await asyncio.sleep(BACKOFF_SECONDS[min(attempt, len(BACKOFF_SECONDS) - 1)])
                attempt += 1
                continue
            attempt = 0
            self._dispatch(DomainEvent("connected"))
            await self._lost.wait()
            logger.warning("libvirt at %s: connection lost (%s); connecting again", self.uri, self.sentence)
            self._dispatch(DomainEvent("disconnected"))
            await self._disconnect()

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        self._lost = lost = asyncio.Event()

        def on_closed(_connection: ConnectionHandle, reason: int, _opaque: Opaque) -> None:
            def tell() -> None:
                self.sentence = f"connection closed by libvirt (reason {reason})"
                self._up.clear()
                lost.set()

            with contextlib.suppress(RuntimeError):  # the loop ended before libvirt's thread said so
                loop.call_soon_threadsafe(tell)

        def open_connection() -> tuple[ConnectionHandle, Features]:
            connection = libvirt.open(self.uri)
            # the test driver has no transport: nothing to keep alive
            with contextlib.suppress(libvirt.libvirtError):
                connection.setKeepAlive(KEEPALIVE_INTERVAL_SECONDS, KEEPALIVE_COUNT)
            with contextlib.suppress(libvirt.libvirtError):
                connection.registerCloseCallback(on_closed, None)
            if self._relay is not None:
                self._relay.register(connection)
            return connection, read_features(connection)

        opening = loop.run_in_executor(self._executor, open_connection)
        async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
            connection, features = await opening
        self._connection, self.features = connection, features
        self.sentence = "connected"
        self._up.set()

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        self._up.clear()
        if connection is None:
            return

        def close() -> None:
            with contextlib.suppress(libvirt.libvirtError):
                connection.unregisterCloseCallback()
            if self._relay is not None:
                self._relay.unregister(connection)
            with contextlib.suppress(libvirt.libvirtError):
                connection.close()

        # a dead libvirtd must not hold us: its thread ends by itself
        with contextlib.suppress(TimeoutError, RuntimeError):
            async with asyncio.timeout(5):
                await asyncio.get_running_loop().run_in_executor(self._executor, close)

    def _dispatch(self, event: DomainEvent) -> None:
        for subscriber in list(self._subscribers):
            try:
                outcome = subscriber(event)
            except Exception:
                logger.exception("a subscriber failed on %s", event)
                continue
            if outcome is not None:
                task = asyncio.ensure_future(self._watch(outcome, event))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    @staticmethod
    async def _watch(outcome: Awaitable[None], event: DomainEvent) -> None:
        try:
            await outcome
        except Exception:
            logger.exception("a subscriber failed on %s", event)
