"""The factored norm of DoRA: exact, with no matrix of the weight's size, of the weight as it is now."""

import pytest
import torch

pytest.importorskip("peft")

from peft_twins import K, N, assert_equal, peft_model, twins
from torch.utils._python_dispatch import TorchDispatchMode

import lorafast
from lorafast.backends import registry
from lorafast.integrations.peft.dora import weight_norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaling", [0.0, 0.5, -2.0, torch.tensor(0.5)], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_the_norm_of_every_row(dtype, scaling, transposed):
    weight = torch.randn(K, N).to(dtype).t() if transposed else torch.randn(N, K).to(dtype)
    lora_A, lora_B = torch.randn(5, K).to(dtype), torch.randn(N, 5).to(dtype)
    found = weight_norm(weight, lora_A, lora_B, scaling)
    exact = (weight.double() + scaling * lora_B.double() @ lora_A.double()).norm(dim=1)
    assert found.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert (found - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()


def test_a_row_that_the_adapter_cancels():
    """Rounding must not make a square negative, whose root would be NaN."""
    lora_A, lora_B = torch.randn(3, K), torch.randn(N, 3)
    found = weight_norm(-(lora_B @ lora_A), lora_A, lora_B, 1.0)
    assert torch.isfinite(1 / found).all()
    assert found.max() < 1e-2


@pytest.mark.parametrize("left", [0.1, 0.01])
def test_a_row_that_the_adapter_nearly_cancels(left):
    """Float32 adapters over bfloat16: the products of both are float32."""
    lora_A, lora_B = torch.randn(3, K), torch.randn(N, 3)
    weight = (-(lora_B @ lora_A) * (1 + left)).bfloat16()
    exact = (weight.double() + lora_B.double() @ lora_A.double()).norm(dim=1)
    found = weight_norm(weight, lora_A, lora_B, 1.0)
    assert ((found - exact).abs() <= 1e-6 / left**2 * exact).all()


def test_no_row_is_an_empty_sum():
    assert weight_norm(torch.empty(0, K), torch.randn(2, K), torch.empty(0, 2), 1.0).shape == (0,)


def test_the_norm_is_taken_by_the_backend(monkeypatch):
    """Once for a call of the layer, of PEFT's own tensors."""
    asked = []
    own = registry.choose

    def choosing(problem, backend=None):
        asked.append(problem.operation)
        return own(problem, backend)

    monkeypatch.setattr(registry, "choose", choosing)
    registry.forget_plans()
    model = lorafast.accelerate(peft_model(use_dora=True), quiet=True)
    model(torch.randn(6, K)).sum().backward()
    assert asked.count("weight_norm") == 1


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_nothing_of_the_weights_size_is_made(dropout):
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func.is_view:
                self.numel = max(self.numel, out.numel())
            return out

    model = peft_model(dtype=torch.bfloat16, upcast=True, use_dora=True, lora_dropout=dropout)
    sizes = {}
    for name, tested in vars(twins(model)).items():
        if name != "exact":
            x = torch.randn(2, K, dtype=torch.bfloat16, requires_grad=True)
            with Largest() as largest:
                tested(x).sum().backward()
            sizes[name] = largest.numel
    assert sizes["stock"] >= N * K
    assert sizes["fast"] < N * K / 2


WRITES = {
    "data in place": lambda layer: layer.base_layer.weight.data.mul_(1.5),
    "one row through data": lambda layer: layer.base_layer.weight.data[3].mul_(4.0),
    "other data": lambda layer: setattr(layer.base_layer.weight, "data", torch.randn(N, K)),
    "in place": lambda layer: torch.nn.init.normal_(layer.base_layer.weight),
    "another parameter": lambda layer: setattr(
        layer.base_layer, "weight", torch.nn.Parameter(torch.randn(N, K), requires_grad=False)
    ),
    "A through data": lambda layer: layer.lora_A["default"].weight.data.mul_(3.0),
    "B": lambda layer: torch.nn.init.normal_(layer.lora_B["default"].weight),
    "another rank": lambda layer: [
        setattr(layer.lora_A["default"], "weight", torch.nn.Parameter(torch.randn(7, K))),
        setattr(layer.lora_B["default"], "weight", torch.nn.Parameter(torch.randn(N, 7))),
    ],
    "scaling": lambda layer: layer.set_scale("default", 0.3),
    "magnitude": lambda layer: layer.lora_magnitude_vector["default"].weight.data.mul_(2.0),
}


@pytest.mark.parametrize(
    ("write", "dora"),
    [(write, dora) for write in WRITES for dora in (False, True) if dora or write != "magnitude"],
)
def test_every_write_is_seen(write, dora):
    model = peft_model(use_dora=dora)
    x, dy = torch.randn(6, K), torch.randn(6, N)
    fast = lorafast.accelerate(model, quiet=True)
    with torch.no_grad():
        before = fast(x)
    torch.manual_seed(1)
    WRITES[write](model.base_model.model.layer)
    with torch.no_grad():
        assert not torch.allclose(fast(x), before)
    lorafast.restore(model)
    assert_equal(twins(model), x, dy, torch.float32)
    lorafast.accelerate(model, quiet=True)
    with torch.no_grad():
        after = fast(x)
        torch.testing.assert_close(after, lorafast.restore(model)(x))
