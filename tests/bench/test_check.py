"""The check must see what a suite that compares outputs alone misses."""

import math

import pytest
import torch
from lorafast.bench.common import check
from lorafast.bench.common.contenders import BUILDERS, FULL, SIBLINGS, Contender, UnavailableError
from lorafast.bench.common.problem import SCALING, Problem, draw
from lorafast.bench.common.shapes import Shape
from torch import nn

from lorafast import reference
from lorafast.operands import packed

NAN = torch.tensor(math.nan)
SHAPE = Shape("", 37, 120, 40, bias=True)
PROBLEMS = [
    Problem(SHAPE, 4, dtype, adapter_dtype, dropout_p)
    for dtype, adapter_dtype in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"))
    for dropout_p in (0.0, 0.25)
]
CPU = torch.device("cpu")


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize(
    "name",
    # Without those that a CPU can't run, or that are no single layer's.
    sorted(set(BUILDERS) - {"peft-compiled", "lorafast-compiled", "cuda", SIBLINGS, FULL}),
)
def test_every_contender_is_right(name, problem):
    tensors = draw(problem, CPU, 1)
    if name == "lorafast-packed" and packed.why_unavailable() is not None:
        pytest.skip(str(packed.why_unavailable()))
    if name == "lorafast-packed" and problem.dtype == "fp32":
        with pytest.raises(UnavailableError, match="only bfloat16 gains"):
            BUILDERS[name](problem, tensors)
        return
    contender = BUILDERS[name](problem, tensors)
    weight = tensors.weight.clone()
    assert check.why_wrong(contender, problem, tensors) is None
    assert torch.equal(tensors.weight, weight)  # probing for the mask leaves no trace
    for parameter, drawn in zip(
        contender.parameters.values(), (tensors.lora_A, tensors.lora_B), strict=False
    ):
        assert torch.equal(parameter, drawn)
        assert parameter.grad is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["peft-compiled", "lorafast-compiled"])
def test_the_mask_of_a_compiled_layer_is_read_back(name):
    problem = PROBLEMS[1]
    tensors = draw(problem, CPU, 1)
    assert check.why_wrong(BUILDERS[name](problem, tensors), problem, tensors) is None


def test_the_mask_is_the_one_that_was_drawn(monkeypatch):
    problem = PROBLEMS[1]
    tensors = draw(problem, CPU, 1)
    seed = torch.tensor([99])
    monkeypatch.setattr(torch, "randint", lambda *arguments, **options: seed.clone())
    dropped = check.mask_of(BUILDERS["lorafast"](problem, tensors), problem, tensors)
    assert torch.equal(dropped.keep, reference.keep_mask(SHAPE.M, SHAPE.K, 0.25, seed))


class Layer(nn.Module):
    """A LoRA layer in plain PyTorch, with one thing wrong."""

    def __init__(self, tensors, dropout_p, wrong):
        super().__init__()
        self.frozen = tensors.weight, tensors.bias
        self.lora_A, self.lora_B = nn.Parameter(tensors.lora_A), nn.Parameter(tensors.lora_B)
        self.dropout = nn.Dropout(dropout_p)
        self.wrong = wrong

    def forward(self, x):
        weight, bias = self.frozen
        wrong = self.wrong
        dropped = x if wrong == "dropout is ignored" else self.dropout(x)
        if wrong == "the mask stays" and self.dropout.p:
            mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) >= 0.25
            dropped = x * mask / 0.75
        if wrong == "rows are dropped whole" and self.dropout.p:
            dropped = x * (torch.rand(len(x), 1) >= 0.25) / 0.75
        if wrong == "dx has no low-rank term":
            dropped = dropped.detach()
        A, B = self.lora_A, self.lora_B
        if wrong == "dA is flipped":
            A = 2 * A.detach() - A
        if wrong == "dB is missing":
            B = B.detach()
        if wrong == "dB is scaled twice":
            B = SCALING * B - (SCALING - 1) * B.detach()
        y = nn.functional.linear(x, weight, None if wrong == "no bias" else bias)
        low_rank = dropped @ A.t() @ B.t()
        y = y + (low_rank if wrong == "not scaled" else SCALING * low_rank)
        if wrong == "y has a NaN":
            y = y + torch.zeros_like(y).index_put((torch.tensor(3), torch.tensor(5)), NAN)
        return y.double() if wrong == "y is float64" else y


WRONG = {
    "dropout is ignored": "0.00% of x is dropped, expected 25.00%",
    "dx has no low-rank term": "dx is off|100.00% of x is dropped",
    "dA is flipped": "dA is off",
    "dB is missing": "dB is missing",
    "dB is scaled twice": "dB is off",
    "no bias": "y is off",
    "not scaled": "y is off",
    "y has a NaN": "y is nan at [3, 5], expected ",
    "y is float64": "y is torch.float64, expected torch.float32",
    "the mask stays": "two dropout masks in a row are the same",
    "rows are dropped whole": "of x is dropped|a row lost too many elements",
}
ONLY_WITH_DROPOUT = ("dropout is ignored", "the mask stays", "rows are dropped whole")


def layer_with(wrong, problem, tensors):
    layer = Layer(tensors, problem.dropout_p, wrong)
    parameters = {"lora_A": layer.lora_A, "lora_B": layer.lora_B}
    scale = 1 / (1 - problem.dropout_p)
    return Contender("mine", layer, parameters, survivor_scale=scale)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_a_plain_layer_is_right(dropout_p):
    problem = Problem(SHAPE, 4, "fp32", "fp32", dropout_p)
    tensors = draw(problem, CPU, 1)
    assert check.why_wrong(layer_with(None, problem, tensors), problem, tensors) is None


@pytest.mark.parametrize(
    ("wrong", "dropout_p"),
    [(w, p) for w in WRONG for p in (0.0, 0.25) if p or w not in ONLY_WITH_DROPOUT],
)
def test_what_is_wrong_is_named(wrong, dropout_p):
    problem = Problem(SHAPE, 4, "fp32", "fp32", dropout_p)
    tensors = draw(problem, CPU, 1)
    found = check.why_wrong(layer_with(wrong, problem, tensors), problem, tensors)
    assert found is not None
    assert any(part in found for part in WRONG[wrong].split("|")), found
