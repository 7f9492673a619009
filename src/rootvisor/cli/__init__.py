# SPDX-License-Identifier: Apache-2.0
"""Commands: text becomes frozen descriptions, descriptions are checked against the host, then something runs.

The order is always the same: `values` and `options` turn text into values and open nothing; `description`
holds the result as plain data; `prepare` looks at the host; `launch` starts the run. Only this package
imports click.
"""

from __future__ import annotations

from rootvisor.cli.app import main

__all__ = ["main"]
