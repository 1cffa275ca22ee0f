"""The counts agree with counts by hand, and the closed forms with what the kernels do."""

from dataclasses import replace

import interpreter
import pytest
import torch

pytest.importorskip("triton")

from lorafast.bench.common.contenders import BUILDERS, FROZEN, SIBLINGS
from lorafast.bench.common.problem import Problem
from lorafast.bench.common.record import Record
from lorafast.bench.common.shapes import Shape
from lorafast.bench.traffic import (
    bottlenecks,
    convolutions,
    interpret,
    launches,
    measure,
    relatives,
    run,
)
from lorafast.bench.traffic.count import Traffic, counting
from lorafast.bench.traffic.job import on_meta

from lorafast.backends.triton import cost as model
from lorafast.backends.triton import planning
from lorafast.operands import FP8, NF4

M, K, N, r = 8192, 4096, 4096, 16
PROBLEM = Problem(Shape("", M, K, N), r, "bf16", "bf16", 0.0)
# Bytes of each tensor of the layer in bf16.
X = DX = 2 * M * K
Y = DY = 2 * M * N
W = 2 * K * N
A, B = 2 * r * K, 2 * r * N
S = DS = 2 * M * r


def traffic_of(name, problem=PROBLEM):
    rows = {row.contender: row for row in measure(problem, [name])}
    return rows[name].forward, rows[name].backward


def test_frozen_layer():
    forward, backward = traffic_of(FROZEN)
    assert forward == Traffic(1, X + W, Y)
    assert backward == Traffic(1, DY + W, DX)
    assert round((forward.bytes + backward.bytes) / 1e6) == 336


def test_convolutions():
    """3 x 3 in float32: s, y and its term; ds and dB; dA; dx of both, one onto the other."""
    C, N, rank, size = 64, 128, 8, 4 * 32 * 28 * 28  # of a channel of y
    shape = convolutions.Shape(C, N, 56, stride=2)
    frozen, ours, pefts = convolutions.measure(shape, rank, "fp32", "fp32")
    W, X, Y, S, A, B = 36 * C * N, 4 * size * C, size * N, size * rank, 36 * C * rank, 4 * N * rank
    assert frozen.forward == Traffic(1, X + W, Y)
    assert frozen.backward == Traffic(1, Y + W, X)
    assert ours.forward == Traffic(3, 2 * X + W + A + Y + S + B, 2 * Y + S)
    # Beside these come the parts of dB, one for each of so many rows of dy, and their sum.
    least = (Y + S + B) + (S + B) + (S + X) + A + (S + A) + X + (Y + W) + X + 2 * X + X
    assert least < ours.backward.bytes < least + 2 * (size // 4 // 32) * B
    assert ours.backward.launches == 7
    assert frozen.bytes < ours.bytes < 0.8 * pefts.bytes


def test_convolutions_in_bf16():
    for shape in convolutions.SHAPES:
        frozen, ours, pefts = convolutions.measure(shape, 8, "bf16", "fp32")
        assert frozen.bytes < ours.bytes < 0.5 * pefts.bytes


def test_bottlenecks():
    """In bf16, behind a feed-forward: a down, f, up and residual in one launch that reads h once; a
    backward in two, of which both read dy and one h and writes dh."""
    size, b = bottlenecks.Size(512, 768, 3072), 64
    frozen, ours, plain = bottlenecks.measure(size, b, "bf16")
    H, D, a = 2 * 512 * 768, 2 * 768 * b, 2 * 512 * b
    biases = 2 * (768 + b)
    forward = ours.forward
    assert forward.launches - frozen.forward.launches == 1
    assert forward.read - frozen.forward.read == H + 2 * D + biases
    assert forward.written - frozen.forward.written == H + a
    backward = ours.backward
    assert backward.launches - frozen.backward.launches == 2
    # Shares of dz, since rows are few; dd of each row block; the other sums of two row groups.
    of_rows = 4 * (3 * 512 * b + 512 // 16 * b)
    of_columns = 4 * 2 * (2 * 768 * b + 768)
    sums = of_rows + of_columns
    assert backward.read - frozen.backward.read == (H + a + D) + (2 * H + 2 * a + D) + sums
    assert backward.written - frozen.backward.written == H + 2 * a + 2 * D + biases + sums
    assert frozen.bytes < ours.bytes < plain.bytes


def test_relatives():
    """None moves more than PEFT's but LoKr and BOFT over a small W: PEFT makes matrices as large as W.
    AdaLoRA is LoRA's pass, with a vector in B: nothing of the size of x more."""
    pytest.importorskip("peft")
    from lorafast.integrations.peft import family, known

    there = [k for k in relatives.KINDS if k not in family.METHODS or known.why_changed(k) is None]
    rows = relatives.measure(Shape("", 8192, 1024, 1024), 8, "bf16", there)
    of = {(row.kind, row.contender): row for row in rows}
    frozen, lora = of["", "frozen"], of["LoRA", "accelerated"]
    assert frozen.forward == Traffic(1, 2 * 1024 * (8192 + 1024), 2 * 8192 * 1024)
    assert len(rows) == 1 + 2 * len(there)
    for kind in set(there) - {"LoKr", "BOFT"}:
        assert frozen.bytes < of[kind, "accelerated"].bytes < of[kind, "peft"].bytes
    if "AdaLoRA" in there:
        assert of["AdaLoRA", "accelerated"].bytes - lora.bytes < 2 * 8192 * 1024
    assert "BOFT, b=4, accelerated" in relatives.format_rows(rows) or "BOFT" not in there


@pytest.mark.parametrize("kind", ["LoKr", "BOFT"])
def test_relatives_over_a_large_weight_move_less_than_pefts(kind):
    pytest.importorskip("peft")
    from lorafast.integrations.peft import known

    if known.why_changed(kind) is not None:
        pytest.skip(known.why_changed(kind))
    of = relatives.measure(Shape("", 8192, 4096, 4096), 16, "bf16", [kind])
    frozen, stock, ours = (row.bytes for row in of)
    assert frozen < ours < stock


def test_siblings(tmp_path):
    problem = Problem(Shape("llama-8b k,v", M, K, 1024), r, "bf16", "fp32", 0.0)
    record = Record(torch.device("cpu"), path=tmp_path / "record.json")
    run([problem], [SIBLINGS], record=record)
    rows = record.rows("siblings")
    qkv = {row["contender"]: row for row in rows if row["group"] == "llama-8b q,k,v"}
    assert list(qkv) == [FROZEN, "lorafast", SIBLINGS]
    Ws, Ys = W + W // 2, Y + Y // 2  # k's and v's are a quarter of q's
    assert qkv[FROZEN]["forward"] == {"launches": 3, "read": 3 * X + Ws, "written": Ys}
    # two sums of three gradients of x
    read, written = Ys + Ws + 4 * DX, 5 * DX
    assert qkv[FROZEN]["backward"] == {"launches": 5, "read": read, "written": written}
    total = {
        name: sum(row[way][to] for way in ("forward", "backward") for to in ("read", "written"))
        for name, row in qkv.items()
    }
    # two passes over x each way; of the sums, what is read beside a GEMM's result
    assert total["lorafast"] - total[SIBLINGS] > 4 * X
    # in the backward one pass over x and dy more than the frozen layers have, and no sums
    backward = qkv[SIBLINGS]["backward"]
    assert backward["read"] + backward["written"] < read + written + 2 * X


def test_peft():
    forward, backward = traffic_of("peft")
    # base, A, B, times scaling, sum
    assert forward.launches == 5
    assert forward.read == (X + W) + (X + A) + (S + B) + Y + 2 * Y
    assert forward.written == Y + S + Y + Y + Y
    # d(times scaling), dB, ds, dA, dx of the low-rank term, dx of the base, their sum
    assert backward.launches == 7
    assert backward.read == DY + (DY + S) + (DY + B) + (DS + X) + (DS + A) + (DY + W) + 2 * DX
    assert backward.written == DY + B + DS + A + DX + DX + DX


def test_peft_with_dropout():
    problem = replace(PROBLEM, dropout_p=0.05)
    plain, dropped = traffic_of("peft"), traffic_of("peft", problem)
    mask = M * K  # one byte an element
    # One fused launch each way: x → a dropped copy and a mask; gradient and mask → gradient.
    assert dropped[0] == Traffic(
        plain[0].launches + 1, plain[0].read + X, plain[0].written + X + mask
    )
    assert dropped[1] == Traffic(
        plain[1].launches + 1, plain[1].read + X + mask, plain[1].written + X
    )


def test_float32_adapters_over_a_half_precision_layer_cost_peft_a_copy_of_x():
    problem = replace(PROBLEM, adapter_dtype="fp32")
    forward, _ = traffic_of("peft", problem)
    # base; x to float32; A, B, times scaling in float32; sum, promoted to float32; back to bf16
    assert forward.launches == 7
    read = (X + W) + X + (2 * X + 2 * A) + (2 * S + 2 * B) + 2 * Y + (Y + 2 * Y) + 2 * Y
    written = Y + 2 * X + 2 * S + 2 * Y + 2 * Y + 2 * Y + Y
    assert (forward.read, forward.written) == (read, written)


def test_aten():
    forward, backward = traffic_of("aten")
    # shrink; s·Bᵀ written, not read; the product accumulated onto it
    assert forward == Traffic(3, (X + A) + (S + B) + (Y + X + W), S + Y + Y)
    # ds, dB, dA, ds·A, the product accumulated onto it
    assert backward == Traffic(
        5, (DY + B) + (DY + S) + (DS + X) + (DS + A) + (DX + DY + W), DS + B + A + DX + DX
    )


ROW_GROUPS, COL_GROUPS = M // 1024, N // 256  # of the pass over dy
PARTIALS = 4 * r * (COL_GROUPS * M + ROW_GROUPS * N)  # of ds and of dB
PARTS_OF_DA = 2 * 132 // (K // 128) * 4 * r * K  # chunks of rows, a partial dA each


def test_triton():
    """Forward x is read by helpers and by tiles, once for the launch."""
    forward, backward = traffic_of("triton")
    assert forward == Traffic(1, X + W + A + S + B, Y + S)
    # ds and dB, the sum of ds, dA, dx
    assert backward == Traffic(
        4,
        (DY + S + B + PARTIALS) + (DS + X + PARTS_OF_DA) + (DS + A) + (DY + W),
        (DS + B + PARTIALS) + (A + PARTS_OF_DA) + DX,
    )


def test_triton_with_dropout():
    """Every launch that takes x makes its mask; the seed is drawn in one. dx is ``expand``, which makes
    the mask, and PyTorch's GEMM onto that."""
    (forward, backward) = traffic_of("triton", replace(PROBLEM, dropout_p=0.05))
    seed = 8
    halves = 2 * 4 * M * r  # two partial sums of s
    read = (X + A + seed + halves) + (X + W + S + B)
    assert forward == Traffic(3, read, seed + halves + S + Y)
    assert backward == Traffic(
        5,
        (DY + S + B + PARTIALS) + (DS + X + seed + PARTS_OF_DA) + (DS + A + seed) + (DX + DY + W),
        (DS + B + PARTIALS) + (A + PARTS_OF_DA) + DX + DX,
    )


@pytest.mark.parametrize(("dropout_p", "most", "launches"), [(0.0, 1.5, 5), (0.05, 2.3, 8)])
@pytest.mark.parametrize("adapter_dtype", ["bf16", "fp32"])
def test_how_much_more_triton_moves_than_the_frozen_layer(dropout_p, most, launches, adapter_dtype):
    """With dropout dx is written by ``expand``, read and written by a GEMM, behind which that hides."""
    problem = replace(PROBLEM, dropout_p=dropout_p, adapter_dtype=adapter_dtype)
    frozen, ours = traffic_of(FROZEN, problem), traffic_of("triton", problem)
    moved = [sum(traffic.bytes for traffic in of) for of in (ours, frozen)]
    assert moved[0] <= most * moved[1]
    assert sum(traffic.launches for traffic in ours) <= launches


DORA = replace(PROBLEM, use_dora=True)
ROW = 4 * N
"""Bytes of the norm, and of the scale; the magnitude, in bf16, has half of that."""


def test_triton_of_dora():
    """Forward: the norm in one launch, the scale, the layer, y scaled. Backward, beside the layer's: dy
    scaled, dy ⊙ y in float32 and its sum, and rows."""
    plain, dora = traffic_of("triton"), traffic_of("triton", DORA)
    read = (W + A + B) + (ROW // 2 + ROW) + (Y + ROW)
    written = ROW + ROW + Y
    assert dora[0] == Traffic(
        plain[0].launches + 3, plain[0].read + read, plain[0].written + written
    )
    more = dora[1].bytes - plain[1].bytes
    assert 0 < more - (2 * DY + (DY + Y + 2 * DY) + 2 * DY) <= 10 * ROW


def test_what_dora_moves_beside_pefts():
    """PEFT makes B·A and its sum with W, and with float32 adapters copies of x and y."""
    problem = replace(DORA, adapter_dtype="fp32")
    frozen, ours, peft = (traffic_of(name, problem) for name in (FROZEN, "triton", "peft"))
    moved = [sum(traffic.bytes for traffic in of) for of in (frozen, ours, peft)]
    assert moved[1] < 4 * moved[0]
    assert moved[2] > 5 * moved[1]


@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
def test_rows_of_dora_are_printed(base):
    few = replace(DORA, shape=replace(DORA.shape, M=16), base=base)
    rows = {row.contender: row for row in measure(few, ["triton", "aten"])}
    assert all(row.unavailable is None and row.bytes for row in rows.values())
    assert "r=16  DoRA  bf16" in str(few)


OVER_NF4 = replace(PROBLEM, base="nf4")
BLOCKS = N * K // 64
CODES = N * K // 2
NESTED = 4 * (BLOCKS // 256 + 256 + 1)
"""Bytes of the scales of scales, of their numbers, and of the offset."""


def test_peft_over_bitsandbytes():
    """Each way: scales from their codes, plus the offset, W, the GEMM over it; y is cloned."""
    forward, backward = traffic_of("peft", OVER_NF4)
    plain_forward, plain_backward = traffic_of("peft")
    scales = 4 * BLOCKS
    read = (BLOCKS + NESTED - 4) + (scales + 4) + (CODES + scales)
    written = scales + scales + W
    assert forward.launches == plain_forward.launches + 3 + 1
    assert forward.read == plain_forward.read + read + Y
    assert forward.written == plain_forward.written + written + Y
    assert backward.launches == plain_backward.launches + 3
    assert backward.read == plain_backward.read + read
    assert backward.written == plain_backward.written + written


def test_peft_over_int8_rounds_x_too():
    forward, backward = traffic_of("peft", replace(PROBLEM, base="int8"))
    plain_forward, plain_backward = traffic_of("peft")
    # x in float16, its codes and scales, their product in int32, y of it: in the place of one GEMM
    read = X + X + (M * K + N * K) + (4 * M * N + 4 * M + 4 * N)
    written = X + (M * K + 4 * M) + 4 * M * N + Y
    assert forward.launches == plain_forward.launches + 3
    assert forward.read == plain_forward.read - (X + W) + read
    assert forward.written == plain_forward.written - Y + written
    # W: codes copied, scales, both multiplied in place
    assert backward.launches == plain_backward.launches + 3
    assert backward.read == plain_backward.read + N * K + 4 * N + (W + 4 * N)
    assert backward.written == plain_backward.written + W + 4 * N + W


def test_peft_over_few_rows_is_not_counted():
    few = replace(OVER_NF4, shape=replace(OVER_NF4.shape, M=1536))
    (row,) = [row for row in measure(few, ["peft"]) if row.contender == "peft"]
    assert row.unavailable.startswith("with fewer than 1537 rows bitsandbytes may launch a kernel")


@pytest.mark.parametrize("base", ["nf4", "fp4", "int8", "fp8", "mxfp4"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
def test_triton_makes_w_dense_in_one_launch(base, dropout_p):
    from lorafast.bench.common.bases import stored_bytes

    dense = replace(PROBLEM, dropout_p=dropout_p)
    stored = stored_bytes(N, K, torch.bfloat16, base)
    for plain, over in zip(
        traffic_of("triton", dense), traffic_of("triton", replace(dense, base=base)), strict=True
    ):
        expected = Traffic(plain.launches, plain.read, plain.written)
        numbers = 4 * 16 if base.endswith("4") else 0  # that codes of 4 bits stand for
        expected.add(1, stored + numbers, W)
        assert over == expected


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_with_few_rows_products_read_codes(base):
    """Codes in the place of W. K is cut, into as many shares in y of both, which are one launch; in dx
    over codes alone, into 8, whose partial sums are written and read."""
    dense = replace(PROBLEM, shape=replace(PROBLEM.shape, M=16))
    stored = CODES + BLOCKS + NESTED + 4 * 16 if base == "nf4" else N * K + 4 * N
    for shares, plain, over in zip(
        (0, 8),
        traffic_of("triton", dense),
        traffic_of("triton", replace(dense, base=base)),
        strict=True,
    ):
        partials = shares * 4 * 16 * N
        assert over.launches == plain.launches
        assert over.read == plain.read - W + stored + partials
        assert over.written == plain.written + partials


@pytest.mark.parametrize("adapter_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("contender", ["triton", "lorafast"])
def test_how_much_more_a_layer_over_nf4_moves_than_the_frozen_one(contender, adapter_dtype):
    problem = replace(OVER_NF4, adapter_dtype=adapter_dtype)
    frozen, ours, peft = (traffic_of(name, problem) for name in (FROZEN, contender, "peft"))
    moved = [sum(traffic.bytes for traffic in of) for of in (frozen, ours, peft)]
    assert moved[1] <= 1.75 * moved[0]
    assert sum(traffic.launches for traffic in ours) <= 8
    assert moved[2] > 4.8 * moved[0]
    assert sum(traffic.launches for traffic in peft) >= 19


def test_nothing_of_the_size_of_w_is_saved_over_codes():
    tensors = on_meta(OVER_NF4)
    saved = {}

    def keep(tensor):
        saved[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return tensor

    with launches.standing_in(132, lambda noted: None):
        contender = BUILDERS["triton"](OVER_NF4, tensors)
        x = tensors.x[0].detach().requires_grad_()
        with contender.context(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            contender.layer(x)
    own = {id(t.untyped_storage()) for t in (*tensors.frozen(), *contender.layer.parameters())}
    assert sum(size for key, size in saved.items() if key not in own) == X + S


def test_operations_made_of_others_are_counted_below_autograd():
    x = torch.empty(8, 16, device="meta", dtype=torch.bfloat16)
    with counting() as traffic, torch.inference_mode():
        x.to(torch.float32)
    assert traffic == Traffic(1, x.nbytes, 2 * x.nbytes)


def test_what_is_saved_for_the_backward():
    """x and s, for any dropout: no mask, no dropped copy of x."""
    for dropout_p in (0.0, 0.05):
        problem = replace(PROBLEM, dropout_p=dropout_p)
        tensors = on_meta(problem)
        saved = {}

        def keep(tensor, saved=saved):
            saved[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
            return tensor

        with launches.standing_in(132, lambda noted: None):
            contender = BUILDERS["triton"](problem, tensors)
            x = tensors.x[0].detach().requires_grad_()
            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
            with contender.context(), hooks:
                contender.layer(x)
        own = {id(t.untyped_storage()) for t in (tensors.weight, *contender.layer.parameters())}
        seed = 8 if dropout_p else 0
        assert sum(size for key, size in saved.items() if key not in own) == X + S + seed


def test_the_minimum():
    assert PROBLEM.least_bytes("fwd", False) == X + W + Y
    assert PROBLEM.least_bytes("bwd", False) == DY + W + DX
    assert PROBLEM.least_bytes("fwd", True) == X + W + A + B + S + Y
    assert PROBLEM.least_bytes("bwd", True) == DY + W + X + S + 2 * (A + B) + DX
    both = PROBLEM.least_bytes("fwd", True) + PROBLEM.least_bytes("bwd", True)
    assert PROBLEM.least_bytes("both", True) == both


def test_no_contender_is_below_the_minimum():
    rows = [row for row in measure(PROBLEM, list(BUILDERS)) if row.unavailable is None]
    assert {"frozen", "peft", "aten", "triton", "reference"} <= {row.contender for row in rows}
    for row in rows:
        assert row.bytes >= row.least - 2 * S  # s may stay in a register


def test_in_place_counts_once_each_way_and_views_count_nothing():
    x = torch.empty(10, 10, device="meta")
    with counting() as traffic:
        x.add_(1.0)
        x.view(2, 50).t()
        torch.empty_like(x)
        torch.add(x, x, out=torch.empty_like(x))
        x.copy_(torch.empty_like(x))
        x.zero_()
    assert traffic == Traffic(4, 400 + 800 + 400, 4 * 400)


def test_an_accumulator_with_beta_0_is_not_read():
    x = torch.empty(10, 10, device="meta")
    with counting() as traffic:
        x.addmm_(x.clone(), x.clone(), beta=0)
    assert traffic.read == 2 * 400 + 2 * 400  # two clones, two factors


PROBLEMS = [
    interpret.Reduced(M, K, N, r, dtype, adapter_dtype, bias, dropout, sms, sms == 20)
    for M, K, N, r, dtype, adapter_dtype, bias, dropout, sms in (
        (199, 297, 293, 16, "bf16", "fp32", False, False, 1),
        (199, 297, 293, 16, "bf16", "bf16", True, True, 132),
        (1, 1, 1, 1, "fp32", "fp32", True, True, 132),
        (130, 64, 70, 40, "fp32", "fp32", False, True, 4),
        (70, 1000, 30, 3, "fp16", "fp32", False, False, 132),
        (300, 40, 600, 300, "bf16", "fp32", False, True, 132),
        (2190, 72, 520, 16, "bf16", "fp32", True, False, 20),  # helpers
        (5, 2064, 40, 20, "bf16", "fp32", True, False, 4),  # one launch, with helpers
        (5, 96, 40, 20, "fp16", "fp32", False, False, 132),  # and without
    )
]


@pytest.mark.parametrize(
    "problem",
    [pytest.param(p, marks=[pytest.mark.slow] * (p.r > 100 or p.sms == 1)) for p in PROBLEMS],
    ids=str,
)
def test_closed_forms_say_what_the_interpreter_counts(problem):
    names = [
        "shrink", "expand", "linear_expand", "expand_backward", "ds", "shrink_backward", "dx",
        "weight_norm", "lora_linear", "lora_linear_backward",
    ]  # fmt: skip
    if problem.bias:
        names += ["dB and dbias", "ds, dB and dbias"]
    if problem.forward_only:
        names = ["lora_linear"]
    assert interpret.compare(problem) == dict.fromkeys(names)


@pytest.mark.parametrize(
    ("problem", "residual"),
    [
        (interpret.Reduced(70, 40, 40, 5, "bf16", "fp32", True, False, 132), False),
        (interpret.Reduced(300, 40, 40, 5, "bf16", "fp32", True, False, 132), False),
        (interpret.Reduced(20, 30, 530, 5, "bf16", "fp32", True, False, 132), True),
        pytest.param(
            interpret.Reduced(150, 70, 300, 66, "bf16", "bf16", False, False, 1), True,
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)  # fmt: skip
def test_closed_forms_of_a_bottleneck_adapter(problem, residual):
    found = interpret.compare_bottleneck(problem, residual)
    assert found == dict.fromkeys(("bottleneck", "bottleneck_backward", "dU"))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "PyTorch's GEMM"])
@pytest.mark.parametrize("scales_input", [False, True], ids=["y", "x"])
@pytest.mark.parametrize(
    "problem",
    [
        interpret.Reduced(70, 40, 88, 0, "bf16", "fp32", True, False, 132),
        pytest.param(
            interpret.Reduced(150, 70, 300, 0, "bf16", "bf16", False, False, 1),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)  # fmt: skip
def test_closed_forms_of_a_layer_with_a_vector(monkeypatch, problem, scales_input, fused):
    """Whichever of the two the model would choose."""
    plan = planning.plan_scaled_linear if fused else planning.plan_scaled_pass
    for name in ("scaled_linear", "scaled_linear_backward"):
        monkeypatch.setitem(model.PLANNED, name, lambda p, device, _: plan(p, device))
    found = interpret.compare_scaled_linear(problem, scales_input)
    asked = ["y", "dx, dscale", "dx", "dscale"] + ["y, z"] * (not scales_input)
    assert found == dict.fromkeys(asked)


def test_a_layer_with_a_vector_moves_what_was_counted_on_paper():
    """In matrices of x's size, of which W is a half: the frozen layer's 5, and 8 in training."""
    pytest.importorskip("peft")
    from lorafast.integrations.peft import family, known  # of which one tells the other its kinds

    if "(IA)³" in family.METHODS and known.why_changed("(IA)³") is not None:
        pytest.skip(known.why_changed("(IA)³"))
    of = relatives.measure(Shape("", 8192, 4096, 4096), 16, "bf16", ["(IA)³"])
    frozen, stock, ours = of
    matrix = 2 * 8192 * 4096
    assert frozen.bytes == 5 * matrix
    assert round(ours.forward.bytes / matrix, 1) == 3.5  # x, W, and y and z written at once
    assert ours.backward.bytes / matrix < 5.6  # dy, z and dz; dz, W and dx
    assert ours.bytes < stock.bytes / 3


@pytest.mark.parametrize(("problem", "shares"), [(PROBLEMS[-2], 8), (PROBLEMS[-1], 0)], ids=str)
def test_few_rows_are_one_launch(problem, shares):
    call, _ = interpret.calls_of(problem)["lora_linear"]
    launch = model.in_one_launch(call, launches.h200(problem.sms))
    assert (launch.shares, launch.splits) == (shares, 2 if shares else 1)


def test_a_wrong_closed_form_is_found(monkeypatch):
    right = launches.traffic_of

    def wrong(launch, call):
        (first, *rest) = right(launch, call)
        more = 2 if call.operation == "shrink" else 0
        return [replace(first, read=first.read + more), *rest]

    monkeypatch.setattr(launches, "traffic_of", wrong)
    differences = interpret.compare(PROBLEMS[0])
    assert [name for name, value in differences.items() if value] == ["shrink", "lora_linear"]


def test_a_wrong_closed_form_is_printed_as_wrong(monkeypatch, capsys):
    wrong = interpret.Verdict(wrong="shrink: counted 1, not 2")
    monkeypatch.setattr(interpret, "check", lambda problems: wrong)
    record = Record(torch.device("cpu"))
    run([PROBLEM], ["triton"], record=record)
    (line,) = [s for s in capsys.readouterr().out.splitlines() if s.startswith("  triton")]
    assert line.split() == ["triton", "WRONG:", "shrink:", "counted", "1,", "not", "2"]
    assert record.any_wrong()


@pytest.mark.parametrize("r", [16, 64])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_reduced_sizes_reach_every_path(r, dtype):
    """At the first no sum is split into partial ones, at the second every one is, then helpers help
    where they have the rank in one block."""
    small, split, helped = interpret.reduce(replace(PROBLEM, r=r, dtype=dtype))

    def planned(reduced, name):
        call, _ = interpret.calls_of(reduced)[name]
        device = launches.h200(reduced.sms)
        if name in model.PLANNED:
            return model.PLANNED[name](call, device, None)
        return model.in_one_launch(call, device)

    for reduced, expected in ((small, False), (split, True)):
        assert planned(reduced, "shrink").split is expected
        assert planned(reduced, "shrink_backward").split is expected
    if dtype == "bf16":
        assert isinstance(planned(helped, "lora_linear"), str) is (r > 16)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("base", ["nf4", "fp4", "int8", "fp8", "mxfp4"])
def test_the_closed_form_of_dequantization_says_what_the_interpreter_counts(base, dtype):
    problem = Problem(Shape("", 8, 64, 16), 4, dtype, "fp32", 0.0, base)
    reduced = interpret.reduce(problem)[0]
    assert (reduced.N, reduced.K, reduced.base) == (293, 288 if base == "mxfp4" else 297, base)
    assert interpret.compare(reduced) == {"dequantize": None}


def fp8(rows, columns, scale, block=None):
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    return FP8({"weight": codes, "scale": torch.ones(scale)}, torch.bfloat16, block)


@pytest.mark.parametrize(
    "weight",
    [
        NF4.of(torch.ones(256, 264), nested=False),
        NF4.of(torch.ones(256, 264), 100),
        NF4.of(torch.ones(255, 263), 100, nested=False),
        fp8(100, 80, []), fp8(101, 83, [101]), fp8(101, 80, [101, 1]),
        fp8(300, 264, [3, 3], (128, 128)), fp8(100, 83, [34, 17], (3, 5)),
    ],
    ids=lambda weight: f"{weight.format}-{weight.parameters}-{list(weight.shape)}",
)  # fmt: skip
def test_the_closed_form_holds_for_other_blocks_and_scales(weight):
    assert interpret.compare_dequantize(weight) is None


# Rows, rank, dtype, SMs: tiles of few rows and of many, ranks in several blocks, K cut and not.
@pytest.mark.parametrize(
    ("base", "rows", "rank", "dtype", "sms"),
    [
        ("nf4", 3, 16, "bf16", 132),
        ("fp4", 199, 40, "bf16", 132),
        ("int8", 16, 40, "fp32", 1),
        ("fp8", 40, 3, "fp16", 132),
        ("fp8", 16, 3, "bf16", 132),
    ],
)  # fmt: skip
def test_the_closed_form_of_products_over_codes_says_what_the_interpreter_counts(
    base, rows, rank, dtype, sms
):
    reduced = interpret.Reduced(rows, 288, 293, rank, dtype, "fp32", True, False, sms, base=base)
    few = {"lora_linear over codes": None} if rows <= 16 else {}
    assert interpret.compare(reduced) == {
        "dequantize": None, "linear_expand over codes": None, "dx over codes": None, **few,
    }  # fmt: skip


def test_products_over_codes_are_compared_where_a_problem_has_them():
    few = Problem(Shape("", 16, 64, 64), 4, "bf16", "fp32", 0.0, "nf4")
    reduced = [made for made in interpret.reduce(few) if made.base == "nf4"]
    assert [(made.M, made.K) for made in reduced] == [(16, 297), (16, 288)]
    many = replace(few, shape=replace(few.shape, M=257))
    assert [made.K for made in interpret.reduce(many) if made.base == "nf4"] == [297]


def test_a_wrong_closed_form_of_a_product_over_codes_is_found(monkeypatch):
    monkeypatch.setattr(launches, "looked_up", lambda launch, weight: 0)
    reduced = interpret.Reduced(16, 288, 64, 4, "bf16", "fp32", False, False, 132, base="nf4")
    differences = interpret.compare(reduced)
    assert "by formula" in differences["dx over codes"]
    assert differences["dequantize"] is None


def test_a_wrong_closed_form_of_dequantization_is_found(monkeypatch):
    monkeypatch.setattr(launches, "GROUPS", 256)
    problem = replace(PROBLEM, base="nf4")
    assert "by formula" in interpret.compare(interpret.reduce(problem)[0])["dequantize"]


@pytest.mark.slow
def test_the_check_runs_in_a_process_of_its_own(monkeypatch):
    for name, value in interpreter.of_a_process().items():
        monkeypatch.setenv(name, value)
    assert interpret.check([PROBLEM]) == interpret.Verdict()


def test_where_triton_cannot_interpret_the_counts_say_that_they_are_unchecked(monkeypatch, capsys):
    unchecked = interpret.Verdict(unchecked="Triton is too old")
    monkeypatch.setattr(interpret, "check", lambda problems: unchecked)
    record = Record(torch.device("cpu"))
    run([PROBLEM], ["triton"], record=record)
    out = capsys.readouterr().out
    assert "not checked here: Triton is too old" in out
    assert any(line.startswith("  triton") and "497" in line for line in out.splitlines())
    assert not record.any_wrong()


def test_the_process_says_why_it_cannot_check(monkeypatch, capsys):
    monkeypatch.setattr(interpret.Triton, "why_unusable", lambda self: "Triton is too old")
    assert interpret.main() == interpret._UNCHECKED
    assert capsys.readouterr().out == "Triton is too old\n"
