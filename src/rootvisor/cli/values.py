# SPDX-License-Identifier: Apache-2.0
"""Text to values: the small languages of the options. Pure: nothing here looks at the machine.

Every function raises `ValueError` with one line that says what was wrong and what a right value looks like.
"""

from __future__ import annotations

import re

from rootvisor.cli.description import Disk

MAX_VPS = 64
"""Most virtual processors of a root partition; CPUID leaf 0x40000005 reports the same number."""

MIN_MEMORY_BYTES = 128 << 20
"""Least memory with which both supported kernels reach user space."""

MAX_MEMORY_BYTES = 1 << 40
"""Most memory that the machine's memory map has room for."""

DEVICES = ("console", "rng", "fs", "disk")
"""Virtio devices that `--devices` can name, in PCI order."""

_UNITS = {"K": 10, "M": 20, "G": 30, "T": 40}
_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)([KMGT])(?:i?B)?", re.IGNORECASE)


def parse_memory(text: str) -> int:
    """Bytes of a memory size such as `512M`, `2G` or `1.5GiB`; a whole number of MiB, within the allowed
    range.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        if text.strip().isdigit():
            raise ValueError(f"{text!r} has no unit; write for example {text.strip()}M or 2G")
        raise ValueError(f"{text!r} is not a size; write for example 512M or 2G")
    size = int(float(match[1]) * (1 << _UNITS[match[2].upper()]))
    if size < MIN_MEMORY_BYTES:
        raise ValueError(f"{text!r} is too small; a root partition needs at least {MIN_MEMORY_BYTES >> 20}M")
    if size > MAX_MEMORY_BYTES:
        raise ValueError(f"{text!r} is too large; the largest machine has {MAX_MEMORY_BYTES >> 40}T")
    return size & -(1 << 20)


def parse_vps(text: str) -> int:
    """Number of virtual processors, 1 to `MAX_VPS`."""
    try:
        count = int(text, 10)
    except ValueError:
        raise ValueError(f"{text!r} is not a number; write 1 to {MAX_VPS}") from None
    if not 1 <= count <= MAX_VPS:
        raise ValueError(f"{count} is out of range; a root partition has 1 to {MAX_VPS} VPs")
    return count


def parse_seconds(text: str) -> float:
    """Seconds, greater than zero; a fraction is allowed."""
    try:
        seconds = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number of seconds; write for example 30 or 0.5") from None
    if not 0 < seconds <= 1e9:
        raise ValueError(f"{text!r} is out of range; give a number of seconds greater than 0")
    return seconds


def parse_disk(text: str) -> Disk:
    """A disk such as `path=disk.img,readonly=on`; a plain file name stands for `path=FILE`."""
    fields: dict[str, str] = {}
    for part in text.split(","):
        key, separator, value = part.partition("=")
        if not separator:
            if fields:
                raise ValueError(f"{part!r} is not a key=value pair; write path=FILE[,readonly=on|off]")
            key, value = "path", part
        if key not in ("path", "readonly"):
            raise ValueError(f"unknown key {key!r}; write path=FILE[,readonly=on|off]")
        if key in fields:
            raise ValueError(f"{key!r} is given twice; write path=FILE[,readonly=on|off]")
        fields[key] = value
    if not fields.get("path"):
        raise ValueError("no file is named; write path=FILE[,readonly=on|off]")
    readonly = fields.get("readonly", "off")
    if readonly not in ("on", "off"):
        raise ValueError(f"readonly={readonly!r} is neither on nor off")
    return Disk(path=fields["path"], readonly=readonly == "on")


def parse_devices(text: str) -> tuple[str, ...]:
    """Devices such as `console,rng`, in PCI order and each once; `none` gives no virtio device, `all` all of
    them.
    """
    if text == "none":
        return ()
    if text == "all":
        return DEVICES
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in DEVICES:
            raise ValueError(f"unknown device {name!r}; choose from {','.join(DEVICES)}, or all, or none")
    return tuple(name for name in DEVICES if name in names)


def parse_append(text: str) -> str:
    """Words for the kernel command line: printable text in one line."""
    if "\0" in text or "\n" in text or "\r" in text:
        raise ValueError("the kernel command line is one line of text; it cannot hold line ends or NUL bytes")
    if len(text.encode("utf-8", "surrogateescape")) > 1500:
        raise ValueError("the text is too long; the kernel's command line has room for 1500 bytes of it")
    return text.strip()
