# SPDX-License-Identifier: Apache-2.0
"""The frame of an inner part: the job that its only argument names, and the results that go where the job says."""

from __future__ import annotations

import json
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def run(
    measure: Callable[[dict[str, Any]], dict[str, Any]], expected: tuple[type[Exception], ...] = ()
) -> int:
    """Measure and write the results; the exit status. An expected failure is one line on standard error and status 1,
    and no results."""
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    try:
        results = measure(job)
    except expected as error:
        sys.stderr.write(f"rootvisor: {error}\n")
        return 1
    with open(job["results"], "w", encoding="utf-8") as file:
        json.dump(results, file)
    return 0
