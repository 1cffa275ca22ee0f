"""PEFT's layers over quantized weights, accelerated: against stock PEFT, outputs and every gradient."""

import gc
import re
import weakref

import pytest
import torch

pytest.importorskip("peft")

from helpers import covering
from peft_twins import assert_equal, assert_near, fast_layers, run
from quantized_twins import (
    BASES,
    K,
    N,
    bnb,
    four_bit,
    in_float64,
    layer_of,
    peft_model,
    twins,
)
from torch import nn

import lorafast
from lorafast.integrations.peft import known, quantized

DTYPES = {
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, False),
    "bf16, fp32 adapters": (torch.bfloat16, True),
    "fp16, fp32 adapters": (torch.float16, True),
}


@pytest.fixture
def served_by_peft(monkeypatch):
    """Counts the calls of accelerated layers that PEFT serves."""
    from peft.tuners.lora import bnb as stock_bnb
    from peft.tuners.lora.layer import Linear

    calls = []
    for cls in (Linear, stock_bnb.Linear4bit, stock_bnb.Linear8bitLt):

        def forward(self, *args, _forward=cls.forward, **kwargs):
            if type(self).__module__.startswith("lorafast"):
                calls.append(self)
            return _forward(self, *args, **kwargs)

        monkeypatch.setattr(cls, "forward", forward)
    return calls


def data(dtype, *leading):
    torch.manual_seed(7)
    return torch.randn(*leading, K).to(dtype), torch.randn(*leading, N)


# Of several adapters each draws a mask of its own: no two runs draw the same ones.
@pytest.mark.parametrize(
    ("kind", "dtype", "active"),
    covering(list(BASES), list(DTYPES), ((1, 0.0), (1, 0.4), (2, 0.0))),
    ids=str,
)
def test_lora(kind, dtype, active, served_by_peft):
    dtype, upcast = DTYPES[dtype]
    adapters, dropout = active
    bias = adapters == 1
    pair = twins(
        kind, dtype, bool(dropout), bias=bias, adapters=adapters, upcast=upcast,
        lora_dropout=dropout,
    )  # fmt: skip
    assert len(fast_layers(pair.fast)) == 1
    x, dy = data(dtype, 3, 5)
    assert_equal(pair, x, dy, dtype)
    assert not served_by_peft


@pytest.mark.parametrize("dropout", [0.0, 0.4], ids="dropout {}".format)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", BASES)
def test_dora(kind, dtype, dropout, served_by_peft):
    dtype, _ = DTYPES[dtype]
    pair = twins(kind, dtype, bool(dropout), use_dora=True, lora_dropout=dropout)
    x, dy = data(dtype, 3, 5)
    assert_equal(pair, x, dy, dtype)
    assert not served_by_peft


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", [kind for kind in BASES if kind != "int8"])
def test_mixed_batches(kind, dtype, served_by_peft):
    """Without gradients: PEFT changes what bitsandbytes gives in place, which autograd refuses."""
    dtype, _ = DTYPES[dtype]
    pair = twins(kind, dtype, adapters=2)
    for model in (pair.stock, pair.fast, pair.exact):
        model.eval()
    x, dy = data(dtype, 4, 5)
    rows = ["other1", "__base__", "default", "other1"]
    with torch.no_grad():
        assert_equal(pair, x, dy, dtype, adapter_names=rows)
    assert not served_by_peft


@pytest.mark.parametrize("kind", ["nf4", "torchao fp8 by row"])
def test_gradients_of_mixed_batches(kind, served_by_peft):
    pair = twins(kind, torch.float32, adapters=2)
    x, dy = data(torch.float32, 4, 5)
    rows = ["other1", "__base__", "default", "other1"]
    eager = in_float64(kind, torch.float32, adapters=2).float()
    for model in (pair.fast, pair.exact, eager):
        model.eval()
    found, eager = (run(model, x, dy, adapter_names=rows) for model in (pair.fast, eager))
    exact = run(pair.exact, x.double(), dy, adapter_names=rows)
    assert_near(*({"y": r.y} | r.gradients for r in (found, eager, exact)), torch.float32)
    assert not served_by_peft


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", BASES)
def test_autocast(kind, dtype, served_by_peft):
    """The dtype of the result too: that of x, but where the library's own product is cast."""
    pair = twins(kind, dtype, upcast=True)
    x, dy = data(dtype, 3, 5)
    exact = run(pair.exact, x.double(), dy)
    with torch.autocast("cpu", torch.bfloat16):
        found = [run(model, x, dy) for model in (pair.fast, pair.stock)]
    assert found[0].y.dtype is found[1].y.dtype
    assert_near(*({"y": one.y} | one.gradients for one in (*found, exact)), torch.bfloat16)
    served = "fp8" in kind and dtype is torch.float32
    assert bool(served_by_peft) is served


@pytest.mark.parametrize("kind", BASES)
def test_autocast_of_an_input_in_another_dtype(kind):
    pair = twins(kind, torch.bfloat16, upcast=True)
    x, dy = data(torch.float32, 3, 5)
    exact = run(pair.exact, x.double(), dy)
    with torch.autocast("cpu", torch.bfloat16):
        found = [run(model, x, dy) for model in (pair.fast, pair.stock)]
    assert found[0].y.dtype is found[1].y.dtype
    assert_near(*({"y": one.y} | one.gradients for one in (*found, exact)), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32], ids=str)
def test_a_4_bit_layer_that_computes_in_another_dtype(compute, dtype, served_by_peft, monkeypatch):
    """As in QLoRA: x in float32, the base layer in bfloat16, the adapters in float32 all the way."""
    monkeypatch.setitem(BASES, "nf4", four_bit("nf4", compute=compute))
    pair = twins("nf4", torch.float32, lora_dropout=0.4, upcast=True)
    x, dy = data(dtype, 3, 5)
    found = [run(model, x, dy) for model in (pair.fast, pair.stock)]
    if compute is dtype:  # one pass, with a mask of its own
        pair = twins("nf4", torch.float32, same_mask=True, lora_dropout=0.4, upcast=True)
        found = [run(model, x, dy) for model in (pair.fast, pair.stock)]
        exact = run(pair.exact, x.double(), dy)
        assert_near(*({"y": one.y} | one.gradients for one in (*found, exact)), dtype)
    else:  # the very mask of PEFT's
        for name, gradient in found[1].gradients.items():
            torch.testing.assert_close(found[0].gradients[name], gradient, rtol=0.02, atol=0.02)
        for name in ("lora_A", "lora_B"):
            (ours,) = (g for n, g in found[0].gradients.items() if name in n)
            (its,) = (g for n, g in found[1].gradients.items() if name in n)
            torch.testing.assert_close(ours, its)
    assert found[0].y.dtype is found[1].y.dtype is dtype
    assert not served_by_peft


class TestLeftToPeft:
    """What is served by PEFT, that ``explain`` says so, and that the results are the very same."""

    def check(self, kind, change, reason, served_by_peft, gradients=True, **options):
        fast = lorafast.accelerate(peft_model(kind, **options), quiet=True)
        stock = peft_model(kind, **options)
        for model in (fast, stock):
            change(model)
        (why,) = lorafast.explain(fast).layers.values()
        assert reason in why
        x, dy = data(torch.float32, 3, 5)
        with torch.set_grad_enabled(gradients):
            found, expected = (run(model, x, dy) for model in (fast, stock))
        assert torch.equal(found.y, expected.y)
        assert found.gradients.keys() == expected.gradients.keys()
        for name, gradient in expected.gradients.items():
            assert torch.equal(found.gradients[name], gradient), name
        assert len(served_by_peft) == 1

    def test_int8_in_eval_mode(self, served_by_peft):
        reason = "its base layer is in eval mode, where bitsandbytes multiplies in 8-bit integers"
        self.check("int8", lambda model: model.eval(), reason, served_by_peft)

    def test_int8_in_eval_mode_that_splits_outliers(self, served_by_peft):
        def change(model):
            layer_of(model).base_layer.state.threshold = 1.0
            model.eval()

        self.check("int8", change, "and splits outliers off", served_by_peft)

    def test_a_16_bit_weight_that_is_quantized_in_each_call(self, served_by_peft):
        def change(model):
            torch.manual_seed(3)
            layer = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=True)
            layer_of(model).base_layer = layer.requires_grad_(False)

        reason = "of its base layer: its has_fp16_weights is True"
        self.check("int8", change, reason, served_by_peft)

    def test_repacked_for_inference_on_a_cpu(self, served_by_peft):
        def change(model):
            model.eval()
            with model.disable_adapter(), torch.no_grad():
                model(torch.ones(1, K))
            served_by_peft.clear()
            state = layer_of(model).base_layer.weight.quant_state
            if not getattr(state, "packing_format_for_cpu", False):
                pytest.skip("bitsandbytes repacks on processors with AVX-512's bfloat16 product")

        reason = "of its base layer: bitsandbytes has repacked its weight for inference on this CPU"
        self.check("nf4", change, reason, served_by_peft, gradients=False)

    def test_not_quantized_yet(self):
        model = peft_model("nf4", base=lambda dtype, bias: bnb.nn.Linear4bit(K, N, bias=bias))
        fast = lorafast.accelerate(model, quiet=True)
        (why,) = lorafast.explain(fast).layers.values()
        assert "of its base layer: bitsandbytes has not quantized its weight yet" in why
        with pytest.raises(AssertionError):  # bitsandbytes' own
            fast(torch.ones(1, K))
        fast.to("cpu")
        assert fast_layers(fast)

    def test_a_scale_that_is_no_number(self):
        model = peft_model("nf4, plain scales")
        layer_of(model).base_layer.weight.quant_state.absmax[0] = float("inf")
        (why,) = lorafast.explain(lorafast.accelerate(model, quiet=True)).layers.values()
        assert "of its base layer: a scale of its weight is NaN or infinite" in why

    def test_a_weight_on_another_device(self):
        fast = lorafast.accelerate(peft_model("nf4"), quiet=True)
        weight = layer_of(fast).base_layer.weight
        (why,) = lorafast.explain(fast).layers.values()
        assert why is None
        weight.quant_state.absmax = weight.quant_state.absmax.to("meta")
        (why,) = lorafast.explain(fast).layers.values()
        assert "of its base layer: it is on the meta device" in why

    def test_a_hook_on_the_base_layer(self, served_by_peft):
        def change(model):
            layer_of(model).base_layer.register_forward_hook(lambda m, args, y: y * 2)

        self.check("nf4", change, "its base layer has hooks", served_by_peft)

    def test_adapters_that_are_disabled(self, served_by_peft):
        def change(model):
            model.base_model.disable_adapter_layers()

        self.check("nf4", change, "its adapters are disabled", served_by_peft)

    def test_a_merged_layer(self, served_by_peft):
        def change(model):
            with pytest.warns(UserWarning, match="Merge lora module to 4-bit"):
                layer_of(model).merge()

        reason = "adapters are merged into its weight: 'default'"
        self.check("nf4", change, reason, served_by_peft)

    def test_dora_whose_base_layer_computes_in_another_dtype(self, served_by_peft, monkeypatch):
        monkeypatch.setitem(BASES, "nf4", four_bit("nf4", compute=torch.bfloat16))
        fast = lorafast.accelerate(peft_model("nf4", use_dora=True), quiet=True)
        stock = peft_model("nf4", use_dora=True)
        x, dy = data(torch.float32, 3, 5)
        found, expected = run(fast, x, dy), run(stock, x, dy)
        assert torch.equal(found.y, expected.y)
        assert len(served_by_peft) == 1

    @pytest.mark.parametrize("kind", ["nf4", "torchao int8 by row"])
    def test_compiled_code(self, kind, served_by_peft):
        torch.compiler.reset()
        fast = lorafast.accelerate(peft_model(kind), quiet=True)
        x, dy = data(torch.float32, 3, 5)
        expected = run(fast, x, dy)
        assert not served_by_peft
        compiled = torch.compile(fast, backend="aot_eager")
        found = run(compiled, x, dy)
        torch.testing.assert_close(found.y, expected.y, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("module", "words"),
        [
            ("gptq", "GPTQ's"),
            ("awq", "AWQ's"),
            ("hqq", "HQQ's"),
            ("eetq", "EETQ's"),
            ("aqlm", "AQLM's"),
        ],
    )
    def test_layers_of_other_libraries(self, module, words):
        from peft.tuners.lora.layer import LoraLayer

        kind = type(
            "Quantized", (nn.Module, LoraLayer), {"__module__": f"peft.tuners.lora.{module}"}
        )
        layer = kind.__new__(kind)
        nn.Module.__init__(layer)
        (why,) = lorafast.explain(
            lorafast.accelerate(nn.Sequential(layer), quiet=True)
        ).layers.values()
        assert why.startswith(f"its weight is stored as {words}")
        assert type(layer) is kind


class TestReading:
    def test_once(self, monkeypatch):
        reads = []
        read = quantized._read_now
        monkeypatch.setattr(quantized, "_read_now", lambda base: reads.append(base) or read(base))
        for kind in BASES:
            reads.clear()
            fast = lorafast.accelerate(peft_model(kind), quiet=True)
            x, dy = data(torch.float32, 3, 5)
            for _ in range(3):
                run(fast, x, dy)
                fast.zero_grad()
            assert len(reads) == 1, kind

    def test_a_weight_that_was_replaced(self):
        fast = lorafast.accelerate(peft_model("nf4"), quiet=True)
        x, dy = data(torch.float32, 3, 5)
        run(fast, x, dy)
        other = layer_of(peft_model("nf4", seed=5))
        layer_of(fast).base_layer.weight = other.base_layer.weight
        stock = peft_model("nf4")
        layer_of(stock).base_layer.weight = other.base_layer.weight
        torch.testing.assert_close(run(fast, x, dy).y, run(stock, x, dy).y, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("kind", ["nf4", "int8", "torchao fp8 by row"])
    def test_nothing_is_kept_of_a_layer_that_is_gone(self, kind):
        fast = lorafast.accelerate(peft_model(kind), quiet=True)
        x, dy = data(torch.float32, 3, 5)
        run(fast, x, dy)
        base = layer_of(fast).base_layer
        assert base in quantized._reads
        gone, before = weakref.ref(base), len(quantized._reads)
        del fast, base
        gc.collect()
        assert gone() is None
        assert len(quantized._reads) < before

    def test_nothing_is_kept_of_a_weight_that_was_merged(self):
        fast = lorafast.accelerate(peft_model("nf4"), quiet=True)
        x, dy = data(torch.float32, 3, 5)
        run(fast, x, dy)
        layer = layer_of(fast)
        storage = weakref.ref(quantized.weight_of(layer.base_layer).tensors()["weight"])
        with pytest.warns(UserWarning, match="Merge lora module to 4-bit"):
            layer.merge()
        run(fast, x, dy)
        gc.collect()
        assert storage() is None

    def test_first_in_inference_mode(self):
        fast = lorafast.accelerate(peft_model("nf4"), quiet=True)
        x, dy = data(torch.float32, 3, 5)
        with torch.inference_mode():
            y = fast(x)
        found = run(fast, x, dy)
        assert torch.equal(found.y, y)
        assert found.gradients


def test_it_is_restored_and_pickled_as_pefts_own():
    for kind in BASES:
        model = peft_model(kind)
        stock = type(layer_of(model))
        lorafast.accelerate(model, quiet=True)
        assert type(layer_of(model)) is not stock
        assert isinstance(layer_of(model), stock)
        _, (named, *_) = layer_of(model).__reduce_ex__(2)[:2]
        assert named is stock
        lorafast.restore(model)
        assert type(layer_of(model)) is stock


def test_layers_made_in_a_block_are_fast():
    with lorafast.accelerated():
        models = [peft_model(kind) for kind in BASES]
    for model in models:
        assert len(fast_layers(model)) == 1


def test_another_bitsandbytes_is_left_to_peft(monkeypatch):
    lorafast.accelerate(peft_model("nf4"), quiet=True)  # they are known by now
    known.why_changed.cache_clear()
    try:
        monkeypatch.setattr(bnb.nn.Linear4bit, "set_compute_type", lambda self, x: None)
        reason = known.why_changed("4-bit linear")
        assert reason == f"bitsandbytes {bnb.__version__} has another Linear4bit.set_compute_type"
        assert known.why_changed("8-bit linear") is None
        assert re.search(r"PEFT serves itself: (.*, )?4-bit linear", known.changes())
    finally:
        known.why_changed.cache_clear()


def test_int8_is_served_where_it_is_trained_by_its_dense_weight():
    """On a GPU bitsandbytes rounds the input too, which is another function."""
    base = layer_of(peft_model("int8")).base_layer
    assert quantized.why_not_input(base, torch.ones(1, K)) is None
    reason = quantized.why_not_input(base, torch.ones(1, K, device="meta"))
    assert "bitsandbytes rounds the input of its int8 base layer" in reason


def test_a_weight_made_in_inference_mode_is_left_to_peft():
    """Autograd keeps no such tensor, and bitsandbytes keeps it elsewhere."""
    with torch.inference_mode():
        model = peft_model("nf4")
    lorafast.accelerate(model, quiet=True)
    reasons = set(lorafast.explain(model).layers.values())
    assert len(reasons) == 1
    assert "it was made in inference mode" in reasons.pop()
