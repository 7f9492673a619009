# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gzip
import lzma
import struct
from pathlib import Path

import pytest

from rootvisor.boot.errors import InitramfsError
from rootvisor.boot.modules import ModuleTree


def make_module(*items: str) -> bytes:
    """An ELF-64 object with nothing but a .modinfo section."""
    names = b"\0.modinfo\0.shstrtab\0"
    info = b"".join(item.encode() + b"\0" for item in items)
    info_offset = 64 + len(names)
    table = info_offset + len(info)
    sections = struct.pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    sections += struct.pack("<IIQQQQIIQQ", 1, 1, 0, 0, info_offset, len(info), 0, 0, 1, 0)
    sections += struct.pack("<IIQQQQIIQQ", 10, 3, 0, 0, 64, len(names), 0, 0, 1, 0)
    head = b"\x7fELF\x02\x01\x01" + bytes(9)
    head += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 2)
    return head + names + info + sections


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "kernel/drivers"
    folder.mkdir(parents=True)
    (folder / "top-level.ko.xz").write_bytes(
        lzma.compress(make_module("depends=middle,other", "license=GPL"))
    )
    (folder / "middle.ko.gz").write_bytes(
        gzip.compress(make_module("depends=bottom", "softdep=pre: extra gone"))
    )
    (folder / "bottom.ko").write_bytes(make_module("depends="))
    (folder / "extra.ko").write_bytes(make_module("depends="))
    (folder / "other.ko").write_bytes(make_module("depends=middle"))
    (tmp_path / "modules.builtin").write_text(
        "kernel/fs/fuse/virtiofs.ko\nkernel/drivers/virtio_console.ko\n"
    )
    return tmp_path


def test_order_without_modules_dep_comes_from_the_modules(tree: Path) -> None:
    order = ModuleTree(str(tree)).load_order(["top_level", "bottom", "virtiofs"])
    assert order == ["bottom", "extra", "middle", "other", "top_level"]


def test_order_from_modules_dep_does_not_open_a_module(tree: Path) -> None:
    lines = [
        "kernel/drivers/top-level.ko.xz: kernel/drivers/middle.ko.gz kernel/drivers/bottom.ko",
        "kernel/drivers/middle.ko.gz: kernel/drivers/bottom.ko",
        "kernel/drivers/bottom.ko:",
    ]
    (tree / "modules.dep").write_text("\n".join(lines))
    for file in (tree / "kernel/drivers").iterdir():
        file.unlink()
    assert ModuleTree(str(tree)).load_order(["top-level"]) == ["bottom", "middle", "top_level"]


def test_read_decompresses(tree: Path) -> None:
    modules = ModuleTree(str(tree))
    for name in ("top-level", "middle", "bottom"):
        assert modules.read(name).startswith(b"\x7fELF")


def test_unknown_module_is_one_line(tree: Path) -> None:
    with pytest.raises(InitramfsError, match="has no module nosuch, neither as a file nor built in"):
        ModuleTree(str(tree)).load_order(["nosuch"])


def test_missing_tree_and_damaged_module_are_one_line(tree: Path) -> None:
    with pytest.raises(InitramfsError, match="no such directory"):
        ModuleTree(str(tree / "none"))
    (tree / "kernel/drivers/bottom.ko.xz").write_bytes(b"not xz")
    (tree / "kernel/drivers/bottom.ko").unlink()
    with pytest.raises(InitramfsError, match="is damaged"):
        ModuleTree(str(tree)).read("bottom")


def test_cycle_and_garbage_end(tmp_path: Path) -> None:
    (tmp_path / "a.ko").write_bytes(make_module("depends=b"))
    (tmp_path / "b.ko").write_bytes(make_module("depends=a"))
    for length in range(0, 300, 7):
        (tmp_path / "c.ko").write_bytes(make_module("depends=a")[:length])
        assert ModuleTree(str(tmp_path)).load_order(["c"])[-1] == "c"
    assert sorted(ModuleTree(str(tmp_path)).load_order(["a"])) == ["a", "b"]
