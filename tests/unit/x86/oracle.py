# SPDX-License-Identifier: Apache-2.0
"""This machine's processor as the judge of emulated instructions: ``oracle.c``, compiled and called."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest

CODE = 0x7001_0000
WINDOW_SIZE = 1024
WINDOW = 0x7002_1000 - WINDOW_SIZE // 2
LEAVE, LEAVE_32 = 0x7000_1000, 0x7000_1100
GS_BASE = 0x12340

_HEAD = struct.Struct("<16Q Q Q 3I 20s")
_VECTORS = 32 * 64
CASE_SIZE = _HEAD.size + _VECTORS + WINDOW_SIZE


class Case:
    """Registers, memory and an instruction; after :func:`run` what the processor made of them.

    ``trap`` is the exception's vector or None.
    """

    __slots__ = ("bits", "code", "flags", "general", "memory", "trap", "vectors", "width")

    def __init__(
        self,
        code: bytes,
        bits: int,
        general: list[int],
        flags: int,
        memory: bytes,
        width: int = 0,
        vectors: bytes = b"",
    ) -> None:
        self.code = code
        self.bits = bits
        self.general = general
        self.flags = flags
        self.memory = memory
        self.width = width
        self.vectors = vectors
        self.trap: int | None = None


@functools.cache
def _library() -> ctypes.CDLL:
    if platform.machine() != "x86_64":
        pytest.skip("an x86-64 processor judges here")
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc, which builds the judge")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "oracle.so")
        source = Path(__file__).with_name("oracle.c")
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", path, source], check=True, timeout=120)
        library = ctypes.CDLL(path)
    error = library.oracle_prepare()
    if error:
        pytest.skip(f"this machine does not let code run at fixed addresses: {os.strerror(error)}")
    return library


def width() -> int:
    """Bytes of this processor's vector registers."""
    return int(_library().oracle_width())


def has(feature: str) -> bool:
    """Whether the processor knows ``movbe``, ``movdiri``, ``movdir64b``, ``bmi2``."""
    return bool(_library().oracle_has(feature.encode()))


def run(cases: list[Case]) -> list[Case]:
    """What became of the cases, in order; those given stay as they are."""
    buffer = bytearray(CASE_SIZE * len(cases))
    for at, case in zip(range(0, len(buffer), CASE_SIZE), cases, strict=True):
        code = case.code.ljust(20, b"\0")
        _HEAD.pack_into(buffer, at, *case.general, case.flags, 0, case.bits, case.width, len(case.code), code)
        if case.width:
            buffer[at + _HEAD.size : at + _HEAD.size + _VECTORS] = case.vectors
        buffer[at + _HEAD.size + _VECTORS : at + CASE_SIZE] = case.memory
    _library().oracle_run((ctypes.c_char * len(buffer)).from_buffer(buffer), ctypes.c_uint64(len(cases)))
    results = []
    for at, case in zip(range(0, len(buffer), CASE_SIZE), cases, strict=True):
        fields = _HEAD.unpack_from(buffer, at)
        memory = at + _HEAD.size + _VECTORS
        vectors = bytes(buffer[at + _HEAD.size : memory]) if case.width else b""
        result = Case(
            case.code, case.bits, list(fields[:16]), fields[16], bytes(buffer[memory : at + CASE_SIZE]),
            case.width, vectors,
        )  # fmt: skip
        result.trap = fields[17] - 1 if fields[17] else None
        results.append(result)
    return results
