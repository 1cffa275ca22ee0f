"""``target_parameters``, accelerated: the same numbers, gradients by name, and what is left to PEFT."""

import copy

import pytest
import torch

pytest.importorskip("peft")

from helpers import covering
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft_twins import K, N, assert_equal, assert_same, twins
from torch import nn
from torch.nn.utils import parametrize

import lorafast
from lorafast.integrations.peft import known

E = 3
CHANGED = known.why_changed("target_parameters")
pytestmark = pytest.mark.skipif(CHANGED is not None, reason=str(CHANGED))


class Experts(nn.Module):
    """Every expert of every row, summed; ``is_transposed`` says how PEFT reads the shapes."""

    def __init__(self, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn((E, K, N) if is_transposed else (E, N, K)))
        self.down = nn.Parameter(torch.randn((E, N, K) if is_transposed else (E, K, N)))

    def forward(self, x):
        up, down = (w if self.is_transposed else w.mT for w in (self.up, self.down))
        return torch.tanh(x.expand(E, *x.shape) @ up @ down / N).sum(0)


class OwnLinear(nn.Linear):
    """Not exactly an ``nn.Linear``."""

    def forward(self, x):
        return super().forward(x) + 1


LAYERS = {
    "[E, N, K]": (lambda: Experts(False), ["0.up"]),
    "[E, K, N]": (lambda: Experts(True), ["0.up"]),
    "both": (lambda: Experts(False), ["0.up", "0.down"]),
    "linear": (lambda: nn.Linear(K, K), ["0.weight"]),
    "[N, K]": (lambda: OwnLinear(K, K), ["0.weight"]),
}
DTYPES = {
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, False),
    "bf16, fp32 adapters": (torch.bfloat16, True),
}


def model_of(case, dtype="fp32", adapters=1, **options):
    make, targets = LAYERS[case]
    kind, upcast = DTYPES[dtype]
    torch.manual_seed(1)

    def config():
        settings = {"target_modules": [], "init_lora_weights": False} | options
        return LoraConfig(r=4, lora_alpha=6, target_parameters=targets, **settings)

    network = nn.Sequential(make()).to(kind)
    model = get_peft_model(network, config(), autocast_adapter_dtype=upcast)
    names = ["default"]
    for i in range(1, adapters):
        names.append(f"other{i}")
        model.add_adapter(names[-1], config(), autocast_adapter_dtype=upcast)
    if adapters > 1:
        model.base_model.set_adapter(names)
    return model, kind


@pytest.fixture
def served_by_peft(monkeypatch):
    calls = []
    activate = ParamWrapper._activate_lora

    def counted(self, names):
        if type(self) is not ParamWrapper:
            calls.append(self)
        return activate(self, names)

    monkeypatch.setattr(ParamWrapper, "_activate_lora", counted)
    return calls


@pytest.mark.parametrize(
    ("case", "dtype", "adapters", "trained"),
    covering(list(LAYERS), list(DTYPES), (1, 2), (False, True)),
)
def test_outputs_and_gradients(served_by_peft, case, dtype, adapters, trained):
    model, kind = model_of(case, dtype, adapters)
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            parameter.requires_grad_(trained)
    pair = twins(model)
    assert set(lorafast.explain(pair.fast).layers.values()) == {None}
    before = {name: id(p) for name, p in pair.fast.named_parameters()}
    assert_equal(pair, torch.randn(5, K).to(kind), torch.randn(5, K).to(kind), kind)
    assert {name: id(p) for name, p in pair.fast.named_parameters()} == before
    assert not served_by_peft


def test_W_is_back_when_the_module_raises(served_by_peft):
    model = lorafast.accelerate(model_of("[E, N, K]")[0], quiet=True)
    before = dict(model.named_parameters())
    with pytest.raises(RuntimeError):
        model(torch.randn(5, K + 1))
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert not served_by_peft


def test_W_and_its_change_are_made_once(monkeypatch):
    made = []
    baddbmm = torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda *a, **o: made.append(1) or baddbmm(*a, **o))
    model = model_of("[E, N, K]")[0]
    x = torch.randn(5, K)
    model(x)
    assert len(made) == 2  # PEFT's
    lorafast.accelerate(model, quiet=True)(x)
    assert len(made) == 3


def parametrized(layer):
    owner = layer.get_base_layer()
    parametrize.register_parametrization(owner, "up", nn.Identity())


LEFT = {
    "its module has parametrizations": parametrized,
    "are disabled": lambda layer: layer.enable_adapters(False),
    "are merged": lambda layer: layer.merge(),
    "has hooks": lambda layer: layer.lora_A["default"].register_forward_hook(print),
    "a hook of accelerate's": lambda layer: setattr(layer.get_base_layer(), "_hf_hook", None),
    "is torch.float64, its parameter": lambda layer: layer.lora_A.double(),
}


@pytest.mark.filterwarnings("ignore:Could not find any LoRA parametrization")
@pytest.mark.parametrize("reason", LEFT)
def test_what_is_left_to_PEFT(reason):
    model = model_of("[E, N, K]")[0]
    fast = lorafast.accelerate(copy.deepcopy(model), quiet=True)
    for one in (model, fast):
        LEFT[reason](one.base_model.model[0])
    (why,) = lorafast.explain(fast).layers.values()
    assert reason in why
    assert_same(model, fast, torch.randn(5, K))


@pytest.mark.slow
def test_compiled():
    model = model_of("linear")[0]
    x = torch.randn(5, K)
    expected = model(x)
    fast = lorafast.accelerate(model, quiet=True)
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_a_second_call_within_the_first_is_refused():
    """As another thread's would be: it would take W + ΔW for W."""
    fast = lorafast.accelerate(model_of("[E, N, K]")[0], quiet=True)
    wrapper = next(m for m in fast.modules() if isinstance(m, ParamWrapper))
    x = torch.randn(2, K)
    expected = fast(x)
    within = []

    def again(module, args):
        if not within:
            within.append(1)
            fast(x)

    handle = wrapper.get_base_layer().register_forward_pre_hook(again)
    with pytest.raises(RuntimeError, match="can't run in two threads at once"):
        fast(x)
    handle.remove()
    assert torch.equal(fast(x), expected)
