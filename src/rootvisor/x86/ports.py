# SPDX-License-Identifier: Apache-2.0
"""Plans of IN and OUT."""

from __future__ import annotations

from .operands import LEGACY, ONE_BYTE, Form

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .operands import Execute


def plan(form: Form) -> Execute | None:
    """The plan of ``form``, if it is one of these instructions."""
    if form.encoding != LEGACY or form.table != ONE_BYTE:
        return None
    if form.opcode in (0xE4, 0xE5, 0xEC, 0xED):
        accumulator, port = form.operands
        store, load_port, size = accumulator.store, port.load, accumulator.size
        return lambda processor: store(processor, processor.input(load_port(processor), size))
    if form.opcode in (0xE6, 0xE7, 0xEE, 0xEF):
        port, accumulator = form.operands
        load, load_port, size = accumulator.load, port.load, accumulator.size
        return lambda processor: processor.output(load_port(processor), size, load(processor))
    return None
