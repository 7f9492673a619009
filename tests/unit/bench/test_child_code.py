# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from rootvisor.bench import child_code
from rootvisor.x86.decoder import decode

SOURCE = Path(child_code.__file__).with_name("child_loop.c")


def instructions(code: bytes) -> dict[int, int]:
    """Offset -> length of every instruction."""
    found = {}
    at = 0
    while at < len(code):
        one = decode(code[at : at + 15], 64)
        assert one is not None, f"no instruction at {at:#x}"
        found[at] = one.length
        at += one.length
    return found


def test_image_has_page_tables_code_and_handler_in_place() -> None:
    code = child_code.program(500)
    image = child_code.image(code)
    assert len(image) == child_code.IMAGE_BYTES
    assert image[child_code.ENTRY :].startswith(code)
    assert child_code.ENTRY + len(code) <= 0x4800  # the handler
    (first,) = struct.unpack_from("<Q", image, child_code.PAGE_TABLE)
    (second,) = struct.unpack_from("<Q", image, first & ~0xFFF)
    (last,) = struct.unpack_from("<Q", image, (second & ~0xFFF) + 511 * 8)
    assert last == 511 << 21 | 0x83


def test_every_jump_lands_on_an_instruction() -> None:
    code = child_code.program(7)
    starts = instructions(code)
    for at, length in starts.items():
        one = code[at : at + length]
        if one[:2] == b"\x0f\x85":
            target = at + length + struct.unpack("<i", one[2:])[0]
        elif one[0] in (0x72, 0x73, 0xEB):
            target = at + length + struct.unpack("b", one[1:])[0]
        else:
            continue
        assert target in starts, f"jump at {at:#x}"


def test_what_intercepts_has_two_bytes_as_the_vmm_assumes() -> None:
    code = child_code.program(7)
    intercepting = [
        length
        for at, length in instructions(code).items()
        if code[at] == 0xE6 or code[at : at + 2] == b"\x89\x03"
    ]
    assert len(intercepting) == child_code.END_MARK + 1 + 3  # marks, two loops of OUT, one of MOV
    assert set(intercepting) == {2}


def test_the_vmm_has_the_same_numbers() -> None:
    text = SOURCE.read_text(encoding="utf-8") + SOURCE.with_name("kvm_processor.h").read_text(
        encoding="utf-8"
    )
    names = dict(re.findall(r"\b([A-Z_]+) = (0x[0-9A-Fa-f]+|\d+)", text))
    for name in (
        "MARK_PORT", "IMAGE_BYTES", "RAM_BYTES", "FRESH_GPA", "FRESH_BYTES", "DOORBELL_GPA", "SEEN_GPA", "TAKEN_GPA",
        "ENTRY", "STACK", "PAGE_TABLE", "VECTOR", "END_MARK",
    ):  # fmt: skip
        assert int(names[name], 0) == getattr(child_code, name), name
    assert child_code.KINDS[int(names["HYPERCALL_MARK"])] == "port_hypercall"
    assert child_code.KINDS[int(names["IRQ_MARK"])] == "irqfd"


def test_the_vmm_compiles_without_warnings() -> None:
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("gcc is missing; apt-get install gcc libc6-dev")
    subprocess.run(
        [gcc, "-Wall", "-Wextra", "-Werror", "-O2", "-fsyntax-only", str(SOURCE)], check=True, timeout=60
    )
