# SPDX-License-Identifier: Apache-2.0
"""Kernel modules for the appliance: which ones, in which order, and without what makes them slow to load."""

from __future__ import annotations

import lzma
import os
import struct
import subprocess
import zlib

from .errors import ApplianceError

#: What the appliance's kernel must have; a name that modules.dep lacks is taken to be built in.
WANTED = ("overlay", "kvm-amd")
_SIGNATURE_MAGIC = b"~Module signature appended~\n"
_SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")  # Elf64_Shdr


def module_files(folder: str, wanted: tuple[str, ...] = WANTED) -> list[str]:
    """Paths of the wanted modules and of everything they need, in the order of loading.

    ``folder`` holds ``modules.dep`` (modules.dep(5)). Raises :class:`ApplianceError`.
    """
    try:
        with open(os.path.join(folder, "modules.dep")) as file:
            needs = dict(line.rstrip("\n").split(":", 1) for line in file if ":" in line)
    except OSError as error:
        raise ApplianceError(
            f"{folder}/modules.dep: {error.strerror}; run depmod, or install the kernel package anew"
        ) from error
    by_name = {_name(path): path for path in needs}
    order: list[str] = []
    for name in wanted:
        path = by_name.get(name.replace("-", "_"))
        if path is None:
            continue
        for one in [*reversed(needs[path].split()), path]:
            if one not in order:
                order.append(one)
    return [os.path.join(folder, path) for path in order]


def _name(path: str) -> str:
    return os.path.basename(path).split(".", 1)[0].replace("-", "_")


def module_name(path: str) -> str:
    """The file name that the module gets in the ramdisk."""
    return f"{_name(path)}.ko"


def read_module(path: str) -> bytes:
    """The module, unpacked, unsigned and without BTF: the kernel would otherwise decompress, hash and parse for
    longer than the rest of the loading takes. Raises :class:`ApplianceError`."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        return without_btf(without_signature(_unpacked(path, data)))
    except OSError as error:
        raise ApplianceError(f"{path}: {error.strerror}; install the kernel package anew") from error
    except (lzma.LZMAError, zlib.error, struct.error, ValueError, OverflowError) as error:
        raise ApplianceError(f"{path}: damaged module ({error}); install the kernel package anew") from error


def _unpacked(path: str, data: bytes) -> bytes:
    if data[:6] == b"\xfd7zXZ\0":
        return lzma.decompress(data)
    if data[:2] == b"\x1f\x8b":
        return zlib.decompress(data, 47)
    if data[:4] == b"\x28\xb5\x2f\xfd":
        try:
            result = subprocess.run(
                ["zstd", "-dcq"], input=data, capture_output=True, timeout=60, check=False
            )
        except FileNotFoundError as error:
            raise ApplianceError(f"{path}: needs zstd to unpack; apt-get install zstd") from error
        if result.returncode:
            raise ValueError("zstd cannot unpack it")
        return result.stdout
    return data


def without_signature(data: bytes) -> bytes:
    """Cut off the signature (scripts/sign-file.c: signature, 12-byte description, magic)."""
    if not data.endswith(_SIGNATURE_MAGIC):
        return data
    end = len(data) - len(_SIGNATURE_MAGIC)
    (length,) = struct.unpack(">I", data[end - 4 : end])
    if length > end - 12:
        raise ValueError("bad signature length")
    return data[: end - 12 - length]


def without_btf(data: bytes) -> bytes:
    """Rename the sections .BTF and .BTF.base, so that the kernel does not find them."""
    if data[:5] != b"\x7fELF\x02":
        raise ValueError("not a 64-bit ELF file")
    table, entry_size, count, names_index = struct.unpack_from("<Q10xHHH", data, 40)
    names_offset = _SECTION_HEADER.unpack_from(data, table + names_index * entry_size)[4]
    result = bytearray(data)
    for index in range(count):
        at = names_offset + _SECTION_HEADER.unpack_from(data, table + index * entry_size)[0]
        name = data[at : data.index(b"\0", at)]
        if name in (b".BTF", b".BTF.base"):
            result[at : at + 4] = b".btf"
    return bytes(result)
