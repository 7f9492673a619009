# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import lzma
import struct
from pathlib import Path

import pytest

from rootvisor.appliance.errors import ApplianceError
from rootvisor.appliance.modules import module_files, module_name, read_module, without_btf, without_signature


def elf(*names: bytes) -> bytes:
    """An ELF file with sections of these names and nothing in them."""
    strings = b"\0" + b"".join(name + b"\0" for name in (*names, b".shstrtab"))
    table = b""
    for name in (*names, b".shstrtab"):
        table += struct.pack(
            "<IIQQQQIIQQ", strings.index(name + b"\0"), 3, 0, 0, 64, len(strings), 0, 0, 1, 0
        )
    strings += bytes(-len(strings) % 8)
    head = b"\x7fELF\x02\x01\x01" + bytes(9)
    rest = struct.pack(
        "<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, 64 + len(strings), 0, 64, 0, 0, 64, len(names) + 1, len(names)
    )
    return head + rest + strings + table


def test_without_btf_sections_lose_their_names() -> None:
    result = without_btf(elf(b".text", b".BTF", b".BTF.base"))
    assert b".BTF" not in result
    assert b".text\0" in result
    assert len(result) == len(elf(b".text", b".BTF", b".BTF.base"))


def test_without_btf_not_elf_is_refused() -> None:
    with pytest.raises(ValueError, match="ELF"):
        without_btf(b"hello")


def test_without_signature_cuts_it_off() -> None:
    signed = b"module" + b"S" * 20 + bytes(8) + struct.pack(">I", 20) + b"~Module signature appended~\n"
    assert without_signature(signed) == b"module"
    assert without_signature(b"module") == b"module"


def test_without_signature_longer_than_file_is_refused() -> None:
    bad = bytes(8) + struct.pack(">I", 1000) + b"~Module signature appended~\n"
    with pytest.raises(ValueError, match="signature"):
        without_signature(bad)


def test_module_files_dependencies_come_first(tmp_path: Path) -> None:
    (tmp_path / "modules.dep").write_text(
        "k/kvm-amd.ko.xz: k/kvm.ko.xz v/irqbypass.ko.xz\nk/kvm.ko.xz: v/irqbypass.ko.xz\nv/irqbypass.ko.xz:\n"
    )
    names = [module_name(path) for path in module_files(str(tmp_path), ("kvm-amd", "overlay"))]
    assert names == ["irqbypass.ko", "kvm.ko", "kvm_amd.ko"]


def test_module_files_no_list_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ApplianceError, match="depmod"):
        module_files(str(tmp_path))


def test_read_module_unpacks_xz(tmp_path: Path) -> None:
    path = tmp_path / "a.ko.xz"
    path.write_bytes(lzma.compress(elf(b".text")))
    assert read_module(str(path)) == elf(b".text")


@pytest.mark.parametrize("content", [b"", b"\xfd7zXZ\0broken", b"\x7fELF\x02" + b"\xff" * 80])
def test_read_module_damaged_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.ko"
    path.write_bytes(content)
    with pytest.raises(ApplianceError, match="damaged"):
        read_module(str(path))
