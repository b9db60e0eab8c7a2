# SPDX-License-Identifier: GPL-3.0-or-later
"""What a guest told (its record file, one on every host) and what it wrote (its log on disk)."""

import itertools
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

RECORD = struct.Struct("<8sQQII480s")
MAGIC = b"LBRECORD"
PAYLOAD_BYTES = 480


@dataclass(frozen=True)
class Beat:
    """One heartbeat, with the guest's own clocks."""

    number: int
    monotonic_seconds: float
    real_seconds: float


@dataclass
class Told:
    """What a guest told about its newest boot and, for acknowledgements, about all of its life."""

    boots: int = 0
    beats: list[Beat] = field(default_factory=list)
    acknowledged: dict[int, float] = field(default_factory=dict)
    committed: dict[int, float] = field(default_factory=dict)
    canaries: list[str] = field(default_factory=list)
    # Heartbeats of the newest boot that more than one host got: two copies were running.
    doubled_beats: int = 0
    cached_bytes: int = 0
    dirty_bytes: int = 0
    trees: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def highest_acknowledged(self) -> int:
        """Number of the newest record that the guest called durable; 0 for none."""
        return max(self.acknowledged, default=0)

    @property
    def highest_committed(self) -> int:
        """Number of the newest row that the guest's database committed; 0 for none."""
        return max(self.committed, default=0)

    def longest_gap_seconds(self) -> float:
        """Largest time between two consecutive heartbeats by the guest's real-time clock."""
        times = [beat.real_seconds for beat in self.beats]
        return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)


def parse(texts: Iterable[str]) -> Told:
    """Join the record files of all hosts, in any order; a line that a power cut left unfinished is
    skipped."""
    told = Told()
    beats: dict[int, Beat] = {}
    boots: set[int] = set()
    of_each_host: list[dict[int, Beat]] = []
    for text in texts:
        here: dict[int, Beat] = {}
        of_each_host.append(here)
        for line in text.splitlines():
            words = line.split()
            try:
                _take(told, here, boots, words)
            except (IndexError, ValueError):
                continue
    told.boots = len(boots)
    # A reboot begins the count anew: only what came after the newest boot is one row of heartbeats.
    newest = max(boots, default=0) / 1e9
    for here in of_each_host:
        for number, beat in here.items():
            told.doubled_beats += (
                number in beats and min(beat.real_seconds, beats[number].real_seconds) >= newest
            )
            if number not in beats or beats[number].real_seconds < beat.real_seconds:
                beats[number] = beat
    told.beats = sorted((b for b in beats.values() if b.real_seconds >= newest), key=lambda beat: beat.number)
    return told


def _take(told: Told, beats: dict[int, Beat], boots: set[int], words: Sequence[str]) -> None:
    kind = words[0] if words else ""
    if kind == "beat":
        beat = Beat(int(words[1]), int(words[2]) / 1e9, int(words[3]) / 1e9)
        old = beats.get(beat.number)
        if old is None or old.real_seconds < beat.real_seconds:
            beats[beat.number] = beat
    elif kind == "ack":
        told.acknowledged[int(words[1])] = int(words[2]) / 1e9
    elif kind == "commit":
        told.committed[int(words[1])] = int(words[2]) / 1e9
    elif kind == "boot":
        boots.add(int(words[1]))
    elif kind == "canary":
        told.canaries.append(words[1])
    elif kind == "cached":
        told.cached_bytes = max(told.cached_bytes, int(words[1]))
    elif kind == "dirty":
        told.dirty_bytes = max(told.dirty_bytes, int(words[1]))
    elif kind == "tree":
        told.trees = max(told.trees, int(words[1]))
    elif kind == "error":
        told.errors.append(" ".join(words[1:]))


@dataclass(frozen=True)
class DiskLog:
    """The log as one disk holds it: whole records 1..count, and what is wrong with it."""

    count: int
    findings: tuple[str, ...]


def expected_payload(number: int) -> bytes:
    """The payload that the agent writes into record `number` (xorshift64, as in agent.c)."""
    mask = (1 << 64) - 1
    state = (number * 0x9E3779B97F4A7C15) & mask
    words = []
    for _ in range(PAYLOAD_BYTES // 8):
        state ^= (state << 13) & mask
        state ^= state >> 7
        state ^= (state << 17) & mask
        words.append(state)
    return struct.pack(f"<{len(words)}Q", *words)


def read_log(data: bytes) -> DiskLog:
    """Check every record of a log file. What was being appended when the copy was taken may be incomplete."""
    findings: list[str] = []
    whole, left = divmod(len(data), RECORD.size)
    for index in range(whole):
        magic, number, _, length, checksum, payload = RECORD.unpack_from(data, index * RECORD.size)
        wrong = (
            magic != MAGIC
            or number != index + 1
            or length != PAYLOAD_BYTES
            or zlib.crc32(payload) != checksum
        )
        if wrong or payload != expected_payload(number):
            # A record that was never acknowledged may be torn, but only the last one can be such.
            if index == whole - 1:
                return DiskLog(index, tuple(findings))
            findings.append(f"record {index + 1} is damaged (says it is {number})")
    if left and whole == 0 and len(data) > RECORD.size:
        findings.append("no whole record")
    return DiskLog(whole, tuple(findings[:10]))
