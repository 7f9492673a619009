# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest

from rootvisor.vmm.schema import (
    Choice,
    ConfigError,
    Field,
    Flag,
    Identifier,
    Integer,
    Listed,
    MacAddress,
    Nested,
    Path,
    Size,
    Table,
    Text,
    Unsupported,
    size_text,
)

COLOUR = Table("Colour", "A colour.", (Field("red", Integer(0, 255), required=True),))
THING = Table(
    "Thing",
    "A thing.",
    (
        Field("name", Text(5)),
        Field("path", Path()),
        Field("big", Flag(), default=False),
        Field("size", Size(1 << 20, 4 << 30, 1 << 20), default=1 << 20),
        Field("shape", Choice("Round", "Flat"), default="Round"),
        Field("queue", Integer(2, 64, power_of_two=True), default=2),
        Field("mac", MacAddress()),
        Field("id", Identifier()),
        Field("colours", Listed(Nested(COLOUR), 2)),
        Field("wings", Unsupported("it walks", list)),
        Field("fast", Flag(), default=False, only=(False,), reason="it walks"),
    ),
)


def complaint(document: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        THING.check(document)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_check_empty_document_gives_the_defaults_only() -> None:
    assert THING.check({}) == {
        "big": False,
        "size": 1 << 20,
        "shape": "Round",
        "queue": 2,
        "fast": False,
    }


def test_check_result_is_a_new_document_that_checks_to_itself() -> None:
    given = {"name": "a", "colours": [{"red": 1}], "mac": "52:54:00:AB:CD:EF"}
    checked = THING.check(given)
    assert checked["mac"] == "52:54:00:ab:cd:ef"
    assert given == {"name": "a", "colours": [{"red": 1}], "mac": "52:54:00:AB:CD:EF"}
    assert THING.check(checked) == checked


def test_check_null_is_as_good_as_absent_where_there_is_no_default() -> None:
    assert "name" not in THING.check({"name": None, "wings": None})
    assert complaint({"big": None}) == "big: null is neither true nor false"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "a list is not an object"),
        (3, "3 is not an object"),
        (None, "null is not an object"),
        ({"zork": 1}, "zork: there is no such field in Thing"),
        ({"x" * 1000: 1}, "x" * 60 + ": there is no such field in Thing"),
        ({"name": 7}, "name: 7 is not a string"),
        ({"name": ""}, "name: is empty"),
        ({"name": "ääää"}, "name: has 8 bytes; at most 5 are possible"),
        ({"name": "a\0"}, "cannot hold line ends or NUL"),
        ({"name": "\ud800"}, "name: '\\ud800' is not Unicode text"),
        ({"path": "/" * 5000}, "path: has 5000 bytes; at most 4095"),
        ({"big": 1}, "big: 1 is neither true nor false"),
        ({"size": True}, "size: true is not a number of bytes"),
        ({"size": 1.5}, "size: 1.5 is not a number of bytes"),
        ({"size": 1}, "size: 1 is out of range; write 1M to 4G"),
        ({"size": 10**400}, "size: the number is out of range"),
        ({"size": (1 << 20) + 1}, "size: 1048577 is not a multiple of 1M"),
        ({"shape": "round"}, "shape: 'round' is none of Round, Flat"),
        ({"shape": {}}, "shape: an object is none of"),
        ({"queue": 3}, "queue: 3 is not a power of two; write 2 to 64"),
        ({"queue": 128}, "queue: 128 is out of range"),
        ({"queue": -(10**4000)}, "queue: a huge number is out of range"),
        ({"queue": "2"}, "queue: '2' is not a whole number"),
        ({"mac": "52:54:00:12:34"}, "mac: '52:54:00:12:34' is not a MAC address"),
        ({"mac": "53:54:00:12:34:56"}, "is a multicast address"),
        ({"mac": "५2:54:00:12:34:56"}, "is not a MAC address"),
        ({"id": "__thing"}, "those with __ are the VMM's own"),
        ({"colours": {}}, "colours: an object is not a list"),
        ({"colours": [{}]}, "colours[0].red: is missing"),
        ({"colours": [{"red": 1}, {"red": 256}]}, "colours[1].red: 256 is out of range; write 0 to 255"),
        ({"colours": [{"red": 1}] * 3}, "colours: has 3 items; at most 2"),
        ({"wings": ["left"]}, "wings: is not supported; it walks"),
        ({"fast": True}, "fast: true is not supported; it walks"),
    ],
)
def test_check_wrong_value_names_field_and_fault(document: Any, message: str) -> None:
    assert message in complaint(document)


def test_check_unsupported_thing_that_is_empty_is_accepted() -> None:
    assert THING.check({"wings": []})["wings"] == []
    assert "is not supported" in complaint({"wings": {}})


def test_check_number_is_no_flag_and_flag_no_number_where_one_value_goes() -> None:
    table = Table("T", "T.", (Field("n", Integer(0, 9), default=0, only=(0,), reason="no"),))
    assert complaint({"fast": 0})
    with pytest.raises(ConfigError):
        table.check({"n": False})


def test_shown_long_text_is_cut() -> None:
    assert len(complaint({"shape": "x" * 10000})) < 120


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0"), (1, "1"), (1 << 30, "1G"), (1536 << 20, "1536M"), (4096, "4K"), (1 << 40, "1T")],
)
def test_size_text_is_what_options_accept(size: int, text: str) -> None:
    assert size_text(size) == text
    assert Size(0, 1 << 50).parse(text, "size") == size


@pytest.mark.parametrize("text", ["512MB", "1.5G", "-1", "", "M", "0x10", "1e3", "٣M", "9" * 30, "5iB"])
def test_size_text_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size; write for example 512M"):
        Size(0, 1 << 50).parse(text, "size")


@pytest.mark.parametrize(("text", "size"), [("512m", 512 << 20), ("2GiB", 2 << 30), ("3k", 3072), ("7", 7)])
def test_size_text_units_are_powers_of_1024(text: str, size: int) -> None:
    assert Size(0, 1 << 50).parse(text, "size") == size


def test_syntax_leaves_out_what_does_nothing() -> None:
    assert THING.syntax() == (
        "name=STRING,path=FILE,big=on|off,size=SIZE,shape=round|flat,queue=N,mac=MAC,id=NAME,colours=VALUE"
    )
