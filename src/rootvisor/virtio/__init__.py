# SPDX-License-Identifier: Apache-2.0
"""Virtio 1.2 devices for whoever runs a guest: the root partition's computer and the VMM alike.

`device.VirtioDevice` is what a device is, `transport.Transport` its life as the driver sees it, `pci_function` the PCI
form of that, `queue` (with `split_ring` and `packed_ring`) the rings; one module per device type.
"""
