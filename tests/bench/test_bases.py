"""Layers over quantized weights: every contender has the same function as the frozen layer's W."""

from dataclasses import asdict, replace

import pytest
import torch
from lorafast.bench.common import bases, bitsandbytes
from lorafast.bench.common.contenders import BUILDERS, FROZEN
from lorafast.bench.common.problem import Problem, draw
from lorafast.bench.common.shapes import Shape

from lorafast.bench import layer
from lorafast.cli import main
from lorafast.operands import NF4, Int8

CPU = torch.device("cpu")
QUANTIZED = [base for base in bases.BASES if base != "dense"]
PROBLEM = Problem(Shape("tiny", 24, 64, 48, bias=True), 4, "bf16", "fp32", 0.0, "nf4")


class Clock:
    def round(self, turns, first):
        for index, (_, turn) in enumerate(turns, first):
            with turn(index) as call:
                call()
        return {name: 0.1 for name, _ in turns}


def measure(problem, against, passes=("both",), **builders):
    rows = layer.measure(
        problem, passes, against,
        device=CPU, clock=Clock(), seconds=0.0, builders=BUILDERS | builders,
    )  # fmt: skip
    return {row.contender: row for row in rows}


@pytest.mark.parametrize("base", QUANTIZED)
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "dropout_p"),
    [("bf16", "fp32", 0.0), ("bf16", "bf16", 0.3), ("fp32", "fp32", 0.3)],
)
def test_every_contender_is_right_over_every_format(base, dtype, adapter_dtype, dropout_p):
    problem = replace(
        PROBLEM, base=base, dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p
    )
    rows = measure(problem, ["peft", "aten", "cpu", FROZEN])
    if base not in bitsandbytes.FLAGS:
        assert rows.pop("peft").unavailable == f"bitsandbytes has no layer for {base}"
    assert {name: row.wrong or row.unavailable for name, row in rows.items()} == dict.fromkeys(rows)
    assert all(row.samples for row in rows.values())


@pytest.mark.parametrize("base", QUANTIZED)
def test_a_contender_over_other_codes_is_wrong(base):
    def other(problem, tensors):
        weight = bases.quantized(tensors.weight.flip(0), problem.base)
        if base == "mxfp4":  # whose codes are drawn, whatever the weight is
            weight.blocks.bitwise_xor_(8)  # signs
        return BUILDERS["lorafast"](problem, replace(tensors, operand=weight))

    rows = measure(replace(PROBLEM, base=base), ["mine"], mine=other)
    assert rows["mine"].wrong.startswith("y is off by")


@pytest.mark.parametrize("base", bitsandbytes.FLAGS)
def test_layers_of_bitsandbytes_are_over_the_operands_memory(base):
    from lorafast import operands

    tensors = draw(replace(PROBLEM, base=base), CPU, 1)
    made = bitsandbytes.layer_of(tensors.operand, tensors.bias)
    read = operands.of_layer(made)
    assert {k: t.data_ptr() for k, t in read.tensors().items()} == {
        k: t.data_ptr() for k, t in tensors.operand.tensors().items()
    }
    assert torch.equal(read.to(torch.bfloat16).dense(), tensors.weight)
    assert made.bias.data_ptr() == tensors.bias.data_ptr()


def test_what_is_stored_and_least_moved():
    N, K = 512, 256
    blocks = N * K // 64
    nf4 = N * K // 2 + blocks + 4 * (blocks // 256 + 256 + 1)
    assert bases.stored_bytes(N, K, torch.bfloat16, "nf4") == nf4
    assert bases.stored_bytes(N, K, torch.bfloat16, "int8") == N * K + 4 * N
    assert bases.stored_bytes(N, K, torch.bfloat16, "mxfp4") == N * K // 2 + N * K // 32
    assert bases.stored_bytes(N, K, torch.bfloat16, "dense") == 2 * N * K
    dense = Problem(Shape("", 16, K, N), 4, "bf16", "fp32", 0.0)
    over_nf4 = replace(dense, base="nf4")
    for which, times in (("fwd", 1), ("both", 2)):
        assert dense.least_bytes(which, True) - over_nf4.least_bytes(which, True) == times * (
            2 * N * K - nf4
        )
        assert dense.least_bytes(which, False) == over_nf4.least_bytes(which, False)


@pytest.mark.parametrize("base", QUANTIZED)
def test_a_weight_without_memory_is_of_the_same_kind(base):
    weight = torch.randn(48, 64).bfloat16()
    real, meta = bases.quantized(weight, base), bases.quantized(weight.to("meta"), base)
    kinds = [{k: (t.shape, t.dtype) for k, t in o.tensors().items()} for o in (real, meta)]
    assert kinds[0] == kinds[1]
    assert (meta.shape, meta.dtype, meta.parameters) == (real.shape, real.dtype, real.parameters)


def test_formats_are_those_that_layers_have():
    tensors = draw(PROBLEM, CPU, 1)
    assert isinstance(tensors.operand, NF4)
    assert isinstance(draw(replace(PROBLEM, base="int8"), CPU, 1).operand, Int8)
    assert draw(replace(PROBLEM, base="dense"), CPU, 1).operand is None


def test_the_base_is_named_where_it_is_not_dense():
    assert str(PROBLEM) == "tiny  M=24 K=64 N=48  r=4  bf16 (fp32 adapter) nf4 base  no dropout"
    assert "base" not in str(replace(PROBLEM, base="dense"))


def test_problems_of_records_without_a_base_are_dense():
    fields = asdict(PROBLEM)
    assert Problem.from_json(fields) == PROBLEM
    del fields["base"]
    assert Problem.from_json(fields) == replace(PROBLEM, base="dense")


def test_the_command_measures_a_base_in_bf16(capsys, tmp_path):
    record = tmp_path / "a.json"
    words = ["bench", "--base", "nf4", "--shapes", "8,64,32,2", "--dropout", "0", "--device", "cpu"]
    assert main([*words, "--seconds", "0.01", "--json", str(record)]) == 0
    out = capsys.readouterr().out
    assert "M=8 K=64 N=32  r=2  bf16 (fp32 adapter) nf4 base  no dropout" in out
    assert "the frozen layer has the same weight dense" in out


def test_sizes_that_a_format_does_not_have_are_refused(capsys):
    assert main(["bench", "--base", "mxfp4", "--shapes", "8,40,32", "--device", "cpu"]) == 2
    assert "mxfp4 has blocks of 32 columns, and K is 40" in capsys.readouterr().err
