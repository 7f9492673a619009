# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from rootvisor.cli import values
from rootvisor.cli.description import Disk


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512M", 512 << 20),
        ("2G", 2 << 30),
        ("2g", 2 << 30),
        ("1.5GiB", 3 << 29),
        ("131072K", 128 << 20),
        ("1T", 1 << 40),
        (" 1GB ", 1 << 30),
        ("200.3M", 200 << 20),
    ],
)
def test_memory_good_text_gives_bytes(text: str, expected: int) -> None:
    assert values.parse_memory(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a size"),
        ("foo", "not a size"),
        ("-1G", "not a size"),
        ("1e3M", "not a size"),
        ("0x10M", "not a size"),
        ("512", "no unit; write for example 512M"),
        ("127M", "at least 128M"),
        ("0G", "at least 128M"),
        ("2T", "too large"),
        ("9" * 400 + "G", "not a size"),
    ],
)
def test_memory_bad_text_says_what_is_right(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        values.parse_memory(text)


@pytest.mark.parametrize("text", ["0", "65", "1000", "-1"])
def test_vps_out_of_range_names_the_range(text: str) -> None:
    with pytest.raises(ValueError, match="1 to 64"):
        values.parse_vps(text)


@pytest.mark.parametrize("text", ["", "two", "1.5", "0x2", "9" * 5000])
def test_vps_not_a_number_names_the_range(text: str) -> None:
    with pytest.raises(ValueError, match="1 to 64"):
        values.parse_vps(text)


def test_vps_limits_are_allowed() -> None:
    assert (values.parse_vps("1"), values.parse_vps("64")) == (1, 64)


@pytest.mark.parametrize("text", ["0", "-1", "inf", "nan", "soon", "1e10"])
def test_seconds_bad_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="seconds"):
        values.parse_seconds(text)


def test_seconds_fraction_is_allowed() -> None:
    assert values.parse_seconds("0.5") == 0.5


@pytest.mark.parametrize(
    ("text", "disk"),
    [
        ("disk.img", Disk("disk.img")),
        ("path=disk.img", Disk("disk.img")),
        ("path=disk.img,readonly=on", Disk("disk.img", readonly=True)),
        ("readonly=off,path=a b", Disk("a b")),
        ("disk.img,readonly=on", Disk("disk.img", readonly=True)),
        ("path=a=b", Disk("a=b")),
    ],
)
def test_disk_good_text(text: str, disk: Disk) -> None:
    assert values.parse_disk(text) == disk


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no file"),
        ("readonly=on", "no file"),
        ("path=", "no file"),
        ("path=a,b", "key=value"),
        ("path=a,path=b", "twice"),
        ("path=a,size=3", "unknown key 'size'"),
        ("path=a,readonly=maybe", "neither on nor off"),
    ],
)
def test_disk_bad_text_shows_the_right_form(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        values.parse_disk(text)


def test_devices_are_in_pci_order_and_once() -> None:
    assert values.parse_devices("fs, console,fs") == ("console", "fs")
    assert values.parse_devices("none") == ()
    assert values.parse_devices("all") == values.DEVICES


@pytest.mark.parametrize("text", ["", "net", "console,,fs", "all,fs"])
def test_devices_unknown_name_lists_the_choice(text: str) -> None:
    with pytest.raises(ValueError, match="console,rng,fs,disk"):
        values.parse_devices(text)


@pytest.mark.parametrize("text", ["a\nb", "a\0b", "x" * 1501])
def test_append_what_a_command_line_cannot_hold_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="command line"):
        values.parse_append(text)
