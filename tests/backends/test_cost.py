"""What calls are taken to cost on a GPU: devices, the models, records. None needs a device."""

import functools

import pytest
import torch
from cards import A100, B200, H200, L4, T4, problem
from lorafast.kernels.common.configs import OPERATIONS as KERNELS
from lorafast.kernels.tables import tuned

from lorafast.backends import cost
from lorafast.backends.cost import Device, estimate_of, price
from lorafast.backends.triton import cost as model
from lorafast.backends.triton import planning
from lorafast.core.problem import LAYER_OPERATIONS, OPERATIONS, Layout, Layouts, parts

HALVES = (torch.float16, torch.bfloat16)
# Name, sm, SMs, boost clock in GHz, memory clock in GHz, bus in bits, and by the data sheet TFLOP/s of
# dense 16-bit products that accumulate in float32, and GB/s.
CARDS = [
    ("NVIDIA H100 PCIe", 90, 114, 1.755, 1.593, 5120, 756, 2039),
    ("NVIDIA H100 80GB HBM3", 90, 132, 1.98, 2.619, 5120, 989, 3352),
    ("NVIDIA H200", 90, 132, 1.98, 3.201, 6144, 989, 4800),
    ("NVIDIA GH200 480GB", 90, 132, 1.98, 2.619, 6144, 989, 4000),
    ("NVIDIA L4", 89, 58, 2.04, 6.251, 192, 121, 300),
    ("NVIDIA L40S", 89, 142, 2.52, 9.001, 384, 362, 864),
    ("NVIDIA RTX 5000 Ada Generation", 89, 100, 2.55, 9.001, 256, 261, 576),
    ("NVIDIA A100-SXM4-40GB", 80, 108, 1.41, 1.215, 5120, 312, 1555),
    ("NVIDIA A100-SXM4-80GB", 80, 108, 1.41, 1.593, 5120, 312, 2039),
    ("NVIDIA A100 80GB PCIe", 80, 108, 1.41, 1.512, 5120, 312, 1935),
    ("NVIDIA A10", 86, 72, 1.695, 6.251, 384, 125, 600),
    ("NVIDIA GeForce RTX 3090", 86, 82, 1.695, 9.751, 384, 71, 936),
    ("NVIDIA GeForce RTX 4090", 89, 128, 2.52, 10.501, 384, 165, 1008),
    ("NVIDIA GeForce RTX 5090", 120, 170, 2.407, 14.001, 512, 210, 1792),
    ("NVIDIA B200", 100, 148, 1.965, 3.996, 8192, 2250, 8000),
    ("NVIDIA GB10", 121, 48, 2.418, 8.533 / 2, 256, 125, 273),
    ("Tesla T4", 75, 40, 1.59, 5.001, 256, 65, 320),
    ("NVIDIA TITAN RTX", 75, 72, 1.77, 7.001, 384, 130, 672),
    ("NVIDIA GeForce RTX 2080 Ti", 75, 68, 1.545, 7.0, 352, 54, 616),
]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card[0])
def test_no_card_reaches_more_than_its_data_sheet_nor_half_of_it(card):
    name, capability, sms, clock, memory, bus, tflops, gigabytes = card
    device = Device.known_by(name, capability, sms, clock * 1e9, memory * 1e9, bus)
    assert 0.5 < device.flops / (tflops * 1e12) < 0.95
    assert 0.5 < device.bandwidth / (gigabytes * 1e9) < 0.95


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card[0])
def test_nor_does_one_that_is_not_in_the_table(card):
    """A name without a number of its own, in the family that says how it accumulates."""
    name, capability, sms, clock, memory, bus, tflops, _ = card
    unknown = "NVIDIA GeForce RTX 0000" if "GeForce" in name else "NVIDIA X0"
    device = Device.known_by(unknown, capability, sms, clock * 1e9, memory * 1e9, bus)
    assert 0.5 < device.flops / (tflops * 1e12) < 0.95


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card[0])
def test_a_driver_that_does_not_tell_its_clocks_is_not_overrated(card):
    name, capability, sms, *_, gigabytes = card
    assert Device.known_by(name, capability, sms).bandwidth < 0.95e9 * gigabytes


def test_what_the_driver_says_is_taken(monkeypatch):
    class Properties:
        name, major, minor, multi_processor_count = "NVIDIA L4", 8, 9, 58
        clock_rate, memory_clock_rate, memory_bus_width = 2_040_000, 6_251_000, 192

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    cost.device_of.cache_clear()
    device = cost.device_of(torch.device("cuda", 7))
    cost.device_of.cache_clear()
    assert (device.capability, device.sms) == (89, 58)
    assert device.bandwidth == pytest.approx(0.87 * 300e9, rel=0.01)


def test_before_sm_80_tensor_cores_take_float16_alone():
    half, rest = T4.rate(torch.float16, False), T4.rate(torch.float32, False)
    assert half > 4 * rest
    for tf32 in (False, True):
        assert T4.rate(torch.bfloat16, tf32) == T4.rate(torch.float32, tf32) == rest
    times = [price("aten", problem("linear_expand", dtype=d), T4).seconds for d in HALVES]
    assert times[0] < 0.5 * times[1]


def test_a_gpu_older_than_the_table_is_its_oldest():
    """A V100's SM has the rate of a T4's."""
    V100 = Device.known_by("Tesla V100-SXM2-16GB", 70, 80, 1.53e9, 0.877e9, 4096)
    assert 0.5 < V100.flops / 125e12 < 0.95


def test_float16_bfloat16_tf32_and_float32_have_rates_of_their_own():
    half, tf32 = H200.rate(torch.bfloat16, False), H200.rate(torch.float32, True)
    assert half == H200.rate(torch.float16, False) == 2 * tf32
    assert H200.rate(torch.float32, False) == pytest.approx(67e12 * 0.8, rel=0.01)


@pytest.mark.parametrize(
    ("backend", "operation"),
    [
        *(("aten", operation) for operation in (*OPERATIONS, *LAYER_OPERATIONS)),
        *(("triton", operation) for operation in (*KERNELS, *LAYER_OPERATIONS)),
    ],
)
def test_more_of_anything_never_costs_less(operation, backend):
    base = price(backend, problem(operation), H200).seconds
    for change in ({"M": 16384}, {"r": 256}, {"dropout": True}, {"adapter_dtype": torch.float32}):
        assert price(backend, problem(operation, **change), H200).seconds >= base
    assert price(backend, problem(operation), L4).seconds > base


def fused(p, device):
    """What ``linear_expand`` in one launch of Triton's takes."""
    return model._of(planning.plan_linear_expand(p, device), p, device)


def test_a_large_gemm_is_bound_by_arithmetic_and_a_pass_by_bandwidth():
    gemm = fused(problem("linear_expand"), H200)
    assert gemm.flops == 2 * 8192 * 4096 * 4096
    of_cublas = model._GEMM[90]
    arithmetic = gemm.flops / (H200.flops * of_cublas)
    assert gemm.device == pytest.approx(arithmetic + cost.LAUNCH_SECONDS)
    shrink = estimate_of("triton", problem("shrink"), H200)
    reached = H200.bandwidth * model._SKINNY["shrink"]
    assert shrink.device == pytest.approx(shrink.bytes / reached + cost.LAUNCH_SECONDS)


def test_time_is_the_devices_or_the_hosts_whichever_is_longer():
    few, many = (estimate_of("triton", problem("shrink", M=M), H200) for M in (1, 8192))
    assert few.seconds == few.host > few.device
    assert many.seconds == many.device > many.host
    assert "the host takes longer" in str(few)
    assert "host" not in str(many)


@pytest.mark.parametrize("M", [1, 16, 128])
@pytest.mark.parametrize("operation", ["shrink", "linear_expand", "lora_linear"])
def test_a_decode_step_stays_with_aten(operation, M):
    """A Triton launch costs the host more than a call of PyTorch's."""
    p = problem(operation, M=M)
    assert price("aten", p, H200).seconds < price("triton", p, H200).seconds


def test_a_small_layer_on_a_gpu_is_one_whose_host_time_rules():
    """About 2**32 multiply-adds on an H200; on an L4 the weight alone takes longer to read."""
    assert cost.host_bound("aten", problem(M=64), H200)
    assert not cost.host_bound("aten", problem(M=1024), H200)
    assert not cost.host_bound("aten", problem(M=64), L4)
    assert cost.host_bound("aten", problem(M=64, K=512, N=512), L4)
    assert not cost.host_bound("aten", problem(M=1, device=torch.device("cpu")))


def test_adapters_of_another_dtype_cost_aten_a_launch_each():
    same, wide = (
        estimate_of("aten", problem("lora_linear", adapter_dtype=dtype), H200)
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert (same.launches, wide.launches) == (3, 5)
    assert wide.host - same.host == pytest.approx(2 * cost.CALL_SECONDS)
    assert wide.bytes - same.bytes == 6 * 16 * (4096 + 4096)
    backward = estimate_of(
        "aten", problem("lora_linear_backward", adapter_dtype=torch.float32), H200
    )
    assert backward.launches == 9
    # A kernel reads them as they are.
    assert estimate_of("triton", problem("shrink", adapter_dtype=torch.float32), H200).launches == 1


@pytest.mark.parametrize(
    ("operation", "sizes", "name"),
    [
        ("shrink", {"K": 1537}, "x"),
        ("shrink", {"K": 4100}, "x"),
        ("expand_backward", {"N": 4100}, "dy"),
        ("shrink_backward", {"K": 4100}, "x"),
    ],
)
def test_rows_that_are_not_aligned_go_to_aten(operation, sizes, name):
    p = problem(operation, **sizes)
    aten, triton = price("aten", p, H200), price("triton", p, H200)
    assert aten.seconds < triton.seconds
    assert f"the rows of {name} aren't aligned to 16 bytes" in triton.source
    assert "aligned" not in price("triton", problem(operation), H200).source


@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_that_lies_as_its_transpose_is_aligned_by_its_columns(transposed):
    """As a GPT-2 layer's, on a card without TMA."""
    prices = []
    for weight in (Layout(16, 0), Layout(0, 16), Layout(0, 8)):
        layouts = Layouts(weight=weight)
        p = problem("linear_expand", transposed=transposed, layouts=layouts)
        prices.append(fused(p, A100))
    by_rows, by_columns, unaligned = prices
    assert by_columns.seconds == by_rows.seconds < unaligned.seconds
    assert "aligned" not in by_columns.remark
    assert "the rows of weight aren't aligned" in unaligned.remark


@pytest.mark.parametrize("M", [1, 16, 8192])
def test_two_matrices_of_narrow_loads_are_as_slow_as_one(M):
    """So that no decode step goes to Triton because both of its matrices are narrow."""
    one = problem("linear_expand", M=M, K=1537, N=1537, layouts=Layouts(weight=Layout(2)))
    both = one._replace(layouts=Layouts(x=Layout(2), weight=Layout(2)))
    assert price("aten", one, L4).seconds == price("aten", both, L4).seconds
    assert price("aten", both, L4).seconds < price("triton", both, L4).seconds


def test_a_view_that_begins_between_16_bytes_is_not_aligned():
    p = problem("shrink", layouts=Layouts(x=Layout(rows=2)))
    assert "aren't aligned" in price("triton", p, H200).source


def test_what_saves_a_pass_goes_to_triton_and_the_bare_gemm_to_cublas():
    """dy is read once for two results; a mask is made beside the loads. Else a pass is a pass."""
    for p in (
        problem("expand_backward"),
        problem("shrink", dropout=True),
        problem("shrink_backward", dropout=True),
    ):
        assert price("triton", p, H200).seconds < 0.85 * price("aten", p, H200).seconds
    p = problem("shrink")
    assert price("triton", p, H200).seconds == pytest.approx(
        price("aten", p, H200).seconds, rel=0.1
    )
    p = problem("linear_expand")
    assert cost.base_gemm(p, H200, accumulated=False).seconds < fused(p, H200).seconds
    # Under a mask PyTorch's composition of Philox costs more than cuBLAS gains.
    p = problem("linear_expand", transposed=True, dropout=True)
    assert price("triton", p, H200).seconds < price("aten", p, H200).seconds


def test_float32_goes_to_cublas_for_the_reason_that_there_is():
    """Its GEMM, that is; the low-rank term is written by either."""
    p = problem("linear_expand", dtype=torch.float32)
    aten, triton = price("aten", p, H200), fused(p, H200)
    assert aten.seconds < triton.seconds
    assert triton.remark == "float32 uses no tensor cores in Triton"
    rounded = fused(p._replace(tf32=True), H200)
    assert rounded.seconds < triton.seconds / 4
    assert "tensor cores" not in rounded.remark


def test_float16_costs_aten_copies():
    for operation in OPERATIONS:
        half, other = (
            price("aten", problem(operation, dtype=d, adapter_dtype=torch.float32), H200)
            for d in (torch.float16, torch.bfloat16)
        )
        assert half.seconds > other.seconds
        if operation not in KERNELS:
            continue
        triton = price("triton", problem(operation, dtype=torch.float16), H200)
        assert triton.seconds < half.seconds


def test_blackwells_accumulator_is_told():
    """It goes through registers twice a tile."""
    p = problem("linear_expand")
    slower = [fused(p, d).seconds / price("aten", p, d).seconds for d in (H200, B200)]
    assert slower[0] < slower[1]


def test_the_sum_is_shown():
    said = price("aten", problem("shrink"), H200)
    assert said.source.startswith("no record: modelled ")
    assert "1.07 GFLOP, 67.5 MB, 1 launch" in said.source
    assert not said.measured


def test_where_there_is_no_model_there_is_no_price():
    assert price("aten", problem(device=torch.device("cpu"))) is None
    assert price("cpu", problem(), H200) is None
    assert price("aten", problem(format="nf4"), H200) is None


@pytest.fixture
def records(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAFAST_CACHE", str(tmp_path))
    caches = (tuned.load, tuned.nearest)
    for cache in caches:
        cache.cache_clear()
    yield functools.partial(tuned.save, H200.name)
    for cache in caches:
        cache.cache_clear()


def record(p, winner="triton", **seconds):
    return tuned.Record(cost.key_of(p), winner, None, seconds or {"aten": 2e-4, "triton": 1e-4})


@pytest.mark.parametrize("operation", tuned.OPERATIONS)
def test_a_record_goes_before_the_model(records, operation):
    p = problem(operation)
    records([record(p)])
    for name, seconds in (("aten", 2e-4), ("triton", 1e-4)):
        found = price(name, p, H200)
        assert found == cost.Price(
            seconds, "measured here by lorafast tune: aten 200 µs, triton 100 µs", True
        )
    assert not price("aten", p._replace(dropout=True), H200).measured
    assert not price("aten", p, L4).measured


def test_a_lead_within_the_noise_decides_nothing(records):
    p = problem("shrink")
    records([record(p, "aten", aten=1e-4, triton=0.995e-4)])
    assert price("triton", p, H200).seconds > price("aten", p, H200).seconds


def test_a_record_nearby_is_scaled(records):
    records([record(problem("shrink", M=4096))])
    found = price("triton", problem("shrink"), H200)
    assert found.seconds == pytest.approx(2e-4)
    assert found.source.endswith(", at M=4096 K=4096 N=4096")


@pytest.mark.parametrize(
    ("operation", "changed", "scale"),
    [
        ("shrink", {"K": 3072}, 0.75),
        ("expand", {"N": 3072}, 0.75),
        ("expand_backward", {"N": 3072}, 0.75),
        ("linear_expand", {"K": 3072, "N": 3072}, 0.75**2),
    ],
)
def test_a_pass_over_a_matrix_is_scaled_by_its_elements(records, operation, changed, scale):
    """It has no third size, whose place in the key one of the two takes."""
    records([record(problem(operation))])
    found = price("triton", problem(operation, **changed), H200)
    assert found.measured
    assert found.seconds == pytest.approx(1e-4 * scale)


@pytest.mark.parametrize(
    ("operation", "changed"),
    [
        ("expand", {"N": 4100}),
        ("linear_expand", {"N": 4100}),
        ("linear_expand", {"K": 4100, "transposed": True, "layouts": Layouts()}),
        ("lora_linear", {"N": 4100}),
    ],
)
def test_a_record_serves_no_output_of_unaligned_rows(records, operation, changed):
    """Which TMA can't write, and pointers by element alone."""
    aligned = {"transposed": True} if "transposed" in changed else {}
    records([record(problem(operation, **aligned))])
    assert price("triton", problem(operation, **aligned), H200).measured
    assert not price("triton", problem(operation, **changed), H200).measured


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dweight_is_the_same_call_of_pytorchs_whatever_the_backend(dtype):
    plain, more = (
        problem("lora_linear_backward", dtype=dtype, wants=("dx", *weight, "dA", "dB"))
        for weight in ((), ("dweight",))
    )
    aten, triton = (
        estimate_of(backend, more, H200).device - estimate_of(backend, plain, H200).device
        for backend in ("aten", "triton")
    )
    assert aten == pytest.approx(triton)


def test_a_record_serves_calls_of_its_kind_alone(records):
    p = problem("expand_backward")
    records([record(p)])
    assert price("triton", p, H200).measured
    changes = (
        {"wants": ("ds",)},
        {"adapter_dtype": torch.float32},
        {"layouts": Layouts(dy=Layout(rows=8))},
    )
    for change in changes:
        assert not price("triton", p._replace(**change), H200).measured
    # A layer's backward is tuned in its parts.
    assert not price("triton", problem("lora_linear_backward"), H200).measured


def test_tf32_has_records_of_its_own(records):
    p = problem("linear_expand", dtype=torch.float32)
    records([record(p)])
    assert price("aten", p, H200).measured
    assert not price("aten", p._replace(tf32=True), H200).measured


def test_dx_is_found_by_its_gemms_sizes():
    *_, dx = parts(problem("lora_linear_backward", N=1024))
    key = cost.key_of(dx)
    assert (key.K, key.N, key.transposed) == (1024, 4096, True)
    assert cost.key_of(problem("expand_backward", N=1024)).K == 1024


def test_a_plan_is_priced():
    from lorafast.backends.plan import Plan

    plan = Plan("aten", print, ())
    assert cost.priced(plan, problem(device=torch.device("cpu"))) is plan
    priced = cost.priced(plan, problem(), H200)
    assert priced.seconds == price("aten", problem(), H200).seconds
    assert (priced.source.startswith("no record"), priced.measured) == (True, False)


def test_a_device_can_be_pretended_on_which_nothing_was_tuned(records):
    p = problem("shrink", device=torch.device("cpu"))
    records([record(p)])
    assert price("triton", p) is None
    with cost.pretending(H200):
        pretended = price("triton", p)
        assert pretended.seconds == cost.estimate_of("triton", p, H200).seconds
        assert not pretended.measured
    assert price("triton", p) is None


def test_another_backend_stands_in_under_a_name_and_in_its_place():
    from lorafast.backends import registry
    from lorafast.backends.plan import Backend, Refusal

    class Other(Backend):
        name = registry.names()[1]

        def plan(self, problem):
            return Refusal(self.name, "it is another one")

    p = problem("shrink", device=torch.device("cpu"))
    before, names = registry.plan_of(Other.name, p), registry.names()
    with registry.standing_in(Other()):
        assert registry.plan_of(Other.name, p) == Refusal(Other.name, "it is another one")
        assert registry.names() == names
    assert type(registry.plan_of(Other.name, p)) is type(before)
    assert registry.names() == names
