import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from helpers import assert_contract, problems
from recorded import launches_of
from small_tiles import SMALL_TILES, are_kernels, on_kernels

from lorafast.reference import wide


def call(p, t, transposed=False):
    """``transposed``: the kernels are given Wᵀ, laid out as the problem says."""

    def run_call(run, cast):
        weight, more = p.lay_out(cast(t.weight)), {}
        if transposed and are_kernels(run):
            weight, more = p.lay_out(cast(t.weight).t()), {"transposed": True}
        elif transposed:
            weight = p.lay_out(cast(t.weight).t()).t()
        return run.linear_expand(
            p.lay_out(cast(t.x)),
            weight,
            cast(t.s, wide(p.dtype)),
            cast(t.lora_B, p.adapter_dtype),
            0.7,
            cast(t.bias) if t.bias is not None else None,
            p.dropout_p,
            t.seed,
            **more,
        )

    return run_call


@given(p=problems(), tiles=st.sampled_from(list(SMALL_TILES)), transposed=st.booleans())
def test_kernel_against_reference(poisoned, device, p, tiles, transposed):
    t = p.tensors(device)
    kernels = on_kernels(linear_expand=SMALL_TILES[tiles])
    assert_contract(call(p, t, transposed), kernels, p.dtype)


def empty(*size, dtype=torch.bfloat16):
    return torch.empty(size, dtype=dtype, device="meta")


def launch_of(x, weight, N, transposed):
    s, lora_B = empty(x.shape[0], 16), empty(N, 16)

    def run():
        return on_kernels().linear_expand(x, weight, s, lora_B, 1.0, transposed=transposed)

    (launch,) = launches_of(90, run)
    return launch


M, K, N = 8192, 4096, 2048


@pytest.mark.parametrize(
    ("weight", "transposed", "n_major"),
    [
        (empty(N, K), False, False),
        (empty(K, N).t(), False, True),
        (empty(K, N), True, True),
        (empty(N, K).t(), True, False),
    ],
    ids=["W", "W column-major", "transposed", "transposed column-major"],
)
def test_tma_reads_a_weight_as_it_is_stored(weight, transposed, n_major):
    """Whichever way the weight is said: what is compiled goes by where its elements lie."""
    launch = launch_of(empty(M, K), weight, N, transposed)
    assert launch.constant("DESCRIPTORS")
    assert launch.constant("N_MAJOR") is n_major


def test_two_ways_to_say_a_weight_are_one_launch():
    x = empty(M, K)
    for one, two in (((empty(N, K), False), (empty(N, K).t(), True)),
                     ((empty(K, N), True), (empty(K, N).t(), False))):  # fmt: skip
        assert launch_of(x, *one[:1], N, one[1]).code == launch_of(x, *two[:1], N, two[1]).code


def test_what_is_not_read_is_not_passed():
    launch = launch_of(empty(M, K), empty(N, K), N, False)
    for name in ("bias_ptr", "seed_ptr", "partials_ptr", "counters_ptr", "stride_bias"):
        assert launch.constant(name) is None, name
