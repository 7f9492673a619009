# SPDX-License-Identifier: Apache-2.0
"""Hypercalls about a processor's registers, page tables and CPUID, through any handle of its partition."""

from __future__ import annotations

from rootvisor.tlfs import cpuid_results, hypercalls, registers, translation

from . import abi
from .errors import MshvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .handle import Handle

_PER_CALL = 128


def get_registers(handle: Handle, vp: int, names: Sequence[int]) -> list[int]:
    """Registers by number (``tlfs.registers``), as integers of up to 128 bits."""
    head = hypercalls.VP_REGISTERS_INPUT.pack(0, vp, 0, bytes(3))
    values = []
    for start in range(0, len(names), _PER_CALL):
        part = names[start : start + _PER_CALL]
        data = head + b"".join([name.to_bytes(4, "little") for name in part])
        output = handle.hypercall(hypercalls.GET_VP_REGISTERS, data, 16 * len(part), len(part))
        values += [int.from_bytes(output[at : at + 16], "little") for at in range(0, len(output), 16)]
    return values


def set_registers(handle: Handle, vp: int, values: Sequence[tuple[int, int]]) -> None:
    """Sets registers (number, value) in order. ``reps`` of the error tells how many were set."""
    head = hypercalls.VP_REGISTERS_INPUT.pack(0, vp, 0, bytes(3))
    step = _PER_CALL - 1  # 127 elements of 32 bytes and the head fill a page
    for start in range(0, len(values), step):
        part = values[start : start + step]
        data = head + b"".join(
            [name.to_bytes(16, "little") + value.to_bytes(16, "little") for name, value in part]
        )
        try:
            handle.hypercall(hypercalls.SET_VP_REGISTERS, data, 0, len(part))
        except MshvError as error:
            error.reps += start
            raise


class Translation:
    """Outcome of a walk: ``code`` is 0 when ``gpa`` is valid, else one of ``tlfs.translation``. True when valid.

    ``overlay``: the hypervisor laid a page of its own over that address.
    """

    __slots__ = ("code", "gpa", "overlay")

    def __init__(self, code: int, gpa: int, overlay: bool) -> None:
        self.code = code
        self.gpa = gpa
        self.overlay = overlay

    def __bool__(self) -> bool:
        return self.code == translation.SUCCESS


def translate(handle: Handle, vp: int, gva: int, flags: int) -> Translation:
    """Walks page tables for ``gva`` (``flags``: ``tlfs.translation``)."""
    data = registers.TRANSLATE_INPUT.pack(0, vp, flags, gva // abi.PAGE)
    output = handle.hypercall(hypercalls.TRANSLATE_VIRTUAL_ADDRESS, data, registers.TRANSLATE_OUTPUT.size)
    code, _cache, overlay, page = registers.TRANSLATE_OUTPUT.unpack(output)
    return Translation(code, page * abi.PAGE + gva % abi.PAGE, bool(overlay & 1))


def cpuid_values(
    handle: Handle, vp: int, leaves: Sequence[tuple[int, int]]
) -> list[tuple[int, int, int, int]]:
    """What CPUID answers for (leaf, subleaf): EAX, EBX, ECX, EDX of each."""
    flags = cpuid_results.USE_VP_XFEM_XSS | cpuid_results.APPLY_REGISTERED_VALUES
    head = cpuid_results.GET_VP_CPUID_VALUES_INPUT.pack(0, vp, flags)
    values: list[tuple[int, int, int, int]] = []
    for start in range(0, len(leaves), _PER_CALL):
        part = leaves[start : start + _PER_CALL]
        data = head + b"".join([cpuid_results.CPUID_LEAF.pack(leaf, subleaf, 0, 0) for leaf, subleaf in part])
        output = handle.hypercall(hypercalls.GET_VP_CPUID_VALUES, data, 16 * len(part), len(part))
        words = memoryview(output).cast("I")
        values += [(words[at], words[at + 1], words[at + 2], words[at + 3]) for at in range(0, len(words), 4)]
    return values
