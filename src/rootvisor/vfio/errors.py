# SPDX-License-Identifier: Apache-2.0
"""What stands in the way of giving a device to a partition, as one line with the mend."""

from __future__ import annotations


class VfioError(Exception):
    """A device cannot be had, or not be used; ``str()`` is one line: what, and what to do."""

    def __init__(self, what: str, mend: str) -> None:
        super().__init__(f"{what}; {mend}")
        self.what = what
        self.mend = mend


def reason(error: OSError) -> str:
    """The system's words for an error."""
    return (error.strerror or str(error)).lower()
