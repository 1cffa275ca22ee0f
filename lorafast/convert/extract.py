"""``extract``: an adapter from the difference of two models, by SVD."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorafast.convert import targets as _targets
from lorafast.convert.adapter import Adapter, patterns, saved
from lorafast.convert.checkpoints import Checkpoint, Tensors, opened
from lorafast.convert.kinds import LINEAR, kind_of_layer
from lorafast.convert.peft_format import PREFIX, shortest_targets, stored_whole
from lorafast.convert.targets import ALL_LINEAR, Pattern, check_pattern, matches, some
from lorafast.nn.checks import check_rank

Factors = tuple[Tensor, Tensor, Tensor]
# Columns beside r that a randomised SVD draws, and its power iterations (Halko et al., 2011).
OVERSAMPLED, ITERATIONS = 8, 4


@dataclass(frozen=True, repr=False, eq=False)
class Extracted:
    """What ``extract`` found; prints as a table."""

    adapter: Adapter
    """The adapter, for ``load_adapter`` and ``save_adapter``."""
    lost: dict[str, float]
    """Of each layer ``‖ΔW − B·A‖ / ‖ΔW‖`` (Frobenius): 0 is nothing lost, 1 is all."""
    total: float
    """The same over all layers together."""
    dropped: tuple[str, ...] = ()
    """Tensors that differ and that ``others="drop"`` left out."""

    def __str__(self) -> str:
        width = max(map(len, self.lost))
        lines = [f"{name:<{width}}  {_percent(one)}" for name, one in self.lost.items()]
        lines.append(_in_all(len(self.lost), self.total))
        if self.dropped:
            lines.append(f"dropped, though they differ: {some(list(self.dropped))}")
        return "\n".join(lines)

    __repr__ = __str__


def extract(
    full_finetuned: Checkpoint,
    base: Checkpoint,
    r: int,
    *,
    targets: Pattern = ALL_LINEAR,
    exclude: Pattern | None = None,
    others: Literal["refuse", "save", "drop"] = "refuse",
    svd: Literal["exact", "randomised"] = "exact",
    folder: str | os.PathLike[str] | None = None,
    report: Callable[[str], object] | None = print,
) -> Extracted:
    """The adapter of rank ``r`` that is nearest to what full fine-tuning has changed.

    For each layer ``ΔW = W_full − W_base = U·S·Vᵀ`` and ``B = U·√S``, ``A = √S·Vᵀ``, both cut to ``r``
    columns and rows: no other matrix of rank ``r`` is nearer to ``ΔW`` (Eckart and Young, 1936). It
    is computed in float32 (float64 where a weight is that), on the device of ``full_finetuned``, one
    layer at a time: files are read one tensor at a time. ``scaling`` is 1. A layer that didn't change
    gets no adapter.

    Args:
        full_finetuned: a model, a state dict, a safetensors file, or a folder with one (``model`` or
            ``diffusion_pytorch_model``, or the only one there) or with an index of several.
        base: what it was trained from, given likewise.
        r: rank; a layer with fewer rows or columns has as many.
        targets: as for ``adapt``. Where neither of the two is a model, nothing says which tensors are of
            linear layers: name those.
        exclude: as for ``adapt``.
        others: what becomes of tensors that differ and get no adapter, such as norms and biases:
            ``"refuse"`` raises and names them, ``"save"`` stores their modules whole (PEFT's
            ``modules_to_save``), ``"drop"`` leaves them out.
        svd: ``"exact"`` is LAPACK's (cuSOLVER's on a GPU). ``"randomised"`` (Halko et al., 2011) is many
            times faster for large layers, and loses slightly more; ``lost`` is measured in both.
        folder: where to write the adapter too.
        report: gets a line for each layer, with what is lost; None for none.

    Returns:
        The adapter, and what is lost.

    Raises:
        ValueError: the two have other tensors or shapes (the message names the first), differ in
            tensors that get no adapter, or not at all; or an argument doesn't fit.
        TypeError: a layer that was asked for can't be adapted.
        FileNotFoundError: there is no safetensors file.
    """
    check_rank("r", r)
    for argument, value, known in (
        ("others", others, ("refuse", "save", "drop")),
        ("svd", svd, ("exact", "randomised")),
    ):
        if value not in known:
            raise ValueError(f"{argument} is {value!r}, expected {' or '.join(map(repr, known))}")
    with opened(full_finetuned, "full_finetuned") as full, opened(base, "base") as start:
        adapter, lost, total, dropped = _extracted(
            full, start, r, targets, exclude, others, svd, report
        )
    return Extracted(saved(adapter, folder), lost, total, dropped)


def _extracted(
    full: Tensors,
    start: Tensors,
    r: int,
    targets: Pattern,
    exclude: Pattern | None,
    others: str,
    svd: str,
    report: Callable[[str], object] | None,
) -> tuple[Adapter, dict[str, float], float, tuple[str, ...]]:
    """The adapter, what is lost of each layer and of all, and what is dropped."""
    _check_structure(full, start)
    shapes = _layers(full, start, targets, exclude)
    changed = [name for name in start.shapes if name in full.shapes and _differs(full, start, name)]
    adapted = {name: layer for name, layer in shapes.items() if f"{name}.weight" in changed}
    if not adapted:
        raise ValueError("full_finetuned and base are equal in all layers that targets names")
    whole, dropped = _others(full, changed, adapted, others)
    tensors: dict[str, Tensor] = {}
    lost: dict[str, float] = {}
    sums = [0.0, 0.0]
    with torch.no_grad():
        for name, layer in adapted.items():
            A, B, residual, energy = _factors(full, start, f"{name}.weight", layer, r, svd)
            for key, tensor in zip(layer.keys, (A, B), strict=True):
                tensors[f"{PREFIX}{name}.{key}"] = tensor.cpu()
            lost[name] = residual / energy
            sums = [sums[0] + residual**2, sums[1] + energy**2]
            if report is not None:
                report(f"{name}  {_percent(lost[name])} lost")
    ranks = {
        name: tensors[f"{PREFIX}{name}.{one.keys[0]}"].shape[0] for name, one in adapted.items()
    }
    adapter = Adapter(
        _config(ranks, r, (start if start.model else full).modules(), whole),
        tensors | {PREFIX + name: full.read(name).cpu() for name in _stored(full, whole)},
    )
    total = math.sqrt(sums[0] / sums[1])
    if report is not None:
        report(_in_all(len(lost), total))
    return adapter, lost, total, dropped


@dataclass(frozen=True)
class _Layer:
    """How a layer's weight becomes ``ΔW [out_features, in_features]``, and PEFT's names for A and B."""

    keys: tuple[str, str] = LINEAR
    transposed: bool = False


def _layers(
    full: Tensors, base: Tensors, targets: Pattern, exclude: Pattern | None
) -> dict[str, _Layer]:
    model = base.model or full.model
    if model is not None:
        found = _targets.find(_targets.unwrapped(model), targets, exclude)
        return {names[0]: _of_module(names[0], layer) for layer, names in found.items()}
    targets = check_pattern("targets", targets)
    if targets == ALL_LINEAR:
        raise ValueError(
            f"targets is {ALL_LINEAR!r}, and neither full_finetuned nor base is a model, which would "
            "say what the linear layers are: name them"
        )
    left = check_pattern("exclude", () if exclude is None else exclude)
    names = [name.removesuffix(".weight") for name in base.shapes if name.endswith(".weight")]
    chosen = [name for name in names if matches(targets, name) and not matches(left, name)]
    if not chosen:
        raise ValueError(f"targets is {targets!r}, which names no weight (there is {some(names)})")
    for name in chosen:
        shape = list(base.shapes[f"{name}.weight"])
        if len(shape) != 2:
            raise ValueError(
                f"{name}.weight has shape {shape}, expected that of a linear layer (give a model for "
                "convolutions)"
            )
    return {name: _Layer() for name in chosen}


def _of_module(name: str, module: nn.Module) -> _Layer:
    kind = kind_of_layer(module)
    if not kind.is_one_product(module):
        raise ValueError(
            f"{name} is a {type(module).__name__}, whose difference is not one matrix of floats: "
            "exclude it"
        )
    return _Layer(kind.factors, kind.is_transposed(module))


def _check_structure(full: Tensors, base: Tensors) -> None:
    """Raises ``ValueError`` that names the first tensor that one has alone, or in another shape."""
    for one, other in ((base, full), (full, base)):
        for name in one.shapes:
            # Files hold a tensor that two modules share once.
            if name not in other.shapes and not any(
                tied in other.shapes for tied in one.shared_with(name)
            ):
                raise ValueError(f"{one.argument} has {name}, and {other.argument} has not")
    for name, shape in base.shapes.items():
        if full.shapes.get(name, shape) != shape:
            raise ValueError(
                f"{name} has shape {list(full.shapes[name])} in full_finetuned and {list(shape)} in base"
            )


def _differs(full: Tensors, base: Tensors, name: str) -> bool:
    one, other = full.read(name), base.read(name)
    dtype = torch.promote_types(one.dtype, other.dtype)
    return not torch.equal(one.to(dtype), other.to(one.device, dtype))


def _others(
    full: Tensors, changed: Sequence[str], adapted: dict[str, _Layer], others: str
) -> tuple[list[str], tuple[str, ...]]:
    """The modules to store whole, and the tensors that are dropped."""
    left = [
        name
        for name in changed
        if name not in {f"{layer}.weight" for layer in adapted}
        and not any(f"{layer}.weight" in full.shared_with(name) for layer in adapted)
    ]
    if others == "drop" or not left:
        return [], tuple(left)
    if others == "refuse":
        raise ValueError(
            f"these differ and get no adapter: {some(left)}; others='save' stores their modules whole, "
            "others='drop' leaves them out"
        )
    whole = sorted({name.rpartition(".")[0] for name in left})
    for name in left:
        owner = name.rpartition(".")[0]
        if not owner:
            raise ValueError(
                f"{name} differs, and it is the model's own: no module can be stored whole"
            )
        if any(f"{layer}.".startswith(f"{owner}.") for layer in adapted):
            raise ValueError(
                f"{name} differs, and {owner} can't be stored whole, since it gets an adapter or holds "
                "what does: exclude that"
            )
    for layer in adapted:
        if stored_whole(layer, whole):
            raise ValueError(
                f"{layer} gets an adapter, and PEFT takes it for one of {some(whole)}, which are to be "
                "stored whole, by the end of its name: exclude it"
            )
    return whole, ()


def _stored(full: Tensors, whole: Sequence[str]) -> list[str]:
    if not whole:
        return []
    return [name for name in full.shapes if stored_whole(name.rpartition(".")[0], whole)]


def _factors(
    full: Tensors, base: Tensors, name: str, layer: _Layer, r: int, svd: str
) -> tuple[Tensor, Tensor, float, float]:
    """``A``, ``B``, ``‖ΔW − B·A‖`` and ``‖ΔW‖``."""
    one, other = full.read(name), base.read(name)
    for tensor in (one, other):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, expected floats: dequantize it first")
    dtype = torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)
    delta = one.to(dtype) - other.to(one.device, dtype)
    shape = delta.shape
    delta = delta.flatten(1)
    if layer.transposed:
        delta = delta.T
    if not delta.isfinite().all():
        raise ValueError(f"{name} is NaN or infinite in full_finetuned or base")
    U, S, Vh = (_exact if svd == "exact" else _randomised)(delta, r)
    root = S[:r].sqrt()
    A, B = root[:, None] * Vh[:r], U[:, :r] * root
    residual = torch.linalg.vector_norm(torch.addmm(delta, B, A, alpha=-1), dtype=torch.float64)
    energy = torch.linalg.vector_norm(delta, dtype=torch.float64)
    if len(shape) > 2:
        A = A.unflatten(1, shape[1:])
        B = B.reshape(*B.shape, *(1,) * (len(shape) - 2))
    return A, B, residual.item(), energy.item()


def _exact(delta: Tensor, r: int) -> Factors:
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return U, S, Vh


def _randomised(delta: Tensor, r: int) -> Factors:
    q = min(r + OVERSAMPLED, *delta.shape)
    U, S, V = torch.svd_lowrank(delta, q=q, niter=ITERATIONS)
    return U, S, V.T


def _config(
    ranks: dict[str, int], r: int, modules: Sequence[str], whole: Sequence[str]
) -> dict[str, Any]:
    most = r if r in ranks.values() else max(ranks.values())
    return {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "target_modules": shortest_targets(ranks, modules),
        "modules_to_save": list(whole) or None,
    } | patterns(most, most, ranks, ranks)


def _in_all(layers: int, share: float) -> str:
    return (
        f"{layers} {'layer' if layers == 1 else 'layers'}, lost in all: {_percent(share).strip()}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:7.3f} %"
