"""Several adapters by name in one model: one is active, and nobody sees the others."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from models import llama_config
from torch import nn

import lorafast
from lorafast.nn import inactive

pytest.importorskip("safetensors")


@pytest.fixture
def model(net, draw_adapters):
    """One with "default" of rank 2 and "other" of rank 3 with rsLoRA, both drawn."""
    draw_adapters(lorafast.adapt(net, r=2, alpha=3))
    lorafast.add_adapter(net, "other", 3, alpha=5, use_rslora=True)
    draw_inactive(net)
    return net


def draw_inactive(model):
    torch.manual_seed(41)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".inactive." in name:
                parameter.normal_()


def output(model, x, name):
    """That of a copy in which ``name`` is active."""
    model = copy.deepcopy(model)
    lorafast.set_adapter(model, name)
    return model(x)


def formula(model, x, name):
    """What the model computes with the adapter ``name`` alone."""
    plain = copy.deepcopy(model)
    lorafast.set_adapter(plain, name)
    return lorafast.merge(plain)(x)


def test_only_the_active_one_computes_and_trains(model, x, assert_same):
    assert lorafast.adapter_names(model) == ("default", "other")
    before = model(x)
    assert_same(before, formula(model, x, "default"))
    up = model.block.up
    mine = up.lora_A
    lorafast.set_adapter(model, "other")
    assert lorafast.adapter_names(model) == ("other", "default")
    assert (up.r, up.alpha, up.use_rslora, up.scaling) == (3, 5, True, 5 / 3**0.5)
    assert_same(model(x), formula(model, x, "other"))
    assert (model(x) - before).norm() > 0.01 * before.norm()
    model(x).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"{layer}.lora_{half}" for layer in ("block.up", "block.down", "head") for half in "AB"
    }
    assert mine.grad is None
    lorafast.set_adapter(model, "default")
    assert up.lora_A is mine
    assert torch.equal(model(x), before)
    lorafast.set_adapter(model, "default", is_trainable=False)
    assert not any(p.requires_grad for p in model.parameters())
    lorafast.delete_adapter(model, "other")
    assert lorafast.adapter_names(model) == ("default",)
    assert not any("inactive" in name for name in model.state_dict())


def test_an_optimizer_of_both_goes_on_with_each(model, x):
    """AdamW's states belong to parameters: they come and go with their adapter."""
    alone = copy.deepcopy(model)
    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    both = torch.optim.AdamW(adapters, lr=0.1)

    def train(model, optimizer):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    for name in ("default", "other", "default"):
        lorafast.set_adapter(model, name)
        train(model, both)
    one = torch.optim.AdamW([p for p in alone.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        train(alone, one)
    assert torch.equal(model(x), alone(x))


def test_states_copies_and_casts(model, x):
    """A state says which one is active, and a model that loads it has that one active."""
    fresh = copy.deepcopy(model)
    draw_inactive(fresh)
    lorafast.set_adapter(model, "other")
    keys = {key for key in model.state_dict() if key.startswith("block.down")}
    assert keys == {
        "block.down.weight", "block.down.lora_A", "block.down.lora_B",
        "block.down.inactive.default.lora_A", "block.down.inactive.default.lora_B",
    }  # fmt: skip
    expected = model(x)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    with pytest.warns(UserWarning, match="the state has the adapter 'other' active"):
        fresh.load_state_dict(model.state_dict())
    assert lorafast.adapter_names(fresh) == ("other", "default")
    for one in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(one(x), expected)
        lorafast.set_adapter(one, "default")
        assert torch.equal(one(x), output(model, x, "default"))
        assert {p.dtype for p in one.float().parameters()} == {torch.float32}
    with pytest.raises(RuntimeError, match=r"Missing key.*inactive\.default"):
        model.load_state_dict({k: v for k, v in model.state_dict().items() if ".default." not in k})


def test_a_part_of_a_state(model, x, tmp_path):
    """Its metadata say which one is active; else a warning says what became of it."""
    fresh = copy.deepcopy(model)
    lorafast.set_adapter(model, "other")
    state = model.state_dict()
    torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for key in [key for key in state if ".inactive." in key]:
        del state[key]  # which keeps the metadata
    one = copy.deepcopy(fresh)
    with pytest.warns(UserWarning, match="the state lacks") as said:
        one.load_state_dict(state, strict=False)
    assert {str(warning.message) for warning in said} == {
        "the state has the adapter 'other' active, and so has the model now: an optimizer must have "
        "been given the parameters of all adapters",
        "the state lacks the adapters default, which keep their values",
    }
    assert torch.equal(one(x), model(x))
    lorafast.set_adapter(one, "default")
    assert torch.equal(one(x), fresh(x))
    lorafast.set_adapter(fresh, "other")
    with pytest.warns(UserWarning, match="the state lacks") as said:  # without the metadata
        fresh.load_state_dict(dict(state), strict=False)
    (sentence,) = {str(warning.message) for warning in said}
    assert sentence.startswith(
        "the state lacks the adapters default, which keep their values; what"
    )
    assert (
        "goes to the active one, 'other': if it is another's, call set_adapter before" in sentence
    )


def test_adapters_that_the_model_has_not(model, make_net):
    plain = lorafast.adapt(make_net(), r=2)
    with pytest.warns(UserWarning, match="has the adapters other, which the model hasn't"):
        plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(plain.head.lora_A, model.head.lora_A)
    waiting = {key: t for key, t in model.state_dict().items() if "inactive" in key}
    with pytest.warns(UserWarning, match="the state lacks the adapters default, which keep their"):
        model.load_state_dict(waiting, strict=False)
    # plain layers read the state of one, whose metadata say nothing that they mind
    state = lorafast.adapt(make_net(), r=2).state_dict()
    assert all("adapter" not in one for one in state._metadata.values())
    assert make_net().load_state_dict(state, strict=False).missing_keys == []


def test_a_state_whose_active_adapter_the_model_has_not(model, make_net):
    """Nor is it taken for another by what is left over."""
    lorafast.set_adapter(model, "other")
    state = model.state_dict()
    two = lorafast.adapt(make_net(), r=3)
    lorafast.add_adapter(two, "third", 2)
    one = lorafast.adapt(make_net(), r=3)
    for target in (one, two):
        with pytest.warns(UserWarning, match="'other' active, which the model hasn't") as said:
            target.load_state_dict(state, strict=False)
        assert any("'default' waits, which is the model's active" in str(w.message) for w in said)
        assert lorafast.adapter_names(target)[0] == "default"


def test_a_state_without_its_active_adapter(model):
    waiting = {key: t for key, t in model.state_dict().items() if "inactive" in key}
    lorafast.set_adapter(model, "other")
    with pytest.warns(UserWarning, match="'other' waits, which is the model's active one"):
        model.load_state_dict(waiting, strict=False)
    assert lorafast.adapter_names(model)[0] == "other"


def test_a_checkpoint_of_the_base_and_meta(make_net, x, assert_same):
    """It has neither's values: the adapters stay, and on meta they begin afresh."""
    with torch.device("meta"):
        model = lorafast.adapt(copy.deepcopy(make_net()).to("meta"), r=2, use_dora=True)
        lorafast.add_adapter(model, "other", 3, use_dora=True)
    model.to_empty(device="cpu")
    model.load_state_dict(make_net().state_dict())
    for name in ("default", "other"):
        lorafast.set_adapter(model, name)
        # B is zero, and the magnitudes are the rows' norms: DoRA changes nothing but by roundings.
        assert_same(model(x), make_net()(x))


def test_merged_layers_are_merged_anew(model, x, assert_same):
    for layer in (model.block.up, model.head):
        layer.merge()
    expected = formula(model, x, "other")
    lorafast.set_adapter(model, "other")
    assert model.head.merged
    assert_same(model(x), expected)
    with torch.no_grad():
        inactive.waiting(model.head)["default"].lora_B.fill_(torch.nan)
    with pytest.raises(ValueError, match="lora_B is NaN or infinite"):
        lorafast.set_adapter(model, "default")
    assert lorafast.adapter_names(model) == ("other", "default")
    assert_same(model(x), expected)


def test_files_of_each(model, make_net, x, tmp_path):
    """They are saved and loaded by name, whichever is active."""
    outputs = {}
    for name in ("default", "other"):
        lorafast.save_adapter(model, tmp_path / name, adapter=name)
        outputs[name] = output(model, x, name)
    assert lorafast.adapter_names(model) == ("default", "other")
    assert json.loads((tmp_path / "other/adapter_config.json").read_text())["use_rslora"] is True
    read = lorafast.load_adapter(make_net(), tmp_path / "default")
    lorafast.load_adapter(read, tmp_path / "other", adapter="b")
    assert lorafast.adapter_names(read) == ("default", "b")
    assert torch.equal(read(x), outputs["default"])
    lorafast.set_adapter(read, "b")
    assert torch.equal(read(x), outputs["other"])
    lorafast.load_adapter(read, tmp_path / "other", adapter="b")
    with pytest.raises(ValueError, match=r"is adapted with r = 2, and the file has r = 3"):
        lorafast.load_adapter(read, tmp_path / "other", adapter="default")


def test_as_peft_has_it(make_net, x, tmp_path, assert_same):
    """The outputs of each, and what is trained."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            make_net(), peft.LoraConfig(r=2, target_modules=["up", "down"], use_dora=True), "a"
        )
        theirs.add_adapter("b", peft.LoraConfig(r=3, target_modules=["up", "down"], lora_alpha=2))
        torch.manual_seed(43)
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        theirs.save_pretrained(tmp_path)
    ours = lorafast.load_adapter(make_net(), tmp_path / "a")
    lorafast.load_adapter(ours, tmp_path / "b", adapter="b")
    for name, own in (("b", "b"), ("a", "default"), ("b", "b")):
        theirs.set_adapter(name)
        lorafast.set_adapter(ours, own)
        assert_same(ours(x), theirs(x))
        flags = [p.requires_grad for n, p in theirs.named_parameters() if f".{name}." in n]
        assert all(flags)
        assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == sum(
            p.numel() for p in theirs.parameters() if p.requires_grad
        )


@pytest.mark.slow
def test_compiled(model, x, assert_same):
    """A compiled model computes with the active one, compiled once for each rank."""
    compiled = torch.compile(model, backend="eager")
    for name in ("default", "other", "default"):
        lorafast.set_adapter(compiled, name)
        assert_same(compiled(x), model(x))
    with torch.compiler.set_stance("fail_on_recompile"):
        lorafast.set_adapter(model, "other")
        assert_same(compiled(x), model(x))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return self.q(x) + self.k(x)


class Others(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, groups=2)
        self.tokens = nn.Embedding(5, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, image):
        rows = self.tokens(torch.arange(5))[None] + self.conv(image).mean((2, 3))
        return self.attention(rows, rows, rows)[0]


@pytest.mark.parametrize(
    ("base", "options", "given"),
    [
        (Pair, {"fuse": "siblings"}, torch.ones(3, 6)),
        (Others, {"targets": ["conv", "tokens", "attention"]}, torch.ones(1, 2, 5, 5)),
    ],
    ids=["siblings", "attention, convolution, embedding"],
)
def test_other_kinds(base, options, given, draw_adapters):
    """Each adapter computes what it does alone in a model, to the bit."""
    torch.manual_seed(47)
    plain = base()
    models = [lorafast.adapt(copy.deepcopy(plain), r=r, **options) for r in (2, 4)]
    model, alone = map(draw_adapters, models)
    lorafast.add_adapter(model, "b", 4)
    draw_inactive(model)
    first = model(given)
    lorafast.set_adapter(model, "b")
    state = {key: value for key, value in model.state_dict().items() if ".inactive." not in key}
    alone.load_state_dict(state)
    assert torch.equal(model(given), alone(given))
    assert not torch.equal(model(given), first)
    lorafast.set_adapter(model, "default")
    assert torch.equal(model(given), first)
    assert lorafast.summary(model).left == lorafast.summary(alone).left


def test_what_a_kind_cannot_have():
    model = lorafast.adapt(Others(), r=2, targets=["attention", "conv"])
    for options, sentence in (
        ({"r": 3}, r"conv can't have 'b': r is 3, expected a multiple of its 2 groups"),
        ({"r": 2, "use_dora": True}, r"conv can't have 'b': use_dora is True"),
    ):
        with pytest.raises(ValueError, match=sentence):
            lorafast.add_adapter(model, "b", **options)
    assert lorafast.adapter_names(model) == ("default",)


def test_save_pretrained_says_what_it_drops(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(llama_config())
    lorafast.adapt(model, r=2, targets=["q_proj"])
    lorafast.add_adapter(model, "b", 2)
    with pytest.warns(UserWarning, match="drops the adapters b, which aren't active"):
        model.save_pretrained(tmp_path)


def test_layers_that_differ_become_one_again(model, x):
    """As a load that fails may leave them."""
    expected = output(model, x, "other")
    inactive.exchange(model.head, "other")
    with pytest.raises(
        ValueError, match="'default' active, and head has 'other': call set_adapter"
    ):
        lorafast.adapter_names(model)
    lorafast.set_adapter(model, "other")
    assert lorafast.adapter_names(model) == ("other", "default")
    assert torch.equal(model(x), expected)


def test_data_parallel_and_starts(model, make_net, unchanged):
    parallel = object.__new__(nn.parallel.DistributedDataParallel)  # without a process group
    nn.Module.__init__(parallel)
    parallel.module = model
    with unchanged(model):
        for call in (lorafast.add_adapter, lorafast.set_adapter, lorafast.delete_adapter):
            with pytest.raises(ValueError, match="is in DistributedDataParallel, which reduces"):
                call(parallel, "c" if call is lorafast.add_adapter else "other")
    pissa = lorafast.adapt(make_net(), r=2, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="can't have 'b': init_lora_weights was 'pissa'"):
        lorafast.add_adapter(pissa, "b")


def test_bad_names_and_models(model, make_net, tmp_path, unchanged):
    cases = [
        (lambda: lorafast.add_adapter(model, "other"), "has an adapter 'other' already"),
        (lambda: lorafast.add_adapter(model, "a.b"), "name is 'a.b', expected one without dots"),
        (lambda: lorafast.add_adapter(model, "c", 0), r"block\.up can't have 'c': r is 0"),
        (
            lambda: lorafast.add_adapter(model, "c", dropout=1.5),
            "dropout is 1.5, expected a probab",
        ),
        (lambda: lorafast.add_adapter(make_net(), "c"), "has no adapted layer: adapt it first"),
        (lambda: lorafast.set_adapter(model, "c"), "has no adapter 'c', but 'default' and 'other'"),
        (lambda: lorafast.delete_adapter(model, "default"), "'default' is active: set another"),
        (lambda: lorafast.save_adapter(model, tmp_path / "c", adapter="c"), "has no adapter 'c'"),
    ]
    with unchanged(model):
        for call, sentence in cases:
            with pytest.raises(ValueError, match=sentence):
                call()
    with pytest.raises(ValueError, match="it has the adapters default, other: delete all but one"):
        inactive.check_alone(model.head)  # which resizes no layer with several
    computed = copy.deepcopy(model)
    nn.utils.parametrize.register_parametrization(computed.head, "lora_A", nn.Identity())
    with pytest.raises(ValueError, match="lora_A of head is computed by a parametrization"):
        lorafast.set_adapter(computed, "other")
    more = nn.ModuleList([model, lorafast.adapt(make_net(), r=2)])
    with pytest.raises(
        ValueError, match=r"has the adapters default, other, and .* has default: adapt"
    ):
        lorafast.add_adapter(more, "c")
    assert [*inactive.waiting(model.head)] == ["other"]
