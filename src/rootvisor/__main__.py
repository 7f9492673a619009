# SPDX-License-Identifier: Apache-2.0
"""`python -m rootvisor`: the same as the `rootvisor` command."""

from __future__ import annotations

from rootvisor.cli import main

if __name__ == "__main__":
    main()
