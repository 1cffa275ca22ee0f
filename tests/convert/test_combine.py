"""``combine`` against PEFT's ``add_weighted_adapter``: the same factors, and the same sum."""

import copy
import warnings

import pytest
import torch
from torch import nn

import lorafast
from lorafast.convert.adapter import adapter_of
from lorafast.convert.combine import HOW, _quantile
from lorafast.reference import contract

peft = pytest.importorskip("peft")
pytest.importorskip("safetensors")

WEIGHTS = [0.7, -0.4]
FACTORS = [how for how in HOW if not how.endswith("svd")]
PRODUCTS = [how for how in HOW if how.endswith("svd")]


class Net(nn.Module):
    """An embedding, a convolution and a linear layer, of odd sizes."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, 9)
        self.conv = nn.Conv2d(1, 5, 3)
        self.head = nn.Linear(7, 6)

    def forward(self, ids):
        return self.head(self.conv(self.tokens(ids)[:, None]).mean(1))


@pytest.fixture(scope="module")
def two():
    """PEFT's model with adapters a and b, and both as ``combine`` takes them."""
    configs = {
        name: peft.LoraConfig(
            r=4, lora_alpha=alpha, use_rslora=rslora, target_modules=["tokens", "conv", "head"]
        )
        for name, alpha, rslora in (("a", 3, True), ("b", 6, False))
    }
    return with_adapters(configs)


def with_adapters(configs):
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = list(configs)
        model = peft.get_peft_model(Net(), configs[names[0]], adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, configs[name])
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.normal_()
        return model, [as_given(model, name) for name in names]


def as_given(model, name):
    state = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return model.peft_config[name], state


def both(two, how, weights=WEIGHTS, **options):
    """PEFT's combined factors and ours, drawn alike."""
    model, given = two
    model = copy.deepcopy(model)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        # The last that PEFT calls before it combines: what it draws before is thrown away.
        patch.setattr(peft.tuners.lora.model, "_freeze_adapter", lambda *_: torch.manual_seed(29))
        stock = torch.bernoulli  # in float64 it would draw others
        patch.setattr(torch, "bernoulli", lambda p: stock(p.float()).to(p.dtype))
        model.base_model.add_weighted_adapter(
            ["a", "b"][: len(weights)], weights, "ours", combination_type=how, **options
        )
    torch.manual_seed(29)
    return as_given(model, "ours")[1], lorafast.combine(
        given[: len(weights)], weights, how, **options
    )


@pytest.mark.parametrize("how", FACTORS)
def test_factors_are_pefts_to_the_bit(two, how):
    options = {} if how in ("linear", "cat") else {"density": 0.6}
    for extra in ({}, {"majority_sign_method": "frequency"}) if "ties" in how else ({},):
        expected, ours = both(two, how, **options, **extra)
        assert expected.keys() == ours.tensors.keys()
        for key, tensor in expected.items():
            assert torch.equal(ours.tensors[key], tensor), key


def product(tensors, key):
    end = ".lora_A.weight" if key.endswith(".lora_A.weight") else ".lora_embedding_A"
    other = key.replace(end, end.replace("_A", "_B"))
    return tensors[other].double().flatten(1) @ tensors[key].double().flatten(1)


@pytest.mark.parametrize("how", PRODUCTS)
def test_products_are_pefts(two, how):
    """Singular vectors have no sign of their own: the product has. It is as near to PEFT's in float64
    as PEFT's in float32 is."""
    options = {"svd_rank": 3} | ({} if how == "svd" else {"density": 0.6})
    expected, ours = both(two, how, **options)
    model, given = two
    exact, _ = both((copy.deepcopy(model).double(), given), how, **options)
    for key in expected:
        if key.endswith("_A") or key.endswith("lora_A.weight"):
            assert ours.tensors[key].shape == expected[key].shape
            mine, theirs, ref64 = (product(t, key) for t in (ours.tensors, expected, exact))
            why = contract.why_broken(mine, theirs, ref64, dtype=torch.float32)
            assert why is None, f"{key} is {why}"
            # As PEFT splits it: Vᵀ has rows of length one.
            assert ours.tensors[key].flatten(1).norm(dim=1).sub(1).abs().max() < 1e-5


def test_clamping(two):
    """PEFT's quantile of both factors, whose signs are those of the SVD."""
    values = torch.randn(1001, generator=torch.Generator().manual_seed(1))
    for q in (0.3, 0.95, 1.0):
        assert torch.equal(_quantile(values, q), values.quantile(q))
    free = lorafast.combine(two[1], WEIGHTS, "svd")
    tight = lorafast.combine(two[1], WEIGHTS, "svd", svd_clamp=0.9)
    for key, tensor in tight.tensors.items():
        if "A" in key:
            pair = [key, key.replace("_A", "_B")]
            bound = torch.cat([free.tensors[one].flatten() for one in reversed(pair)]).quantile(0.9)
            assert torch.equal(tensor, free.tensors[key].clamp(-bound, bound))


@pytest.mark.parametrize("how", ["cat", "svd"])
def test_the_model_computes_the_weighted_sum(two, how, tmp_path):
    """Also of an adapter with rsLoRA, of which PEFT's own result is √r times too much."""
    _, given = two
    net = Net().double()
    deltas = []
    for one in given:
        adapted = lorafast.load_adapter(copy.deepcopy(net), lorafast.Adapter(*as_adapter(one)))
        deltas.append({n: m.delta_weight() for n, m in layers_of(adapted)})
    combined = lorafast.combine(given, WEIGHTS, how, svd_rank=8, folder=tmp_path / "sum")
    lorafast.save_adapter(combined, tmp_path / "again")
    with pytest.raises(ValueError, match="are for a model, and this is an Adapter"):
        lorafast.save_adapter(combined, tmp_path / "again", ["head"])
    for source in (combined, tmp_path / "sum", tmp_path / "again"):
        model = lorafast.load_adapter(copy.deepcopy(net), source)
        for name, layer in layers_of(model):
            expected = sum(w * delta[name] for w, delta in zip(WEIGHTS, deltas, strict=True))
            assert layer.scaling == 1
            # As what PyTorch makes of the same products in float32.
            eager = sum(w * delta[name].float() for w, delta in zip(WEIGHTS, deltas, strict=True))
            size64 = sum(
                (w * delta[name]).square() for w, delta in zip(WEIGHTS, deltas, strict=True)
            ).sqrt()
            why = contract.why_broken(
                layer.delta_weight(), eager.double(), expected, size64, torch.float32
            )
            assert why is None, f"{name} is {why}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "sum").eval()
    model_of_peft, _ = two
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = copy.deepcopy(model_of_peft)
        theirs.base_model.add_weighted_adapter(["a", "b"], WEIGHTS, "sum", combination_type=how)
    rank = theirs.peft_config["sum"].r
    assert theirs.base_model.model.head.scaling["sum"] == pytest.approx(rank**0.5)
    ids = torch.arange(9)[None]
    assert torch.allclose(read(ids), model.eval()(ids), rtol=1e-12, atol=0)


def as_adapter(given):
    adapter = adapter_of(given)
    return adapter.config, adapter.tensors


def layers_of(model):
    return [(n, m) for n, m in model.named_modules() if isinstance(m, lorafast.nn.AdapterLayer)]


def test_one_adapter_is_scaled_and_density_1_is_linear(two):
    expected, ours = both(two, "ties", [0.5])
    assert all(torch.equal(ours.tensors[key], expected[key]) for key in expected)
    whole = lorafast.combine(two[1], WEIGHTS, "dare", density=1)
    linear = lorafast.combine(two[1], WEIGHTS)
    assert all(torch.equal(whole.tensors[key], linear.tensors[key]) for key in linear.tensors)


def test_other_layers_and_ranks():
    """A layer that one adapter has alone, and one of another rank."""
    model, given = with_adapters(
        {
            "a": peft.LoraConfig(r=2, target_modules=["conv", "head"], rank_pattern={"head": 3}),
            "b": peft.LoraConfig(r=2, target_modules=["tokens", "head"]),
        }
    )
    cat = lorafast.combine(given, [1, 2], "cat")
    assert cat.config["target_modules"] == ["conv", "head", "tokens"]
    assert {n: m.r for n, m in layers_of(lorafast.load_adapter(Net(), cat))} == {
        "tokens": 2, "conv": 2, "head": 5,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.base_model.add_weighted_adapter(["a", "b"], [1, 2], "sum", combination_type="cat")
    theirs = as_given(model, "sum")[1]
    for key, tensor in cat.tensors.items():  # PEFT pads with zeros
        padded = theirs[key]
        inside = padded[: tensor.shape[0], : tensor.shape[1]]
        assert torch.equal(inside, tensor)
        assert padded.count_nonzero() == tensor.count_nonzero()
    with pytest.raises(
        ValueError, match=r"head\.lora_A\.weight has shape \[3, 7\] in one .*\[2, 7\]"
    ):
        lorafast.combine(given, [1, 2])


def test_a_grouped_convolution_side_by_side(assert_same):
    """Each group's block of B meets its own rows of A."""
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).double()
    ours = []
    for seed in (1, 2):
        model = lorafast.adapt(copy.deepcopy(net), r=2 * seed, targets=["0"])
        torch.manual_seed(seed)
        for parameter in model[0].adapter_parameters().values():
            nn.init.normal_(parameter)
        tensors = {
            f"base_model.model.0.{n}.weight": p for n, p in model[0].adapter_parameters().items()
        }
        config = {"peft_type": "LORA", "r": 2 * seed, "lora_alpha": 3, "target_modules": ["0"]}
        ours.append((config, tensors))
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    parts = [
        lorafast.load_adapter(copy.deepcopy(net), lorafast.Adapter(*one)).eval()(x) - net(x)
        for one in ours
    ]
    both = lorafast.load_adapter(copy.deepcopy(net), lorafast.combine(ours, [1, -2], "cat")).eval()
    assert_same(both(x) - net(x), parts[0] - 2 * parts[1])
    with pytest.raises(ValueError, match="convolution with 2 groups"):
        lorafast.combine(ours, [1, 1], "svd")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"how": "mean"}, "how is 'mean', expected one of linear"),
        ({"how": "ties"}, "density is None, expected a number above 0"),
        ({"how": "dare", "density": 0}, "density is 0, expected a number above 0"),
        ({"weights": [1]}, "weights are 1, expected 2"),
        ({"weights": [1, float("nan")]}, r"weights\[1\] is nan"),
        ({"how": "ties", "density": 1, "majority_sign_method": "most"}, "majority_sign_method is"),
        ({"how": "svd", "svd_rank": 0}, "svd_rank is 0"),
        ({"how": "svd", "svd_clamp": 2}, "svd_clamp is 2"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:24],
)
def test_bad_arguments(two, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        lorafast.combine(**({"adapters": two[1], "weights": WEIGHTS} | change))


def test_adapters_that_do_not_go_together(two):
    config, tensors = as_adapter(two[1][0])
    head = "base_model.model.head.lora_B.weight"
    wider = lorafast.Adapter(config, tensors | {head: torch.zeros(8, 4)})
    with pytest.raises(
        ValueError, match=r"head\.lora_B\.weight has shape \[6, 4\].*different layers"
    ):
        lorafast.combine([two[1][0], wider], WEIGHTS)
    dora = lorafast.Adapter(config | {"use_dora": True}, tensors)
    with pytest.raises(ValueError, match="adapter 1 has DoRA"):
        lorafast.combine([two[1][0], dora], WEIGHTS)
    norms = [
        lorafast.Adapter(
            config | {"modules_to_save": ["n"]}, tensors | {"base_model.model.n.weight": v}
        )
        for v in (torch.zeros(2), torch.ones(2))
    ]
    with pytest.raises(ValueError, match=r"base_model\.model\.n\.weight is stored whole"):
        lorafast.combine(norms, WEIGHTS)
    one = lorafast.combine([norms[0], two[1][1]], WEIGHTS)
    assert one.config["modules_to_save"] == ["n"]
    assert "base_model.model.n.weight" in one.tensors
    with pytest.raises(
        ValueError, match=r"head\.lora_B\.weight \[6, 2\], expected \[r, in_features\]"
    ):
        lorafast.combine([lorafast.Adapter(config, tensors | {head: torch.zeros(6, 2)})], [1])
    with pytest.raises(TypeError, match="an adapter is int"):
        lorafast.combine([3], [1])
    with pytest.raises(TypeError, match="adapters is str, expected a list"):
        lorafast.combine("ab", [1, 1])
    with pytest.raises(TypeError, match="weights is NoneType, expected a list of numbers"):
        lorafast.combine(two[1], None)
    for bad, sentence in (
        (torch.full((6, 4), torch.nan), "is NaN or infinite"),
        (torch.ones(6, 4, dtype=torch.int8), r"is torch\.int8, expected floats"),
        (torch.ones(6, 4, dtype=torch.complex64), r"is torch\.complex64, expected floats"),
    ):
        with pytest.raises(ValueError, match=rf"head\.lora_B\.weight of adapter 1 {sentence}"):
            lorafast.combine([two[1][0], lorafast.Adapter(config, tensors | {head: bad})], WEIGHTS)
    assert repr(lorafast.Adapter({}, {})) == "Adapter(r=None, 0 layers, 0 numbers)"


@pytest.mark.parametrize(
    ("missing", "partner"),
    [("lora_A.weight", "lora_B.weight"), ("lora_B.weight", "lora_A.weight")],
)
def test_half_a_pair_is_refused(two, missing, partner):
    config, tensors = as_adapter(two[1][1])
    start = "base_model.model.head."
    half = {key: one for key, one in tensors.items() if key != start + missing}
    with pytest.raises(
        ValueError, match=rf"the adapter has {start}{partner} and no {start}{missing}"
    ):
        lorafast.combine([two[1][0], lorafast.Adapter(config, half)], WEIGHTS, "cat")


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("foo.bar", r"tensor 'foo\.bar' doesn't begin with 'base_model\.model\.'"),
        (
            "base_model.model.head.lora_B.bias",
            r"has base_model\.model\.head\.lora_B\.bias, which is no factor",
        ),
    ],
)
def test_a_tensor_in_no_layout_is_refused(two, key, sentence):
    config, tensors = as_adapter(two[1][1])
    more = lorafast.Adapter(config, tensors | {key: torch.ones(2)})
    with pytest.raises(ValueError, match=sentence):
        lorafast.combine([two[1][0], more], WEIGHTS)


def test_starts_that_take_a_part_of_W_away(two):
    """PiSSA's and OLoRA's factors belong to what is left of W."""
    config, tensors = as_adapter(two[1][0])
    plain, pissa, olora = (
        lorafast.Adapter(config | {"init_lora_weights": how}, tensors)
        for how in (True, "pissa", "olora")
    )
    with pytest.raises(ValueError, match="adapter 1 has init_lora_weights 'pissa' and adapter 0"):
        lorafast.combine([plain, pissa], WEIGHTS)
    assert lorafast.combine([pissa, pissa], WEIGHTS).config["init_lora_weights"] == "pissa"
    with pytest.raises(ValueError, match=r"has r = 4 .* would have r = 8"):
        lorafast.combine([pissa, pissa], WEIGHTS, "cat")
    with pytest.raises(ValueError, match=r"'olora' leaves another part"):
        lorafast.combine([olora, olora], WEIGHTS)


def test_autocast_changes_nothing(two):
    for how in ("cat", "ties_svd"):
        options = {"density": 1} if how == "ties_svd" else {}
        expected = lorafast.combine(two[1], WEIGHTS, how, **options).tensors
        with torch.autocast("cpu", torch.bfloat16):
            ours = lorafast.combine(two[1], WEIGHTS, how, **options).tensors
        assert all(torch.equal(ours[key], expected[key]) for key in expected)
