import ctypes

import numpy as np
import pytest

from ptx.parse import parse
from ptx.program import layout
from ptx.syntax import PtxError

TEXT = """.version 9.0
.target sm_90a
.entry k(.param .s8 small, .param .u64 .ptr .global .align 1 out, .param .align 8 .b8 pair[24],
    .param .b16 half, .param .f32 scale, .param .u32 n, .param .f64 rate, .param .b32 bits,
    .param .b64 wide)
{ ret; }"""


class Pair(ctypes.Structure):
    _fields_ = (("count", ctypes.c_int32), ("weight", ctypes.c_double), ("tag", ctypes.c_char * 5))


class Arguments(ctypes.Structure):
    """What a C compiler makes of these parameters."""

    _fields_ = (
        ("small", ctypes.c_int8),
        ("out", ctypes.c_uint64),
        ("pair", Pair),
        ("half", ctypes.c_uint16),
        ("scale", ctypes.c_float),
        ("n", ctypes.c_int32),
        ("rate", ctypes.c_double),
        ("bits", ctypes.c_float),
        ("wide", ctypes.c_double),
    )


GIVEN = (-3, 2**64 - 16, bytes(Pair(7, 0.1, b"abcde")), 0xFFFF, 0.1, -5, 1e-300, 2.5, -0.1)


@pytest.fixture
def program():
    return layout(parse(TEXT), "k")


def test_arguments_lie_as_in_a_struct(program):
    members = [getattr(Arguments, param.name) for param in program.params]
    assert [(p.offset, p.size) for p in program.params] == [(m.offset, m.size) for m in members]
    assert [p.name for p in program.params if p.pointer] == ["out"]
    assert [p.name for p in program.params if p.array] == ["pair"]
    expected = Arguments()
    for param, value in zip(program.params, GIVEN, strict=True):
        setattr(expected, param.name, Pair.from_buffer_copy(value) if param.array else value)
    assert program.pack(*GIVEN) == bytes(expected)


def test_arguments_of_other_types_of_the_same_kind(program):
    # NumPy's scalars; an integer for a float; an unsigned number for what may be signed.
    others = (np.float32(2), np.int64(2**32 - 1), np.int32(1), 3, np.uint64(2**63))
    assert program.pack(*GIVEN[:4], *others) == program.pack(*GIVEN[:4], 2, -1, 1.0, 3, -(2**63))


def test_a_float_beyond_the_range_is_infinite(program):
    packed = program.pack(*GIVEN[:4], -1e39, *GIVEN[5:])
    assert np.frombuffer(packed, "<f4", 1, Arguments.scale.offset) == -np.inf


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("small", 256, "is 256, expected an integer of 8 bits"),
        ("small", -129, "is -129, expected an integer of 8 bits"),
        ("out", -(2**63) - 1, "is -9223372036854775809, expected an integer of 64 bits"),
        ("out", None, "is None, expected an integer of 64 bits"),
        ("pair", bytes(23), "has 23 bytes, expected 24"),
        ("pair", 5, "is 5, expected 24 bytes"),
        ("half", 0.5, "is 0.5, expected an integer of 16 bits"),
        ("scale", b"1234", "is b'1234', expected a number"),
        ("scale", "1", "is '1', expected a number"),
        ("n", 2.0, "is 2.0, expected an integer of 32 bits"),
        ("rate", 1j, "is 1j, expected a number"),
        ("bits", "x", "is 'x', expected an integer of 32 bits or a float"),
    ],
)
def test_arguments_that_are_refused(program, name, value, sentence):
    values = [
        value if p.name == name else given for p, given in zip(program.params, GIVEN, strict=True)
    ]
    with pytest.raises(PtxError) as caught:
        program.pack(*values)
    assert str(caught.value) == f"k: argument {name} {sentence}"


def test_the_number_of_arguments(program):
    with pytest.raises(PtxError, match=r"^k takes 9 arguments, not 2$"):
        program.pack(1, 2)
