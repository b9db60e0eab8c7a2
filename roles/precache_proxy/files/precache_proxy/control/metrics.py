# SPDX-License-Identifier: GPL-3.0-or-later
"""Prometheus metrics, made from one answer of the proxy about itself (so they say what the API says)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from precache_proxy.control.answers import Answer

# Documented name, what it is, where it stands in a protected VM's answer.
_VM_GAUGES = (
    ("lag_bytes", "Bytes changed since the last sealed generation", "lag_bytes"),
    ("lag_seconds", "Age of the oldest change that is not yet at the peer", "lag_seconds"),
    ("coverage_ratio", "Share of the allocated bytes that the replica holds", "coverage"),
    ("rpo_seconds", "The lag in seconds that the operator asked for", "rpo_seconds"),
    ("rpo_kept", "1 while the lag is within the RPO", "rpo_kept"),
    ("generation", "Number of the last sealed generation", "generation"),
    ("generation_age_seconds", "Age of the last sealed generation", "generation_age_seconds"),
    ("pass_open", "1 while a pass is under way", "pass_open"),
)
# The same for the last pass.
_PASS_GAUGES = (
    ("last_pass_open_seconds", "For how long the last pass had a backup job open in QEMU", "open_seconds"),
    ("last_pass_seconds", "How long the last pass took", "total_seconds"),
    ("last_pass_data_bytes", "Changed bytes in the last pass, before compression", "data_bytes"),
    ("last_pass_wire_bytes", "Payload of the last pass as handed to the link", "wire_bytes"),
    ("last_pass_slices", "Slices of the last pass", "slices"),
    ("last_pass_at_seconds", "When the last pass ended", "at"),
)
# Since the proxy took the VM up.
_PASSES_COUNTERS = (
    ("passes", "Passes whose generation was sealed", "made"),
    ("passes_empty", "Passes that found nothing to send", "empty"),
    ("passes_failed", "Passes that an error ended", "failed"),
    ("passes_data_bytes", "Changed bytes sent by passes, before compression", "data_bytes"),
    ("passes_zero_bytes", "Bytes that passes told to be zero", "zero_bytes"),
    ("passes_wire_bytes", "Payload of passes as handed to the link", "wire_bytes"),
    ("passes_open_seconds", "Seconds for which a backup job was open in QEMU", "open_seconds"),
)
_SCRUB_COUNTERS = (
    ("scrub_turns", "Times that a scrub has compared all blocks", "turns"),
    ("scrub_different_blocks", "Blocks that a scrub found to differ", "different_blocks"),
)
_RECENT_TEXT = "Blocks that differed in the last whole turn of the scrub, or since"


class ProxyCollector(Collector):
    """Metrics of one answer."""

    def __init__(self, status: Answer) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Every metric family of the proxy."""
        yield from self._proxy()
        yield from self._vms()
        yield from self._links()
        yield from self._replicas()
        yield from self._jobs()

    def _proxy(self) -> Iterator[Metric]:
        status = self._status
        info = InfoMetricFamily("lifeboat_proxy", "Which proxy this is")
        info.add_metric([], {key: status[key] for key in ("version", "name", "site")})
        yield info
        plain = (
            ("uptime_seconds", "Time since the proxy started", status["uptime_seconds"]),
            ("libvirt_connected", "1 while libvirt answers", status["hypervisor"]["connected"]),
            (
                "certificate_expires_at_seconds",
                "When our certificate ends",
                status["certificate"]["expires_at"],
            ),
            ("store_free_bytes", "Free space under the store", status["store"]["free_bytes"]),
            ("store_size_bytes", "Size of the file system under the store", status["store"]["size_bytes"]),
            ("scratch_used_bytes", "Space that scratch files take", status["scratch"]["used_bytes"]),
            ("scratch_free_bytes", "Free space under the scratch directory", status["scratch"]["free_bytes"]),
            ("scratch_files", "Scratch files", status["scratch"]["files"]),
        )
        for name, text, value in plain:
            if value is not None:
                yield GaugeMetricFamily(f"lifeboat_{name}", text, value=float(value))

    def _vms(self) -> Iterator[Metric]:
        labels = ("vm", "uuid", "peer")
        vms = self._status["vms"]
        for name, text, key in _VM_GAUGES:
            yield _family(GaugeMetricFamily(f"lifeboat_vm_{name}", text, labels=labels), labels, vms, key)
        passes = [{**vm, **vm["last_pass"]} for vm in vms if vm.get("last_pass")]
        for name, text, key in _PASS_GAUGES:
            yield _family(GaugeMetricFamily(f"lifeboat_vm_{name}", text, labels=labels), labels, passes, key)
        for part, counters in (("passes", _PASSES_COUNTERS), ("scrub", _SCRUB_COUNTERS)):
            parts = [{**vm, **vm[part]} for vm in vms]
            for name, text, key in counters:
                counter = CounterMetricFamily(f"lifeboat_vm_{name}", text, labels=labels)
                yield _family(counter, labels, parts, key)
        recent = GaugeMetricFamily("lifeboat_vm_scrub_recent_different_blocks", _RECENT_TEXT, labels=labels)
        yield _family(recent, labels, [{**vm, **vm["scrub"]} for vm in vms], "recent_different_blocks")
        yield _states("lifeboat_vm_state", "1 for the state that a protected VM is in", labels, vms)

    def _links(self) -> Iterator[Metric]:
        links = self._status["links"]
        labels = ("peer",)
        yield _states("lifeboat_link_state", "1 for the state that a link is in", labels, links)
        for key, text in (
            ("round_trip_seconds", "Last measured round trip"),
            ("rate_bytes_per_second", "Rate limit; absent without one"),
        ):
            yield _family(GaugeMetricFamily(f"lifeboat_link_{key}", text, labels=labels), labels, links, key)
        byte_labels = ("peer", "class", "direction", "kind")
        counted = CounterMetricFamily(
            "lifeboat_link_bytes",
            "Bytes per class; kind raw is payload, wire is frames before TLS",
            labels=byte_labels,
        )
        for link in links:
            for traffic_class, tally in link["counters"].get("classes", {}).items():
                for key, value in tally.items():
                    direction, kind, _unit = key.split("_")
                    counted.add_metric([link["peer"], traffic_class, direction, kind], float(value))
        yield counted

    def _replicas(self) -> Iterator[Metric]:
        labels = ("vm", "uuid")
        replicas = self._status["replicas"]
        yield _states("lifeboat_replica_state", "1 for the state that a replica is in", labels, replicas)
        for key, text in (
            ("allocated_bytes", "Space that a replica takes"),
            ("chain_length", "Longest chain of images of a replica's disks"),
        ):
            yield _family(
                GaugeMetricFamily(f"lifeboat_replica_{key}", text, labels=labels), labels, replicas, key
            )
        sealed = GaugeMetricFamily("lifeboat_replica_generation", "Last sealed generation", labels=labels)
        for replica in replicas:
            if replica.get("sealed"):
                sealed.add_metric(_values(labels, replica), float(replica["sealed"]["generation"]))
        yield sealed

    def _jobs(self) -> Iterator[Metric]:
        for name, jobs in (("evacuations", "evacuations"), ("arrivals", "arrivals")):
            family = GaugeMetricFamily(
                f"lifeboat_{name}", f"Remembered {name} by verdict", labels=("verdict",)
            )
            counts: dict[str, int] = {"running": 0, "undecided": 0}
            for job in self._status[jobs]:
                verdict = str(job.get("verdict") or ("ended" if job["ended"] else "running"))
                counts[verdict] = counts.get(verdict, 0) + 1
            for verdict, count in sorted(counts.items()):
                family.add_metric([verdict], float(count))
            yield family


def _values(labels: Iterable[str], thing: Answer) -> list[str]:
    names = {"vm": "name", "uuid": "uuid" if "uuid" in thing else "vm"}
    return [str(thing.get(names.get(label, label), "")) for label in labels]


def _family(family: Any, labels: Iterable[str], things: Iterable[Answer], key: str) -> Metric:
    """Add one sample per thing that has a value under ``key``."""
    for thing in things:
        if thing.get(key) is not None:
            family.add_metric(_values(labels, thing), float(thing[key]))
    told: Metric = family
    return told


def _states(name: str, text: str, labels: tuple[str, ...], things: Iterable[Answer]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=(*labels, "state"))
    for thing in things:
        family.add_metric([*_values(labels, thing), str(thing.get("state"))], 1.0)
    return family


def render(status: Answer) -> bytes:
    """The text that Prometheus reads."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ProxyCollector(status))
    return bytes(generate_latest(registry))
