# SPDX-License-Identifier: Apache-2.0
"""Plans of MOVS, CMPS, STOS, LODS, SCAS, INS and OUTS, alone and repeated.

A call does at most :data:`ITERATIONS` of a repeated one and leaves registers so that the same instruction goes on.
"""

from __future__ import annotations

from . import memory
from .arithmetic import sub
from .flags import DF, ZF
from .operands import ES, FS, LEGACY, MASK_16, MASK_32, MASK_64, ONE_BYTE, Form, general

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .operands import Execute
    from .processor import Processor

    #: One element, from one linear address to another.
    Step = Callable[[Processor, int, int], None]

#: Iterations of a repeated instruction in one call.
ITERATIONS = 256

_OFFSET = memory.PAGE - 1
_RAX, _RCX, _RDX, _RSI, _RDI = 0, 1, 2, 6, 7
_INS, _OUTS, _MOVS, _CMPS, _STOS, _LODS, _SCAS = 0x6C, 0x6E, 0xA4, 0xA6, 0xAA, 0xAC, 0xAE
_FROM_SOURCE = (_OUTS, _MOVS, _CMPS, _LODS)
_TO_DESTINATION = (_INS, _MOVS, _CMPS, _STOS, _SCAS)


def plan(form: Form) -> Execute | None:
    """The plan of ``form``, if it is one of these instructions."""
    if form.encoding != LEGACY or form.table != ONE_BYTE or not form.string:
        return None
    opcode, size = form.opcode & 0xFE, form.memory_size
    accumulator = general(_RAX, size)
    load, store, bits = accumulator.load, accumulator.store, size * 8
    ones, most = (1 << bits) - 1, memory.PAGE - size

    def move(processor: Processor, source: int, destination: int) -> None:
        if source & _OFFSET <= most and destination & _OFFSET <= most:
            processor.write(destination, size, processor.read(source, size, False))
        else:
            memory.write(processor, destination, size, memory.read(processor, source, size, False))

    def compare(processor: Processor, source: int, destination: int) -> None:
        a = memory.read(processor, source, size, False)
        b = memory.read(processor, destination, size, False)
        processor.rflags = sub(a, b, processor.rflags, bits)[1]

    def fill(processor: Processor, source: int, destination: int) -> None:
        if destination & _OFFSET <= most:
            processor.write(destination, size, processor.general(_RAX) & ones)
        else:
            memory.write(processor, destination, size, load(processor))

    def fetch(processor: Processor, source: int, destination: int) -> None:
        store(processor, memory.read(processor, source, size, False))

    def scan(processor: Processor, source: int, destination: int) -> None:
        a = load(processor)
        b = memory.read(processor, destination, size, False)
        processor.rflags = sub(a, b, processor.rflags, bits)[1]

    def take(processor: Processor, source: int, destination: int) -> None:
        memory.write(processor, destination, size, processor.input(processor.general(_RDX) & 0xFFFF, size))

    def give(processor: Processor, source: int, destination: int) -> None:
        value = memory.read(processor, source, size, False)
        processor.output(processor.general(_RDX) & 0xFFFF, size, value)

    step: Step | None = {
        _MOVS: move, _CMPS: compare, _STOS: fill, _LODS: fetch, _SCAS: scan, _INS: take, _OUTS: give,
    }.get(opcode)  # fmt: skip
    return None if step is None else _loop(form, opcode, step)


def _loop(form: Form, opcode: int, step: Step) -> Execute:
    size, mask, segment = form.memory_size, form.address_mask, form.segment
    reads, writes = opcode in _FROM_SOURCE, opcode in _TO_DESTINATION
    repeats = form.repeat or form.repeat_not
    compares = opcode in (_CMPS, _SCAS)
    end = 0 if form.repeat else ZF
    linear = MASK_64 if form.bits == 64 else MASK_32
    source_has_base = reads and (form.bits != 64 or segment >= FS)
    destination_has_base = writes and form.bits != 64
    # what must be known to be accessible before the source is read, which may be a register that reading changes
    probes, probes_write = opcode in (_MOVS, _INS, _CMPS), opcode != _CMPS

    def execute(processor: Processor) -> bool:
        count = processor.general(_RCX) & mask if repeats else 1
        if not count:
            return False
        by = -size if processor.rflags & DF else size
        source, destination = processor.general(_RSI) & mask, processor.general(_RDI) & mask
        source_base = processor.segment_base(segment) if source_has_base else 0
        destination_base = processor.segment_base(ES) if destination_has_base else 0
        rest, last, probed = count, max(0, count - ITERATIONS), -1
        try:
            while rest > last:
                to = destination_base + destination & linear
                if probes and (to >> 12 != probed or to + size - 1 >> 12 != probed):
                    memory.probe(processor, to, size, probes_write)
                    probed = to >> 12
                step(processor, source_base + source & linear, to)
                rest -= 1
                source, destination = source + by & mask, destination + by & mask
                if compares and repeats and processor.rflags & ZF == end:
                    return False
        finally:
            if rest != count:
                if reads:
                    _set(processor, _RSI, source, mask)
                if writes:
                    _set(processor, _RDI, destination, mask)
                if repeats:
                    _set(processor, _RCX, rest, mask)
        return rest > 0

    return execute


def _set(processor: Processor, register: int, value: int, mask: int) -> None:
    if mask == MASK_16:
        value |= processor.general(register) & ~MASK_16
    processor.set_general(register, value)
