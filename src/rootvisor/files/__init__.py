# SPDX-License-Identifier: Apache-2.0
"""The host's files for a guest: virtiofsd found, called and confined, as root and as an ordinary user."""
