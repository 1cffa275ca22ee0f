"""What the conversion tests share: a small network, and two ways of comparing."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import Tensor, nn

import lorafast

# Before anything imports huggingface_hub: nothing here needs the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 7)
        self.down = nn.Linear(7, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """``[..., 5]`` → ``[..., 2]`` with odd sizes, a layer without bias, and a norm in between."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(x)))


@pytest.fixture
def make_net() -> Callable[[], Net]:
    """Makes a network in float64, always with the same weights."""

    def make() -> Net:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return Net().double()

    return make


@pytest.fixture
def net(make_net: Callable[[], Net]) -> Net:
    return make_net()


@pytest.fixture
def x() -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)


@pytest.fixture
def draw_adapters() -> Callable[[nn.Module], nn.Module]:
    """Gives every adapter of a model random values, so that it changes the output."""

    def draw(model: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(13)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, lorafast.nn.AdapterLayer):
                    for parameter in module.adapter_parameters().values():
                        parameter.normal_(generator=generator)
        return model

    return draw


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """Asserts ``‖actual − expected‖ ≤ eps · ‖expected‖``.

    The default is some thousand roundings in float64: two orders of summation differ by far fewer,
    a float32 on the way by far more.
    """

    def check(actual: Tensor, expected: Tensor, eps: float = 1e-12) -> None:
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        scale = expected.norm().item()
        assert scale > 0
        assert (actual - expected).norm().item() / scale <= eps

    return check


def _state(model: nn.Module) -> dict[str, object]:
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        "modules": {name: (id(module), type(module)) for name, module in modules.items()},
        "tensors": {key: id(t) for key, t in model.state_dict(keep_vars=True).items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in modules.items()},
        "adapters": {
            name: (
                module.r,
                module.alpha,
                module.scaling,
                module.use_rslora,
                module.dropout,
                module.merged,
                id(module._merged_weight),
            )
            for name, module in modules.items()
            if isinstance(module, lorafast.nn.AdapterLayer)
        },
    }


@pytest.fixture
def unchanged() -> Callable[[nn.Module], AbstractContextManager[None]]:
    """``with unchanged(model):`` the same modules, parameters, values and ``requires_grad`` after."""

    @contextmanager
    def check(model: nn.Module) -> Iterator[None]:
        before = _state(model)
        values = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        yield
        assert _state(model) == before
        for key, tensor in model.state_dict().items():
            one, other = (t.to_dense() if t.is_sparse else t for t in (tensor, values[key]))
            assert torch.equal(one.double(), other.double()), key

    return check
