"""Counts of a kernel written by hand, to the last instruction; of ours, with the full launch's code."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest

pytest.importorskip("triton")

from lorafast.kernels.common.launch import INTERPRETED

from ptx import In, Machine, Out, Program, counts
from ptx.launch import Count

# A warp adds rows of x by way of shared memory, every second word of it, and multiplies once a step.
KERNEL = """.version 9.0
.target sm_80
.address_size 64
.visible .entry sums(.param .u64 x, .param .u64 y, .param .u32 steps) .reqntid 32 {
.reg .b64 %x, %y, %at; .reg .b32 %i, %n, %word, %a<4>, %b<2>; .reg .f32 %v, %sum, %c<4>;
.reg .pred %more;
.shared .align 256 .b8 row[256];
ld.param.u64 %x, [x]; ld.param.u64 %y, [y]; ld.param.u32 %n, [steps];
mov.u32 %i, %tid.x;
mul.wide.u32 %at, %i, 4;
add.u64 %x, %x, %at;
add.u64 %y, %y, %at;
mov.u32 %word, row;
mad.lo.u32 %word, %i, 8, %word;
mov.b32 %a0, 0; mov.b32 %a1, 0; mov.b32 %a2, 0; mov.b32 %a3, 0; mov.b32 %b0, 0; mov.b32 %b1, 0;
mov.f32 %c0, 0f00000000; mov.f32 %c1, 0f00000000; mov.f32 %c2, 0f00000000; mov.f32 %c3, 0f00000000;
mov.f32 %sum, 0f00000000;
again:
ld.global.f32 %v, [%x];
st.shared.f32 [%word], %v;
ld.shared.f32 %v, [%word];
bar.sync 0;
add.f32 %sum, %sum, %v;
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
    {%c0, %c1, %c2, %c3}, {%a0, %a1, %a2, %a3}, {%b0, %b1}, {%c0, %c1, %c2, %c3};
add.u64 %x, %x, 128;
sub.u32 %n, %n, 1;
setp.ne.u32 %more, %n, 0;
@%more bra again;
st.global.f32 [%y], %sum;
ret;
}
"""
STEP = counts.Amounts(
    {"tensor": 1, "shared": 2, "copy": 0, "global": 1, "wait": 1, "branch": 2, "float": 1,
     "integer": 2},
    multiplies=16 * 8 * 16, sectors=4, wavefronts=4, conflicts=2,
)  # fmt: skip
"""128 bytes are 4 sectors; every second word of 64 lies in 16 banks, so that a row takes two passes."""
AROUND = counts.Amounts(
    {"tensor": 0, "shared": 0, "copy": 0, "global": 1, "wait": 0, "branch": 1, "float": 5,
     "integer": 15},
    multiplies=0, sectors=4, wavefronts=0, conflicts=0,
)  # fmt: skip


def aligned(*shape):
    room = np.zeros(int(np.prod(shape)) + 64, np.float32)
    start = -room.ctypes.data % 128 // 4
    return room[start : start + int(np.prod(shape))].reshape(shape)


def amounts(steps, programs=1):
    x, y = aligned(steps, 32), aligned(32)
    x[:] = np.arange(steps * 32).reshape(x.shape)
    ran = Machine(seed=steps).launch(
        Program.from_text(KERNEL, "sums"), (programs,), (32,), [In("x", x), Out("y", y), steps]
    )
    assert (y == x.sum(0)).all()
    return counts.amounts(ran.counts)


def test_a_kernel_to_the_last_instruction():
    assert amounts(1) == AROUND.minus(STEP, -1)


def test_a_step_is_the_difference_of_two_runs():
    step = amounts(20).minus(amounts(12)).over(8)
    assert step == STEP
    assert amounts(12).minus(step, 12) == AROUND


@pytest.mark.parametrize(
    ("opcode", "its_class"),
    [
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "tensor"),
        ("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", "tensor"),
        ("wgmma.wait_group.sync.aligned", "wait"),
        ("tcgen05.mma.cta_group::1.kind::f16", "tensor"),
        ("tcgen05.wait::ld.sync.aligned", "wait"),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16", "shared"),
        ("ld.shared.v4.b32", "shared"),
        ("ld.volatile.shared.f32", "shared"),
        ("atom.shared.add.u32", "shared"),
        ("ld.global.L1::evict_last.v4.b32", "global"),
        ("ld.acquire.gpu.global.u32", "global"),
        ("red.global.add.f32", "global"),
        ("ld.param.u64", "integer"),
        ("cp.async.cg.shared.global", "copy"),
        ("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier", "copy"),
        ("bar.sync", "wait"),
        ("mbarrier.try_wait.parity.shared::cta.b64", "wait"),
        ("bra", "branch"),
        ("brev.b32", "integer"),
        ("setp.lt.s32", "branch"),
        ("cvt.rn.bf16x2.f32", "float"),
        ("fma.rn.f64", "float"),
        ("mad.lo.s32", "integer"),
        ("shf.l.wrap.b32", "integer"),
    ],
)  # fmt: skip
def test_classes(opcode, its_class):
    assert counts.class_of(opcode) == its_class


def test_shared_memory_that_wgmma_reads():
    """B of 128 x 16 once and A of 64 x 16, of two bytes, 128 bytes a pass; the four warps issue it."""
    opcode = "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"
    count = Count(1, opcode, 4, 128, 0, 0, 0, 64 * 128 * 16)
    found = counts.amounts((count,))
    assert found.wavefronts == (128 + 64) * 16 * 2 / 128
    assert (found.multiplies, found.conflicts, found.issued["tensor"]) == (64 * 128 * 16, 0, 4)


def test_the_unit_that_bounds():
    rates = counts.RATES[80]
    cycles = STEP.cycles(rates, from_l2=True)
    assert cycles == {"tensor": 2.0, "issue": 2.5, "shared": 4.0, "memory": 2.0}
    assert STEP.cycles(rates, from_l2=False)["memory"] == pytest.approx(128 / (1555 / 1.41 / 108))
    row = counts.Row(
        "linear_expand", "", 80, 64, 640, 64, 16, STEP, AROUND, AROUND, 10, 1, 0.0, True, 0
    )
    assert row.cycles == {"tensor": 20.0, "issue": 25 + 5.5, "shared": 40.0, "memory": 20 + 2.0}
    assert row.bound == "shared"
    assert row.exposed == 5.5  # instructions around the steps
    assert dataclasses.replace(row, steps=0).bound == "issue"


def row_of(tiles, capability=80, from_l2=False, **more):
    return counts.Row(
        "shrink", "", capability, 64, 640, 0, 16, STEP, AROUND, AROUND, 10, tiles, 0.0, from_l2, 0,
        **more,
    )  # fmt: skip


def test_a_launch_as_its_busiest_sm_and_the_memory_have_it():
    row = row_of(109)  # of 108 SMs one has two
    assert row.launch.multiplies == 109 * 10 * STEP.multiplies
    assert row.moved == 109 * 32 * (10 * 4 + 4)
    assert row.least == 2 * (64 * 640 + 16 * (64 + 640))
    cycles = row.launch_cycles
    assert (cycles["tensor"], cycles["shared"]) == (2 * 20.0, 2 * 40.0)
    assert cycles["issue"] == 2 * (25 + 5.5)
    assert cycles["L2"] == 2 * 32 * 44 / 64
    assert cycles["memory"] == pytest.approx(row.least / (1555 / 1.41))
    known = row_of(109, from_memory=1e6)
    assert known.launch_cycles["memory"] == pytest.approx(1e6 / (1555 / 1.41))


@pytest.mark.parametrize(
    ("operation", "bytes_of"),
    [
        ("shrink", 8 * 32 + 4 * (8 + 32)),
        ("shrink_backward", 8 * 32 + 4 * (8 + 32)),
        ("expand", 8 * 16 + 4 * (8 + 16)),
        ("expand_backward", 8 * 16 + 2 * 4 * (8 + 16)),
        ("linear_expand", 8 * 32 + 16 * 32 + 8 * 16 + 4 * (8 + 16)),
        ("lora_linear", 8 * 32 + 16 * 32 + 8 * 16 + 4 * (32 + 16)),
    ],
)
def test_the_least_bytes(operation, bytes_of):
    assert counts.least(operation, 8, 32, 16, 4) == 2 * bytes_of
    assert counts.least("mask", 8, 32, 0, 0) == 32


def test_without_nvcc_a_sentence(monkeypatch, capsys):
    cuda_counts = pytest.importorskip("ptx.cuda_counts")
    monkeypatch.setattr(counts, "rows", lambda capabilities: [row_of(1)])
    monkeypatch.setattr(cuda_counts, "why_no_cuda", lambda: "there is no nvcc")
    assert counts.main(["--json", "sm_80"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["without"] == "the CUDA C++ kernels are not counted here: there is no nvcc"
    assert [row["backend"] for row in said["rows"]] == ["triton"]
    assert counts.main(["sm_80"]) == 0
    assert "are not counted here: there is no nvcc\nsm_80 triton shrink" in capsys.readouterr().out


def test_cuda_rows_follow(monkeypatch, capsys):
    cuda_counts = pytest.importorskip("ptx.cuda_counts")
    monkeypatch.setattr(counts, "rows", lambda capabilities: [row_of(1)])
    monkeypatch.setattr(cuda_counts, "why_no_cuda", lambda: None)
    monkeypatch.setattr(cuda_counts, "rows", lambda capability: [row_of(2, backend="cuda")])
    assert counts.main(["--json", "sm_80"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["without"] is None
    assert [(row["backend"], row["tiles"]) for row in said["rows"]] == [("triton", 1), ("cuda", 2)]
    assert said["rows"][1]["launch_cycles"]["tensor"] == 20.0


@pytest.mark.executed
@pytest.mark.skipif(INTERPRETED, reason="needs a process without TRITON_INTERPRET")
def test_tiles_and_items_of_a_forward_with_helpers():
    M, K, N, r = 8192, 4096, 4096, 16
    tile, item = counts.count_helped(90, M, K, N, r)
    assert (tile.tiles, item.tiles) == (64 * 16, 64)
    assert tile.steps * tile.step.multiplies + tile.tile.multiplies == 128 * 256 * (K + 16)
    assert item.steps * item.step.multiplies == 128 * K * 16
    assert item.tile.multiplies == 0
    # x and A once, in sectors of 32 bytes; beside that s, flags and the queue.
    assert item.step.sectors == (128 + 16) * 128 * 2 / 32
    assert item.tile.sectors < 150
    assert (tile.bound, max(tile.cycles.values())) == ("shared", 66_816)
    assert (item.bound, max(item.cycles.values())) == ("shared", 20_393)
    # No program waits for another: those that poll would be counted with.
    assert tile.tile.issued["global"] < 100
    assert counts.count_helped(90, M, K, N, r) == [tile, item]


def test_where_there_are_no_helpers_nothing_is_counted():
    assert counts.count_helped(80, 8192, 4096, 4096, 16) == []
    assert counts.count_helped(90, 8192, 4096, 1024, 16) == []


@pytest.mark.executed
@pytest.mark.skipif(INTERPRETED, reason="needs a process without TRITON_INTERPRET")
@pytest.mark.parametrize("capability", [80, 90])
def test_programs_of_expand(capability):
    subject = next(s for s in counts._subjects() if s.operation == "expand" and not s.variant)
    row = counts.count(subject, capability, 8192, 4096, 4096, 16)
    assert row.step.multiplies * row.steps * row.tiles == 8192 * 4096 * 16
    assert row.tile.multiplies == 0
    # y, and s once for each column block.
    assert 8192 * 4096 * 2 / 32 < row.step.sectors * row.steps * row.tiles < 1.2 * row.least / 32


@pytest.mark.executed
@pytest.mark.skipif(INTERPRETED, reason="needs a process without TRITON_INTERPRET")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["linear_expand forward", "shrink dropout", "shrink_backward"])
def test_what_is_counted_is_the_code_of_the_full_launch(monkeypatch, name, capability):
    subject = next(s for s in counts._subjects() if f"{s.operation} {s.variant}".strip() == name)
    M, K, N, r = 8192, 4096, 4096, 16
    states, recorded = [], []

    @contextlib.contextmanager
    def executed(*args, of=counts.executed, **kwargs):
        with of(*args, **kwargs) as state:
            states.append(state)
            yield state

    def launches_of(*args, of=counts.launches_of):
        recorded.append(of(*args))
        return recorded[-1]

    monkeypatch.setattr(counts, "executed", executed)
    monkeypatch.setattr(counts, "launches_of", launches_of)
    row = counts.count(subject, capability, M, K, N, r)
    (full, *_), *_ = recorded
    assert [launch.code for state in states for launch, *_ in state.ran[:1]] == [full.code] * 3
    # All steps together multiply what the problem does; the last share may be a part of one.
    multiplies = M * K * (N if subject.operation == "linear_expand" else r)
    assert multiplies <= row.step.multiplies * row.steps * row.tiles < 1.1 * multiplies


def test_instructions_are_counted_by_warp():
    """The second warp of each of two CTAs goes round once more than the first."""
    text = """.version 8.0
.target sm_80
.address_size 64
.visible .entry rounds() .reqntid 64 {
.reg .b32 %n; .reg .pred %more;
mov.u32 %n, %tid.x;
shr.u32 %n, %n, 5;
again:
sub.s32 %n, %n, 1;
setp.ge.s32 %more, %n, 0;
@%more bra again;
ret;
}
"""
    ran = Machine(seed=1).launch(Program.from_text(text, "rounds"), (2,), (64,), [])
    found = {c.opcode: c.by_warp for c in ran.counts}
    assert found["sub.s32"] == (2, 4)
    assert all(sum(c.by_warp) == c.issued for c in ran.counts)
