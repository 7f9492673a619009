# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from rootvisor.cli import app, engine
from rootvisor.cli.engine import KvmVerdict

Result = tuple[int, str, str]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has an empty cache of its own."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("ROOTVISOR_CACHE", str(cache))
    return cache


@pytest.fixture(autouse=True)
def no_kvm_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test runs the processor self-test; KVM counts as usable."""
    monkeypatch.setattr(engine, "kvm_verdict", lambda use_cache=True: KvmVerdict(True, "pretended"))


@pytest.fixture
def rootvisor(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs a command line in this process; gives exit status, stdout, stderr."""

    def run(*arguments: str) -> Result:
        status = app.run(list(arguments))
        out, err = capfd.readouterr()
        return status, out, err

    return run


@pytest.fixture
def bzimage(tmp_path: Path) -> Path:
    """A file that passes as a 64-bit bzImage."""
    head = bytearray(0x1000)
    head[0x1F1] = 1
    struct.pack_into("<I", head, 0x1F4, 0x40)
    head[0x1FE:0x200] = b"\x55\xaa"
    head[0x201] = 0x6A
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<HHHH", head, 0x206, 0x20F, 0, 0, 0)
    struct.pack_into("<H", head, 0x20E, 0x300)
    head[0x211] = 1
    struct.pack_into("<I", head, 0x230, 0x200000)
    head[0x234] = 1
    struct.pack_into("<H", head, 0x236, 1)
    struct.pack_into("<Q", head, 0x258, 0x1000000)
    struct.pack_into("<I", head, 0x260, 0x100000)
    head[0x500:0x540] = b"6.12.0-test (somebody) #1 SMP".ljust(0x40, b"\0")
    path = tmp_path / "bzImage"
    path.write_bytes(bytes(head))
    return path


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True
