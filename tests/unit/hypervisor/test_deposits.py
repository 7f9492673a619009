# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from rootvisor.hypervisor.deposits import DepositPool
from rootvisor.hypervisor.errors import HvError
from rootvisor.tlfs import status


def test_allocate_and_release_keep_the_total() -> None:
    pool = DepositPool()
    pool.free.extend((1, 2))
    page = pool.allocate()
    assert (pool.total, pool.used) == (2, {page})
    pool.release(page)
    assert (pool.total, sorted(pool.free), pool.used) == (2, [1, 2], set())


def test_allocate_from_an_empty_pool_asks_for_memory() -> None:
    with pytest.raises(HvError) as refused:
        DepositPool().allocate()
    assert refused.value.status == status.INSUFFICIENT_MEMORY
