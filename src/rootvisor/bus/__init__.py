# SPDX-License-Identifier: Apache-2.0
"""What a computer's processors can address: RAM, device memory, I/O ports. Whoever runs them is not known here."""
