"""Which weights of a model have no adapter, and which of PEFT's settings would give them one."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lorafast.convert.kinds import adapter_parameters, kind_of
from lorafast.nn.adapter_module import adapters_in

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BY_MODULE = "LoraConfig(target_modules=[...])"
_BY_PARAMETER = "LoraConfig(target_parameters=[...])"
# Above this share of a model's parameters "all-linear" is not what its name promises.
_LARGE_SHARE = 0.25


@dataclass(frozen=True)
class LeftOut:
    """The frozen layers of one class that hold matrices and have no adapter."""

    kind: str
    layers: int
    parameters: int
    peft: str = ""
    """The setting of PEFT's that adapts them, where there is one and ``adapt`` doesn't."""
    by_name: bool = False
    """Whether ``adapt`` adapts them where its ``targets`` name them, and not by default."""

    def __str__(self) -> str:
        served = f" (PEFT adapts them: {self.peft})" if self.peft else ""
        if self.by_name:
            served = " (adapted where targets name them)"
        return f"{self.layers} {self.kind}, {self.parameters:,} parameters{served}"


def left_out(model: nn.Module) -> tuple[LeftOut, ...]:
    """What has no adapter and is not trained, the largest first; a shared parameter counts once."""
    return tuple(
        sorted(
            (_count(layers) for layers in _layers_by_kind(model).values()),
            key=lambda one: -one.parameters,
        )
    )


def large_share(model: nn.Module, trained: bool = False) -> str | None:
    """A sentence where convolutions and stacked experts hold much of the model, else None.

    Trained ones count only with ``trained``.
    """
    groups = _layers_by_kind(model, trained).values()
    missed = [_count(layers) for layers in groups if _is_missed(layers[0][0])]
    if not missed:
        return None
    adapters = {id(parameter) for parameter in adapter_parameters(model)}
    total = _size(p for p in model.parameters() if id(p) not in adapters)
    parameters = sum(one.parameters for one in missed)
    if parameters < _LARGE_SHARE * total:
        return None
    fast = "; lorafast.accelerate then makes PEFT's linear layers and convolutions fast"
    return (
        f"{100 * parameters / total:.0f} % of the parameters are in layers that 'all-linear' doesn't "
        f"reach: {'; '.join(map(str, missed))}{fast if any(one.peft for one in missed) else ''}"
    )


def _layers_by_kind(
    model: nn.Module, trained: bool = False
) -> dict[tuple[str, bool], list[tuple[nn.Module, list[nn.Parameter]]]]:
    """By class, each with its own parameters; stacked weights are a kind for themselves."""
    modules = list(model.modules())
    seen = {id(p) for one in adapters_in(model).values() for p in one.parameters()}
    found: dict[tuple[str, bool], list[tuple[nn.Module, list[nn.Parameter]]]] = {}
    for module in modules:
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen |= {id(p) for p in own}
        own = [p for p in own if trained or not p.requires_grad]
        if _has_matrix(own):
            key = (type(module).__name__, _is_missed(module))
            found.setdefault(key, []).append((module, own))
    return found


def _has_matrix(parameters: Iterable[nn.Parameter]) -> bool:
    return any(nn.parameter.is_lazy(p) or p.dim() >= 2 for p in parameters)


def _count(layers: list[tuple[nn.Module, list[nn.Parameter]]]) -> LeftOut:
    module = layers[0][0]
    kind = kind_of(module)
    by_name = (
        kind is not None
        and not kind.in_all_linear
        and all(kind.layer.why_not_adaptable(one) is None for one, _ in layers)
    )
    peft = "" if by_name else _peft_setting(module)
    size = _size(p for _, own in layers for p in own)
    return LeftOut(type(module).__name__, len(layers), size, peft, by_name)


def _peft_setting(module: nn.Module) -> str:
    if isinstance(module, (*_CONVOLUTIONS, nn.Embedding)):
        return _BY_MODULE
    return _BY_PARAMETER if _is_stacked(module) else ""


def _size(parameters: Iterable[nn.Parameter]) -> int:
    """Elements, but for lazy parameters, which have no shape yet."""
    return sum(p.numel() for p in parameters if not nn.parameter.is_lazy(p))


def _is_missed(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) or _is_stacked(module)


def _is_stacked(module: nn.Module) -> bool:
    """Whether it keeps several matrices in one parameter, as a mixture of experts often does."""
    if isinstance(module, (nn.modules.conv._ConvNd, ParametrizationList)):
        return False
    own = module.parameters(recurse=False)
    return any(not nn.parameter.is_lazy(p) and p.dim() == 3 and len(p) > 1 for p in own)
