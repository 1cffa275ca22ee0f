"""``parallelize``: a model is cut over the ranks of a mesh, by a plan."""

import fnmatch
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.distributed.tensor.placement_types import Placement

from lorafast.convert.fsdp import name_of_sharded
from lorafast.convert.kinds import has_peft_adapter
from lorafast.convert.targets import nearest, unwrapped
from lorafast.nn.adapter_module import AdapterModule
from lorafast.parallel import replicas
from lorafast.parallel.styles import (
    Replicated,
    Style,
    class_of,
    is_trained,
    why_not_mesh,
    why_not_plain,
)


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    plan: Mapping[str, ParallelStyle],
    *,
    src_data_rank: int | None = 0,
) -> nn.Module:
    """Cuts ``model`` over the ranks of ``mesh`` by ``plan``; returns the model, changed in place.

    Adapt it before, and make the optimizer after it: parameters are replaced by DTensors. Whatever is
    trained and no style is given for is replicated, as by ``Replicated()``. All that is checked is
    checked before anything is moved. With FSDP2, cut first (``mesh["tp"]``) and call ``fully_shard``
    after (``mesh["dp"]``).

    Ranks of the mesh must draw alike: their default generators get the state of the first one's.

    Args:
        model: with adapted layers or without, the same on all ranks.
        mesh: one dimension.
        plan: styles by the names of modules: a name, or the end of one after a dot, of which each part
            may be a pattern (``layers.*.mlp.down_proj``). ``Colwise``, ``Rowwise`` and ``Replicated``;
            PyTorch's styles for modules without adapters.
        src_data_rank: as in PyTorch: the rank of the mesh whose frozen tensors are taken, 0, or None:
            each rank has them already, and nothing is sent. What is trained is the first rank's.

    Raises:
        ValueError: a pattern names no module, or one that another names too; a module can't have its
            style; the mesh has several dimensions; the model is in FSDP or
            ``DistributedDataParallel``; or what is trained reads a part of the tokens and has no style.
            The model is unchanged.
        TypeError: a style is none, or a name no string.
    """
    reason = why_not_mesh(mesh)
    if reason is not None:
        raise ValueError(f"the model {reason}")
    if src_data_rank not in (0, None):
        raise ValueError(f"src_data_rank is {src_data_rank!r}, expected 0 or None")
    inner = unwrapped(model)
    styles = _styles(inner, plan)
    _check_unwrapped(model)
    for name, style in styles.items():
        module = inner.get_submodule(name)
        reason = _why_peft(inner, name)
        if reason is None and isinstance(style, Style):
            reason = style.why_not(module, mesh)
        elif reason is None:
            reason = _why_not_pytorchs(style, module, mesh)
        if reason is not None:
            raise ValueError(f"{name} {reason}")
    left = _left(inner, styles)
    by_tokens = [n for n, s in styles.items() if any(map(_is_of_tokens, _layouts(s)))]
    if left and by_tokens:
        raise ValueError(
            f"{next(iter(left))} is trained and no style of the plan is for it, and with "
            f"{by_tokens[0]} each rank has a part of the tokens: give it "
            "Replicated(input_layouts=Shard(1)) if it reads such a part, else Replicated()"
        )
    for name, module in left.items():
        reason = Replicated().why_not(module, mesh)
        if reason is not None:
            raise ValueError(f"{name} {reason}")
    _check_ties(inner, {**styles, **dict.fromkeys(left, Replicated())})
    replicas.set_alike(mesh)
    sharded: dict[int, Any] = {}
    for name, style in styles.items():
        style.src_data_rank = src_data_rank
        if isinstance(style, Style):
            style.put_on(inner.get_submodule(name), mesh, sharded, name)
        else:
            style._apply(inner.get_submodule(name), mesh)
    for name, module in left.items():
        Replicated().put_on_one(module, mesh, sharded, name)
    return model


def _why_peft(model: nn.Module, name: str) -> str | None:
    """That the module is one of PEFT's layers, or in one."""
    path = name.split(".")
    for count in range(1, len(path) + 1):
        around = ".".join(path[:count])
        if has_peft_adapter(model.get_submodule(around)):
            where = "has an adapter of PEFT's" if around == name else f"is in PEFT's layer {around}"
            return f"{where}, which no style cuts: use lorafast.adapt, or load_adapter of a PEFT folder"
    return None


def _why_not_pytorchs(style: ParallelStyle, module: nn.Module, mesh: DeviceMesh) -> str | None:
    """What PyTorch's own styles refuse only when they get it, and adapters, which they don't know."""
    kind = type(style).__name__
    if isinstance(module, AdapterModule):
        return f"has an adapter, and {kind} is PyTorch's, which cuts none: use lorafast.parallel's"
    if not isinstance(style, ColwiseParallel | RowwiseParallel):
        return None
    if not isinstance(module, nn.Linear | nn.Embedding):
        expected = f"expected an nn.Linear or an nn.Embedding for PyTorch's {kind}"
        return f"is a {class_of(module)}, {expected}"
    return why_not_plain(module, mesh)


def _styles(model: nn.Module, plan: Mapping[str, ParallelStyle]) -> dict[str, ParallelStyle]:
    """The styles by the full names of their modules, in the order of the model."""
    if not isinstance(plan, Mapping) or not plan:
        raise ValueError(f"plan is {plan!r}, expected styles by the names of modules")
    modules = dict(model.named_modules())
    chosen: dict[str, str] = {}
    for pattern, style in plan.items():
        if not isinstance(pattern, str):
            raise TypeError(f"plan has {pattern!r}, expected the name of a module")
        if not isinstance(style, ParallelStyle):
            raise TypeError(f"plan[{pattern!r}] is {style!r}, expected a style, as Colwise()")
        found = [name for name in modules if name and _matches(pattern, name)]
        if not found:
            hint = nearest(pattern.replace("*", ""), filter(None, modules))
            raise ValueError(f"plan has {pattern!r}, which is the name of no module{hint}")
        for name in found:
            if name in chosen:
                raise ValueError(f"plan has {chosen[name]!r} and {pattern!r}, and both name {name}")
            chosen[name] = pattern
    inner: set[str] = set()
    for name, pattern in chosen.items():
        style = plan[pattern]
        if isinstance(style, Replicated):
            inside = {one: plan[chosen[one]] for one in chosen if one.startswith(f"{name}.")}
            other = next((one for one, its in inside.items() if not style.is_like(its)), None)
            if other is not None:
                raise ValueError(
                    f"plan has {pattern!r}, which has {other} inside, and a style for that"
                )
            inner |= inside.keys()
    return {name: plan[chosen[name]] for name in modules if name in chosen.keys() - inner}


def _matches(pattern: str, name: str) -> bool:
    """Whether the last parts of ``name`` are the pattern's."""
    wanted, parts = pattern.split("."), name.split(".")
    ending = parts[-len(wanted) :]
    return len(ending) == len(wanted) and all(map(fnmatch.fnmatchcase, ending, wanted))


def _check_unwrapped(model: nn.Module) -> None:
    sharded = name_of_sharded(model, set(model.modules()))
    if sharded is not None:
        raise ValueError(f"{sharded} is sharded by FSDP: cut it first, and call fully_shard after")
    if any(isinstance(one, nn.parallel.DistributedDataParallel) for one in model.modules()):
        raise ValueError("the model is in DistributedDataParallel: cut it first, and wrap it after")


def _left(model: nn.Module, styles: Mapping[str, ParallelStyle]) -> dict[str, nn.Module]:
    """The modules that are trained, or have adapters, and that no style is for."""
    covered: set[nn.Module] = set()
    for name, style in styles.items():
        module = model.get_submodule(name)
        covered |= set(module.modules()) if isinstance(style, Replicated) else {module}
    return {
        name: one for name, one in model.named_modules() if one not in covered and is_trained(one)
    }


def _check_ties(model: nn.Module, styles: Mapping[str, ParallelStyle]) -> None:
    """That a parameter of several modules is cut in one way."""
    first: dict[int, tuple[str, Placement]] = {}
    for name, style in styles.items():
        if not isinstance(style, Style):
            continue
        for parameter, (tensor, placement) in style.placements(model.get_submodule(name)).items():
            other, before = first.setdefault(id(tensor), (f"{name}.{parameter}", placement))
            if before != placement:
                raise ValueError(
                    f"{other} and {name}.{parameter} are one tensor, which the plan would cut along two "
                    "dimensions: of tied layers take Rowwise for the embedding and Colwise for the head"
                )


def _layouts(style: Any) -> list[Any]:
    found = [getattr(style, name, None) for name in ("input_layouts", "output_layouts")]
    if isinstance(style, Replicated):
        return []
    return [one for given in found for one in (given if isinstance(given, tuple) else (given,))]


def _is_of_tokens(placement: object) -> bool:
    """Whether it is a part of the tokens, not of the last dimension."""
    return isinstance(placement, Shard) and placement.dim != -1
