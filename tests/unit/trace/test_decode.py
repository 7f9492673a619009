# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import random

from rootvisor.tlfs import hypercalls
from rootvisor.trace import sink
from rootvisor.trace.decode import (
    INPUT_LAYOUTS,
    call_name,
    decode_input,
    decode_record,
    msr_name,
    status_name,
)


def test_known_numbers_have_the_headers_names() -> None:
    assert call_name(hypercalls.CREATE_VP) == "CREATE_VP"
    assert status_name(0) == "SUCCESS"
    assert msr_name(0x40000001) == "HYPERCALL"
    assert msr_name(0x40000093) == "SINT3"


def test_unknown_numbers_stay_numbers() -> None:
    assert call_name(0xBEEF) == "0xbeef"
    assert status_name(0x7777) == "0x7777"
    assert msr_name(0x40001234) == "0x40001234"


def test_control_word_fields_appear_when_set() -> None:
    control = hypercalls.DEPOSIT_MEMORY | 1 << 16 | 3 << 17 | 5 << 32 | 2 << 48
    line, _ = decode_record((sink.HYPERCALL, 100, 150, 1, 0, control, b"", 0, 4, b"\1"), 40)
    assert (line["fast"], line["var"], line["rep_count"], line["rep_start"]) == (True, 3, 5, 2)
    assert (line["t"], line["ns"], line["reps"], line["output"]) == (60, 50, 4, "01")


def test_what_follows_the_fixed_part_is_hex() -> None:
    data = (1).to_bytes(8, "little") + bytes(range(8))
    assert decode_input(hypercalls.DEPOSIT_MEMORY, data) == {"partition_id": 1, "rest": "0001020304050607"}


def test_short_input_stays_hex() -> None:
    assert decode_input(hypercalls.DEPOSIT_MEMORY, b"\1\2") == {"rest": "0102"}


def test_every_layout_decodes_zeros() -> None:
    for code, layout in INPUT_LAYOUTS.items():
        assert set(decode_input(code, bytes(layout.size))) == set(layout.fields)


def test_random_hypercalls_always_give_json() -> None:
    chance = random.Random(1)
    for _ in range(2000):
        record = (
            sink.HYPERCALL, chance.getrandbits(63), chance.getrandbits(63), 1, chance.randrange(64),
            chance.getrandbits(64), chance.randbytes(chance.randrange(600)), chance.getrandbits(16), 0, b"",
        )  # fmt: skip
        json.dumps(decode_record(record, 0)[0])


def test_unknown_record_is_shown_as_it_is() -> None:
    line, _ = decode_record((99, 5, "x"), 0)
    assert line["kind"] == "unknown"
