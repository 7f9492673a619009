# SPDX-License-Identifier: Apache-2.0
"""VMMs that others wrote, as they come from the distribution, and guests that show that they work in the root."""
