# SPDX-License-Identifier: Apache-2.0
"""The error class of the appliance."""

from __future__ import annotations


class ApplianceError(Exception):
    """The appliance cannot run or has died. The text is one line: what happened, and what to do next."""
