# SPDX-License-Identifier: Apache-2.0
"""Rootvisor: the Microsoft hypervisor's root-partition environment, with Linux KVM as its processor."""

from __future__ import annotations

__version__ = "0.1.0"
