# SPDX-License-Identifier: Apache-2.0
"""The Microsoft hypervisor's interface on KVM: partitions, VPs, hypercalls, synthetic MSRs, SynIC, remapping."""
