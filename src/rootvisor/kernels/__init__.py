# SPDX-License-Identifier: Apache-2.0
"""Find, fetch, build and cache kernel images."""

from __future__ import annotations
