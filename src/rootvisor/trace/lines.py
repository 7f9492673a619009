# SPDX-License-Identifier: Apache-2.0
"""Read trace files: one JSON object a line; damaged lines are counted, never fatal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any


class TraceLines:
    """The good lines of a trace, in order; `malformed` counts the others, `first_malformed` is the first
    one's number.

    A line is good when it is a JSON object with a numeric `t` and a text `kind`.
    """

    def __init__(self, source: Iterable[bytes]) -> None:
        """Read from an open binary file, or from any iterable of lines."""
        self._source = source
        self.malformed = 0
        self.first_malformed = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The good lines."""
        for number, text in enumerate(self._source, 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                line = None
            if _is_good(line):
                yield line
            else:
                self.malformed += 1
                self.first_malformed = self.first_malformed or number


def _is_good(line: object) -> bool:
    return (
        isinstance(line, dict)
        and isinstance(line.get("kind"), str)
        and isinstance(line.get("t"), (int, float))
        and not isinstance(line.get("t"), bool)
    )


def integer(value: object, default: int = 0) -> int:
    """`value` if it is a whole number, else `default`: a field of a line can hold anything."""
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def text(value: object, default: str = "?") -> str:
    """`value` if it is text, else `default`."""
    return value if isinstance(value, str) else default
