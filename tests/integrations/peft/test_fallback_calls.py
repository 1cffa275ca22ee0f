"""What about a call makes PEFT serve it: the input, its dtype, how it is differentiated or traced."""

import pytest
import torch

pytest.importorskip("peft")

from peft_twins import TOKENS, K, N, OwnTensor, assert_same, layer_of, peft_model, stock_and_fast

import lorafast

INPUTS = {
    "a subclass of Tensor": (lambda: torch.randn(5, K).as_subclass(OwnTensor), {}),
}


@pytest.mark.parametrize("what", INPUTS)
def test_an_input_that_is_not_plain(what, served_by_peft):
    stock, fast = map(layer_of, stock_and_fast(peft_model(), lambda layer: None))
    make, arguments = INPUTS[what]
    x = make()
    torch.testing.assert_close(fast(x, **arguments), stock(x, **arguments), rtol=0, atol=0)
    assert len(served_by_peft) == 1


@pytest.mark.parametrize(
    "x",
    [torch.randn(5, K + 1), torch.randn(5, K).double(), torch.randn(5, K).bfloat16(),
     torch.ones(5, K, dtype=torch.int64), torch.randn(5, K, device="meta"), torch.tensor(1.0)],
    ids=["columns", "float64", "bfloat16", "int64", "meta", "a number"],
)  # fmt: skip
def test_bad_input_raises_what_it_raised(x, served_by_peft):
    stock, fast = stock_and_fast(peft_model(), lambda layer: None)

    def outcome(model):
        try:
            return model(x).shape
        except Exception as error:
            return type(error), str(error)

    assert outcome(fast) == outcome(stock)
    assert len(served_by_peft) == 1


def test_forward_mode(served_by_peft):
    stock, fast = stock_and_fast(peft_model(), lambda layer: None)
    x, tangent = torch.randn(5, K), torch.randn(5, K)
    found = []
    for model in (stock, fast):
        with torch.autograd.forward_ad.dual_level():
            y = model(torch.autograd.forward_ad.make_dual(x, tangent))
            found.append(torch.autograd.forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert len(served_by_peft) == 1


def test_more_positional_arguments(served_by_peft):
    _, fast = stock_and_fast(peft_model(), lambda layer: None)
    with pytest.raises(TypeError):
        layer_of(fast)(torch.randn(5, K), 1)
    _, fast = stock_and_fast(peft_model("embedding"), lambda layer: None)
    with pytest.raises(TypeError):
        layer_of(fast)(torch.ones(5, dtype=torch.int64), 1)
    assert len(served_by_peft) == 2


def test_a_single_row_of_dora(served_by_peft):
    """PEFT makes it a matrix of one row."""
    stock, fast = stock_and_fast(peft_model(use_dora=True), lambda layer: None)
    assert fast(torch.randn(K)).shape == (1, N)
    assert_same(stock, fast, torch.randn(K))
    assert len(served_by_peft) == 2


def test_a_bias_of_another_dtype(served_by_peft):
    fast = lorafast.accelerate(peft_model(dtype=torch.bfloat16), quiet=True)
    layer_of(fast).base_layer.bias.data = layer_of(fast).base_layer.bias.data.float()
    with torch.autocast("cpu", torch.bfloat16):
        fast(torch.randn(5, K))
    assert len(served_by_peft) == 1


def nested(rows, layout):
    return torch.nested.nested_tensor(list(rows.tensor_split([2])), layout=layout)


LAYOUTS = {
    "sparse": lambda rows: rows.to_sparse(),
    "csr": lambda rows: rows.to_sparse_csr(),
    "mkldnn": lambda rows: rows.to_mkldnn(),
    "nested": lambda rows: nested(rows, torch.strided),
    "jagged": lambda rows: nested(rows, torch.jagged),
}
WAYS = {
    "linear": ({}, {}),
    "dora": ({"use_dora": True}, {}),
    "embedding": ({"kind": "embedding"}, {}),
    "mixed batch": ({"adapters": 2}, {"adapter_names": ["default", "other1"]}),
}


@pytest.mark.parametrize("rows", [4, 1200], ids="{} rows".format)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
def test_input_of_another_layout(way, layout, rows, served_by_peft):
    """Whatever stock PEFT makes of it, a sentence or a result."""
    options, arguments = WAYS[way]
    stock, fast = stock_and_fast(peft_model(**options).eval(), lambda layer: None)
    plain = torch.randint(TOKENS, (rows, 3)) if way == "embedding" else torch.randn(rows, K)
    if way == "embedding" and layout == "mkldnn":
        pytest.skip("there are no mkldnn tensors of int64")
    if arguments:
        plain = plain.view(2, -1, K)
    x = LAYOUTS[layout](plain)

    def outcome(model):
        try:
            y = model.base_model.model.layer(x, **arguments)
            return torch.cat([part.reshape(-1) for part in y.unbind()])
        except Exception as error:
            return type(error), str(error)

    theirs, ours = outcome(stock), outcome(fast)
    assert type(theirs) is type(ours)
    assert torch.equal(theirs, ours) if isinstance(ours, torch.Tensor) else theirs == ours
    assert len(served_by_peft) == 1


def test_adapters_that_PEFT_would_cast_down_to(served_by_peft):
    def narrow(layer):
        layer.lora_A.to(torch.bfloat16)
        layer.lora_B.to(torch.bfloat16)

    stock, fast = stock_and_fast(peft_model(), narrow)
    assert_same(stock, fast, torch.randn(5, K))
    assert len(served_by_peft) == 1


def test_input_that_must_not_be_cast(served_by_peft):
    from peft.helpers import disable_input_dtype_casting

    fast = lorafast.accelerate(peft_model(dtype=torch.bfloat16, upcast=True), quiet=True)
    x = torch.randn(5, K, dtype=torch.bfloat16)
    fast(x)
    assert served_by_peft == []
    with disable_input_dtype_casting(fast), pytest.raises(RuntimeError, match="dtype"):
        fast(x)
    assert len(served_by_peft) == 1


def test_adapters_of_several_dtypes(served_by_peft):
    model = peft_model(dtype=torch.bfloat16, upcast=True, adapters=2)
    stock, fast = stock_and_fast(model, lambda layer: layer.lora_A["other1"].bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(5, K)
        torch.testing.assert_close(fast(x), stock(x), rtol=0, atol=0)
    assert len(served_by_peft) == 1


def test_meta(served_by_peft):
    model = lorafast.accelerate(peft_model(), quiet=True).to("meta")
    assert "meta device" in str(lorafast.explain(model))
    assert model(torch.randn(5, K, device="meta")).is_meta
    assert len(served_by_peft) == 1


def test_what_is_exported_is_PEFTs(served_by_peft):
    fast = lorafast.accelerate(peft_model(), quiet=True).eval()
    x = torch.randn(5, K)
    expected = fast(x)
    for strict in (False, True):
        exported = torch.export.export(fast, (x,), strict=strict)
        targets = {str(node.target) for node in exported.graph.nodes}
        assert not any("lorafast" in target for target in targets)
        torch.testing.assert_close(exported.module()(x), expected)
    served_by_peft.clear()
    traced = torch.jit.trace(fast, x, check_trace=False)
    assert len(served_by_peft) == 1
    torch.testing.assert_close(traced(x), expected)
