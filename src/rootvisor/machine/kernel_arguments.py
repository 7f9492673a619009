# SPDX-License-Identifier: Apache-2.0
"""The kernel command line of a run; also what a dry run shows."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def wants_log(description: dict[str, Any]) -> bool:
    """Whether somebody reads what the kernel prints."""
    return bool(description.get("console_log") or description.get("verbose"))


def kernel_command_line(description: dict[str, Any]) -> str:
    """Ours first, so that the user's words, which come last, win."""
    if description["kernel"].get("multiboot"):
        return str(description["append"])
    foreign = description.get("command") is None
    words = [] if foreign and not description["initrds"] else ["rdinit=/init"]
    if description.get("role") == "guest":
        words.append("panic=-1")  # a guest that has reported a crash goes on, and would wait for ever
    display = bool(description.get("display"))
    if display:
        words.append("console=tty0")  # /dev/console is the last one
    if foreign:
        words.append("console=ttyS0")
        if "console" in description["devices"]:
            words.append("console=hvc0")
    elif wants_log(description):
        words += ["earlyprintk=ttyS0", "console=ttyS0"]
    else:
        words.append("console=hvc0")
        # The display shows the boot, unless that would show it on the user's terminal, too; see agent/main.
        if not display or description.get("tty"):
            words.append("quiet")
    if description["append"]:
        words.append(description["append"])
    return " ".join(words)
