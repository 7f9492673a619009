# SPDX-License-Identifier: Apache-2.0
"""Runs in the root partition: has it deposit memory for a child partition, and aims a DMA engine there (see aim.py).

    aim_at_deposits.py PCI-ADDRESS

Says "deposited" when the child is there, and takes from standard input a line with the addresses of deposited pages.
"""

from __future__ import annotations

import os
import sys

_PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path += [_PROJECT, os.path.join(_PROJECT, "src")]


def main(address: str) -> None:
    from rootvisor.mshv import Mshv
    from tests.hardware.aim import main as aim_at

    with Mshv() as mshv, mshv.create_partition() as child:
        child.initialize()
        print("deposited", flush=True)
        addresses = sys.stdin.readline().split()
        aim_at(address, ["own", *addresses, "own"])


main(sys.argv[1])
