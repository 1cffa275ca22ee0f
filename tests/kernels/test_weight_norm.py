"""The norm in one launch against float64; the backend around it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from helpers import DTYPES, skip_unless_usable
from layouts import LAYOUTS, lay_out
from lorafast.kernels.weight_norm import kernel, weight_norm
from norms import assert_right, drawn
from quantized_weights import KINDS, draw

import lorafast
from lorafast import ops
from lorafast.backends import Refusal, registry
from lorafast.backends.cost import Device, pretending
from lorafast.core.dtypes import LEAST_NORM
from lorafast.ops.problems import weight_norm_problem

SIZES = st.one_of(st.integers(0, 9), st.integers(10, 150))
RANKS = st.one_of(st.integers(1, 9), st.sampled_from((16, 17, 32, 33, 64, 65, 129)))
H200 = Device.known_by("NVIDIA H200", 90, 132, memory_clock=3.2e9, bus_bits=6144)


@given(
    N=SIZES, K=SIZES, r=RANKS, dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3), scaling=st.sampled_from((0.7, -2.0, 0.0)),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_kernel_against_reference(poisoned, device, N, K, r, dtypes, layouts, scaling, seed):
    given = drawn(N, K, r, dtypes, device, seed)
    given = [lay_out(t, layout) for t, layout in zip(given, layouts, strict=True)]
    assert_right(weight_norm(*given, scaling), *given, scaling)


@pytest.mark.parametrize("r", [5, 70])
def test_more_rows_than_ctas_of_few_rows(poisoned, device, r):
    """With tiles of 32 rows, as where they fill a device."""
    given = drawn(150, 90, r, (torch.bfloat16, torch.float32, torch.float32), device)
    launch = kernel.weight_norm_launch(150, 90, r, sms=4)
    assert launch.config.block_n == 32
    assert_right(kernel.launcher(launch)(*given, 0.5), *given, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_scaling_that_is_a_tensor(device, dtype):
    given = drawn(40, 70, 3, (torch.bfloat16, torch.float32, torch.float32), device)
    scaling = torch.tensor(0.75, dtype=dtype, device=device)
    assert torch.equal(weight_norm(*given, scaling), weight_norm(*given, 0.75))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_the_adapter_cancels_keeps_its_digits(device, dtype):
    """A thousandth of W is left: a difference of squares would lose six of seven digits."""
    _, lora_A, lora_B = drawn(33, 70, 4, (dtype, torch.float32, torch.float32), device)
    weight = (lora_B @ lora_A).to(dtype)
    lora_B *= 1.001
    assert_right(weight_norm(weight, lora_A, lora_B, -1.0), weight, lora_A, lora_B, -1.0)


def test_rows_of_zeros_and_of_no_columns(device):
    weight, lora_A, lora_B = drawn(3, 70, 2, (torch.float32,) * 3, device)
    weight[1] = lora_B[1] = 0
    assert weight_norm(weight, lora_A, lora_B, 2.0)[1] == LEAST_NORM
    norm = weight_norm(weight[:, :0], lora_A[:, :0], lora_B, 2.0)
    assert (norm == LEAST_NORM).all()


def test_what_is_not_finite_stays_in_its_row(device):
    weight, lora_A, lora_B = drawn(40, 70, 2, (torch.float32,) * 3, device)
    weight[3, 69], weight[5, 0] = float("nan"), float("inf")
    norm = weight_norm(weight, lora_A, lora_B, 2.0)
    assert norm[3].isnan()
    assert norm[5].isinf()
    assert norm.isfinite().sum() == 38


class TestBackend:
    def test_it_is_launched_once(self, device, monkeypatch):
        skip_unless_usable("triton")
        started = []
        own = kernel.Start.__call__
        monkeypatch.setattr(
            kernel.Start, "__call__", lambda self, *a: (started.append(self), own(self, *a))
        )
        given = drawn(40, 70, 3, (torch.bfloat16, torch.float32, torch.float32), device)
        with lorafast.use_backend("triton"):
            for _ in range(2):
                assert_right(ops.weight_norm(*given, 0.5), *given, 0.5)
        assert len(started) == 2

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_quantized_weight_is_made_dense_first(self, device, kind):
        skip_unless_usable("triton")
        weight = draw(kind, 40, 96, torch.bfloat16, device)
        _, lora_A, lora_B = drawn(40, 96, 3, (torch.float32,) * 3, device)
        with lorafast.use_backend("triton"):
            found = ops.weight_norm(weight, lora_A, lora_B, 0.5)
        assert torch.equal(found, weight_norm(weight.dense(), lora_A, lora_B, 0.5))
        answer = registry.plan_of("triton", weight_norm_problem(weight, lora_A, lora_B, 0.5))
        assert [line.split(":")[0] for line in answer.launches] == ["dequantize", "weight_norm"]

    def test_what_it_refuses(self, device):
        skip_unless_usable("triton")
        given = drawn(4, 7, 3, (torch.float64,) * 3, device)
        with (
            lorafast.use_backend("triton"),
            pytest.raises(lorafast.BackendError, match="can't serve weight_norm: the dtype"),
        ):
            ops.weight_norm(*given, 0.5)

    def test_a_backend_without_it_leaves_it_to_others(self):
        skip_unless_usable("cpu")
        given = drawn(4, 7, 3, (torch.float32,) * 3, torch.device("cpu"))
        with lorafast.use_backend("cpu"):
            assert_right(ops.weight_norm(*given, 0.5), *given, 0.5)

    @pytest.mark.parametrize(
        ("N", "K", "r", "dtype"),
        [(64, 64, 4, torch.float32), (512, 512, 16, torch.bfloat16), (4096, 4096, 16, torch.bfloat16),
         (14336, 4096, 64, torch.bfloat16), (2048, 2048, 256, torch.float32)],
        ids=str,
    )  # fmt: skip
    def test_by_the_model_one_launch_is_the_fastest(self, device, N, K, r, dtype):
        skip_unless_usable("triton")
        given = [torch.empty(1, dtype=t, device=device).expand(s) for s, t in (
            ((N, K), dtype), ((r, K), torch.float32), ((N, r), torch.float32))]  # fmt: skip
        with pretending(H200):
            problem = weight_norm_problem(*given, 0.5)
            answers = {name: registry.plan_of(name, problem) for name in ("aten", "triton")}
            assert not any(isinstance(answer, Refusal) for answer in answers.values())
            assert registry.choose(problem) is answers["triton"]
        assert 0 < answers["triton"].seconds < answers["aten"].seconds
