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
    words = ["rdinit=/init"]
    if description.get("role") == "guest":
        words.append("panic=-1")  # a guest that has reported a crash goes on, and would wait for ever
    if description.get("command") is None:
        words += ["console=ttyS0", "console=hvc0"]
    elif wants_log(description):
        words += ["earlyprintk=ttyS0", "console=ttyS0"]
    else:
        words += ["console=hvc0", "quiet"]
    if description["append"]:
        words.append(description["append"])
    return " ".join(words)
