# SPDX-License-Identifier: Apache-2.0
"""Runs in the root partition: has it deposit memory for a child partition, and aims a DMA engine there (see aim.py).

    aim_at_deposits.py PCI-ADDRESS

Says "deposited" when the child is there, and takes from standard input a line with the addresses of deposited pages.
Then the child goes, and the engine works on one of those pages that the root uses for something else.
"""

from __future__ import annotations

import os
import sys

_PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path += [_PROJECT, os.path.join(_PROJECT, "src")]

PIPES, PIPE_BYTES = 256, 65536
WAITING = b"unaimed."


def reuse(address: str, deposited: list[int]) -> None:
    """Fills pipes, whose pages come from where the deposited ones came from, until the engine finds one of the pipes
    in the place of a page of ``deposited``; it writes there, and that is looked for in the pipes."""
    from tests.hardware.aim import MARK, Engine

    engine = Engine(address)
    pipes = [os.pipe() for _ in range(PIPES)]
    for _, end in pipes:
        os.write(end, WAITING * (PIPE_BYTES // len(WAITING)))
    for gpa in deposited:
        if engine.read(gpa) == WAITING:
            engine.write(gpa)
            found = sum(os.read(end, PIPE_BYTES).count(MARK) for end, _ in pipes)
            print(f"again {gpa:#x} {found}", flush=True)
            return
    print("no page came back", flush=True)


def main(address: str) -> None:
    from rootvisor.mshv import Mshv
    from tests.hardware.aim import main as aim_at

    with Mshv() as mshv, mshv.create_partition() as child:
        child.initialize()
        print("deposited", flush=True)
        addresses = sys.stdin.readline().split()
        aim_at(address, ["own", *addresses, "own"])
    reuse(address, [int(one, 16) for one in addresses])


main(sys.argv[1])
