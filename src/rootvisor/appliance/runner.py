# SPDX-License-Identifier: Apache-2.0
"""Run a program in the appliance, trying again when the appliance itself dies before the program has started."""

from __future__ import annotations

import os
import sys
import time

from .errors import ApplianceError
from .request import ApplianceKernel, Request
from .session import Died, Session
from .tools import Problem, find_tools, require_tools

TRIES = 3


def run(request: Request) -> int:
    """Run ``request`` and give the program's exit status: 124 after ``timeout``, 128 + n when signal n ended it.

    Raises :class:`ApplianceError` with one line when the appliance cannot start, or died.
    """
    request.validate()
    _open_standard_descriptors()
    tools = require_tools()
    kernel = request.kernel or _stock_kernel()
    for path in (kernel.image, kernel.modules):
        if not os.access(path, os.R_OK):
            raise ApplianceError(
                f"{path}: the appliance's kernel cannot be read; rootvisor kernel build stock"
            )
    deadline = None if request.timeout is None else time.monotonic() + request.timeout
    for attempt in range(1, TRIES + 1):
        with Session(request, tools, kernel, deadline) as session:
            outcome = session.run()
        if not isinstance(outcome, Died):
            return outcome.status
        if outcome.ready or outcome.hopeless or attempt == TRIES:
            raise ApplianceError(_obituary(outcome))
        print(
            f"rootvisor: the appliance's kernel died while starting ({outcome.reason}); "
            f"try {attempt + 1} of {TRIES}",
            file=sys.stderr,
            flush=True,
        )
    raise AssertionError("unreachable")


def check() -> list[Problem]:
    """What keeps the appliance from running on this machine: nothing, when the list is empty."""
    return find_tools()[1]


def _open_standard_descriptors() -> None:
    """Where the caller closed one of 0, 1 and 2, a socket of ours would take its number and its data."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number


def _obituary(outcome: Died) -> str:
    """One line. An appliance that died under its program may take long to die so again: its console is shown whole."""
    if outcome.ready:
        if outcome.console:
            print("rootvisor: the last lines of the appliance's console:", file=sys.stderr)
            print("\n".join(outcome.console), file=sys.stderr, flush=True)
        return f"the appliance died while its program ran: {outcome.reason}"
    tail = " | ".join(line for line in outcome.console[-6:] if line != outcome.reason)
    return f"the appliance died while starting: {outcome.reason}" + (
        f"; its last words: {tail}" if tail else ""
    )


def _stock_kernel() -> ApplianceKernel:
    from rootvisor import kernels

    try:
        found = kernels.ensure("stock")
    except kernels.KernelError as error:
        raise ApplianceError(str(error)) from error
    return ApplianceKernel(str(found.vmlinux or found.image), str(found.modules))
