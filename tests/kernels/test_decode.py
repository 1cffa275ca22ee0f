"""A layer of few rows in one launch, against the reference."""

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from codes_products import READ
from decodings import DENSE, Decoding
from helpers import DTYPES
from lorafast.kernels.lora_linear import decode
from triton.runtime import interpreter

KINDS = [DENSE, *READ]


@given(
    kind=st.sampled_from(KINDS), M=st.integers(1, 16), N=st.integers(1, 140),
    K=st.integers(1, 20).map(lambda groups: 32 * groups), r=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES), adapter_dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    stored=st.sampled_from(DTYPES), bias=st.booleans(),
)  # fmt: skip
def test_against_the_reference(
    poisoned, device, kind, M, N, K, r, dtype, adapter_dtype, stored, bias
):
    Decoding(kind, M, N, K, r, dtype, adapter_dtype, bias, stored=stored).check(device)


LONG = [Decoding(kind, 5, 40, 2112, 20, torch.bfloat16) for kind in (DENSE, "nf4 nested")]
"""K in shares of tiles and of helpers, two blocks of the rank."""
SHORT = Decoding("int8 by row", 5, 40, 96, 20, torch.bfloat16)
"""Each tile makes its own s."""


def test_who_makes_s():
    assert [(c.launch.shares, c.launch.splits) for c in LONG] == [(8, 2), (8, 4)]
    assert (SHORT.launch.shares, SHORT.launch.splits) == (0, 1)
    assert LONG[0].launch.helpers == 16


@pytest.mark.parametrize("call", [*LONG, SHORT], ids=lambda c: f"{c.kind}-K{c.K}")
@pytest.mark.parametrize("order", ["backwards", "shuffled"])
def test_no_order_in_which_programs_start_is_assumed(monkeypatch, device, order, call):
    """One program at a time, each to its end: tiles that come before helpers make s themselves, and have
    the same bits."""
    if device.type != "cpu":
        pytest.skip("the interpreter's order")
    own = []
    made = decode._own
    monkeypatch.setattr(decode, "_own", lambda *given: own.append(1) or made(*given))
    expected = call.check(device)
    assert bool(own) is (call is SHORT)
    begin = interpreter.InterpreterBuilder.set_grid_idx
    places = list(range(call.launch.programs))
    if order == "backwards":
        places.reverse()
    else:
        numpy.random.default_rng(1).shuffle(places)
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "set_grid_idx",
        lambda self, x, y, z: begin(self, places[x], y, z),
    )
    found = call.check(device)
    assert own
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("call", LONG, ids=lambda c: c.kind)
def test_the_counters_are_left_as_they_were_found(monkeypatch, device, call):
    kept = torch.zeros(4096, dtype=torch.int32, device=device)
    used = []
    monkeypatch.setattr(decode, "counters", lambda x, count: used.append(count) or kept)
    results = []
    for _ in range(2):
        results.append(call.check(device))
        assert not kept.any()
    launch = call.launch
    assert used == [2 + launch.rank_blocks + launch.tiles] * 2
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
