"""EVA and CorDA: PEFT's numbers, files that fit, refusals."""

import copy
import dataclasses
import importlib
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

import lorafast
from lorafast.convert.incremental_pca import IncrementalPCA
from lorafast.nn.lora_operand_linear import LoRAOperandLinear

peft = pytest.importorskip("peft")

K, VOCABULARY = 24, 40


class Net(nn.Module):
    """Two blocks of layers that share an input, of which the second one sees few directions."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, K)
        self.q, self.k = nn.Linear(K, 16), nn.Linear(K, 16)
        self.narrow, self.up = nn.Linear(16, 3), nn.Linear(3, K)
        self.wide = nn.Linear(K, 32)
        self.out = nn.Linear(32, 8)

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = self.embed(input_ids)
        x = x + self.up(self.narrow(torch.tanh(self.q(x)) * self.k(x)))
        return self.out(torch.tanh(self.wide(x)))


TARGETS = ["q", "k", "narrow", "wide", "out"]


def network(dtype=torch.float32):
    torch.manual_seed(1)
    return Net().to(dtype)


def batches(n=4, size=6, T=12):
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(n):
        tokens = torch.randint(VOCABULARY, (size, T), generator=generator)
        lengths = torch.randint(T // 2, T + 1, (size, 1), generator=generator)
        mask = (torch.arange(T) < lengths).long()
        labels = torch.where(torch.arange(T) < 2, -100, tokens)
        found.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return found


def theirs_with_eva(net, data, r=3, targets=TARGETS, **eva):
    settings = peft.LoraConfig(
        r=r, lora_alpha=6, target_modules=targets, init_lora_weights="eva",
        eva_config=peft.tuners.lora.config.EvaConfig(**eva),
    )  # fmt: skip
    model = peft.get_peft_model(copy.deepcopy(net), settings)
    peft.initialize_lora_eva_weights(model, data, show_progress_bar=False)
    return model


def assert_same_start(ours, theirs, dtype=torch.float32):
    """By name: which layers are adapted, A, B, the scaling, what is left of W."""
    ours = {n: m for n, m in ours.named_modules() if isinstance(m, lorafast.nn.LoRALinear)}
    theirs = {
        n: m
        for n, m in theirs.base_model.model.named_modules()
        if isinstance(m, peft.tuners.lora.Linear)
    }
    assert ours.keys() == theirs.keys()
    for name, layer in ours.items():
        stock = theirs[name]
        A, B = stock.lora_A["default"].weight, stock.lora_B["default"].weight
        assert layer.lora_A.requires_grad
        assert layer.lora_B.requires_grad
        torch.testing.assert_close(layer.lora_A.to(dtype), A.to(dtype))
        torch.testing.assert_close(layer.lora_B.to(dtype), B.to(dtype))
        assert layer.scaling == pytest.approx(stock.scaling["default"])
        torch.testing.assert_close(layer.weight, stock.base_layer.weight)


@pytest.mark.parametrize(
    "options",
    [{}, {"rho": 1.0, "tau": 0.9}, {"rho": 1.5, "use_label_mask": False},
     {"adjust_scaling_factors": False}],
    ids=str,
)  # fmt: skip
def test_eva_has_the_numbers_of_peft(options):
    net, data = network(), batches()
    theirs = theirs_with_eva(net, data, **options)
    ours = lorafast.adapt(copy.deepcopy(net), 3, TARGETS, alpha=6).train()
    ranks = lorafast.initialize_eva(ours, iter(data), **options)
    assert_same_start(ours, theirs)
    assert sum(ranks.values()) == 3 * len(TARGETS)
    assert (set(ranks.values()) == {3}) == (options.get("rho") == 1.0)
    assert all(module.training for module in ours.modules())
    x = data[0]["input_ids"]
    torch.testing.assert_close(ours(x), net(x))
    ours(x).sum().backward()


def test_eva_of_a_layer_that_gets_no_rank(tmp_path):
    net, data = network(), batches(size=12)
    theirs = theirs_with_eva(net, data, r=1, rho=4)
    ours = lorafast.adapt(copy.deepcopy(net), 1, TARGETS, alpha=6)
    called = []
    ours.out.register_forward_hook(lambda *_: called.append(1))
    ranks = lorafast.initialize_eva(ours, data, rho=4)
    gone = [name for name, rank in ranks.items() if rank == 0]
    assert gone
    assert all(type(ours.get_submodule(name)) is nn.Linear for name in gone)
    assert_same_start(ours, theirs)
    x, before = data[0]["input_ids"], len(called)
    ours(x)
    assert len(called) == before + 1
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_()
    lorafast.save_adapter(ours, tmp_path)
    expected = ours.double()(x)
    read = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path).double()
    torch.testing.assert_close(read(input_ids=x), expected)
    again = lorafast.load_adapter(copy.deepcopy(net), tmp_path).double()
    torch.testing.assert_close(again(x), expected)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = lorafast.load_adapter(copy.deepcopy(net), tmp_path / "theirs")
    assert_same_start(loaded, theirs)


def test_eva_whitens_where_inputs_differ():
    net, data = network(), batches()
    targets = [name for name in TARGETS if name != "k"]
    theirs = theirs_with_eva(net, data, targets=targets, whiten=True)
    ours = lorafast.adapt(net, 3, targets, alpha=6)
    lorafast.initialize_eva(ours, data, whiten=True)
    assert_same_start(ours, theirs)


@pytest.mark.parametrize("kind", ["nf4", "Conv1D", "DoRA"])
def test_eva_over_other_weights(kind):
    from transformers.pytorch_utils import Conv1D

    net, data = network(), batches(size=12)
    if kind == "nf4":
        lorafast.quantize(net, "nf4", block=8, nested=False)
    elif kind == "Conv1D":
        for name in TARGETS:
            linear = net.get_submodule(name)
            made = Conv1D(linear.out_features, linear.in_features)
            made.weight, made.bias = nn.Parameter(linear.weight.t().contiguous()), linear.bias
            setattr(net, name, made)
    x = data[0]["input_ids"]
    model = lorafast.adapt(net, 1, TARGETS, use_dora=kind == "DoRA")
    with lorafast.disabled(model):
        before = model(x)
    ranks = lorafast.initialize_eva(model, data, rho=4, mask=lambda batch: None)
    assert sum(ranks.values()) == len(TARGETS)
    assert 0 in ranks.values()
    adapters = [m for m in model.modules() if isinstance(m, lorafast.nn.LoRALinear)]
    assert all(isinstance(m, LoRAOperandLinear) == (kind == "nf4") for m in adapters)
    for layer in adapters:
        gram = layer.lora_A.double() @ layer.lora_A.double().t()
        torch.testing.assert_close(gram.float(), torch.eye(layer.r))
    torch.testing.assert_close(model(x), before)


def test_components_are_those_of_peft_and_of_all_rows():
    X = torch.randn(3, 50, 9) * torch.logspace(0, -2, 9) + torch.randn(9)
    Theirs = importlib.import_module("peft.utils.incremental_pca").IncrementalPCA
    ours, theirs = IncrementalPCA(4), Theirs(n_components=4, lowrank=True, lowrank_seed=42)
    whole = IncrementalPCA(9)  # 2 · 9 are more than there are columns
    for rows in X:
        ours.add(rows)
        theirs.partial_fit(rows)
        whole.add(rows)
    torch.testing.assert_close(ours.components, theirs.components_)
    torch.testing.assert_close(ours.singular_values, theirs.singular_values_)
    torch.testing.assert_close(ours.explained, theirs.explained_variance_ratio_)
    rows = X.reshape(-1, 9).double()
    _, S, Vh = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)
    torch.testing.assert_close(whole.singular_values.float(), S.float())
    cosines = (whole.components.double() * Vh).sum(dim=1).abs().float()
    torch.testing.assert_close(cosines, torch.ones(9))
    assert whole.explained.sum().item() == pytest.approx(1)


def one_by_one(data):
    return [{"input_ids": row[None]} for batch in data for row in batch["input_ids"]]


def preprocess_corda(*given, **options):
    """PEFT's, which takes a dataclass from ``attr``, a package that it doesn't require."""
    stand_in = SimpleNamespace(dataclass=dataclasses.dataclass)
    with mock.patch.dict(sys.modules, attr=sys.modules.get("attr", stand_in)):
        module = importlib.import_module("peft.tuners.lora.corda")
    module.preprocess_corda(*given, **options)


def theirs_with_corda(net, data, method="ipm"):
    settings = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=TARGETS, init_lora_weights="corda",
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method=method),
    )  # fmt: skip
    model = copy.deepcopy(net)
    preprocess_corda(model, settings, run_model=lambda: [model(**batch) for batch in data])
    return model, peft.get_peft_model(copy.deepcopy(model), settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_has_the_numbers_of_peft(method, dtype):
    net, data = network(dtype), one_by_one(batches())
    _, theirs = theirs_with_corda(net, data, method)
    ours = lorafast.adapt(copy.deepcopy(net), 3, TARGETS, alpha=6).train()
    lorafast.initialize_corda(ours, data, method=method)
    assert_same_start(ours, theirs, dtype)
    assert all(module.training for module in ours.modules())
    if dtype is torch.float32:
        torch.testing.assert_close(ours(data[0]["input_ids"]), net(data[0]["input_ids"]))


def test_a_saved_adapter_of_corda_goes_with_the_same_data(tmp_path):
    net, data = network(), one_by_one(batches())
    ours = lorafast.adapt(copy.deepcopy(net), 3, TARGETS, alpha=6)
    lorafast.initialize_corda(ours, data)
    again = copy.deepcopy(ours)
    with torch.no_grad():
        ours.q.lora_B.add_(0.1)
    lorafast.save_adapter(ours, tmp_path)
    x = data[0]["input_ids"]
    torch.testing.assert_close(lorafast.load_adapter(again, tmp_path)(x), ours(x))
    preprocessed, _ = theirs_with_corda(net, data)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(preprocessed, tmp_path)(x), ours(x))
    with pytest.raises(ValueError, match="init_lora_weights in the config is 'corda', and"):
        lorafast.load_adapter(copy.deepcopy(net), tmp_path)
    with pytest.raises(ValueError, match="init_lora_weights was 'corda'"):
        lorafast.add_adapter(ours, "other")
    # For the model as it was: the change has twice the rank.
    merged = lorafast.merge(copy.deepcopy(ours))
    found = lorafast.extract(merged, net, r=6, targets=TARGETS, report=None)
    plain = lorafast.load_adapter(copy.deepcopy(net), found.adapter)
    torch.testing.assert_close(plain(x), ours(x))


def trained(model):
    nn.init.ones_(model.up.lora_B)


def merged(model):
    model.up.merge()


def named(model):
    lorafast.add_adapter(model, "other", 2)


def with_nan(model):
    nn.init.constant_(model.embed.weight, torch.nan)


EVA, CORDA = lorafast.initialize_eva, lorafast.initialize_corda
ONE_TOKEN = [torch.zeros(1, 1, dtype=torch.int64)]


@pytest.mark.parametrize(
    ("start", "change", "options", "message"),
    [
        (EVA, None, {"rho": 0.5}, "rho is 0.5, expected a number from 1 to 1000"),
        (EVA, None, {"tau": 2}, "tau is 2, expected a number from 0 to 1"),
        (EVA, None, {"max_passes": 0}, "max_passes is 0, expected an integer of at least 1"),
        (EVA, None, {"rho": 2.4}, r"rho · r of up is 5, expected at most its 3 features"),
        (EVA, trained, {}, "up can't begin with EVA: its lora_B isn't zero"),
        (EVA, merged, {}, "up can't begin with EVA: it is merged"),
        (EVA, named, {}, "q can't begin with EVA: it has the adapters default, other"),
        (EVA, with_nan, {}, "the input of q has NaN or infinity in a batch"),
        (EVA, None, {"batches": []}, "batches is empty"),
        (EVA, None, {"forward": lambda m, b: m.q(m.embed(b["input_ids"]))}, "no batch reaches k, n"),
        (EVA, None, {"batches": ONE_TOKEN}, "q sees at most 1 inputs in a batch, expected at least 2"),
        (EVA, None, {"tau": 1, "max_passes": 1}, "turn still after 1 passes"),
        (CORDA, None, {"method": "else"}, "method is 'else', expected 'ipm' or 'kpm'"),
        (CORDA, trained, {}, "up can't begin with CorDA: its lora_B isn't zero"),
        (CORDA, with_nan, {}, "the input of q has NaN or infinity in a batch"),
        (CORDA, None, {"batches": []}, "no batch reaches k, nar"),
        (CORDA, lambda m: nn.init.zeros_(m.embed.weight), {}, "the largest input of q in a batch is 0"),
        (CORDA, lambda m: setattr(m.q, "alpha", -1), {}, "alpha of q is -1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_leaves_the_model_as_it_was(start, change, options, message):
    model = lorafast.adapt(network(), 2, [*TARGETS, "up"])
    if change is not None:
        change(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    arguments = {"batches": batches(2)} | ({"rho": 1.0} if start is EVA else {}) | options
    with pytest.raises(ValueError, match=message):
        start(model, **arguments)
    assert dict(model.named_modules()) == modules
    assert not any(module._forward_pre_hooks for module in modules.values())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], equal_nan=True, rtol=0, atol=0)


def test_what_has_no_part_to_begin_with():
    quantized = lorafast.quantize(nn.Sequential(nn.Linear(8, 8)), "nf4", block=8)
    with pytest.raises(TypeError, match="the weight of 0 is no dense one of floats"):
        CORDA(lorafast.adapt(quantized, 2), [torch.ones(2, 8)])
    with pytest.raises(ValueError, match="r of 0 is 9, expected at most 8, the smaller side"):
        CORDA(lorafast.adapt(nn.Sequential(nn.Linear(8, 8)), 9), [torch.ones(2, 8)])
    with pytest.raises(ValueError, match="the model has no adapted layer"):
        EVA(nn.Linear(2, 2), [])
    net = lorafast.adapt(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4)), 1, ["0", "1"])
    with pytest.warns(UserWarning, match="EVA is of linear layers alone, and these begin as .* 0"):
        EVA(net, [torch.arange(5), torch.arange(5)])
    with pytest.raises(
        ValueError, match=r"'eva', which begins from data: .* lorafast\.initialize_eva"
    ):
        lorafast.adapt(nn.Sequential(nn.Linear(8, 8)), init_lora_weights="eva")
