# SPDX-License-Identifier: Apache-2.0
"""The computer that the root partition sees: memory map, PCI, serial port, clocks, power, and its wiring."""
