"""A new number of rows, rank or scaling means no new compilation where specialising buys nothing."""

import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from recorded import launches_of
from small_tiles import on_kernels

K, N = 4096, 4096
KERNELS = on_kernels()


def empty(*size, dtype=torch.bfloat16):
    return torch.empty(size, dtype=dtype, device="meta")


def layer(M, r=16, scaling=2.0, dropout_p=0.0):
    """Every launch of a forward and a backward."""
    x, dy, weight = empty(M, K), empty(M, N), empty(N, K)
    lora_A, lora_B = empty(r, K), empty(N, r)
    seed = empty(1, dtype=torch.int64) if dropout_p else None
    _, s = KERNELS.lora_linear(x, weight, lora_A, lora_B, scaling, None, dropout_p, seed)
    ds, _, _ = KERNELS.expand_backward(dy, s, lora_B, scaling)
    KERNELS.shrink_backward(ds, x, dropout_p, seed, lora_A.dtype)
    KERNELS.linear_expand(dy, weight, ds, lora_A.t(), 1.0, None, dropout_p, seed, transposed=True)


def expanded(M, r=16, scaling=2.0, dropout_p=0.0):
    """The low-rank terms of a forward and of dx."""
    s, lora_A, lora_B = empty(M, r), empty(r, K), empty(N, r)
    seed = empty(1, dtype=torch.int64) if dropout_p else None
    for factor in (lora_B, lora_A.t()):
        KERNELS.expand(s, factor, scaling, dropout_p, seed, dtype=s.dtype)


def codes(calls, capability=90):
    """The different machine codes that the calls launch."""
    return {launch.code for call in calls for launch in launches_of(capability, call)}


@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_new_numbers_of_rows_compile_nothing_for_expand(capability, dropout_p):
    first = codes([lambda: expanded(4096, dropout_p=dropout_p)], capability)
    for M in (1, 2, 16, 100, 8191, 2**31 - 8192):
        assert codes([lambda M=M: expanded(M, dropout_p=dropout_p)], capability) == first


@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_new_numbers_of_rows_compile_nothing_after_the_first_few(capability, dropout_p):
    few = [1, 16, 64, 100, 512, 1000, 2048, 2600, 3000, 4096, 8192]
    known = codes([lambda M=M: layer(M, dropout_p=dropout_p) for M in few], capability)
    rows = torch.randint(1, 8192, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    new = codes([lambda M=M: layer(M, dropout_p=dropout_p) for M in rows], capability)
    assert new <= known


def test_ranks_of_one_bucket_run_the_same_code():
    # A multiple of 8 and 16, so that the strides of s and B are divided alike.
    for ranks in ((1,), (3, 5, 7), (17, 19, 31)):
        for call in (layer, expanded):
            found = {frozenset(codes([lambda r=r, call=call: call(2048, r=r)])) for r in ranks}
            assert len(found) == 1


@pytest.mark.parametrize("call", [layer, expanded])
def test_scaling_and_dropout_are_run_time_numbers(call):
    first = codes([lambda: call(2048, scaling=0.5, dropout_p=0.05)])
    assert codes([lambda: call(2048, scaling=16.0, dropout_p=0.3)]) == first


def test_the_sanitizer_sees_helpers():
    """Its layer is too small for them, by the model of what they cost."""
    script = Path(__file__).parents[1] / "gpu" / "sanitized.py"
    with_helpers = runpy.run_path(str(script))["with_helpers"]
    launched = launches_of(90, lambda: with_helpers(torch.device("meta")))
    assert [launch.kernel.__name__ for launch in launched] == ["lora_linear_kernel"]


@pytest.mark.parametrize("rows", [512, 8192])
def test_what_is_launched(rows):
    def names(dropout_p):
        launched = launches_of(90, lambda: layer(rows, dropout_p=dropout_p))
        return [launch.kernel.__name__.removesuffix("_kernel") for launch in launched]

    alone = ["shrink", "linear_expand"]
    backward = ["expand_backward", "sum_partials", "shrink_backward", "linear_expand"]
    assert names(0.0) == (alone if rows == 512 else ["lora_linear"]) + backward
    assert names(0.05) == alone + backward
