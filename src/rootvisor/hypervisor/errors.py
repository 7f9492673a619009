# SPDX-License-Identifier: Apache-2.0
"""Two kinds of failure: what a partition did wrong (a status), and what the host cannot do (a message)."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


class HvError(Exception):
    """A hypercall ends with ``status``; a rep call has completed ``reps`` elements, counted from element 0."""

    __slots__ = ("reps", "status")

    def __init__(self, status: int, reps: int | None = None) -> None:
        self.status = status
        self.reps = reps


class Restart(Exception):
    """The hypercall is to be made again from its first instruction, after interrupts have had their chance."""


class GeneralProtection(Exception):
    """The access to a synthetic MSR raises #GP in the partition."""


class UndefinedOpcode(Exception):
    """The hypercall raises #UD in the partition (TLFS: CPL > 0, real mode, a register form that is not offered)."""


class MemoryIntercept(Exception):
    """A child's hypercall needs a page that the root has to provide: the call runs again when it has.

    ``state`` is the page's (:mod:`.child_memory`), ``write`` the right that is missing.
    """

    __slots__ = ("gpa", "state", "write")

    def __init__(self, gpa: int, write: bool, state: int) -> None:
        self.gpa = gpa
        self.write = write
        self.state = state


class HypervisorError(Exception):
    """The host side cannot go on; ``str()`` is one line with the mend."""


def fail(status: int) -> NoReturn:
    """Raises :class:`HvError`; usable inside expressions."""
    raise HvError(status)
