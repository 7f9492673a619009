# SPDX-License-Identifier: Apache-2.0
"""What an exit costs: the same guest under our run loop and under a C loop, in turns, each in a process of its own."""

from __future__ import annotations

from rootvisor.bench.figures import parse_marks, spans
from rootvisor.bench.guest_code import KINDS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

TURNS = 3
ROUNDS = 7
EXITS = 1000
"""TURNS x ROUNDS x EXITS exits of each kind on each side."""

_DEADLINE_S = 120.0


class ExitLoopError(Exception):
    """An exit loop failed; one line."""


def measure(job: dict[str, Any], progress: Callable[[str], None]) -> dict[str, dict[str, list[float]]]:
    """Side -> kind -> microseconds per exit of every round. Raises ExitLoopError.

    `python` is the C loop word for word in Python: what no run loop in Python can be quicker than. `c` has KVM hand
    over the registers that our loop needs (the same ioctl on the same state), `c_lean` the least.
    """
    ours = [*job["exit_loop_argv"], job["exit_image"]]
    commands = {"rootvisor": ours, "python": [*ours, "bare"]}
    if job["c_loop"]:
        commands["c"] = [job["c_loop"], job["exit_image"], "3"]
        commands["c_lean"] = [job["c_loop"], job["exit_image"], "0"]
    found: dict[str, dict[str, list[float]]] = {side: {kind: [] for kind in KINDS} for side in commands}
    for turn in range(TURNS):
        progress(f"exits: turn {turn + 1} of {TURNS}")
        for side, argv in commands.items():
            for kind, values in spans(parse_marks(_run(argv)), KINDS, EXITS).items():
                found[side][kind] += values
    return found


def _run(argv: list[str]) -> str:
    import subprocess

    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ExitLoopError(f"{argv[0]}: {error}") from error
    if done.returncode:
        words = done.stderr.strip().splitlines()
        raise ExitLoopError(
            f"{' '.join(argv)} ended with status {done.returncode}: {words[-1] if words else ''}"
        )
    return done.stdout
