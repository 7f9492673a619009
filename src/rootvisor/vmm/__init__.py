# SPDX-License-Identifier: Apache-2.0
"""A virtual machine monitor on /dev/mshv: Linux guests with virtio devices in child partitions.

It runs in the root partition of Rootvisor and, unchanged, in that of any Microsoft hypervisor. Options, API and names
of configuration fields are Cloud Hypervisor's where it has the thing.
"""

from __future__ import annotations
