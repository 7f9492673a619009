# SPDX-License-Identifier: Apache-2.0
"""A VP of a partition with a computer of its own, as :mod:`.memory_access` and :mod:`.page_walk` look at children's."""

from __future__ import annotations

from . import page_walk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from .computer_vp import ComputerVp

    class StatedMemory(Protocol):
        """Memory with the states that children's has."""

        def state(self, gpa: int) -> int:
            """One of the states of :mod:`.gpa_ranges`."""

        def page(self, gpn: int) -> memoryview | None:
            """What the VP sees at a page number; None where it sees nothing."""


class VpView:
    """VP, partition and translations in one; ``memory`` is the partition's."""

    __slots__ = ("memory", "partition", "translations", "u8", "u64", "vcpu")

    def __init__(self, vp: ComputerVp, memory: StatedMemory) -> None:
        self.u8 = vp.u8
        self.u64 = vp.u64
        self.vcpu = vp.vcpu
        self.memory = memory
        self.partition = self
        self.translations = self

    def find(self, linear: int) -> int:
        """As Translations.find."""
        walk = page_walk.translate(self, linear)  # type: ignore[arg-type]
        return -1 if walk.code else walk.gpa

    def page(self, _linear: int) -> None:
        """As Translations.page: nothing is remembered."""
        return
