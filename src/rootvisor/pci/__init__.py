# SPDX-License-Identifier: Apache-2.0
"""A PCI Express root complex and the functions on it, independent of who runs the guest.

`root.PciRoot` owns configuration access (ECAM and ports 0xCF8..0xCFF) and address decoding; `function.PciFunction`
is one function with its configuration space, BARs and capabilities; `msix.MsixTable` its interrupts. What a machine
or VMM must offer is written down in `platform`.
"""
