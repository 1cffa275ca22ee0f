"""``linear_expand`` as ``expand`` and PyTorch's GEMM: right, chosen where it is faster, described."""

import dataclasses
import functools
import json

import pytest
import torch
from cards import B200, H200, L4, problem
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from helpers import assert_contract, problems, skip_unless_usable
from lorafast.kernels.common.configs import LaunchConfig, why_invalid
from lorafast.kernels.common.plan import LinearExpandLaunch
from lorafast.kernels.tables import tuned

from lorafast import reference
from lorafast.backends import cost, registry
from lorafast.backends.cost import Device
from lorafast.backends.triton import Triton, backend, planning
from lorafast.backends.triton import cost as model
from lorafast.backends.triton.lines import lines
from lorafast.backends.triton.planning import HybridLaunch
from lorafast.core.problem import Layout, Layouts
from lorafast.ops.problems import by_plans
from lorafast.reference import wide

H100 = Device.known_by("NVIDIA H100 80GB HBM3", 90, 132, 1.98e9, 2.619e9, 5120)
HYBRID = LaunchConfig(16, 32, 16, 16, 1, 1, hybrid=True)
DX = {"transposed": True, "dropout": True}


@functools.cache
def hybrid_operations():
    return by_plans(functools.cache(Triton(HYBRID).plan))


def call(p, t, transposed):
    def run_call(run, cast):
        return run.linear_expand(
            p.lay_out(cast(t.x)),
            p.lay_out(cast(t.weight).t() if transposed else cast(t.weight)),
            cast(t.s, wide(p.dtype)),
            cast(t.lora_B, p.adapter_dtype),
            0.7,
            cast(t.bias) if not transposed else None,
            p.dropout_p,
            t.seed,
            transposed=transposed,
        )

    return run_call


@given(p=problems(), transposed=st.booleans())
def test_two_launches_keep_the_contract(poisoned, device, p, transposed):
    """In every layout, with a bias and with a mask; float16's is the fused kernel."""
    skip_unless_usable("triton")
    assert_contract(call(p, p.tensors(device), transposed), hybrid_operations(), p.dtype)


def test_the_mask_is_that_of_every_other_backend():
    """Where an element was dropped, what is left is the GEMM's alone."""
    skip_unless_usable("triton")
    M, K, N, r = 40, 24, 36, 3
    dy, weight, ds = torch.zeros(M, N), torch.zeros(N, K), torch.ones(M, r)
    lora_A, seed = torch.ones(r, K), torch.tensor([-7])
    dx = hybrid_operations().linear_expand(
        dy, weight, ds, lora_A.t(), 1.0, None, 0.3, seed, transposed=True
    )
    assert torch.equal(dx != 0, reference.keep_mask(M, K, 0.3, seed))


def test_dx_with_dropout_is_two_launches_on_sm_90():
    """A mask in the epilogue of the GEMM costs a fifth of it; measured on an H100: 432 µs, and 372."""
    for device in (H100, H200):
        assert isinstance(model.gemm(problem("linear_expand", **DX), device), HybridLaunch)


def test_without_a_mask_the_h100_fuses():
    for transposed in (False, True):
        p = problem("linear_expand", transposed=transposed)
        assert isinstance(model.gemm(p, H100), LinearExpandLaunch)


@pytest.mark.parametrize("device", [H100, L4, B200])
def test_what_takes_less_time_by_the_model_is_chosen(device):
    for change in ({}, DX, {"M": 4096, **DX}, {"dtype": torch.float32}, {"N": 4100}):
        p = problem("linear_expand", **change)
        both = planning.plan_linear_expand(p, device), planning.plan_hybrid(p, device)
        least = min(model._of(launch, p, device).seconds for launch in both)
        chosen = model.gemm(p, device)
        assert model._of(chosen, p, device).seconds == model.estimate(p, device).seconds == least


def test_where_little_is_written_it_is_one_launch():
    """So that a decode step stays with PyTorch's own, whose calls cost the host less."""
    for device in (H100, H200, B200):
        assert isinstance(model.gemm(problem("linear_expand", M=16), device), LinearExpandLaunch)


def test_rows_that_are_not_aligned_are_left_to_pytorchs_gemm():
    p = problem("linear_expand", K=4100)
    assert isinstance(model.gemm(p, H100), HybridLaunch)
    assert "aligned" not in model.estimate(p, H100).remark


def test_float16_is_fused():
    """Its low-rank term would be rounded, and may overflow, before the GEMM."""
    p = problem("linear_expand", dtype=torch.float16, **DX)
    assert "may overflow" in planning.plan_hybrid(p, H100)
    for config in (None, HYBRID):
        launch = model.gemm(p, H100, config)
        assert isinstance(launch, LinearExpandLaunch)
        assert not launch.config.hybrid


def test_a_configuration_says_which():
    for p in (problem("linear_expand"), problem("linear_expand", **DX)):
        fused = planning.rule_of(p, H100)
        chosen = model.gemm(p, H100, fused)
        assert isinstance(chosen, LinearExpandLaunch)
        assert chosen.config == fused
        hybrid = model.gemm(p, H100, HYBRID)
        assert isinstance(hybrid, HybridLaunch)
        assert hybrid.config == HYBRID


@pytest.fixture
def record(monkeypatch, tmp_path):
    """Keeps a record of the H100, in a file of its own."""
    monkeypatch.setenv("LORAFAST_CACHE", str(tmp_path))

    def forget():
        tuned.load.cache_clear()
        tuned.nearest.cache_clear()

    def keep(p, config):
        seconds = {"aten": 4e-4, "triton": 3e-4}
        tuned.save(H100.name, [tuned.Record(cost.key_of(p), "triton", config, seconds)])
        forget()

    forget()
    yield keep
    forget()


def test_what_was_measured_is_planned(record):
    plain, masked = problem("linear_expand"), problem("linear_expand", **DX)
    record(plain, HYBRID)
    record(masked, planning.rule_of(masked, H100))
    hybrid = model.gemm(plain, H100)
    assert isinstance(hybrid, HybridLaunch)
    assert hybrid.config == HYBRID
    assert isinstance(model.gemm(masked, H100), LinearExpandLaunch)
    assert model.gemm(plain._replace(dtype=torch.float16), H100).config.hybrid is False


def test_a_record_from_before_there_was_a_choice_is_of_the_fused_kernel(record, monkeypatch):
    p = problem("linear_expand", **DX)
    record(p, planning.rule_of(p, H100))
    path = tuned.path_for(H100.name)
    content = json.loads(path.read_text())
    assert content["records"][0]["config"].pop("hybrid") is False
    path.write_text(json.dumps(content))
    tuned.load.cache_clear()
    (found,) = tuned.load(H100.name)
    assert found.config == planning.rule_of(p, H100)


@pytest.mark.parametrize(
    ("operation", "dtypes", "said"),
    [
        ("shrink", "bfloat16", "hybrid is a way to do linear_expand, and this is shrink"),
        ("lora_linear", "bfloat16", "and this is lora_linear"),
        ("linear_expand", "float16+float32", "would round the low-rank term to float16"),
    ],
)
def test_a_record_that_can_not_be_hybrid_is_not_used(operation, dtypes, said):
    key = tuned.Key(operation, dtypes, 8192, 4096, 4096, 16)
    good = tuned.Record(key, "triton", HYBRID, {"triton": 1e-4})
    assert said in tuned.why_unusable(good, 90)
    plain = dataclasses.replace(good, config=dataclasses.replace(HYBRID, hybrid=False))
    assert tuned.why_unusable(plain, 90) is None


def test_tiles_are_checked_as_those_of_expand():
    much = dataclasses.replace(HYBRID, block_m=128, block_n=256, block_k=256, num_stages=8)
    assert "bytes of shared memory" in why_invalid(
        "linear_expand", dataclasses.replace(much, hybrid=False), 2, 90
    )
    assert "registers a thread" in why_invalid("linear_expand", much, 2, 90)
    assert why_invalid("linear_expand", dataclasses.replace(much, num_warps=8), 2, 90) is None


def test_explained_in_words(monkeypatch):
    monkeypatch.setattr(cost, "device_of", lambda device: H100)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "say_untuned", lambda device, sm: None)
    p = problem("linear_expand", **DX)
    launched = lines(model.gemm(p, H100))
    assert [line.split(":")[0] for line in launched] == ["expand", "addmm_"]
    plan = Triton().plan(p)
    assert plan.launches == launched
    assert plan.launches[1] == "addmm_: PyTorch's GEMM, accumulated onto that"


def test_expand_shares_its_rows_out():
    """As many programs as run at once, each with the same number of row blocks."""
    launch = planning.plan_expand(problem("expand"), H100)
    columns, groups = launch.grid
    slots = H100.sms * launch.config.ctas_per_sm
    assert 0.9 * slots <= columns * groups <= slots
    row_blocks = -(-launch.M // launch.config.block_m)
    assert (groups - 1) * launch.m_blocks < row_blocks <= groups * launch.m_blocks
    for M in (0, 1, 17):
        few = planning.plan_expand(problem("expand", M=M), H100)
        assert few.grid[1] * few.m_blocks == -(-M // few.config.block_m)


def test_y_that_is_written_by_element_is_slower():
    even, odd = (model.estimate(problem("expand", N=N), H100) for N in (4096, 4097))
    assert odd.seconds > 2 * even.seconds
    assert "the rows of y" in odd.remark


def test_a_gemm_on_unaligned_rows_is_no_faster_for_being_pytorchs():
    aligned, unaligned = (
        model._of(planning.plan_hybrid(p, H100), p, H100).seconds
        for p in (
            problem("linear_expand"),
            problem("linear_expand", layouts=Layouts(x=Layout(rows=2))),
        )
    )
    assert unaligned > 1.5 * aligned


def test_operations_one_by_one_are_priced_as_a_whole(monkeypatch):
    """What the host takes for one hides behind what the device takes for another: on an H100 256 rows
    take 82 µs so, 95 with a backward by PyTorch's calls."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    p = problem("lora_linear_backward", M=256, adapter_dtype=torch.float32)
    with cost.pretending(H100):
        assert registry.choose(p).backend == "triton"
