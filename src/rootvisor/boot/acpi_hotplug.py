# SPDX-License-Identifier: Apache-2.0
"""AML by which an operating system hears of PCI functions that come and go on bus 0, and ejects them.

The hardware behind it is :mod:`rootvisor.chips.hotplug`: general-purpose event 1, and three 32-bit registers with a bit
for each device number. Sources: ACPI 6.5, 5.6.4 (event methods), 6.3 (device insertion and removal), 20 (encoding).
"""

from __future__ import annotations

from . import aml

FIRST_SLOT, SLOTS = 1, 32
GPE = 1
REGISTER_BYTES = 12

_INSERTED, _EJECT_ASKED, _EJECT = "PINS", "PEJQ", "PEJT"
_DEVICE_CHECK, _EJECT_REQUEST = 1, 3


def slots(port: int) -> bytes:
    """Terms for the host bridge's scope: registers, a device for each slot, and the method that tells of changes."""
    terms = [
        aml.io_region("PHPR", port, REGISTER_BYTES),
        aml.dword_fields("PHPR", _INSERTED, _EJECT_ASKED, _EJECT),
    ]
    checks = aml.store(_INSERTED.encode(), aml.LOCAL0) + aml.store(_EJECT_ASKED.encode(), aml.LOCAL1)
    for number in range(FIRST_SLOT, SLOTS):
        name = f"S{number:02X}_"
        bit = aml.integer(1 << number)
        terms.append(
            aml.device(
                name,
                aml.name("_ADR", aml.integer(number << 16)),
                aml.name("_SUN", aml.integer(number)),
                aml.method("_EJ0", 1, aml.store(bit, _EJECT.encode())),
            )
        )
        for told, kind in ((aml.LOCAL0, _DEVICE_CHECK), (aml.LOCAL1, _EJECT_REQUEST)):
            checks += aml.when(aml.both(told, bit), aml.notify(name, kind))
    terms.append(aml.method("PCNT", 0, checks))
    return b"".join(terms)


def event() -> bytes:
    """The scope of general-purpose events: an edge of event 1 means that slots have changed."""
    return aml.scope("\\_GPE", aml.method(f"_E{GPE:02X}", 0, aml.path("_SB_", "PCI0", "PCNT")))
