# SPDX-License-Identifier: Apache-2.0
"""A processor's state as data and back; vector registers in and out of the XSAVE image."""

from __future__ import annotations

import marshal

import pytest

from rootvisor.mshv import MshvError
from rootvisor.mshv.vp import STATE_LAPIC, STATE_SIMP, STATE_XSAVE
from rootvisor.tlfs import registers as names
from rootvisor.vmm.processor_state import restore_processor, save_processor
from rootvisor.vmm.vector_registers import read_vector, write_vector
from tests.unit.vmm.fake_partition import FakeVp

LAPIC, XSAVE = bytes(range(256)) * 16, bytes(576)


@pytest.fixture
def vp() -> FakeVp:
    one = FakeVp()
    one.states = {STATE_LAPIC: LAPIC, STATE_XSAVE: XSAVE}
    one.values = {names.RAX: 5, names.CR3: 0x1000, names.TSC: 77, names.CS: 0xA09B << 112}
    return one


def test_saved_registers_and_states_are_written_back(vp: FakeVp) -> None:
    saved = marshal.loads(marshal.dumps(save_processor(vp)))  # type: ignore[arg-type]
    other = FakeVp()
    restore_processor(other, saved)  # type: ignore[arg-type]
    for name, value in vp.values.items():
        assert other.values[name] == value
    assert other.states == {STATE_LAPIC: LAPIC, STATE_XSAVE: XSAVE}


def test_register_that_there_is_not_is_left_out_and_no_other(vp: FakeVp) -> None:
    everything = [number for number, _ in save_processor(vp)["registers"]]  # type: ignore[arg-type]
    for unknown in ({everything[0]}, {everything[-1]}, {names.U_CET, names.S_CET}, set(everything[3:9])):
        vp.unknown = unknown
        got = [number for number, _ in save_processor(vp)["registers"]]  # type: ignore[arg-type]
        assert got == [number for number in everything if number not in unknown]


@pytest.mark.parametrize("kind", [STATE_LAPIC, STATE_XSAVE])
def test_missing_local_apic_or_vector_state_is_an_error(vp: FakeVp, kind: int) -> None:
    del vp.states[kind]
    with pytest.raises(MshvError):
        save_processor(vp)  # type: ignore[arg-type]


def test_state_of_a_synic_is_kept_where_there_is_one(vp: FakeVp) -> None:
    vp.states[STATE_SIMP] = bytes(4096)
    assert STATE_SIMP in save_processor(vp)["states"]  # type: ignore[arg-type]


# --- vector registers -----------------------------------------------------------------------------------------------
def image(xstate_bv: int = 7, xcomp_bv: int = 7 | 1 << 63) -> bytes:
    data = bytearray(1024)
    data[512:520] = xstate_bv.to_bytes(8, "little")
    data[520:528] = xcomp_bv.to_bytes(8, "little")
    for number in range(16):
        data[576 + 16 * number : 592 + 16 * number] = bytes([0xA0 + number]) * 16
    return bytes(data)


@pytest.mark.parametrize("number", [0, 5])
def test_low_vector_registers_come_from_the_page(vp: FakeVp, number: int) -> None:
    write_vector(vp, number, 16, 0x1234 << 64 | 5)  # type: ignore[arg-type]
    assert vp.register_page.xmm(number) == 0x1234 << 64 | 5
    assert read_vector(vp, number, 16) == 0x1234 << 64 | 5  # type: ignore[arg-type]
    assert vp.register_page.dirty & names.DIRTY_XMM


def test_other_vector_registers_have_names(vp: FakeVp) -> None:
    vp.values[names.XMM0 + 9] = 99
    assert read_vector(vp, 9, 16) == 99  # type: ignore[arg-type]
    write_vector(vp, 9, 16, 98)  # type: ignore[arg-type]
    assert vp.set == [(str(names.XMM0 + 9), 98)]


def test_upper_half_is_in_the_xsave_image(vp: FakeVp) -> None:
    vp.states[STATE_XSAVE] = image()
    assert read_vector(vp, 3, 32) >> 128 == int.from_bytes(b"\xa3" * 16, "little")  # type: ignore[arg-type]
    write_vector(vp, 3, 64, 7 << 128 | 1)  # type: ignore[arg-type]
    assert read_vector(vp, 3, 32) == 7 << 128 | 1  # type: ignore[arg-type]
    assert read_vector(vp, 4, 32) >> 128 == int.from_bytes(b"\xa4" * 16, "little")  # type: ignore[arg-type]


def test_upper_halves_that_were_all_zero_come_to_be(vp: FakeVp) -> None:
    vp.states[STATE_XSAVE] = image(xstate_bv=3)
    assert read_vector(vp, 3, 32) == 0  # type: ignore[arg-type]
    write_vector(vp, 3, 64, 7 << 128)  # type: ignore[arg-type]
    assert read_vector(vp, 3, 32) == 7 << 128  # type: ignore[arg-type]
    assert read_vector(vp, 4, 32) == 0  # type: ignore[arg-type]


def test_processor_without_avx_and_registers_beyond_it(vp: FakeVp) -> None:
    vp.states[STATE_XSAVE] = image(xstate_bv=3, xcomp_bv=3 | 1 << 63)
    before = vp.states[STATE_XSAVE]
    write_vector(vp, 2, 64, 7 << 128 | 4)  # type: ignore[arg-type]
    assert vp.states[STATE_XSAVE] == before and read_vector(vp, 2, 16) == 4  # type: ignore[arg-type]
    write_vector(vp, 20, 64, 1)  # type: ignore[arg-type]
    assert read_vector(vp, 20, 64) == 0  # type: ignore[arg-type]
