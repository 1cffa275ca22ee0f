"""csrc/cuda/decode_codes.cu, executed: layers of at most 16 rows over quantized weights."""

import pytest
import torch
from cards import A100, H200, T4, problem
from codes_cases import BF16, F16, F32, drawn, eight_bit, four_bit
from decode_cases import drawn as drawn_layer
from on_machine import Fault, launched, needs_nvcc, planted
from ptx.plant import EVERY, change

from lorafast.backends.cuda import cost, decode
from lorafast.backends.cuda import launch as launches
from lorafast.core.assignment import Assignment
from lorafast.core.problem import Layout
from lorafast.operands import FP8, NF4, Int8
from lorafast.reference import contract

KERNEL = "decode_codes_kernel"
ONCE = ("ld.global.nc.L1::no_allocate.v4.u32", "cp.async.cg.shared.global")
"""What loads matrices; of them the second W."""


def run(weight, layer, helpers=2, arch=80, want_s=True, **options):
    """By the plan's ``run``: y and s."""
    M, (N, K) = layer.x.shape[0], weight.shape
    grouped = layer.adapter_of is not None
    p = problem(
        "grouped_lora_linear" if grouped else "lora_linear", M, K, N, layer.r, layer.x.dtype,
        adapter_dtype=layer.lora_A.dtype, format=weight.format, bias=layer.bias is not None,
        format_parameters=weight.parameters, wants=("y", "s") if want_s else ("y",),
        adapters=layer.lora_A.shape[0] if grouped else 0,
    )  # fmt: skip
    assert decode.why_refused(p, A100) is None
    shares = decode._shares(p, A100, helpers)
    matrices = layer.x, weight, layer.lora_A, layer.lora_B, layer.scaling
    with launched(arch, **options) as ran:
        if grouped:
            found = decode._grouped_lora_linear(p, shares)(
                *matrices, Assignment(layer.adapter_of.tolist()), layer.bias
            )
        else:
            found = decode._lora_linear(p, shares)(*matrices, layer.bias, 0.0, None)
    assert [launch.kernel for launch in ran.launches] == [KERNEL]
    return ran, *found


def layer_over(weight, M, r, dtype=BF16, adapters=None, **more):
    N, K = weight.shape
    layer = drawn_layer(M, K, N, r, dtype, adapters, **more)
    layer.weight = weight.to(dtype).dense()
    return layer


def check(weight, layer, helpers=2, arch=80, **options):
    ran, y, s = run(weight.to(layer.x.dtype), layer, helpers, arch, **options)
    reason = contract.why_any_broken({"y": y, "s": s}, layer.bounds())
    assert reason is None, reason
    return ran, y, s


CASES = [
    # format, arch, M, K, N, r, helpers, dtype, adapters
    ("nf4", 80, 1, 2048, 33, 16, 2, BF16, BF16),
    ("nf4", 90, 8, 4192, 18, 16, 0, BF16, F32),
    ("nf4-plain", 80, 16, 1056, 40, 17, 3, F16, F16),
    ("nf4-plain", 90, 3, 9216, 16, 3, 4, F16, F32),
    ("fp4-4096", 80, 9, 32, 7, 1, 0, BF16, BF16),
    ("int8", 80, 1, 1040, 33, 16, 2, BF16, BF16),
    ("int8-SCB", 90, 16, 4624, 34, 8, 5, F16, F16),
    ("fp8-one", 80, 7, 16, 1, 4, 0, BF16, F32),
    ("fp8-blocks", 90, 12, 2304, 140, 16, 3, BF16, BF16),
    ("mxfp4", 80, 5, 2080, 20, 16, 2, BF16, BF16),
]


def name(case):
    return "-".join(str(value).removeprefix("torch.") for value in case)


FAULTS = {
    "halves of bytes in the other order": change(r"16465", "20800", EVERY),
    "upper bytes of other numbers": change(r"30001", "30051", EVERY),
    "numbers 8 to 15 for 0 to 7": change(r"40332", "0", EVERY),
    "scales of other blocks": change(r"shr\.s64", "shl.b64", EVERY),
}


@needs_nvcc
class TestExecuted:
    @pytest.mark.parametrize(
        "case",
        [c if c[1] == 80 else pytest.param(c, marks=pytest.mark.slow) for c in CASES],
        ids=name,
    )
    def test_cases(self, case):
        of, arch, M, K, N, r, helpers, dtype, adapters = case
        weight = drawn(of, N, K, dtype, seed=M)
        check(weight, layer_over(weight, M, r, dtype, adapters, seed=N), helpers, arch, seed=M)

    @pytest.mark.slow
    @pytest.mark.parametrize("arch", [86, 100, 120])
    @pytest.mark.parametrize("of", ["nf4", "fp8-blocks"])
    def test_every_architecture(self, of, arch):
        weight = drawn(of, 20, 1152)
        check(weight, layer_over(weight, 3, 8), arch=arch)

    @pytest.mark.parametrize("of", ["nf4", "int8"])
    def test_a_mixed_batch(self, of):
        weight = drawn(of, 34, 1088)
        layer = layer_over(weight, 5, 20, adapter_of=[3, -1, 0, 3, 1])
        check(weight, layer, 3)
        check(weight, layer, 0, 90)

    def test_it_is_rounded_to_what_it_was_stored_for_first(self):
        for weight in (four_bit(NF4, 8, 64, BF16), eight_bit(Int8, 8, 64, F32)):
            check(weight, layer_over(weight, 2, 4, F16))

    def test_the_numbers_are_those_of_dequantize(self):
        """x picks columns of W, so y is W to the bit."""
        for of in ("nf4", "fp4-4096", "int8", "fp8-blocks", "mxfp4"):
            weight = drawn(of, 16, 128)
            layer = layer_over(weight, 16, 1, bias=False)
            layer.lora_B.zero_()
            for first in (0, 48, 112):
                layer.x.zero_()
                layer.x[torch.arange(16), torch.arange(first, first + 16)] = 1.0
                _, y, _ = run(weight, layer)
                assert torch.equal(y, layer.weight[:, first : first + 16].t() + 0.0)

    def test_the_same_bits_under_all_schedules(self):
        weight = drawn("nf4", 90, 2080)
        layer = layer_over(weight, 6, 33)
        _, y, s = run(weight, layer, 7)
        for seed, resident in ((1, 1), (2, 2), (3, 40)):
            _, other, other_s = run(weight, layer, 7, seed=seed, resident=resident)
            assert torch.equal(y, other)
            assert torch.equal(s, other_s)

    def test_codes_at_any_address(self):
        weight = drawn("nf4", 16, 64)
        codes = weight.tensors()["weight"].flatten()
        moved = torch.empty(codes.numel() + 3, dtype=torch.uint8)[3:].copy_(codes)
        other = NF4.build({**weight.tensors(), "weight": moved}, weight.parameters)
        layer = layer_over(weight, 2, 4)
        assert torch.equal(check(other, layer)[1], check(weight, layer)[1])

    def test_what_it_moves(self):
        """Of W the codes, once."""
        for of, per in (("nf4", 2), ("int8", 1)):
            weight = drawn(of, 64, 2048)
            ran, _, _ = run(weight, layer_over(weight, 1, 16), 0)
            (one,) = ran.ran()
            loads = [c for c in one.counts if c.opcode in ONCE]
            codes, A, B = (
                64 * 2048 // per,
                4 * 16 * 2048 * 2,
                64 * 16 * 2,
            )  # each of four CTAs has A
            assert (
                sum(c.bytes for c in loads) == codes + A + B == 32 * sum(c.sectors for c in loads)
            )

    @pytest.mark.parametrize("M", [1, 16])
    @pytest.mark.parametrize("of", ["nf4", "int8", "fp8-one"])
    def test_what_a_number_takes(self, of, M):
        """Of PTX at most 8.1 instructions of a lane, with all of a step around it; what a CTA takes once
        is no part of that. By as many ``auto`` reckons."""

        def lanes(N, K):
            weight = drawn(of, N, K)
            ran, _, _ = run(weight, layer_over(weight, M, 16), 1, 90, want_s=False, resident=8)
            return sum(count.lanes for one in ran.ran() for count in one.counts)

        rows, more = lanes(96, 1024) - lanes(32, 1024), lanes(96, 2048) - lanes(32, 2048)
        each = (more - rows) / (64 * 1024)
        assert decode._INSTRUCTIONS - 1 < each < 8.1

    @pytest.mark.parametrize("fault", FAULTS)
    def test_planted(self, fault):
        weight = drawn("nf4", 20, 2048)
        layer = layer_over(weight, 3, 8)
        with pytest.raises((Fault, AssertionError)):
            check(weight, layer, edit=planted(KERNEL, FAULTS[fault]))


class TestRefused:
    def asked(self, weight, M=3, **more):
        N, K = weight.shape
        return problem(
            "lora_linear", M, K, N, 8, weight.dtype, format=weight.format,
            format_parameters=weight.parameters, **more,
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("weight", "said"),
        [
            (four_bit(NF4, 8, 48), "rows have 48 elements and blocks 64"),
            (four_bit(NF4, 8, 96, block=48), "rows have 96 elements and blocks 48"),
            (eight_bit(Int8, 8, 24), "rows have 24 elements and blocks none"),
            (eight_bit(FP8, 8, 64, scales=(4, 8)), "multiples of 16"),
            (four_bit(NF4, 8, 64, F32), "x is torch.float32, over codes"),
        ],
        ids=str,
    )
    def test_codes_that_are_not_read_at_once(self, weight, said):
        assert said in decode.why_refused(self.asked(weight), H200)

    def test_the_device_and_x(self):
        p = self.asked(four_bit(NF4, 8, 64, F16))
        assert "sm_75, over codes the kernels need sm_80" in decode.why_refused(p, T4)
        narrow = p._replace(layouts=p.layouts._replace(x=Layout(8)))
        assert "rows of x aren't aligned" in decode.why_refused(narrow, H200)
        assert decode.why_refused(p, H200) is None

    def test_a_launch_says_the_codes(self):
        launch = decode.plan_lora_linear(self.asked(four_bit(NF4, 4096, 4096)), H200)
        assert isinstance(launch, launches.Launch)
        assert "rows of W in nf4" in launch.line
        assert 4096 * 4096 * 0.5 < launch.moved < 4096 * 4096 * 0.7

    def test_numbers_take_longer_than_memory(self):
        """At few rows; longest where e4m3 isn't converted by hardware."""
        p = self.asked(drawn("nf4", 4096, 4096), 16)
        launch = decode.plan_lora_linear(p, H200)
        assert cost.of(launch, p, H200).device > 1.5 * launch.moved / H200.bandwidth
        fp8 = self.asked(drawn("fp8-one", 4096, 4096), 16)
        assert decode.seconds_of_numbers(fp8, H200) == decode.seconds_of_numbers(p, H200)
        assert decode.seconds_of_numbers(fp8, A100) > 1.5 * decode.seconds_of_numbers(p, A100)

    @needs_nvcc
    def test_the_launcher(self):
        weight = four_bit(NF4, 8, 48)
        p = self.asked(weight)
        layer = layer_over(weight, 3, 8)
        shares = decode._shares(p, A100, 1)
        with launched(80), pytest.raises(RuntimeError, match="codes of 48 columns aren't read"):
            decode._lora_linear(p, shares)(
                layer.x, weight, layer.lora_A, layer.lora_B, 0.5, layer.bias, 0.0, None
            )
