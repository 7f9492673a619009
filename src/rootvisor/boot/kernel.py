# SPDX-License-Identifier: Apache-2.0
"""Recognise and load x86-64 kernel images: bzImage (64-bit entry) and ELF vmlinux.

Sources: kernel ``Documentation/arch/x86/boot.rst`` (real-mode header, 64-bit boot protocol),
``arch/x86/kernel/vmlinux.lds.S`` (ELF entry ``phys_startup_64``), the ELF-64 object format, and
``include/xen/interface/elfnote.h`` (``XEN_ELFNOTE_PHYS32_ENTRY``, the PVH entry).
"""

from __future__ import annotations

import errno
import os
import stat
import struct

from .errors import KernelImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

BZIMAGE: Final = "bzimage"
"""Kind of a compressed kernel with a real-mode header (``arch/x86/boot/bzImage``, a distribution's
``vmlinuz``)."""
ELF: Final = "elf"
"""Kind of an uncompressed ELF-64 image (``vmlinux``); it starts faster, for nothing has to be
decompressed."""

MIN_PROTOCOL: Final = 0x20C
"""Oldest boot protocol with ``xloadflags`` (2.12, Linux 3.8); older images have no described 64-bit entry."""
ENTRY_64_OFFSET: Final = 0x200
"""Distance of the 64-bit entry from the start of a bzImage's payload (boot.rst, 64-bit boot protocol)."""

_MIB = 1 << 20
_HEADER_BYTES = 0x1000  # covers boot_params' setup_header and the ELF header of every linker in use

# Offsets in the first sectors of a bzImage; the same as in boot_params (boot.rst, "details of header
# fields").
_SETUP_SECTS = 0x1F1
_SYSSIZE = 0x1F4
_BOOT_FLAG = 0x1FE
_JUMP_LENGTH = 0x201
_MAGIC = 0x202
_PROTOCOL = 0x206
_VERSION_POINTER = 0x20E
_LOADFLAGS = 0x211
_KERNEL_ALIGNMENT = 0x230
_RELOCATABLE = 0x234
_XLOADFLAGS = 0x236
_PREF_ADDRESS = 0x258
_INIT_SIZE = 0x260
_LOADED_HIGH = 0x01
_XLF_KERNEL_64 = 0x01

# ELF-64 (gABI): file header fields behind e_ident, program header, and the values that matter.
_ELF_HEADER = struct.Struct("<HHIQQQIHHHHHH")
_ELF_PROGRAM = struct.Struct("<IIQQQQQQ")
_ELF_NOTE = struct.Struct("<III")
_EM_386, _EM_X86_64 = 3, 62
_ET_EXEC, _ET_DYN = 2, 3
_PT_LOAD, _PT_INTERP, _PT_NOTE, _PT_TLS = 1, 3, 4, 7
_MAX_PROGRAM_HEADERS = 64
_MAX_NOTE_BYTES = 64 << 10
_XEN_ELFNOTE_PHYS32_ENTRY = 18


class _Segment:
    """One PT_LOAD: ``file_size`` bytes at ``offset`` go to ``gpa``, which then owns ``size`` bytes."""

    __slots__ = ("file_size", "gpa", "offset", "size", "vaddr")

    def __init__(self, offset: int, vaddr: int, gpa: int, file_size: int, size: int) -> None:
        self.offset = offset
        self.vaddr = vaddr
        self.gpa = gpa
        self.file_size = file_size
        self.size = size


class KernelFacts:
    """What an image says about itself.

    ``kind`` is :data:`BZIMAGE` or :data:`ELF`; ``version`` the text of the real-mode header (bzImage only),
    for example ``6.12.117+deb12-cloud-amd64``; ``protocol`` the boot protocol (0 for ELF); ``pvh_entry`` the
    32-bit PVH entry GPA of an ELF image, if it has one; ``low_gpa`` and ``end_gpa`` bound the memory that the
    image occupies until Linux has read its memory map, working space of the decompressor included.
    """

    __slots__ = ("end_gpa", "kind", "low_gpa", "protocol", "pvh_entry", "version")

    def __init__(
        self, kind: str, version: str | None, protocol: int, pvh_entry: int | None, low_gpa: int, end_gpa: int
    ) -> None:
        self.kind = kind
        self.version = version
        self.protocol = protocol
        self.pvh_entry = pvh_entry
        self.low_gpa = low_gpa
        self.end_gpa = end_gpa


class LoadedKernel:
    """A kernel in memory: ``rip`` is the physical 64-bit entry, ``kind`` as in :class:`KernelFacts`.

    ``setup_header`` holds the image's own header, from boot_params offset 0x1F1 on (None for ELF). The kernel
    owns ``low_gpa`` up to ``end_gpa`` while it starts; initrd, zero page and tables belong elsewhere.
    """

    __slots__ = ("end_gpa", "kind", "low_gpa", "pvh_entry", "rip", "setup_header")

    def __init__(
        self,
        rip: int,
        kind: str,
        setup_header: bytes | None,
        low_gpa: int,
        end_gpa: int,
        pvh_entry: int | None,
    ) -> None:
        self.rip = rip
        self.kind = kind
        self.setup_header = setup_header
        self.low_gpa = low_gpa
        self.end_gpa = end_gpa
        self.pvh_entry = pvh_entry


def probe_kernel(path: str) -> KernelFacts:
    """Read the headers of ``path`` and say what it is; :class:`KernelImageError` when it cannot boot."""
    fd = _open(path)
    try:
        return _parse(path, fd).facts
    finally:
        os.close(fd)


def load_kernel(path: str, ram: memoryview) -> LoadedKernel:
    """Read the image straight into ``ram``, the guest memory that starts at GPA 0, and return its entry.

    ``ram`` is a writable view of bytes that reads as zero where nothing has been written yet (the image's
    uninitialised data is left as it is, so that its pages stay unallocated). Raises
    :class:`KernelImageError`.
    """
    fd = _open(path)
    try:
        image = _parse(path, fd)
        facts = image.facts
        if facts.end_gpa > len(ram):
            raise KernelImageError(
                f"{path}: the kernel needs memory up to {-(-facts.end_gpa // _MIB)} MiB and does not fit in "
                f"{len(ram) // _MIB} MiB; give the partition more memory"
            )
        for segment in image.segments:
            _read_into(path, fd, segment.offset, ram[segment.gpa : segment.gpa + segment.file_size])
        return LoadedKernel(
            image.rip, facts.kind, image.setup_header, facts.low_gpa, facts.end_gpa, facts.pvh_entry
        )
    finally:
        os.close(fd)


class _Image:
    """A parsed image: what to read where, and how to enter it."""

    __slots__ = ("facts", "rip", "segments", "setup_header")

    def __init__(
        self, facts: KernelFacts, rip: int, segments: list[_Segment], setup_header: bytes | None
    ) -> None:
        self.facts = facts
        self.rip = rip
        self.segments = segments
        self.setup_header = setup_header


def _open(path: str) -> int:
    try:
        # Without O_NONBLOCK a named pipe would hang here until somebody writes to it.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        number = error.errno if isinstance(error, OSError) else None
        if number == errno.ENOENT:
            raise KernelImageError(f"{path}: no such kernel image; check --kernel") from error
        reason = os.strerror(number) if number else str(error)
        raise KernelImageError(f"{path}: cannot open the kernel image: {reason}") from error
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        what = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise KernelImageError(f"{path}: is {what}; --kernel takes a bzImage or an ELF vmlinux")
    return fd


def _parse(path: str, fd: int) -> _Image:
    size = os.fstat(fd).st_size
    try:
        head = os.pread(fd, _HEADER_BYTES, 0)
    except OSError as error:
        raise KernelImageError(f"{path}: cannot read the kernel image: {error.strerror}") from error
    if head.startswith(b"\x7fELF"):
        return _parse_elf(path, fd, head, size)
    if head[_MAGIC : _MAGIC + 4] == b"HdrS" and head[_BOOT_FLAG : _BOOT_FLAG + 2] == b"\x55\xaa":
        return _parse_bzimage(path, fd, head, size)
    if not size:
        raise KernelImageError(f"{path}: is empty; --kernel takes a bzImage or an ELF vmlinux")
    raise KernelImageError(f"{path}: is not a kernel; --kernel takes an x86-64 bzImage or ELF vmlinux")


def _u16(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 2], "little")


def _u32(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 4], "little")


def _u64(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 8], "little")


def _truncated(path: str, needed: int, size: int) -> KernelImageError:
    return KernelImageError(
        f"{path}: is truncated: {size} bytes where its header promises {needed}; copy or build it again"
    )


def _parse_bzimage(path: str, fd: int, head: bytes, size: int) -> _Image:
    protocol = _u16(head, _PROTOCOL)
    if protocol < MIN_PROTOCOL:
        raise KernelImageError(
            f"{path}: boot protocol {protocol >> 8}.{protocol & 0xFF:02} is too old; "
            "2.12 (Linux 3.8) or newer is needed"
        )
    if not _u16(head, _XLOADFLAGS) & _XLF_KERNEL_64:
        raise KernelImageError(f"{path}: is a 32-bit kernel; an x86-64 kernel is needed")
    if not head[_LOADFLAGS] & _LOADED_HIGH:
        raise KernelImageError(f"{path}: is a zImage, which loads below 1 MiB; a bzImage is needed")
    payload = ((head[_SETUP_SECTS] or 4) + 1) * 512
    length = _u32(head, _SYSSIZE) * 16
    # The last paragraph may be partial: syssize counts whole ones.
    if size < payload + max(length - 15, ENTRY_64_OFFSET):
        raise _truncated(path, payload + length, size)
    length = min(length, size - payload)
    preferred = _u64(head, _PREF_ADDRESS)
    init_size = _u32(head, _INIT_SIZE)
    # A relocatable kernel loaded lower than its preferred address moves there, so nothing would be saved by
    # that.
    load = preferred if preferred >= _MIB else _MIB
    header_end = _MAGIC + head[_JUMP_LENGTH]
    pointer = _u16(head, _VERSION_POINTER)
    version = None
    if pointer:
        text = os.pread(fd, 256, pointer + 0x200).split(b"\0", 1)[0].decode("ascii", "replace")
        version = text.split(" ", 1)[0] or None
    end = load + max(init_size, length)
    facts = KernelFacts(BZIMAGE, version, protocol, None, load, end)
    segment = _Segment(payload, 0, load, length, end - load)
    return _Image(facts, load + ENTRY_64_OFFSET, [segment], head[_SETUP_SECTS:header_end])


def _parse_elf(path: str, fd: int, head: bytes, size: int) -> _Image:
    if len(head) < 16 + _ELF_HEADER.size:
        raise _truncated(path, 16 + _ELF_HEADER.size, size)
    bits, order = head[4], head[5]
    machine = _u16(head, 18)
    if bits == 1 and order == 1 and machine in (_EM_386, _EM_X86_64):
        raise KernelImageError(f"{path}: is a 32-bit kernel; an x86-64 kernel is needed")
    if bits != 2 or order != 1 or machine != _EM_X86_64:
        raise KernelImageError(f"{path}: is an ELF file for another processor; an x86-64 kernel is needed")
    kind, _, _, entry, table, _, _, _, entry_size, count, _, _, _ = _ELF_HEADER.unpack_from(head, 16)
    not_a_kernel = KernelImageError(
        f"{path}: is an ELF file but not a kernel; --kernel takes an x86-64 bzImage or ELF vmlinux"
    )
    if (
        kind not in (_ET_EXEC, _ET_DYN)
        or entry_size != _ELF_PROGRAM.size
        or not 0 < count <= _MAX_PROGRAM_HEADERS
    ):
        raise not_a_kernel
    if table + count * entry_size > size:
        raise _truncated(path, table + count * entry_size, size)
    programs = os.pread(fd, count * entry_size, table)
    segments: list[_Segment] = []
    pvh_entry: int | None = None
    needed = 0
    for program in _ELF_PROGRAM.iter_unpack(programs):
        p_type, _, offset, vaddr, paddr, file_size, mem_size, _ = program
        if p_type in (_PT_INTERP, _PT_TLS):  # only user programs have these
            raise not_a_kernel
        if p_type == _PT_LOAD and mem_size:
            if file_size > mem_size or paddr + mem_size > 1 << 52:
                raise not_a_kernel
            needed = max(needed, offset + file_size)
            segments.append(_Segment(offset, vaddr, paddr, file_size, mem_size))
        elif p_type == _PT_NOTE and offset + file_size <= size:
            note = os.pread(fd, min(file_size, _MAX_NOTE_BYTES), offset)
            pvh_entry = _pvh_entry(note) if pvh_entry is None else pvh_entry
    if not segments:
        raise not_a_kernel
    if needed > size:
        raise _truncated(path, needed, size)
    low = min(segment.gpa for segment in segments)
    if low < _MIB:
        raise KernelImageError(
            f"{path}: loads at {low:#x}, below 1 MiB, where the boot tables live; not supported"
        )
    rip = _physical_entry(segments, entry)
    if rip is None:
        raise not_a_kernel
    end = max(segment.gpa + segment.size for segment in segments)
    return _Image(KernelFacts(ELF, None, 0, pvh_entry, low, end), rip, segments, None)


def _physical_entry(segments: list[_Segment], entry: int) -> int | None:
    """Linux links ``e_entry`` as the physical address of startup_64; other linkers leave the virtual one."""
    for segment in segments:
        if segment.gpa <= entry < segment.gpa + segment.file_size:
            return entry
    for segment in segments:
        if segment.vaddr <= entry < segment.vaddr + segment.file_size:
            return entry - segment.vaddr + segment.gpa
    return None


def _pvh_entry(notes: bytes) -> int | None:
    offset = 0
    while offset + _ELF_NOTE.size <= len(notes):
        name_size, value_size, kind = _ELF_NOTE.unpack_from(notes, offset)
        name = offset + _ELF_NOTE.size
        value = name + (name_size + 3 & ~3)
        if (
            kind == _XEN_ELFNOTE_PHYS32_ENTRY
            and notes[name : name + name_size] == b"Xen\0"
            and value_size in (4, 8)
        ):
            return int.from_bytes(notes[value : value + value_size], "little")
        offset = value + (value_size + 3 & ~3)
    return None


def _read_into(path: str, fd: int, offset: int, target: memoryview) -> None:
    done = 0
    while done < len(target):
        try:
            count = os.preadv(fd, [target[done:]], offset + done)
        except OSError as error:
            raise KernelImageError(f"{path}: cannot read the kernel image: {error.strerror}") from error
        if not count:
            raise _truncated(path, offset + len(target), offset + done)
        done += count
