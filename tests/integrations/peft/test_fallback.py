"""Every rule by which PEFT serves a call itself: that it did, that it says why, and what came out."""

import copy

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer as stock_layers
from peft.tuners.lora.layer import LoraLayer
from peft_twins import TOKENS, K, N, config, peft_model
from torch import nn

import lorafast


class Scaled(nn.Linear):
    """Not exactly an nn.Linear."""

    def forward(self, x):
        return 2 * super().forward(x)


class OwnTensor(torch.Tensor):
    pass


def layer_of(model):
    return next(m for m in model.modules() if isinstance(m, LoraLayer))


def hooked(module):
    module.register_forward_hook(lambda module, args, output: output + 1.0)


# Each does something to the layer of a model; the reason must contain the words.
CHANGES = {
    "its adapters are disabled": lambda layer: layer.enable_adapters(False),
    "adapters are merged into its weight: 'default'": lambda layer: layer.merge(),
}


def change(name):
    def decorate(function):
        CHANGES[name] = function
        return function

    return decorate


@change("none of its adapters is active")
def _(layer):
    layer._active_adapter = []


@change("its base layer has hooks")
def _(layer):
    layer.base_layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))


@change("adapter 'default' has hooks")
def _(layer):
    hooked(layer.lora_B["default"])


@change("adapter 'default' has hooks ")  # a hook on the backward
def _(layer):
    layer.lora_A["default"].register_full_backward_hook(lambda module, dx, dy: (3 * dx[0],))


@change("adapter 'default' has hooks  ")  # on the dropout
def _(layer):
    hooked(layer.lora_dropout["default"])


@change("its base layer has a forward of its own")
def _(layer):
    layer.base_layer.forward = lambda x: torch.zeros(*x.shape[:-1], N)


@change("its base layer has a hook of accelerate's")
def _(layer):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Twice(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    add_hook_to_module(layer.base_layer, Twice())


@change("its base layer is a Scaled, not exactly an nn.Linear or a Conv1D")
def _(layer):
    layer.base_layer.__class__ = Scaled


@change("its base layer is a ParametrizedLinear")
def _(layer):
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", Halved())


@change("adapter 'default' is made of ParametrizedLinear and Linear")
def _(layer):
    nn.utils.parametrizations.weight_norm(layer.lora_A["default"])


@change("adapter 'default' has hooks   ")  # before the backward
def _(layer):
    layer.lora_A["default"].register_full_backward_pre_hook(lambda module, dy: (2 * dy[0],))


@change("its base layer has no bias of its own")
def _(layer):
    bias = layer.base_layer.bias.detach()
    del layer.base_layer.bias
    layer.base_layer.register_buffer("bias", bias)


@change("the dropout of adapter 'default' changes its input")
def _(layer):
    layer.lora_dropout["default"] = nn.Dropout(0.5, inplace=True).eval()


@change("its base layer has a tensor parallel plan ")
def _(layer):
    layer.base_layer._hf_device_mesh = None


@change("its base layer has no weight of its own")
def _(layer):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer.base_layer)


@change("its base layer has a tensor parallel plan")
def _(layer):
    layer.base_layer._hf_tp_plan = "colwise"


@change("its base layer has a OwnTensor, not a plain tensor")
def _(layer):
    weight = layer.base_layer.weight.detach().as_subclass(OwnTensor)
    layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)


@change("the dropout of adapter 'default' is a AlphaDropout")
def _(layer):
    layer.lora_dropout["default"] = nn.AlphaDropout(0.0)


@change("the scaling of adapter 'default' has the shape [1]")
def _(layer):
    layer.scaling["default"] = torch.tensor([0.5])


@change("its base layer is torch.sparse_csr")
def _(layer):
    weight = layer.base_layer.weight.detach()
    layer.base_layer.weight = nn.Parameter(weight.to_sparse_csr(), requires_grad=False)


@change("adapter 'default' is of another kind: ALoraLinearVariant")
def _(layer):
    from peft.tuners.lora.variants import ALoraLinearVariant

    class ALora(ALoraLinearVariant):
        @staticmethod
        def forward(module, active_adapter, x, result, **kwargs):
            return result + 5.0

    ALora.__name__ = "ALoraLinearVariant"
    layer.lora_variant["default"] = ALora()


def stock_and_fast(model, do):
    """The same thing done to a stock layer and to one that has been accelerated."""
    fast = lorafast.accelerate(copy.deepcopy(model), quiet=True)
    assert set(lorafast.explain(fast).layers.values()) == {None}
    do(layer_of(model))
    do(layer_of(fast))
    return model, fast


@pytest.fixture
def served_by_peft(monkeypatch):
    """Counts the calls of accelerated layers that PEFT serves."""
    calls = []
    for cls in (stock_layers.Linear, stock_layers.Embedding):

        def forward(self, *args, _forward=cls.forward, **kwargs):
            if type(self).__module__.startswith("lorafast"):
                calls.append(self)
            return _forward(self, *args, **kwargs)

        monkeypatch.setattr(cls, "forward", forward)
    return calls


def assert_same(stock, fast, x, **arguments):
    """Outputs and gradients are the very same: the same code made them."""
    found = []
    for model in (stock, fast):
        model.zero_grad()
        torch.manual_seed(0)
        leaf = x.detach().clone().requires_grad_(x.is_floating_point())
        y = model(leaf, **arguments)
        if y.requires_grad:
            y.sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({"y": y.detach(), "x": leaf.grad} | gradients)
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("reason", CHANGES)
def test_what_is_changed_about_a_layer(reason, served_by_peft):
    stock, fast = stock_and_fast(peft_model(), CHANGES[reason])
    (why,) = lorafast.explain(fast).layers.values()
    assert reason.strip() in why
    assert_same(stock, fast, torch.randn(5, K))
    assert len(served_by_peft) == 1


@pytest.mark.parametrize(
    "kind", ["forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_other_hooks_on_every_module(kind, served_by_peft):
    stock, fast = stock_and_fast(peft_model(), lambda layer: None)
    seen = []
    register = getattr(nn.modules.module, f"register_module_{kind}")
    handle = register(lambda module, *_: seen.append(type(module)))
    try:
        assert_same(stock, fast, torch.randn(5, K))
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 6
    assert len(served_by_peft) == 1


def test_hooks_on_every_module(served_by_peft):
    stock, fast = stock_and_fast(peft_model(), lambda layer: None)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        (why,) = lorafast.explain(fast).layers.values()
        assert why == "hooks are registered for all modules"
        assert_same(stock, fast, torch.randn(5, K))
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 6
    assert len(served_by_peft) == 1


VARIANTS = {
    "DoRA, active together with others": (
        {"use_dora": True, "adapters": 2}, "of DoRA, is active together with others",
    ),
    "BD-LoRA": (
        {"use_bdlora": {"target_modules_bd_a": ["layer"], "nblocks": 2}}, "BdLoraLinearVariant",
    ),
    "MiCA": ({"init_lora_weights": "mica"}, "MiCALinearVariant"),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_another_kind_of_adapter(variant, served_by_peft):
    options, reason = VARIANTS[variant]
    if "use_bdlora" in options:
        from peft.tuners.lora.config import BdLoraConfig

        options = options | {"use_bdlora": BdLoraConfig(**options["use_bdlora"])}
    stock = peft_model(**options)
    fast = lorafast.accelerate(copy.deepcopy(stock), quiet=True)
    (why,) = lorafast.explain(fast).layers.values()
    assert reason in why
    assert_same(stock, fast, torch.randn(5, K))
    assert len(served_by_peft) == 1


INPUTS = {
    "an argument that isn't known": (lambda: torch.randn(5, K), {"alora_offsets": None}),
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


def test_a_forward_of_nn_Linear_that_was_replaced(served_by_peft, monkeypatch):
    stock, fast = stock_and_fast(peft_model(), lambda layer: None)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * x @ self.weight.t())
    assert "the forward of Linear was replaced" in str(lorafast.explain(fast))
    assert_same(stock, fast, torch.randn(5, K))
    assert len(served_by_peft) == 1


def test_a_hook_on_the_magnitude_of_dora(served_by_peft):
    def hook(layer):
        magnitude = layer.lora_magnitude_vector["default"]
        magnitude.register_forward_hook(lambda module, args, output: output + 1.0)

    stock, fast = stock_and_fast(peft_model(use_dora=True), hook)
    assert "the magnitude of adapter 'default' has hooks" in str(lorafast.explain(fast))
    assert_same(stock, fast, torch.randn(5, K))
    assert len(served_by_peft) == 1


@pytest.mark.parametrize(
    "shapes", [((4, K + 1), (N, 4)), ((4, K), (N, 5)), ((0, K), (N, 0))], ids=str
)
def test_factors_that_do_not_fit(shapes, served_by_peft):
    def replace(layer):
        for factor, shape in zip((layer.lora_A, layer.lora_B), shapes, strict=True):
            factor["default"].weight = nn.Parameter(torch.ones(shape))

    def outcome(model):
        try:
            return model(x).sum().item()
        except RuntimeError as error:
            return str(error)

    stock, fast = stock_and_fast(peft_model(), replace)
    x = torch.randn(5, K)
    assert outcome(fast) == outcome(stock)
    assert len(served_by_peft) == 1


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_float32_over_float16_where_gradients_are_asked_for(kind, served_by_peft):
    """In float16 the gradients of small adapters would be lost."""
    stock, fast = peft_model(kind, torch.float16, upcast=True), None
    fast = lorafast.accelerate(copy.deepcopy(stock), quiet=True)
    assert "float32 over float16, and gradients are asked for" in str(lorafast.explain(fast))
    x = torch.randint(TOKENS, (3, 4)) if kind == "embedding" else torch.randn(5, K).half()
    assert_same(stock, fast, x)
    assert len(served_by_peft) == 1
    with torch.no_grad():
        fast(x)
        assert set(lorafast.explain(fast).layers.values()) == {None}
    assert len(served_by_peft) == 1


def test_a_magnitude_of_another_class(served_by_peft):
    def replace(layer):
        magnitude = layer.lora_magnitude_vector["default"]
        magnitude.__class__ = type("Own", (type(magnitude),), {})

    stock, fast = stock_and_fast(peft_model(use_dora=True), replace)
    assert "the magnitude of adapter 'default' is a Own" in str(lorafast.explain(fast))
    assert_same(stock, fast, torch.randn(5, K))
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


def test_dropout_of_dora_follows_the_layer():
    """Not the dropout's own mode, as PEFT has it."""
    model = peft_model(use_dora=True, lora_dropout=0.5)
    fast = lorafast.accelerate(copy.deepcopy(model), quiet=True)
    x = torch.randn(5, K)
    for training, dropout_training in ((False, True), (True, False)):
        found = []
        for tested in (model, fast):
            layer = layer_of(tested).train(training)
            layer.lora_dropout.train(dropout_training)
            torch.manual_seed(0)
            found.append(tested(x))
        torch.testing.assert_close(*found)


def test_a_bias_of_another_dtype(served_by_peft):
    fast = lorafast.accelerate(peft_model(dtype=torch.bfloat16), quiet=True)
    layer_of(fast).base_layer.bias.data = layer_of(fast).base_layer.bias.data.float()
    with torch.autocast("cpu", torch.bfloat16):
        fast(torch.randn(5, K))
    assert len(served_by_peft) == 1


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(5, K).to_sparse(),
        torch.nested.nested_tensor([torch.randn(n, K) for n in (2, 3)]),
    ],
    ids=["sparse", "nested"],
)
def test_input_of_another_layout(x, served_by_peft):
    stock, fast = stock_and_fast(peft_model(), lambda layer: None)

    def outcome(model):
        try:
            return torch.cat(list(model(x).unbind()))
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


EMBEDDINGS = {
    "max_norm": lambda layer: setattr(layer.base_layer, "max_norm", 1.0),
    "scale_grad_by_freq": lambda layer: setattr(layer.base_layer, "scale_grad_by_freq", True),
    "tensor parallel plan": lambda layer: setattr(layer.base_layer, "_hf_tp_plan", "rowwise"),
    "hooks": lambda layer: hooked(layer.base_layer),
    "scales what it gives": lambda layer: setattr(
        layer.base_layer, "embed_scale", torch.tensor(3.0)
    ),
    "a scaling of the shape [1]": lambda layer: layer.scaling.update(default=torch.ones(1)),
    "disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "not exactly an nn.Embedding": lambda layer: setattr(
        layer.base_layer, "__class__", type("ScaledEmbedding", (nn.Embedding,), {})
    ),
}


@pytest.mark.parametrize("reason", EMBEDDINGS)
def test_embedding(reason, served_by_peft):
    stock, fast = stock_and_fast(peft_model("embedding"), EMBEDDINGS[reason])
    (why,) = lorafast.explain(fast).layers.values()
    assert reason in why
    assert_same(stock, fast, torch.randint(TOKENS, (3, 4)))
    assert len(served_by_peft) == 1


def own_factor(layer):
    lora_A = layer.lora_embedding_A["default"].detach().as_subclass(OwnTensor)
    layer.lora_embedding_A["default"] = nn.Parameter(lora_A)


FACTORS = {
    "none of its adapters is active": lambda layer: setattr(layer, "_active_adapter", []),
    "has a OwnTensor, not a plain tensor": own_factor,
    "has the shapes [4, 34] and [40, 4]": lambda layer: layer.lora_embedding_A.update(
        {"default": nn.Parameter(torch.ones(4, TOKENS + 3))}
    ),
    "is torch.float64, the weight torch.float32": lambda layer: layer.lora_embedding_A.double(),
}


@pytest.mark.parametrize("reason", FACTORS)
def test_embedding_of_other_factors(reason, served_by_peft):
    stock, fast = stock_and_fast(peft_model("embedding"), FACTORS[reason])
    assert reason in str(lorafast.explain(fast))
    tokens = torch.randint(TOKENS, (3, 4))
    outcomes = []
    for model in (stock, fast):
        try:
            outcomes.append(model(tokens).sum().item())
        except RuntimeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
    assert len(served_by_peft) == 1


def test_embedding_with_sparse_gradients(served_by_peft):
    stock, fast = stock_and_fast(
        peft_model("embedding"), lambda layer: setattr(layer.base_layer, "sparse", True)
    )
    tokens = torch.randint(TOKENS, (3, 4))
    torch.testing.assert_close(fast(tokens), stock(tokens), rtol=0, atol=0)
    assert len(served_by_peft) == 1


def test_embedding_of_a_parametrized_factor(served_by_peft):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    def parametrize(layer):
        nn.utils.parametrize.register_parametrization(layer.lora_embedding_A, "default", Twice())

    stock, fast = stock_and_fast(peft_model("embedding", adapters=2), parametrize)
    assert "adapter 'default' has a NoneType" in str(lorafast.explain(fast))
    assert_same(stock, fast, torch.randint(TOKENS, (3, 4)))
    assert len(served_by_peft) == 1


def test_tokens_of_a_subclass(served_by_peft):
    stock, fast = stock_and_fast(peft_model("embedding"), lambda layer: None)
    tokens = torch.randint(TOKENS, (3, 4)).as_subclass(OwnTensor)
    torch.testing.assert_close(fast(tokens), stock(tokens), rtol=0, atol=0)
    assert len(served_by_peft) == 1


def test_embedding_of_dora(served_by_peft):
    stock = peft_model("embedding", use_dora=True)
    fast = lorafast.accelerate(copy.deepcopy(stock), quiet=True)
    assert "DoraEmbeddingVariant" in str(lorafast.explain(fast))
    assert_same(stock, fast, torch.randint(TOKENS, (3, 4)))
    assert len(served_by_peft) == 1


def test_layers_of_other_types_stay_as_they_are():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.linear = nn.Linear(5, 6)

        def forward(self, x):
            return self.conv(x).sum() + self.linear.weight.sum()

    model = get_peft_model(Net(), LoraConfig(target_modules=["conv", "linear"]))
    lorafast.accelerate(model, quiet=True)
    found = lorafast.explain(model)
    assert found.layers["base_model.model.linear"] is None
    assert "a Conv2d layer" in found.layers["base_model.model.conv"]
    assert type(model.base_model.model.conv) is stock_layers.Conv2d
    assert found.summary == (
        "1 of 2 adapter layers are fast, 1 PEFT's own (lorafast.explain(model) says why)"
    )


def test_a_parameter_targeted_directly():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8, 8))

        def forward(self, x):
            return torch.einsum("bi,eoi->beo", x, self.weight)

    settings = config(target_modules=[], target_parameters=["experts.weight"])
    stock = get_peft_model(nn.ModuleDict({"experts": Experts()}), settings)
    fast = lorafast.accelerate(copy.deepcopy(stock), quiet=True)
    assert "a ParamWrapper layer" in str(lorafast.explain(fast))
    x = torch.randn(4, 8)
    run = [m.base_model.model["experts"](x) for m in (stock, fast)]
    torch.testing.assert_close(*run, rtol=0, atol=0)


def test_dora_with_a_bias_of_B(served_by_peft):
    """Which PEFT refuses to make, but would compute."""

    def give_bias(layer):
        layer.lora_B["default"].bias = nn.Parameter(torch.ones(N))

    stock, fast = stock_and_fast(peft_model(use_dora=True), give_bias)
    assert "of DoRA with lora_bias" in str(lorafast.explain(fast))
    assert_same(stock, fast, torch.randn(5, K))
    assert len(served_by_peft) == 1
