# SPDX-License-Identifier: Apache-2.0
"""The programs behind a VM's devices: passt, qemu-storage-daemon, virtiofsd.

Each serves one VM on a socket that nobody else can reach, and ends with the process that started it, whatever happens
to that one.
"""
