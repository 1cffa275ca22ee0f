"""What Triton plans for a problem on a made-up device, and what it refuses."""

import dataclasses
import functools
import warnings

import pytest
import torch
from cards import FROZEN, H200, L4, problem
from lorafast.kernels.tables import tuned

pytest.importorskip("triton")

from lorafast.kernels.common.configs import OPERATIONS, LaunchConfig
from lorafast.kernels.common.plan import LoraLinearLaunch

from lorafast.backends import composed, cost, registry
from lorafast.backends.cost import Device
from lorafast.backends.plan import Plan, Refusal
from lorafast.backends.triton import Triton, backend, planning
from lorafast.backends.triton import cost as model
from lorafast.backends.triton.lines import lines
from lorafast.core.problem import LAYER_OPERATIONS, Layout, Layouts, parts

TRITON = Triton()
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_records(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAFAST_CACHE", str(tmp_path))
    caches = (tuned.load, tuned.nearest)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def on(monkeypatch):
    """Makes CUDA devices of those given, by their index."""

    def pretend(*devices):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(cost, "device_of", lambda device: devices[device.index])
        monkeypatch.setattr(backend, "say_untuned", lambda device, sm: None)

    return pretend


def test_few_rows_share_their_columns_out():
    many, few = (planning.plan_shrink(problem("shrink", M=M), H200) for M in (65536, 16))
    assert (many.grid, many.split) == ((1024, 1, 1), False)
    assert few.split
    blocks = -(-4096 // few.config.block_k)
    assert (few.grid[1] - 1) * few.k_blocks < blocks <= few.grid[1] * few.k_blocks


def test_dbias_alone_reads_dy_once_whatever_the_rank():
    alone, beside = (
        planning.plan_expand_backward(problem("expand_backward", r=256, wants=wants), H200)
        for wants in (("dbias",), ("dB", "dbias"))
    )
    assert alone.grid[2] == 1 < beside.grid[2]


def test_dbias_is_made_beside_factors_of_no_rank():
    p = problem("expand_backward", r=0, wants=("ds", "dB", "dbias"))
    assert planning.plan_expand_backward(p, H200).grid[2] == 1


@pytest.mark.parametrize(
    ("tile", "warps", "flatten", "masked"),
    [
        ((64, 64), 4, False, (4, 64)),
        ((128, 128), 4, False, (8, 128)),
        ((128, 256), 8, False, (8, 128)),
        ((128, 256), 4, False, (8, 128)),  # as the one above, once it has its warps
        ((128, 256), 8, True, (8, 256)),
    ],
    ids=str,
)
def test_a_mask_beside_a_large_accumulator_takes_warps_then_columns(tile, warps, flatten, masked):
    config = LaunchConfig(*tile, 64, 16, warps, 4, descriptors=True, flatten=flatten)
    for dropout, expected in ((False, (warps, tile[1])), (True, masked)):
        p = problem("linear_expand", transposed=True, dropout=dropout)
        found = planning.plan_linear_expand(p, H200, config)
        assert (found.config.num_warps, found.config.block_n) == expected
        assert found.tiles == 8192 // tile[0] * 4096 // expected[1]


def test_few_tiles_share_k_and_do_not_flatten():
    flat = LaunchConfig(128, 128, 64, 16, 8, 4, descriptors=True, flatten=True)
    gemm = planning.plan_linear_expand(problem("linear_expand", M=16, N=512), H200, flat)
    assert gemm.splits == 8
    assert not gemm.flatten
    assert gemm.programs == gemm.tiles * 8 <= 132
    large = planning.plan_linear_expand(problem("linear_expand"), H200, flat)
    assert (large.splits, large.programs, large.tma, large.flatten) == (1, 132, True, True)


@pytest.mark.parametrize("device", [H200, L4, Device.known_by("RTX 5090", 120, 170)])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_device_is_planned_for(operation, device):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for M in (1, 100, 8192):
            p = problem(operation, M=M, dtype=dtype)
            launch = model.PLANNED[operation](p, device, None)
            assert launch.config.num_warps
            assert lines(launch)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"N": 4100}, False),  # y, whose rows no read matrix has
        ({"K": 4100}, False),
        ({"N": 4104, "K": 4104}, True),
        ({"layouts": Layouts(x=Layout(rows=8))}, False),  # a view that begins between 16 bytes
        ({"layouts": Layouts(x=Layout(rows=0, columns=16))}, False),  # transposed
        ({"layouts": Layouts(weight=Layout(rows=0, columns=16))}, True),
        ({"layouts": Layouts(weight=Layout(rows=4))}, False),
        ({"layouts": Layouts(x=Layout(huge=True))}, False),
        ({"M": 2**31}, False),
    ],
    ids=str,
)
def test_one_predicate_says_whether_tma_can_be_used(change, expected):
    """Of reads and of the output: N = 4100 in bfloat16 reads well, and writes rows of 8,200 bytes."""
    p = problem("linear_expand", **change)
    assert planning.tma(p) is expected
    assert planning.plan_linear_expand(p, H200).tma is expected
    whole = problem("lora_linear", **change)
    assert planning.tma(whole) is expected
    if not expected:
        assert "TMA can't" in planning.plan_lora_linear(whole, H200)


def test_the_backward_reads_dy_and_writes_dx():
    *_, dx = parts(problem("lora_linear_backward", N=4100))
    assert not planning.tma(dx)
    *_, dx = parts(problem("lora_linear_backward", layouts=Layouts(x=Layout(rows=2))))
    assert planning.tma(dx)  # x is not what its GEMM reads
    assert not planning.tma(dx._replace(layouts=Layouts(dy=Layout(rows=2))))


def test_a_tensor_says_how_it_lies():
    t = torch.empty(6, 24, dtype=torch.bfloat16)
    assert Layout.of(t) == Layout(16, 0, False)
    assert Layout.of(t[:, 4:]).rows == 8
    assert Layout.of(t.t()) == Layout(0, 16, False)
    # TMA knows no rows that overlap.
    for over in (t[:1].expand(6, 24), t.as_strided((6, 24), (16, 1))):
        assert Layout.of(over).huge
        assert Layout.of(over.t()).huge
    assert not any(
        Layout.of(one).huge
        for one in (t[:1], t[:, :1], t.as_strided((1, 24), (8, 1)), t[:, :1].t())
    )


@pytest.mark.parametrize("stored", ["rows", "columns"])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_weight_is_read_as_it_is_stored(stored, transposed):
    weight = Layout(16, 0) if stored == "rows" else Layout(0, 16)
    p = problem("linear_expand", transposed=transposed, layouts=Layouts(weight=weight))
    assert planning.plan_linear_expand(p, H200).n_major is ((stored == "rows") == transposed)


def test_helpers_serve_a_large_layers_forward():
    forward = model.helped(problem("lora_linear"), H200)
    assert isinstance(forward, LoraLinearLaunch)
    assert forward.gemm.programs == forward.helpers.programs == 132
    assert 0 < forward.helpers.waves <= 4
    assert forward.helpers.rounds == forward.helpers.alone == 8


@pytest.mark.parametrize(
    ("p", "reason"),
    [
        (problem(M=64), "the configuration has none"),
        (problem(M=512, dropout=True), "the configuration has none"),
        (problem(dropout=True), "a mask, the rank, or few tiles or SMs"),
        (problem(N=1024), "a mask, the rank, or few tiles or SMs"),
        (problem(r=200), "a mask, the rank, or few tiles or SMs"),
        (problem(dtype=torch.float16), "float16's skinny work is in float32"),
        (problem(K=4100), "TMA can't read or write"),
        (problem(M=0), "nothing to compute"),
        (problem("lora_linear_backward"), "they make a backward slower"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_why_there_are_no_helpers_is_said(p, reason):
    assert reason in model.helped(p, H200)


def test_helpers_that_do_not_pay_are_left():
    """The launch and its model have the same rounds of tiles."""
    p = problem(
        "lora_linear", M=4224
    )  # four full rounds of tiles: each that helpers miss is one more
    planned = planning.plan_lora_linear(p, H200)
    assert planned.helpers.rounds > planned.helpers.alone
    assert "they don't pay, modelled" in model.helped(p, H200)
    together = model._of(planned, p, H200)
    gemm = model._of(planned.gemm, p, H200)
    rounds = planned.helpers.rounds / planned.helpers.alone
    assert together.device == pytest.approx(gemm.device * rounds)


def test_helpers_need_no_tuned_card(on):
    """The model says where they pay; their rules hold on any card."""
    on(H200)
    plan = TRITON.plan(problem("lora_linear"))
    (line,) = plan.launches
    assert line.startswith("lora_linear: grid 132, tiles 128 × 256 × 64")
    helpers = planning.plan_lora_linear(problem("lora_linear"), H200).helpers
    said = f"{helpers.helpers} of 132 programs help for {helpers.waves} rounds of tiles: s"
    assert line.endswith(said)
    assert plan.seconds == model.estimate(problem("lora_linear"), H200).seconds


def test_plans_leave_the_sms_free_that_pytorch_is_asked_to(on, monkeypatch):
    """Not the rates: what is measured and modelled is of the device."""
    on(H200)
    for free, grid in ((None, 132), (16, 116), (None, 132)):
        monkeypatch.setattr(torch._C, "_get_sm_carveout_experimental", lambda free=free: free)
        for operation in ("lora_linear", "linear_expand"):
            plan = registry.plan_of("triton", problem(operation))
            assert any(f" grid {grid}," in line for line in plan.launches)
        found = cost.gpu_of(torch.device("cuda", 0))
        assert found == dataclasses.replace(H200, sms=grid)


def test_a_layer_without_helpers_is_its_operations_and_says_why(on):
    on(H200)
    plan = TRITON.plan(problem("lora_linear", dropout=True))
    assert [line.partition("help")[0] for line in plan.launches[-1:]] == ["no "]
    assert any("shrink: grid" in line for line in plan.launches)
    assert any(line.startswith("linear_expand on triton: ") for line in plan.launches)


def test_a_record_is_launched_as_it_was_measured():
    own = LaunchConfig(128, 128, 64, 16, 8, 3, descriptors=True, helpers=8)
    p = problem("lora_linear")
    record = tuned.Record(cost.key_of(p), "triton", own, {"triton": 1e-4})
    tuned.save(H200.name, [record])
    assert model.helped(p, H200).gemm.config == own
    single = problem("linear_expand")
    assert planning.plan_linear_expand(single, H200).config != own
    tuned.save(H200.name, [dataclasses.replace(record, key=cost.key_of(single))])
    assert planning.plan_linear_expand(single, H200).config == own
    # One that is read through pointers takes no configuration for TMA.
    unaligned = problem("linear_expand", layouts=Layouts(x=Layout(rows=8)))
    assert not planning.plan_linear_expand(unaligned, H200).config.descriptors


def test_a_square_weights_record_is_that_of_its_direction():
    """A square weight's strides don't tell whether it is transposed."""
    own = LaunchConfig(128, 128, 64, 16, 8, 3, descriptors=True)
    p = problem("linear_expand")
    tuned.save(H200.name, [tuned.Record(cost.key_of(p), "triton", own, {"triton": 1e-4})])
    assert planning.config_of(p, H200) == own
    assert planning.config_of(p._replace(transposed=True), H200) != own


def test_float32_is_rounded_as_pytorch_does_and_float16s_factors_always():
    assert planning.precision(problem(dtype=torch.float32)) == "ieee"
    assert planning.precision(problem(dtype=torch.float32, tf32=True)) == "tf32"
    assert planning.precision(problem(tf32=True)) == "ieee"
    for tf32 in (False, True):
        assert planning.precision(problem(dtype=torch.float16, tf32=tf32)) == "tf32"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "the dtype is torch.float64, the kernels have"),
        ({"adapter_dtype": torch.float64}, "the adapter is torch.float64, the kernels have"),
        ({"plain": False}, "an input is a tensor subclass or on another device"),
        ({"device": torch.device("meta")}, "the inputs are on meta"),
        ({"format": "other"}, "the weight is stored as other, the kernels read dense ones and nf4"),
    ],
    ids=str,
)
def test_what_the_kernels_can_not_is_a_sentence(on, change, reason):
    on(H200)
    for operation in LAYER_OPERATIONS:
        answer = TRITON.plan(problem(operation, **change))
        assert isinstance(answer, Refusal)
        assert reason in answer.reason


def test_operations_without_a_weight_ask_for_no_format(on):
    on(H200)
    for operation in ("shrink", "expand_backward", "shrink_backward"):
        assert isinstance(TRITON.plan(problem(operation, format="nf4")), Plan)
    assert isinstance(TRITON.plan(problem("linear_expand", format="other")), Refusal)


@pytest.mark.parametrize("operation", [*OPERATIONS, *LAYER_OPERATIONS])
def test_no_rows_are_planned_for(on, operation):
    on(H200)
    assert isinstance(TRITON.plan(problem(operation, M=0)), Plan)


def test_an_old_gpu_disables_no_newer_one(on):
    old = Device.known_by("Tesla T4", 75, 40)
    on(old, H200)
    refused = TRITON.plan(problem("shrink"))
    assert refused.reason == "compute capability is 7.5, the kernels need 8.0"
    assert isinstance(TRITON.plan(problem("shrink", device=torch.device("cuda", 1))), Plan)


def test_usability_is_decided_once_a_process(monkeypatch):
    backend._why_unusable.cache_clear()
    asked = []
    monkeypatch.setattr(
        backend.importlib.util, "find_spec", lambda name: asked.append(name) or name
    )
    for _ in range(3):
        TRITON.why_unusable()
    backend._why_unusable.cache_clear()
    assert asked.count("triton") == 1


def test_without_a_gpu_and_an_interpreter_it_is_said(monkeypatch):
    backend._why_unusable.cache_clear()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in TRITON.why_unusable()
    backend._why_unusable.cache_clear()


def test_the_user_is_told_once_that_a_device_is_untuned():
    backend.say_untuned.cache_clear()
    with pytest.warns(UserWarning, match="not tuned for NVIDIA X9.*`lorafast tune`"):
        backend.say_untuned("NVIDIA X9", 90)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.say_untuned("NVIDIA X9", 90)


@pytest.mark.parametrize("operation", ["shrink", "expand_backward", "shrink_backward"])
def test_a_plan_runs_in_the_interpreter(operation, monkeypatch):
    if not backend.interpreting():
        pytest.skip("runs the interpreter on a CPU")
    plan = TRITON.plan(problem(operation, 40, 48, 32, 4, torch.float32, device=CPU))
    assert plan.seconds is None
    x, dy, s = torch.randn(40, 48), torch.randn(40, 32), torch.randn(40, 4)
    lora_A, lora_B = torch.randn(4, 48), torch.randn(32, 4)
    if operation == "shrink":
        torch.testing.assert_close(plan.run(x, lora_A, 0.0, None), x @ lora_A.t())
    elif operation == "expand_backward":
        ds, dB, dbias = plan.run(dy, s, lora_B, 0.5)
        torch.testing.assert_close(ds, 0.5 * dy @ lora_B)
        torch.testing.assert_close(dB, 0.5 * dy.t() @ s)
        assert dbias is None
    else:
        torch.testing.assert_close(plan.run(s, x, 0.0, None), s.t() @ x)


def test_a_whole_layer_runs_in_the_interpreter():
    if not backend.interpreting():
        pytest.skip("runs the interpreter on a CPU")
    make = functools.partial(problem, M=40, K=48, N=32, r=4, dtype=torch.float32, device=CPU)
    x, weight, bias = torch.randn(40, 48), torch.randn(32, 48), torch.randn(32)
    lora_A, lora_B, dy = torch.randn(4, 48), torch.randn(32, 4), torch.randn(40, 32)
    y, s = TRITON.plan(make("lora_linear", bias=True)).run(
        x, weight, lora_A, lora_B, 0.5, bias, 0.0, None
    )
    torch.testing.assert_close(s, x @ lora_A.t())
    torch.testing.assert_close(y, x @ weight.t() + 0.5 * s @ lora_B.t() + bias)
    dx, dweight, dA, dB, dbias = TRITON.plan(make("lora_linear_backward", wants=FROZEN)).run(
        dy, x, weight, lora_A, lora_B, s, 0.5, 0.0, None
    )
    torch.testing.assert_close(dx, dy @ weight + 0.5 * dy @ lora_B @ lora_A)
    torch.testing.assert_close(dA, 0.5 * (dy @ lora_B).t() @ x)
    torch.testing.assert_close(dB, 0.5 * dy.t() @ s)
    assert (dweight, dbias) == (None, None)


WANTS = [("ds",), ("dB",), ("dbias",), ("ds", "dbias"), ("dB", "dbias"), ("ds", "dB", "dbias")]


@pytest.mark.parametrize("wants", WANTS, ids=" ".join)
def test_what_is_wanted_of_dy_is_made_and_nothing_else(wants):
    if not backend.interpreting():
        pytest.skip("runs the interpreter on a CPU")
    p = problem("expand_backward", 40, 0, 32, 4, torch.float32, device=CPU, wants=wants)
    dy, s, lora_B = torch.randn(40, 32), torch.randn(40, 4), torch.randn(32, 4)
    expected = {"ds": 0.5 * dy @ lora_B, "dB": 0.5 * dy.t() @ s, "dbias": dy.sum(0)}
    # What no result depends on may be missing.
    given = (s if "dB" in wants else None, lora_B if "ds" in wants else None)
    found = TRITON.plan(p).run(dy, *given, 0.5)
    for name, result in zip(("ds", "dB", "dbias"), found, strict=True):
        if name in wants:
            torch.testing.assert_close(result, expected[name])
        else:
            assert result is None
    assert found[1] is None or found[1].is_contiguous()


def test_ds_alone_is_one_launch(on):
    on(H200)
    (line,) = TRITON.plan(problem("expand_backward", wants=("ds",))).launches
    assert line.startswith("shrink: ")
    both = TRITON.plan(problem("expand_backward")).launches
    assert [line.split(":")[0] for line in both] == ["expand_backward (ds, dB)", "sum_partials"]
    alone = model.estimate(problem("expand_backward", wants=("ds",)), H200)
    assert alone.launches == 1
    assert alone.seconds < model.estimate(problem("expand_backward"), H200).seconds


def test_a_trained_bias_costs_the_backward_no_launch(on):
    on(H200)
    plans = [
        TRITON.plan(problem("lora_linear_backward", wants=wants)).launches
        for wants in (FROZEN, (*FROZEN, "dbias"))
    ]
    assert len(plans[0]) == len(plans[1])
    assert any("expand_backward (ds, dB, dbias): grid" in line for line in plans[1])
    assert plans[0][-1].startswith("no helpers: ")


@pytest.mark.parametrize("operation", [*OPERATIONS, *LAYER_OPERATIONS])
def test_no_rows_are_planned_for_too(operation, on):
    on(H200)
    plan = TRITON.plan(problem(operation, M=0))
    assert isinstance(plan, Plan)
    if backend.interpreting() and operation == "shrink":
        p = problem(operation, 0, 48, 32, 4, torch.float32, device=CPU)
        assert TRITON.plan(p).run(torch.ones(0, 48), torch.ones(4, 48), 0.0, None).shape == (0, 4)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("stored", ["rows", "columns"])
def test_a_gemm_runs_whichever_way_the_weight_is_stored(stored, transposed):
    if not backend.interpreting():
        pytest.skip("runs the interpreter on a CPU")
    M, K, N, r = 24, 64, 48, 4
    weight = torch.randn(N, K) if stored == "rows" else torch.randn(K, N).t()
    x, s = torch.randn(M, N if transposed else K), torch.randn(M, r)
    factor = torch.randn(K if transposed else N, r)
    layouts = Layouts(x=Layout.of(x), dy=Layout.of(x), weight=Layout.of(weight))
    p = problem(
        "linear_expand", M, K, N, r, torch.float32, device=CPU, transposed=transposed,
        layouts=layouts,
    )  # fmt: skip
    tiles = LaunchConfig(16, 16, 16, 16, 1, 1, descriptors=True)
    expected = x @ (weight if transposed else weight.t()) + 0.5 * s @ factor.t()
    for planner in (TRITON, Triton(tiles)):
        plan = planner.plan(p)
        torch.testing.assert_close(plan.run(x, weight, s, factor, 0.5, None, 0.0, None), expected)
    assert "TMA" in plan.launches[0]


def test_a_tensor_that_contradicts_its_plan_raises():
    if not backend.interpreting():
        pytest.skip("runs the interpreter on a CPU")
    p = problem("linear_expand", 24, 64, 48, 4, torch.float32, device=CPU)
    plan = Triton(LaunchConfig(16, 16, 16, 16, 1, 1, descriptors=True)).plan(p)
    x = torch.randn(24 * 64 + 1)[1:].view(24, 64)
    with pytest.raises(ValueError, match="begins between 16 bytes, and its plan has TMA"):
        plan.run(
            x, torch.randn(48, 64), torch.randn(24, 4), torch.randn(48, 4), 1.0, None, 0.0, None
        )


def of_nf4(block=64, **others):
    """A layer's forward over NF4."""
    return problem(format="nf4", format_parameters=f"4096x4096,bfloat16,{block}", **others)


@pytest.mark.parametrize("p", [problem(M=16, N=1024), of_nf4(M=1), of_nf4(M=16)], ids=str)
def test_few_rows_are_one_launch_where_the_model_has_it_faster(on, p):
    on(H200)
    plan = TRITON.plan(p)
    (line,) = plan.launches
    assert line.startswith("lora_linear: grid ")
    assert line.endswith("; 8 programs make s")
    assert ("W read as codes" in line) is (p.format != "dense")
    launch = model.decoded(p, H200)
    assert plan.seconds == model._of(launch, p, H200).seconds
    apart = composed.plan_or_refusal(p, TRITON.plan)
    assert plan.seconds < apart.seconds


def test_a_large_dense_weight_is_read_by_the_gemm():
    """Whose rate is measured; that of the launch for few rows isn't, and launches count for less."""
    p = problem(M=1, N=14336)
    assert not isinstance(planning.plan_decode(p, H200), str)
    assert model.decoded(p, H200) is None


def test_a_forced_configuration_is_that_of_operations():
    config = LaunchConfig(16, 32, 64, 16, 4, 2)
    assert model.decoded(of_nf4(M=1), H200) is not None
    assert model.decoded(of_nf4(M=1), H200, config) is None


@pytest.mark.parametrize(
    ("p", "reason"),
    [
        (problem(M=17), "there are 17 rows"),
        (problem(M=0), "there are 0 rows"),
        (problem(M=1, dropout=True), "there is dropout"),
        (problem(M=1, r=257), "the rank is 257"),
        (problem(M=1, r=0), "nothing to compute"),
        (problem(M=1, K=4100), "aligned to 16 bytes"),
        (of_nf4(M=1, block=100), "groups of 32"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_why_few_rows_are_not_one_launch(p, reason):
    assert reason in planning.plan_decode(p, H200)
