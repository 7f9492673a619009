# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]

_MAGIC = 0x1BADB002


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    path = tmp_path / "test.flat"
    flags = 1 << 16
    header = _MAGIC, flags, -(_MAGIC + flags) & 0xFFFFFFFF, 1 << 20, 1 << 20, 0, 0, 1 << 20
    path.write_bytes(struct.pack("<8I", *header).ljust(512, b"\0"))
    return path


def described(rootvisor: Run, *words: str) -> dict[str, object]:
    status, out, err = rootvisor("run", "--dry-run", "--json", "--as", "guest", *words)
    assert (status, err) == (0, "")
    description = json.loads(out)["description"]
    assert isinstance(description, dict)
    return description


def test_linux_as_a_guest_has_the_devices_and_the_command(rootvisor: Run, bzimage: Path) -> None:
    description = described(rootvisor, "--kernel", str(bzimage), "--", "true")
    assert description["role"] == "guest"
    assert description["devices"] == ["console", "rng", "fs"]
    assert description["command"]["argv"] == ["true"]  # type: ignore[index]


def test_a_multiboot_kernel_has_neither_devices_nor_ramdisk(rootvisor: Run, flat: Path) -> None:
    description = described(rootvisor, "--kernel", str(flat), "--append", "direct")
    assert description["kernel"] == {
        "image": str(flat), "vmlinux": None, "name": "test.flat", "version": "", "multiboot": True,
    }  # fmt: skip
    assert (description["devices"], description["initrds"], description["command"]) == ([], [], None)
    assert (description["rootfs"], description["tty"], description["append"]) == (None, False, "direct")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--kernel", "FLAT"), "is no Linux but a multiboot kernel"),
        (("--as", "guest", "--kernel", "FLAT", "--", "ls"), "CMD needs Linux"),
        (("--as", "guest", "--kernel", "FLAT", "--disk", "path=FLAT"), "--disk needs Linux"),
        (("--as", "guest", "--watch-deposits"), "--watch-deposits is about a root partition"),
        (("--as", "guest", "--child-timers"), "--child-timers is about a root partition"),
        (("--hide", "timers"), "--hide is about a guest"),
        (("--as", "guest", "--scheduler", "root"), "--scheduler root is about a root partition"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(
    rootvisor: Run, flat: Path, words: tuple[str, ...], message: str
) -> None:
    status, _out, err = rootvisor("run", "--dry-run", *(word.replace("FLAT", str(flat)) for word in words))
    assert status == 2
    assert message in err
