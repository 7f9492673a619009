# SPDX-License-Identifier: Apache-2.0
"""What a hypercall is: a code, its layouts, the privilege that gates it, and one function.

A family module declares its calls with the decorators here; :mod:`.hypercall_abi` executes them. Handlers of simple
calls get the unpacked input fields as positional arguments and return the packed output; handlers of rep calls get the
element list and return how many elements are done, counted from element 0.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..tlfs.layout import Layout

SIMPLE = 0
VARIABLE = 1
REP = 2
#: A repeated call with a variable header.
REP_VARIABLE = 3


class Hypercall:
    """One entry of the table. Sizes in bytes; ``element``/``output_element`` are per repetition.

    ``alone``: nothing else of the hypervisor runs meanwhile (``Hypervisor.lock``).
    """

    __slots__ = (
        "alone",
        "code",
        "element",
        "handler",
        "kind",
        "output",
        "output_element",
        "privilege",
        "size",
        "unpack",
    )

    def __init__(
        self,
        code: int,
        kind: int,
        layout: Layout | None,
        output: int,
        element: int,
        output_element: int,
        privilege: int,
        handler: Callable[..., Any],
        alone: bool,
    ) -> None:
        self.alone = alone
        self.code = code
        self.kind = kind
        self.size = layout.size if layout else 0
        self.unpack = layout.unpack_from if layout else None
        self.output = output
        self.element = element
        self.output_element = output_element
        self.privilege = privilege
        self.handler = handler


class HypercallTable:
    """Codes to calls. ``more`` declares the calls that are not there yet."""

    __slots__ = ("calls", "more")

    def __init__(self) -> None:
        self.calls: dict[int, Hypercall] = {}
        self.more: Callable[[], None] | None = None

    def find(self, code: int) -> Hypercall | None:
        """The call with this code, after a look at all there are. The caller holds Hypervisor.lock."""
        if code not in self.calls and self.more is not None:
            self.more()
            self.more = None
        return self.calls.get(code)

    def simple(
        self,
        code: int,
        layout: Layout | None = None,
        output: int = 0,
        privilege: int = 0,
        alone: bool = True,
    ) -> Callable[[Callable[..., bytes | None]], Callable[..., bytes | None]]:
        """``handler(vp, *fields) -> bytes | None``; ``output`` is the size it returns.

        A handler that is not ``alone`` runs without ``Hypervisor.lock``: it only reads what does not change.
        """
        return self._register(code, SIMPLE, layout, output, 0, 0, privilege, alone)

    def variable(
        self, code: int, layout: Layout, output: int = 0, privilege: int = 0
    ) -> Callable[[Callable[..., bytes | None]], Callable[..., bytes | None]]:
        """``handler(vp, header: memoryview, *fields) -> bytes | None`` with the variable header in 8-byte units."""
        return self._register(code, VARIABLE, layout, output, 0, 0, privilege)

    def rep(
        self, code: int, layout: Layout | None, element: int, output_element: int = 0, privilege: int = 0
    ) -> Callable[[Callable[..., int]], Callable[..., int]]:
        """``handler(vp, elements, output, start, count, *fields) -> done``; raises HvError(status, done) on failure.

        ``elements`` and ``output`` are views of the whole lists (element i at i * size). Returning less than ``count``
        without an error makes the VP issue the call again from there, after interrupts had their chance.
        """
        return self._register(code, REP, layout, 0, element, output_element, privilege)

    def rep_variable(
        self, code: int, layout: Layout, element: int, privilege: int = 0
    ) -> Callable[[Callable[..., int]], Callable[..., int]]:
        """``handler(vp, header, elements, start, count, *fields) -> done``: :meth:`rep` behind a variable header."""
        return self._register(code, REP_VARIABLE, layout, 0, element, 0, privilege)

    def _register(
        self,
        code: int,
        kind: int,
        layout: Layout | None,
        output: int,
        element: int,
        output_element: int,
        privilege: int,
        alone: bool = True,
    ) -> Callable[[Any], Any]:
        def register(handler: Any) -> Any:
            if code in self.calls:
                raise AssertionError(f"hypercall {code:#x} declared twice")
            call = Hypercall(code, kind, layout, output, element, output_element, privilege, handler, alone)
            self.calls[code] = call
            return handler

        return register


#: The calls of every partition.
TABLE = HypercallTable()
#: Those that only a guest with a computer of its own is offered; elsewhere their codes do not exist.
GUEST_TABLE = HypercallTable()
