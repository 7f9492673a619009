# SPDX-License-Identifier: Apache-2.0
"""Measurements side by side: our exits against a C loop, our boot against QEMU's, all on one engine in one run.

`probe` is a guest that makes exits, `exits` times them, `boot` times boots, `inside` is the process that does both
where KVM works, `verdict` holds the results against the targets.
"""

from __future__ import annotations
