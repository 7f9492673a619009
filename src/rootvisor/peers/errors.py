# SPDX-License-Identifier: Apache-2.0
"""The one error of this package."""

from __future__ import annotations


class PeerError(Exception):
    """A peer cannot be had or did not run: `message` says what happened, `mend` what to do next (may be empty)."""

    def __init__(self, message: str, mend: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.mend = mend

    def __str__(self) -> str:
        """The one line that is shown: message, then mend."""
        return f"{self.message}; {self.mend}" if self.mend else self.message
