# SPDX-License-Identifier: Apache-2.0
"""The one error that commands show: what happened, what mends it, and the exit status that says so."""

from __future__ import annotations

USAGE = 2
"""Exit status of a command line that cannot be right: bad value, unknown option, file that is not there."""

TRIPLE_FAULT = 121
"""Exit status of `run`: the root partition died of a triple fault."""

RESET = 122
"""Exit status of `run`: the root partition asked for a reset (`reboot`), and `--on-reboot exit` holds."""

CRASHED = 123
"""Exit status of `run`: the root partition's kernel reported a crash; the report is on stderr."""

TIMED_OUT = 124
"""Exit status of `run`: `--timeout` ran out (the same number as timeout(1))."""

OWN_FAILURE = 125
"""Exit status of Rootvisor's own failure: the host lacks something, or an internal error."""

INTERRUPTED = 130
"""Exit status after Ctrl-C (128 + SIGINT)."""

EXIT_STATUSES: tuple[tuple[str, str], ...] = (
    ("0", "the root partition powered off, or CMD ended with 0"),
    ("1-120", "CMD's own exit status"),
    (str(TRIPLE_FAULT), "the root partition died of a triple fault"),
    (str(RESET), "the root partition was reset (reboot)"),
    (str(CRASHED), "the root partition's kernel crashed; its report is shown"),
    (str(TIMED_OUT), "--timeout ran out"),
    (
        str(OWN_FAILURE),
        "Rootvisor itself failed, or this machine lacks something; the message says what mends it",
    ),
    (
        "odd",
        "a bare-metal kernel's, 2 N + 1 for the value N that it wrote to its exit port 0xF4 (QEMU's convention)",
    ),
    ("126-255", "CMD's own exit status, as a shell gives it (127: not found, 128+N: killed by signal N)"),
    (str(USAGE), "the command line is wrong"),
    (str(INTERRUPTED), "Ctrl-C"),
)
"""What the exit statuses of `rootvisor run` mean, in the order in which help and reference show them."""


class UserError(Exception):
    """Something that the user can understand and mend.

    `message` says what happened (no full stop, no prefix), `mend` what to do next (empty when there is
    nothing to say), `status` becomes the exit status.
    """

    def __init__(self, message: str, mend: str = "", status: int = OWN_FAILURE) -> None:
        super().__init__(message)
        self.message = message
        self.mend = mend
        self.status = status

    def __str__(self) -> str:
        """The one line that is shown: message, then mend."""
        return f"{self.message}; {self.mend}" if self.mend else self.message


def usage_error(message: str, mend: str = "") -> UserError:
    """A `UserError` with the exit status of a wrong command line (2)."""
    return UserError(message, mend, USAGE)


def error_chain(error: BaseException) -> str:
    """The messages of an error and of its causes, each once, outermost first, in one line."""
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None:
        text = " ".join(str(current).split()) or type(current).__name__
        if not any(text in part for part in parts):
            parts.append(text)
        current = current.__cause__
    return ": ".join(parts)
