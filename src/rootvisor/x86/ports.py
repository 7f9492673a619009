# SPDX-License-Identifier: Apache-2.0
"""Plans of IN and OUT."""

from __future__ import annotations

from .operands import IMMEDIATE, LEGACY, ONE_BYTE, Form

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .operands import Execute
    from .processor import Processor


def plan(form: Form) -> Execute | None:
    """The plan of ``form``, if it is one of these instructions."""
    if form.encoding != LEGACY or form.table != ONE_BYTE:
        return None
    if form.opcode in (0xE4, 0xE5, 0xEC, 0xED):
        accumulator, port = form.operands
        store, load_port, size = accumulator.store, port.load, accumulator.size
        mask = 0xFF if port.kind == IMMEDIATE else 0xFFFF
        return lambda processor: store(processor, processor.input(load_port(processor) & mask, size))
    if form.opcode in (0xE6, 0xE7, 0xEE, 0xEF):
        port, accumulator = form.operands
        load, load_port, size = accumulator.load, port.load, accumulator.size
        mask = 0xFF if port.kind == IMMEDIATE else 0xFFFF

        def output(processor: Processor) -> None:
            processor.output(load_port(processor) & mask, size, load(processor))

        return output
    return None
