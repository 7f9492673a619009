# SPDX-License-Identifier: Apache-2.0
"""Chips of a PC board, each a class with ``read(offset, size)`` and ``write(offset, size, value)``.

The root partition's computer and the VMM's machines are built of them. They know nothing of partitions or processors:
interrupt lines and messages are callbacks. ``save()`` gives a chip's state as plain data (what :mod:`marshal` takes),
``restore()`` puts it back.
"""
