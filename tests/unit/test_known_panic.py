# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from tests.conftest import is_known_panic

WARNING = "WARNING: security/commoncap.c:928 at cap_bprm_creds_from_file+0x317/0x430, CPU#0: swapper/0/1"
PANIC = "Kernel panic - not syncing: No working init found.  Try passing init= option to kernel."


@pytest.mark.parametrize(
    ("text", "known"),
    [
        (f"{WARNING}\n{PANIC}", True),
        (f"Failed to execute /init (error -1)\nRun /sbin/init as init process\n{PANIC}", True),
        (f"Failed to execute /init (error -2)\n{PANIC}", False),
        ("Failed to execute /init (error -1)", False),
        (WARNING, False),
        (PANIC, False),
        (f"{WARNING}\nKernel panic - not syncing: Fatal exception", False),
        ("assert 1 == 0", False),
    ],
)
def test_only_the_warning_together_with_its_panic_is_the_known_one(text: str, known: bool) -> None:
    assert is_known_panic(text) is known
