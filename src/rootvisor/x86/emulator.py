# SPDX-License-Identifier: Apache-2.0
"""Carries out one instruction whose operand in memory is not RAM: what drivers do with device memory, and more.

An instruction becomes a plan, once: a function on a processor with everything decoded bound into it. Plans are kept by
the instruction's bytes; iced-x86 decodes (see :mod:`.decoder`). Nothing here knows where memory, ports and registers
are: see :class:`.processor.Processor`.

Not looked at, because the processor has before it stopped: segment limits, alignment checks (#AC), privilege, whether
SSE and AVX are enabled. A trap flag that was set means a debug exception after the instruction: the caller's business,
as is the end of an interrupt shadow. LOCK is accepted; each access is one call, and a device serializes those itself.
"""

from __future__ import annotations

from . import bit_operations, decoder, exchange, integer, moves, ports, stack, strings, vectors
from .operands import Form
from .processor import Fault, Processor, Unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .operands import Execute

    Maker = Callable[[Form], Execute | None]

__all__ = ["Fault", "Processor", "Unsupported", "emulate"]

#: Plans that are remembered, for each width of code.
CACHE_LIMIT = 1024

#: What carries an instruction out, its length, and the mask of RIP.
_Plan = tuple["Execute", int, int]
_plans: dict[int, dict[bytes, _Plan]] = {16: {}, 32: {}, 64: {}}
_MAKERS: tuple[Maker, ...] = (
    moves.plan, integer.plan, bit_operations.plan, exchange.plan, stack.plan, strings.plan, ports.plan, vectors.plan,
)  # fmt: skip


def emulate(processor: Processor, code: bytes, bits: int) -> None:
    """Executes the instruction at the start of ``code``, which is 16-, 32- or 64-bit code.

    RIP is behind it afterwards. A repeated string instruction does a bounded number of iterations; while some are left
    RIP stays, so that the processor comes back after it has looked at interrupts. Raises :class:`Unsupported`, and
    :class:`Fault`, in which the exceptions of the processor's own methods pass as well: registers and RIP are then
    as they were (of a string instruction: as after the last whole iteration).
    """
    plan = _plans[bits].get(code)
    if plan is None:
        plan = _make(code, bits)
    execute, length, mask = plan
    if not execute(processor):
        processor.rip = processor.rip + length & mask


def _make(code: bytes, bits: int) -> _Plan:
    library = decoder.load()
    decoded = library.Decoder(bits, code).decode() if code else None
    if decoded is None or decoded.is_invalid:
        raise Unsupported(code, decoder.incomplete(code, bits))
    form = Form(decoded, bits)
    for maker in _MAKERS:
        execute = maker(form)
        if execute is not None:
            break
    else:
        raise Unsupported(code[: form.length])
    plan = (execute, form.length, form.ip_mask)
    plans = _plans[bits]
    if len(plans) >= CACHE_LIMIT:
        plans.clear()
    plans[code] = plan
    return plan
