"""``lora_linear_decode`` and ``grouped_lora_linear_decode`` of csrc/cuda, executed."""

import itertools

import pytest
import torch
from decode_cases import BF16, F16, F32, KERNEL, LAST_FIRST, call, check, drawn, run
from on_machine import Fault, launched, needs_nvcc, planted

from lorafast.reference import contract

pytestmark = needs_nvcc

# arch, M, K, N, r, helpers, dtype, adapters
SHAPES = [
    (80, 1, 64, 16, 16, 0, BF16, BF16),
    (90, 1, 1, 1, 1, 0, BF16, BF16),
    (80, 3, 600, 40, 3, 2, BF16, BF16),
    (90, 8, 2056, 50, 16, 5, BF16, F32),
    (80, 9, 1544, 33, 64, 6, BF16, BF16),
    (90, 16, 520, 70, 17, 3, F16, F16),
    (80, 7, 333, 20, 33, 1, F16, F32),
    (90, 13, 779, 31, 40, 4, F16, F32),
    (80, 2, 1029, 18, 16, 9, F32, F32),
    (90, 16, 260, 40, 5, 0, F32, F32),
    (75, 5, 1032, 34, 17, 3, F16, F16),
    (75, 16, 130, 40, 16, 2, BF16, F32),
    (80, 4, 768, 1, 256, 4, BF16, BF16),
]
OTHERS = [
    (86, 16, 512, 64, 16, 4, BF16, BF16),
    (100, 16, 512, 64, 16, 4, BF16, BF16),
    (120, 8, 257, 47, 8, 2, BF16, F32),
]
"""nvcc takes ten seconds for an architecture more."""


def name(case):
    arch, M, K, N, r, helpers, dtype, adapters = case
    short = {BF16: "bf16", F16: "fp16", F32: "fp32"}
    return f"sm{arch}-{M}x{K}x{N}-r{r}-h{helpers}-{short[dtype]}-{short[adapters]}"


@pytest.mark.parametrize("case", SHAPES, ids=name)
def test_shapes(case):
    arch, M, K, N, r, helpers, dtype, adapters = case
    check(drawn(M, K, N, r, dtype, adapters, bias=N % 2 == 0), helpers, arch, seed=M)


def _long_list():
    rng = torch.Generator().manual_seed(7)

    def one(values):
        return values[int(torch.randint(len(values), (), generator=rng))]

    kinds = ((BF16, BF16), (BF16, F32), (F16, F16), (F16, F32), (F32, F32))
    for i in range(75):
        yield (
            one((80, 90, 80, 90, 75)),
            i % 16 + 1,
            one((1, 8, 17, 255, 256, 264, 512, 1000, 2048, 2055)),
            one((1, 7, 16, 33, 64)),
            (1, 3, 16, 17, 64, 256)[i % 6],
            one((0, 1, 2, 3, 8, 17)) if (1, 3, 16, 17, 64, 256)[i % 6] < 200 else one((1, 16, 40)),
            *kinds[i % 5],
        )


@pytest.mark.slow
@pytest.mark.parametrize("case", [*OTHERS, *_long_list()], ids=name)
def test_many_shapes(case):
    arch, M, K, N, r, helpers, dtype, adapters = case
    check(drawn(M, K, N, r, dtype, adapters, seed=K), helpers, arch, seed=N + r, resident=1 + M % 5)


ADAPTERS_OF = {
    "none": [-1] * 5,
    "one": [2] * 5,
    "mixed": [3, -1, 0, 3, 1],
    "each": [2, 0, 3, 1],
}


@pytest.mark.parametrize("helpers", [0, 3, 9])
@pytest.mark.parametrize("kind", ADAPTERS_OF)
def test_a_mixed_batch(kind, helpers):
    of = ADAPTERS_OF[kind]
    layer = drawn(len(of), 776, 34, 20, adapter_of=of)
    check(layer, helpers, 80 if helpers else 90, seed=helpers)


@pytest.mark.parametrize(
    ("arch", "dtype", "adapters"),
    [(80, BF16, F32), (90, F16, F16), (80, F16, F32), (75, F16, F16), (90, F32, F32)],
)
def test_sixteen_adapters(arch, dtype, adapters):
    of = torch.randperm(17, generator=torch.Generator().manual_seed(3))[:16].sub(1).tolist()
    layer = drawn(16, 520, 33, 17, dtype, adapters, adapter_of=of, n=16)
    check(layer, 7, arch, resident=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_many_mixed_batches(seed):
    rng = torch.Generator().manual_seed(seed)
    M, n = seed % 16 + 1, seed % 5 + 1
    of = torch.randint(-1, n, (M,), generator=rng).tolist()
    dtype, adapters = ((BF16, BF16), (BF16, F32), (F16, F16), (F16, F32), (F32, F32))[seed % 5]
    r, helpers = (1, 16, 33, 70)[seed % 4], (0, 1, 4, 20)[seed // 2 % 4]
    if helpers == 0:
        r = min(r, 33)
    layer = drawn(M, (40, 512, 1031)[seed % 3], 35, r, dtype, adapters, adapter_of=of, n=n)
    check(layer, helpers, (80, 90, 75)[seed % 3], seed=seed, resident=seed % 4 + 1)


def test_elements_of_several_rows():
    layer = drawn(12, 264, 20, 4, adapter_of=[1, -1, 0], n=2)
    check(layer, 2)


class TestNumbers:
    def test_an_adapter_without_numbers_spoils_its_own_rows_alone(self):
        layer = drawn(4, 264, 20, 4, adapter_of=[1, 0, -1, 1], n=2)
        layer.lora_A[1], layer.lora_B[1] = float("nan"), float("inf")
        for helpers in (0, 2):
            _, y, s = run(layer, helpers)
            assert y[[0, 3]].isnan().all()
            assert s[[0, 3]].isnan().all()
            assert y[[1, 2]].isfinite().all()
            assert s[[1, 2]].isfinite().all()

    @pytest.mark.parametrize("dtype", [BF16, F16, F32])
    def test_infinity_and_nan_come_through(self, dtype):
        layer = drawn(3, 264, 20, 4, dtype)
        layer.x[1, 3], layer.x[2, 7], layer.weight[4, 3] = float("inf"), float("nan"), 0.0
        check(layer, 2)

    def test_one_infinite_rank_beside_padding(self):
        layer = drawn(2, 264, 20, 3)
        layer.lora_A[2] = float("inf")
        check(layer, 2)

    def test_float16_beyond_its_range_between_the_factors(self):
        layer = drawn(9, 520, 20, 4, F16, F32)
        layer.lora_A *= 1e5
        layer.lora_B *= 1e-5
        _, s = check(layer, 2)
        assert s.abs().max() > 65504

    def test_the_frozen_layer_where_B_is_zero(self):
        layer = drawn(5, 520, 20, 4, F32)
        layer.lora_B.zero_()
        _, y, _ = run(layer, 2)
        layer.lora_A.zero_()
        _, frozen, _ = run(layer, 0)
        assert torch.equal(y, frozen)


class TestLayouts:
    """Any strides; 16-byte loads where rows allow them."""

    def test_strides_of_everything(self):
        layer = drawn(5, 200, 24, 9)
        layer.x = layer.x.t().contiguous().t()
        layer.weight = torch.randn(24, 400).to(BF16)[:, ::2]
        layer.lora_A = layer.lora_A.t().contiguous().t()
        layer.lora_B = torch.randn(48, 27).to(BF16)[::2, 3:12]
        layer.bias = torch.randn(72).to(BF16)[::3]
        check(layer, 0)
        check(layer, 2, 90)

    def test_rows_that_are_longer(self):
        layer = drawn(5, 517, 24, 16)
        layer.weight = torch.randn(24, 528).to(BF16)[:, :517]
        layer.x = torch.randn(5, 536).to(BF16)[:, :517]
        layer.lora_A = torch.randn(16, 520).to(BF16)[:, :517]
        check(layer, 2)

    def test_rows_that_begin_beside_16_bytes(self):
        layer = drawn(2, 512, 24, 16)
        layer.weight = torch.randn(24, 520).to(BF16)[:, 1:513]
        check(layer, 2)

    def test_one_row_of_any_stride(self):
        layer = drawn(1, 512, 24, 16)
        layer.x = torch.randn(1, 513).to(BF16)[:, :512]
        check(layer, 2)

    def test_a_stack_of_any_strides(self):
        layer = drawn(5, 264, 24, 9, adapter_of=[1, 1, 0, -1, 0], n=2)
        layer.lora_A = torch.randn(264, 2, 9).to(BF16).permute(1, 2, 0)
        layer.lora_B = torch.randn(9, 24, 2).to(BF16).permute(2, 1, 0)
        layer.scaling = torch.rand(1).expand(2)
        layer.adapter_of = torch.stack([layer.adapter_of] * 2, 1)[:, 1]
        check(layer, 3, 90)

    @pytest.mark.parametrize(
        ("arch", "dtype", "M", "helpers"), [(80, BF16, 3, 2), (90, F16, 16, 0), (75, F32, 9, 2)]
    )
    def test_a_weight_that_is_transposed(self, arch, dtype, M, helpers):
        """The launcher serves it, element by element; the plan leaves it to others."""
        layer = drawn(M, 520, 40, 16, dtype)
        layer.weight = layer.weight.t().contiguous().t()
        check(layer, helpers, arch)

    def test_expanded_rows(self):
        layer = drawn(4, 264, 24, 9)
        layer.x = layer.x[:1].expand(4, 264)
        y, _ = check(layer, 2)
        assert (y == y[0]).all()

    @pytest.mark.parametrize("dtype", [BF16, F32])
    def test_beyond_2_to_31_elements(self, dtype):
        layer = drawn(2, 264, 3, 3, dtype)
        far = torch.empty(2**31 + 2**12, dtype=dtype).as_strided((3, 264), (2**30 + 8, 1))
        for tensor in ("weight", "lora_A"):
            setattr(layer, tensor, far.copy_(getattr(layer, tensor)))
            check(layer, 2)
            setattr(layer, tensor, far.clone())
        x = torch.empty(2**32, dtype=dtype).as_strided((2, 264), (2**31 + 8, 1))
        layer.x = x.copy_(layer.x)
        check(layer, 2)

    @pytest.mark.parametrize("dtype", [BF16, F32])
    def test_rows_of_B_beyond_2_to_31_elements(self, dtype):
        layer = drawn(2, 264, 3, 3, dtype)
        far = torch.empty(2**31 + 2**12, dtype=dtype).as_strided((3, 3), (2**30 + 8, 1))
        layer.lora_B = far.copy_(layer.lora_B)
        check(layer, 2)

    def test_adapters_beyond_2_to_31_elements(self):
        layer = drawn(3, 264, 3, 3, adapter_of=[1, 0, -1], n=2)
        for name, rows in (("lora_A", 264), ("lora_B", 3)):
            whole = torch.empty(2**31 + 2**14, dtype=BF16)
            far = whole.as_strided((2, 3, rows), (2**31 + 8, rows, 1))
            setattr(layer, name, far.copy_(getattr(layer, name)))
        check(layer, 2)


class TestSchedules:
    @pytest.mark.parametrize("arch", [80, 90, 75])
    def test_the_same_bits_under_all(self, arch):
        layer = drawn(6, 1032, 90, 33, adapter_of=[1, 0, -1, 1, 2, 2], n=3)
        y, s = check(layer, 7, arch)
        for seed, resident in itertools.zip_longest(range(1, 6), (1, 2, 3, 40, 4)):
            _, other, other_s = run(layer, 7, arch, seed=seed, resident=resident)
            assert torch.equal(y, other)
            assert torch.equal(s, other_s)

    def test_two_launches_on_the_same_counters(self):
        layer, other = drawn(3, 520, 40, 16), drawn(3, 776, 50, 40, seed=1)
        counters = torch.zeros(9, dtype=torch.int32)
        with launched(80, seed=2) as ran:
            first = call(layer, 4, counters)
            second = call(other, 6, counters)
            third = call(layer, 4, counters)
        assert len(ran.launches) == 3
        assert not counters.any()
        for one, results in ((layer, first), (other, second), (layer, third)):
            assert not contract.why_any_broken(dict(zip("ys", results, strict=True)), one.bounds())

    def test_turn_by_turn_on_counters_of_their_own(self):
        layer, other = drawn(3, 520, 40, 16), drawn(9, 776, 50, 40, seed=1)
        counters = [torch.zeros(9, dtype=torch.int32) for _ in range(2)]
        with launched(90, seed=2, resident=2):
            results = [
                (one, call(one, 6, own))
                for _ in range(2)
                for one, own in zip((layer, other), counters, strict=True)
            ]
        for one, found in results:
            assert not contract.why_any_broken(dict(zip("ys", found, strict=True)), one.bounds())

    @pytest.mark.parametrize("resident", [1, 2, 5])
    @pytest.mark.parametrize("helpers", [1, 7])
    def test_helpers_that_start_last(self, helpers, resident):
        layer = drawn(3, 520, 60, 33)
        edit = planted(KERNEL, LAST_FIRST)
        y, s = check(layer, helpers, 80, seed=helpers, resident=resident, edit=edit)
        _, first_y, first_s = run(layer, helpers, 80)
        assert torch.equal(y, first_y)
        assert torch.equal(s, first_s)

    def test_more_helpers_than_there_is_to_do(self):
        check(drawn(3, 300, 40, 16), 30, resident=2)

    def test_s_is_not_wanted(self):
        layer = drawn(3, 520, 40, 16)
        for helpers in (0, 3):
            _, y, s = run(layer, helpers, want_s=False)
            assert s is None
            assert layer.bounds()["y"].verdict(y).why_broken is None

    def test_no_rows(self):
        layer = drawn(3, 520, 40, 16)
        layer.x = layer.x[:0]
        ran, y, s = run(layer, 3)
        assert not ran.launches
        assert y.shape == (0, 40)
        assert s.shape == (0, 16)


class TestRefused:
    """A sentence each."""

    @pytest.mark.parametrize("helpers", [0, 2])
    @pytest.mark.parametrize("one", [2, 10**12, 2**62, -2, -(2**63)])
    def test_an_adapter_that_there_is_not(self, one, helpers):
        """By the kernel: the host doesn't read what is on the device."""
        layer = drawn(3, 264, 24, 9, adapter_of=[0, 1, one], n=2)
        with pytest.raises(Fault, match="trap"):
            run(layer, helpers)

    def test_s_of_a_weight_without_rows(self):
        layer = drawn(3, 264, 24, 9, bias=False)
        layer.weight, layer.lora_B = layer.weight[:0], layer.lora_B[:0]
        with pytest.raises(RuntimeError, match="weight has no rows, no CTA makes s without them"):
            run(layer, 2)
        ran, y, s = run(layer, 2, want_s=False)
        assert (y.shape, s, ran.launches) == ((3, 0), None, [])

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (
                {"scaling": torch.ones(2, 2)},
                "scaling has 2 dimensions and 4 elements, expected a vector of 4",
            ),
            (
                {"scaling": torch.ones(4, dtype=torch.float64)},
                "scaling has dtype Double, expected float32",
            ),
            (
                {"adapter_of": torch.tensor([[0, 1, -1]])},
                "adapter_of has 2 dimensions, expected a vector",
            ),
        ],
    )
    def test_arguments_of_several_adapters(self, change, sentence):
        layer = drawn(3, 264, 24, 9, adapter_of=[0, 1, -1])
        for argument, value in change.items():
            setattr(layer, argument, value)
        with pytest.raises(RuntimeError, match=sentence):
            run(layer, 2)

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"x": torch.zeros(17, 264, dtype=BF16)}, "x has 17 rows, expected at most 16"),
            ({"weight": torch.zeros(24, 263, dtype=BF16)}, "weight is 24 x 263, expected 24 x 264"),
            ({"weight": torch.zeros(24, 264)}, "weight has dtype Float, expected BFloat16"),
            (
                {"lora_A": torch.zeros(9, 264, dtype=F16)},
                "lora_A has dtype Half, expected that of x",
            ),
            ({"lora_B": torch.zeros(24, 9)}, "lora_B has dtype Float, expected BFloat16"),
            ({"bias": torch.zeros(23, dtype=BF16)}, "bias has 1 dimensions and 23 elements"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_arguments(self, change, sentence):
        layer = drawn(3, 264, 24, 9)
        for argument, value in change.items():
            setattr(layer, argument, value)
        with pytest.raises(RuntimeError, match=sentence):
            run(layer, 2)

    def test_too_little_scratch(self):
        layer = drawn(3, 264, 24, 9)
        with pytest.raises(RuntimeError, match="counters has 4 elements, expected 5"), launched(80):
            call(layer, 2, torch.zeros(4, dtype=torch.int32))

    def test_an_s_that_a_CTA_has_no_room_for(self):
        with pytest.raises(RuntimeError, match="without helpers s of rank 1024 doesn't fit"):
            run(drawn(3, 40, 24, 1024), 0)

    def test_an_assignment_of_another_length(self):
        layer = drawn(5, 264, 24, 9, adapter_of=[0, 1], n=2)
        with pytest.raises(RuntimeError, match="adapter_of has 2 elements, expected one for each"):
            run(layer, 2)
