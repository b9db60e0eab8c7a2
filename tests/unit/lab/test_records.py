# SPDX-License-Identifier: GPL-3.0-or-later
"""Reading what a guest told and what it wrote: nothing that is missing or damaged may pass."""

import zlib

import pytest

from lifeboat_lab.errors import LabError
from lifeboat_lab.guests.plan import GuestPlan
from lifeboat_lab.guests.records import MAGIC, PAYLOAD_BYTES, RECORD, expected_payload, parse, read_log


def log_of(count: int) -> bytes:
    """A log as the agent writes it."""
    records = []
    for number in range(1, count + 1):
        payload = expected_payload(number)
        records.append(RECORD.pack(MAGIC, number, 1, PAYLOAD_BYTES, zlib.crc32(payload), payload))
    return b"".join(records)


def test_whole_log_counts() -> None:
    log = read_log(log_of(50))
    assert (log.count, log.findings) == (50, ())
    assert read_log(b"").count == 0


def test_the_last_record_may_be_torn_and_no_other() -> None:
    whole = log_of(10)
    torn = whole[:-100] + bytes(100)
    assert read_log(torn) == read_log(log_of(9))
    assert read_log(whole[:-1]).count == 9
    damaged = bytearray(whole)
    damaged[4 * RECORD.size + 100] ^= 1
    assert read_log(bytes(damaged)).findings == ("record 5 is damaged (says it is 5)",)


def test_a_lost_record_in_the_middle_is_seen() -> None:
    whole = log_of(10)
    holed = whole[: 3 * RECORD.size] + whole[4 * RECORD.size :]
    assert read_log(holed).findings[0] == "record 4 is damaged (says it is 5)"
    zeroed = whole[: 3 * RECORD.size] + bytes(RECORD.size) + whole[4 * RECORD.size :]
    assert read_log(zeroed).findings == ("record 4 is damaged (says it is 0)",)


def test_told_is_joined_over_hosts() -> None:
    home = "boot 1000000000\nbeat 1 5 1100000000\nack 1 1100000000\ncanary ab\nbeat 2 6 1200000000\nack 2 12"
    backup = "beat 3 7 1900000000\nack 3 1950000000\nack 4 1960000000\nbeat 4 8 1950000000\n"
    told = parse([backup, home])
    assert [beat.number for beat in told.beats] == [1, 2, 3, 4]
    assert told.longest_gap_seconds() == pytest.approx(0.7)
    assert told.highest_acknowledged == 4
    assert told.canaries == ["ab"]
    assert (told.boots, told.doubled_beats) == (1, 0)


def test_two_running_copies_show() -> None:
    home = "boot 1000000000\n" + "".join(f"beat {n} 1 {1000000000 + n}\n" for n in range(1, 10))
    backup = "".join(f"beat {n} 1 {1000000000 + n}\n" for n in range(5, 12))
    assert parse([home, backup]).doubled_beats == 5


def test_a_reboot_begins_a_new_row() -> None:
    text = "boot 1000000000\nbeat 1 1 1100000000\nbeat 2 1 1200000000\nboot 9000000000\nbeat 1 1 9100000000\n"
    told = parse([text])
    assert told.boots == 2
    assert [beat.real_seconds for beat in told.beats] == [9.1]
    # The same number after a reboot at another host is no second copy.
    assert (
        parse(
            ["boot 1000000000\nbeat 1 1 1100000000\n", "boot 9000000000\nbeat 1 1 9100000000\n"]
        ).doubled_beats
        == 0
    )


def test_every_fault_of_a_plan_is_told_at_once() -> None:
    with pytest.raises(LabError) as caught:
        GuestPlan(
            "web/1",
            workload="juggle",
            disks=9,
            bus="ide",
            disk_format="vmdk",
            disk_mib=10,
            firmware="coreboot",
        )
    text = str(caught.value)
    for fault in (
        "workload juggle",
        "9 disks",
        "bus ide",
        "format vmdk",
        "10 MiB: too small",
        "slash",
        "coreboot",
    ):
        assert fault in text


def test_names_with_markup_reach_libvirt_whole() -> None:
    xml = GuestPlan('ü & <"x">').domain_xml("2001:db8:1:1::100", "qemu")
    assert '<name>ü &amp; &lt;"x"&gt;</name>' in xml
