# SPDX-License-Identifier: Apache-2.0
"""A library for LD_PRELOAD whose ``openat`` leaves out O_NOATIME.

The overlay in which guests write opens the files below it with O_NOATIME (``fs/overlayfs/file.c``), and only root may
do that with files of others: without this an ordinary user's guest could not read what belongs to root. The functions
are openat, openat64 and their fortified forms; each passes its arguments on to ``syscall`` of the C library, which
takes care of errno. Two pages: code and symbols, then what the loader writes to.
"""

from __future__ import annotations

import os
import struct

_FUNCTIONS = (b"openat", b"openat64", b"__openat_2", b"__openat64_2")
_CALLEE = b"syscall"
_PAGE = 0x1000
_CODE = bytes.fromhex(
    "81e2fffffbff"  # and edx,~O_NOATIME
    "4989c8"  # mov r8,rcx         mode
    "89d1"  # mov ecx,edx          flags
    "4889f2"  # mov rdx,rsi        path
    "4863f7"  # movsxd rsi,edi     folder
    "bf01010000"  # mov edi,257    __NR_openat
    "31c0"  # xor eax,eax          no vector registers
    "ff25"  # jmp [rip+...]        the slot of `syscall`
)
_HASH, _SYMTAB, _STRTAB, _RELA, _STRSZ, _SYMENT, _RELASZ, _RELAENT = 4, 6, 5, 7, 10, 11, 8, 9
_GLOB_DAT = 6
_GLOBAL_FUNCTION = 0x12


def library() -> str:
    """The path of the library, as long as this process and what it executes live."""
    fd = os.memfd_create("rootvisor-preload", 0)
    os.write(fd, image())
    os.set_inheritable(fd, True)
    return f"/proc/self/fd/{fd}"


def image() -> bytes:
    """The library as an ELF-64 shared object."""
    names = (*_FUNCTIONS, _CALLEE)
    strings = b"\0"
    name_at = []
    for name in names:
        name_at.append(len(strings))
        strings += name + b"\0"
    symbols = len(names) + 1
    at = 64 + 4 * 56  # behind the headers
    places = {}
    for what, size in (
        (_SYMTAB, symbols * 24), (_RELA, 24), (_HASH, (3 + symbols) * 4), (_STRTAB, len(strings)), ("code", 0),
    ):  # fmt: skip
        at = (at + 15) & ~15
        places[what] = at
        at += size
    code_at = places["code"]
    slot = _PAGE  # of the address of `syscall`; the dynamic section follows
    code = _CODE + struct.pack("<i", slot - (code_at + len(_CODE) + 4))
    table = bytes(24)
    for name, offset in zip(names, name_at, strict=True):
        ours = name != _CALLEE
        table += struct.pack(
            "<IBBHQQ",
            offset,
            _GLOBAL_FUNCTION,
            0,
            int(ours),
            code_at if ours else 0,
            len(code) if ours else 0,
        )
    chain = struct.pack(f"<{3 + symbols}I", 1, symbols, 1, 0, *range(2, symbols), 0)
    relocation = struct.pack("<QQq", slot, (symbols - 1) << 32 | _GLOB_DAT, 0)
    entries = (
        (_HASH, places[_HASH]), (_STRTAB, places[_STRTAB]), (_SYMTAB, places[_SYMTAB]), (_STRSZ, len(strings)),
        (_SYMENT, 24), (_RELA, places[_RELA]), (_RELASZ, 24), (_RELAENT, 24), (0, 0),
    )  # fmt: skip
    dynamic = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    first_size = code_at + len(code)
    second = bytes(8) + dynamic
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01".ljust(16, b"\0"), 3, 62, 1, 0, 64, 0, 0, 64, 56, 4, 0, 0, 0,
    )  # fmt: skip
    segments = (
        (1, 5, 0, first_size, _PAGE),  # PT_LOAD, r-x
        (1, 6, _PAGE, len(second), _PAGE),  # PT_LOAD, rw-
        (2, 6, _PAGE + 8, len(dynamic), 8),  # PT_DYNAMIC
        (0x6474E551, 6, 0, 0, 16),  # PT_GNU_STACK: not executable
    )
    headers = b"".join(
        struct.pack("<IIQQQQQQ", kind, flags, offset, offset, offset, size, size, align)
        for kind, flags, offset, size, align in segments
    )
    file = bytearray(_PAGE)
    for at, content in (
        (0, header + headers), (places[_SYMTAB], table), (places[_RELA], relocation), (places[_HASH], chain),
        (places[_STRTAB], strings), (code_at, code),
    ):  # fmt: skip
        file[at : at + len(content)] = content
    return bytes(file) + second
