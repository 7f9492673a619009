# SPDX-License-Identifier: Apache-2.0
"""Takes the uncompressed ELF kernel out of a bzImage.

A bzImage decompresses itself while it boots, which costs seconds on an emulated processor. Its set-up header says
where the compressed kernel lies (kernel Documentation/arch/x86/boot.rst: `payload_offset`, `payload_length`); the
program that made it is known by its magic number, and the last four bytes are the size that comes out.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import lzma
import os
import shutil
import struct
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path

from .cache import cache_dir, make_dir, storing
from .kernel import KernelError
from .process import clean_environment

_SECTOR = 512
_SETUP_SECTS = 0x1F1
_MAGIC = 0x202  # "HdrS", then u16 protocol version
_KERNEL_VERSION = 0x20E  # u16, offset of a text less 0x200
_PAYLOAD = 0x248  # u32 offset in the protected-mode code, u32 length
_PAYLOAD_PROTOCOL = 0x208
_ELF_IDENT = b"\x7fELF\x02\x01"  # 64-bit, little-endian
_EM_X86_64 = 62
_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_MAX_KERNEL_BYTES = 1 << 30
_TOOL_TIMEOUT_S = 120

_TOOLS = {
    b"\x28\xb5\x2f\xfd": ("zstd", "-dcq"),
    b"\x02\x21\x4c\x18": ("lz4", "-dc"),
    b"\x89LZO": ("lzop", "-dc"),
}


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """`kind` is `bzimage` or `elf`; `version` the text of the set-up header up to the first blank (bzImage only)."""

    kind: str
    version: str


def probe(path: Path) -> ImageFacts:
    """What kind of kernel a file is. Raises `KernelError`: missing, unreadable, not an x86-64 kernel."""
    try:
        with path.open("rb") as file:
            head = file.read(0x10000)
    except OSError as error:
        raise KernelError(
            f"cannot read the kernel {path}: {error.strerror}", "give the path of a kernel image"
        ) from error
    if (
        head[:6] == _ELF_IDENT
        and len(head) >= _ELF_HEADER.size
        and _ELF_HEADER.unpack_from(head)[2] == _EM_X86_64
    ):
        return ImageFacts("elf", "")
    if head[_MAGIC : _MAGIC + 4] == b"HdrS":
        return ImageFacts("bzimage", _version_text(head))
    raise KernelError(f"{path} is not an x86-64 Linux kernel", "give a bzImage (vmlinuz) or an ELF vmlinux")


def vmlinux_of(path: Path) -> Path | None:
    """The ELF image of any kernel file: itself, or taken out and kept in the cache by its content's hash.

    None when it cannot be had (unknown compression, the program for it is missing, no cache): boot the bzImage.
    """
    if probe(path).kind == "elf":
        return path
    data = path.read_bytes()
    target = cache_dir() / "kernels" / "extracted" / f"{hashlib.sha256(data).hexdigest()[:32]}.elf"
    if target.exists():
        with contextlib.suppress(OSError):  # it is in use: see prune
            os.utime(target)
        return target
    try:
        make_dir(target.parent)
        return target if extract(data, target) else None
    except KernelError:
        return None  # the cache cannot be written: not needed for a boot


def extract(bzimage: bytes, target: Path) -> bool:
    """Write the ELF kernel of a bzImage to `target`, in one rename. False when it cannot be had."""
    elf = unpack(bzimage)
    if elf is None:
        return False
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with storing():
            draft.write_bytes(elf)
            draft.rename(target)
    finally:
        draft.unlink(missing_ok=True)
    return True


def unpack(bzimage: bytes) -> bytes | None:
    """The ELF kernel inside a bzImage; None when the image is damaged or its compression cannot be undone here."""
    if len(bzimage) < _PAYLOAD + 8 or bzimage[_MAGIC : _MAGIC + 4] != b"HdrS":
        return None
    (protocol,) = struct.unpack_from("<H", bzimage, _MAGIC + 4)
    if protocol < _PAYLOAD_PROTOCOL:
        return None
    offset, length = struct.unpack_from("<II", bzimage, _PAYLOAD)
    start = ((bzimage[_SETUP_SECTS] or 4) + 1) * _SECTOR + offset
    payload = bzimage[start : start + length]
    if length < 8 or len(payload) != length:
        return None
    (size,) = struct.unpack_from("<I", payload, length - 4)
    if size > _MAX_KERNEL_BYTES:
        return None
    kernel = _decompress(payload)
    if kernel is None or len(kernel) != size:
        return None
    return _elf_only(kernel)


def _decompress(payload: bytes) -> bytes | None:
    body = payload[:-4]  # gzip's own trailer ends with the size; after the others kbuild has put it
    try:
        if payload.startswith(b"\x1f\x8b"):
            return gzip.decompress(payload)
        if payload.startswith(b"BZh"):
            return bz2.decompress(body)
        if payload.startswith((b"\xfd7zXZ\x00", b"\x5d\x00\x00")):
            return lzma.decompress(body)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError):
        return None
    tool = next((tool for magic, tool in _TOOLS.items() if payload.startswith(magic)), None)
    return _decompress_with(tool, body) if tool else None


def _decompress_with(tool: tuple[str, ...], body: bytes) -> bytes | None:
    if shutil.which(tool[0]) is None:
        return None
    try:
        done = subprocess.run(
            tool,
            input=body,
            capture_output=True,
            env=clean_environment(),
            timeout=_TOOL_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _elf_only(kernel: bytes) -> bytes | None:
    """Cut off the relocations that kbuild appends for address randomisation (arch/x86/boot/compressed/Makefile)."""
    if len(kernel) < _ELF_HEADER.size or kernel[:6] != _ELF_IDENT:
        return None
    header = _ELF_HEADER.unpack_from(kernel)
    machine, phoff, shoff, phentsize, phnum, shentsize, shnum = (header[i] for i in (2, 5, 6, 9, 10, 11, 12))
    if machine != _EM_X86_64 or phentsize != 56 or phoff + phnum * phentsize > len(kernel):
        return None
    end = max(shoff + shnum * shentsize, phoff + phnum * phentsize)
    for index in range(phnum):
        file_offset, file_size = struct.unpack_from("<8xQ16xQ", kernel, phoff + index * phentsize)
        end = max(end, file_offset + file_size)
    return kernel[:end] if end <= len(kernel) else None


def _version_text(head: bytes) -> str:
    (pointer,) = struct.unpack_from("<H", head, _KERNEL_VERSION)
    if not pointer:
        return ""
    text = head[pointer + 0x200 :].split(b"\0", 1)[0][:200].decode("ascii", "replace")
    return text.split(" ", 1)[0]
