# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rootvisor.kernels import KernelError
from rootvisor.kernels.image import extract, probe, unpack, vmlinux_of
from tests.unit.kernels.fakes import make_bzimage, make_elf

ELF = make_elf(b"kernel text " * 400)


def with_tool(*command: str) -> Callable[[bytes], bytes]:
    def compress(data: bytes) -> bytes:
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is not installed; run make setup")
        return subprocess.run(command, input=data, check=True, capture_output=True).stdout

    return compress


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lambda data: lzma.compress(data, check=lzma.CHECK_CRC32),
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "zstd": with_tool("zstd", "-cq"),
    "lz4": with_tool("lz4", "-lc"),
}


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_unpack_each_compression(name: str) -> None:
    assert unpack(make_bzimage(ELF, COMPRESSIONS[name])) == ELF


def test_unpack_cuts_off_relocations() -> None:
    assert unpack(make_bzimage(ELF + b"\0" * 4000 + b"relocations")) == ELF


@pytest.mark.parametrize("cut", [0, 0x100, 0x250, 5 * 512, 5 * 512 + 100])
def test_unpack_truncated_is_none(cut: int) -> None:
    assert unpack(make_bzimage(ELF)[:cut]) is None


def test_unpack_damaged_payload_is_none() -> None:
    for compress in (gzip.compress, bz2.compress, COMPRESSIONS["xz"], COMPRESSIONS["lzma"]):
        image = bytearray(make_bzimage(ELF, compress))
        image[-40:-20] = bytes(20)
        assert unpack(bytes(image)) is None


def test_unpack_unknown_compression_is_none() -> None:
    assert unpack(make_bzimage(ELF, lambda data: b"????" + data)) is None


def test_unpack_without_the_tool_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    image = make_bzimage(ELF, COMPRESSIONS["zstd"])
    monkeypatch.setenv("PATH", "/nonexistent")
    assert unpack(image) is None


def test_unpack_payload_that_is_no_x86_64_kernel_is_none() -> None:
    assert unpack(make_bzimage(b"no kernel at all")) is None
    assert unpack(make_bzimage(make_elf(machine=183))) is None
    assert unpack(make_bzimage(ELF[:-1])) is None


def test_extract_leaves_no_draft(tmp_path: Path) -> None:
    assert extract(make_bzimage(ELF), tmp_path / "vmlinux")
    assert [path.name for path in tmp_path.iterdir()] == ["vmlinux"]
    assert not extract(b"nonsense", tmp_path / "other")


def test_probe_bzimage_tells_its_version(tmp_path: Path) -> None:
    path = tmp_path / "bzImage"
    path.write_bytes(make_bzimage(ELF))
    assert probe(path).kind == "bzimage"
    assert probe(path).version == "6.12.1-test-cloud-amd64"


def test_probe_refuses_with_one_line(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    text = tmp_path / "text"
    text.write_text("hello")
    empty = tmp_path / "empty"
    empty.touch()
    for path, words in (
        (missing, "No such file"),
        (text, "not an x86-64"),
        (empty, "not an x86-64"),
        (tmp_path, "directory"),
    ):
        with pytest.raises(KernelError, match=words) as caught:
            probe(path)
        assert "\n" not in str(caught.value)


def test_vmlinux_of_is_kept_by_content(cache: Path, tmp_path: Path) -> None:
    image = tmp_path / "bzImage"
    image.write_bytes(make_bzimage(ELF))
    first = vmlinux_of(image)
    assert first is not None
    assert first.read_bytes() == ELF
    inode = first.stat().st_ino
    image.rename(tmp_path / "elsewhere")
    assert vmlinux_of(tmp_path / "elsewhere") == first
    assert first.stat().st_ino == inode  # not written again
    assert first.is_relative_to(cache)


def test_vmlinux_of_elf_is_the_file_itself(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(ELF)
    assert vmlinux_of(path) == path
    assert not cache.exists()


def test_vmlinux_of_without_a_cache_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "bzImage"
    image.write_bytes(make_bzimage(ELF))
    monkeypatch.setenv("ROOTVISOR_CACHE", str(image / "below a file"))
    assert vmlinux_of(image) is None
