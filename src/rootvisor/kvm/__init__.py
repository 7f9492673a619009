# SPDX-License-Identifier: Apache-2.0
"""The processor: Linux KVM as virtual machines, processors, memory and interrupts.

Knows nothing of partitions or hypercalls. Everything here maps one to one onto ``Documentation/virt/kvm/api.rst``.
"""
