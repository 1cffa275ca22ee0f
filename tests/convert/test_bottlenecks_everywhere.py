"""What is done with LoRA layers is done with bottlenecks: explained, warmed up, watched, summed up."""

import sys
import warnings

import pytest
import torch
from torch import nn

import lorafast
from lorafast.convert.first_backward import waits_for_gradient
from lorafast.nn import Bottleneck
from lorafast.nn.adapter_module import adapters_in


class Block(nn.Module):
    """With a layer that nobody calls."""

    def __init__(self):
        super().__init__()
        self.lora, self.first, self.uncalled = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, h):
        return self.first(self.lora(h).relu())


def model_of(kind, targets=("first", "uncalled"), **options):
    return lorafast.adapt(Block(), kind=kind, targets=list(targets), bottleneck=3, **options)


@pytest.mark.parametrize("kind", ["houlsby", "parallel"])
def test_explain_has_the_problem_of_the_call(kind, monkeypatch):
    model = model_of(kind, ["first"])
    explained = lorafast.explain(model, torch.ones(5, 6))
    assert [one.operation for one in explained.layers["first"]] == [
        "bottleneck", "bottleneck_backward",
    ]  # fmt: skip
    assert all(one.backend for one in explained.layers["first"])
    asked = []
    op = sys.modules["lorafast.ops.bottleneck"]  # whose name there is the function's
    stock = op.registry.choose
    monkeypatch.setattr(op.registry, "choose", lambda p, n: (asked.append(p), stock(p, n))[1])
    op._calls.clear()
    x = torch.ones(5, 6, requires_grad=True)
    model(x).square().sum().backward()
    op._calls.clear()
    assert asked == list(adapters_in(model)["first"].problems(x))
    (forward, *_), (again, *_) = asked, adapters_in(model)["first"].problems(None)
    assert again._replace(M=5) == forward
    assert "first" in str(explained)
    with torch.no_grad():
        assert adapters_in(model)["first"].problems(x)[0].wants == ("y",)


def test_a_model_of_bottlenecks_alone_is_warmed_up(monkeypatch):
    model, seen = model_of("parallel", layer_norm=True), []
    forward = Bottleneck.forward
    monkeypatch.setattr(
        Bottleneck,
        "forward",
        lambda self, h, residual=None: (
            seen.append((self, tuple(h.shape), residual is not None)),
            forward(self, h, residual),
        )[1],
    )
    lorafast.warm_up(model, [1, 4])
    assert seen == [
        (one, (rows, 6), True) for one in adapters_in(model).values() for rows in (1, 4)
    ]
    assert all(p.grad is None for p in model.parameters())


def test_the_first_backward_names_bottlenecks_without_a_gradient():
    model = model_of("houlsby")
    with pytest.warns(UserWarning, match=r"got no gradient in the first backward.*: uncalled \("):
        model(torch.ones(2, 6)).sum().backward()
    places = adapters_in(model)
    assert (waits_for_gradient(places["first"]), waits_for_gradient(places["uncalled"])) == (
        False, True,
    )  # fmt: skip
    rows = {row.name: row for row in lorafast.summary(model).layers}
    assert rows["uncalled"].no_gradient
    assert "no gradient so far" in str(lorafast.summary(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.ones(2, 6)).sum().backward()


def test_one_list_of_lora_layers_and_bottlenecks():
    model = model_of("houlsby", ["first"])
    lorafast.adapt(model, 2, targets=["lora"])
    assert list(adapters_in(model)) == ["lora", "first"]
    assert [row.name for row in lorafast.summary(model).layers] == ["lora", "first"]
    assert lorafast.explain(model).layers.keys() == {"lora", "first"}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert [one.kind for one in lorafast.summary(model).left] == ["Linear"]  # no Bottleneck
    alone = nn.ModuleDict({"bottleneck": Bottleneck(4, 2)})  # a user's own, which stands nowhere
    assert list(adapters_in(alone)) == ["bottleneck"]
