# SPDX-License-Identifier: Apache-2.0
"""Measurements side by side: our exits against a C loop, our boot against QEMU's, all on one engine in one run."""

from __future__ import annotations
