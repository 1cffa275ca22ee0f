"""Small models with adapters of every kind, and what is compared between ranks and one process."""

from typing import Any

import pytest
import torch
from ranks import device, own_draws
from small_decoder import Decoder, decoder, fill_adapters, loss_of, tokens
from torch import Tensor, nn

import lorafast

R = 3


class Picture(nn.Module):
    """A convolution, self-attention and a head: pictures ``[batch, 3, 6, 6]`` to ``[batch, 5]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).mT
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


def picture(dtype: torch.dtype) -> Picture:
    """The same weights on every call, on the CPU."""
    with own_draws():
        torch.manual_seed(1)
        return Picture().to(dtype)


DECODERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rank-1": {"r": 1, "use_rslora": True},
    "siblings": {"fuse": "siblings"},
    "dora": {"use_dora": True},
    "embedding": {"targets": ["embed_tokens", "q_proj", "lm_head"]},
    "houlsby": {"kind": "houlsby"},
    "pfeiffer": {"kind": "pfeiffer", "layer_norm": True},
    "parallel": {"kind": "parallel"},
    "nf4": {},
    "int8": {},
    "fp8": {},
    "nf4-dora": {"use_dora": True},
}
PICTURES: dict[str, dict[str, Any]] = {
    "conv": {"targets": ["conv"]},
    "conv-dora": {"targets": ["conv"], "use_dora": True},
    "attention": {"targets": ["attention"]},
}
FORMATS = ("nf4", "int8", "fp8")
KINDS = (*DECODERS, *PICTURES)
QUICK = ("lora", "siblings", "pfeiffer", "nf4-dora", "conv-dora")
"""Those that every run tests."""


def quickly(kinds: tuple[str, ...]) -> list[Any]:
    """Parameters of a test, slow where the kind isn't one of ``QUICK``."""
    return [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in kinds]


def plain(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The frozen model of this kind."""
    return _frozen(kind, dtype).to(device())


def _frozen(kind: str, dtype: torch.dtype) -> nn.Module:
    if kind in PICTURES:
        return picture(dtype).requires_grad_(False)
    model: nn.Module = decoder(dtype).requires_grad_(False)
    if kind.split("-")[0] in FORMATS:
        lorafast.quantize(model, kind.split("-")[0])
    return model


def adapted(
    kind: str, dtype: torch.dtype = torch.float64, filled: bool = True, **options: Any
) -> nn.Module:
    """It with adapters that change what it computes; the same on every call.

    ``filled``: else they are as ``adapt`` makes them, over a new model on the device of the context.
    """
    arguments = dict((DECODERS | PICTURES)[kind])
    if "kind" in arguments:
        arguments |= {"targets": ["self_attn", "mlp"], "bottleneck": R}
    else:
        arguments.setdefault("r", R)
        arguments["alpha"] = 2.0 * arguments["r"]
    if not filled:
        bare = Picture() if kind in PICTURES else Decoder()
        return lorafast.adapt(bare.to(dtype), **arguments | options)
    with own_draws():
        torch.manual_seed(3)
        model = lorafast.adapt(_frozen(kind, dtype), **arguments | options)
    fill_adapters(model)
    return model.to(device())


def inputs(kind: str, batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same batch on every call."""
    if kind in PICTURES:
        generator = torch.Generator().manual_seed(2)
        return torch.randn(batch, 3, 6, 6, dtype=dtype, generator=generator).to(device())
    return tokens(batch)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    """A mean over the batch."""
    return model(x).square().mean() if x.is_floating_point() else loss_of(model, x)


def part(x: Tensor, rank: int, world: int) -> Tensor:
    """The rows of a rank."""
    return x.chunk(world)[rank]


def gradients(model: nn.Module) -> dict[str, Any]:
    """Whole gradients, float64 arrays, by the names that the parameters have in the bare model."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad: Any = parameter.grad
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            found[plain_name(name)] = grad.double().cpu().numpy()
    return found


def one_process(kind: str, batch: int, dtype: torch.dtype = torch.float64) -> tuple[float, dict]:
    """The loss and the gradients of the whole batch in this process."""
    model = adapted(kind, dtype)
    whole = loss(model, inputs(kind, batch, dtype))
    whole.backward()
    return whole.item(), gradients(model)


def assert_near(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-12) -> None:
    """Every array by name, relative to the largest element of the expected one."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        error = abs(found[name] - array).max() / abs(array).max()
        assert error <= tolerance, f"{name} is off by {error:.1e}"


def plain_name(name: str) -> str:
    """Without what wrappers put in."""
    for wrapper in ("_checkpoint_wrapped_module.", "_orig_mod.", "module."):
        name = name.replace(wrapper, "")
    return name
