# SPDX-License-Identifier: Apache-2.0
"""Physical PCI functions for a partition, through VFIO: what a process may have of a device, and no more."""
