"""``AdapterState``: what a run trains, as ``torch.distributed.checkpoint`` saves and loads it."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorafast.convert.all_or_nothing import all_or_nothing, copy_into
from lorafast.convert.checkpoints import state_of
from lorafast.convert.fsdp import has_flat_parameters
from lorafast.convert.kinds import adapter_parameters
from lorafast.convert.targets import COMPILED, unwrapped
from lorafast.nn import AdapterLayer, bitsandbytes_keys, inactive
from lorafast.nn.adapter_module import AdapterModule, adapters_in

# What stands before the names of a block that torch.compile or PyTorch's checkpoint_wrapper wraps.
_WRAPPERS = (COMPILED, "_checkpoint_wrapped_module")


class AdapterState:
    """The adapters of a model, all else of it that is trained, and the optimizer's state of these.

    ``torch.distributed.checkpoint`` takes it as it takes a model: on every rank
    ``dcp.save({"adapter": AdapterState(model, optimizer)}, checkpoint_id=folder)``, and ``dcp.load``
    likewise. What is sharded (FSDP2, tensor parallelism) stays so: each rank writes its part, and a
    model that is sharded otherwise, or not at all, loads it. Frozen weights are in no such checkpoint,
    nor are the scales of quantized ones: the model must have them. PyTorch reads pickles there: load
    checkpoints of people that you trust.

    In it are, by their names in the model's ``state_dict``: the parameters of all adapters, active or
    not; every other parameter that requires a gradient; the buffers of a module that holds such a one
    (BatchNorm's statistics). And what no tensor says: each layer's scaling, and which adapter is active.

    Args:
        model: with adapters, or with parameters that are trained; merged layers are merged anew after a
            load. PEFT's adapters count as parameters: those that are trained are in it.
        optimizer: of the model; None: its state is neither saved nor loaded. In it is that of every
            parameter of these which the optimizer has, of adapters that wait too; where there was none
            yet there is none after a load. An optimizer of other parameters loads no checkpoint.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self._model, self._optimizer = unwrapped(model), optimizer

    def state_dict(self) -> dict[str, Any]:
        """Copies of the tensors, and the rest; ``dcp.load`` calls this too, and fills them.

        Raises:
            ValueError: the model has neither adapters nor trained parameters, is on meta, or is in
                ``FullyShardedDataParallel``, whose parameters are flat.
        """
        tensors = self._tensors()
        state: dict[str, Any] = {
            "tensors": _copied(tensors),
            "layers": json.dumps(_settings(self._model)),
        }
        names: dict[str, list[str]] = {"tensors": sorted(tensors)}
        if self._optimizer is not None:
            held = self._held(tensors)
            names["optimizer"] = sorted(held)
            names["fresh"] = sorted(n for n, p in held.items() if not self._optimizer.state.get(p))
            state["optimizer"] = self._optimizer_state(held)
        state["names"] = json.dumps(names)
        return state

    def _held(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those that the optimizer has."""
        assert self._optimizer is not None
        has = {id(p): p for group in self._optimizer.param_groups for p in group["params"]}
        for more in has.keys() - {id(p) for p in self._model.parameters()}:
            raise ValueError(
                f"the optimizer has a parameter of shape {list(has[more].shape)} that the model hasn't"
            )
        return {name: tensor for name, tensor in tensors.items() if id(tensor) in has}

    def _optimizer_state(self, held: dict[str, Tensor]) -> dict[str, Any]:
        """The optimizer's of these parameters, whose own stays as it is."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        assert self._optimizer is not None
        parameters = list({id(p): p for p in held.values()}.values())
        with (
            _trained_without_gradients(self._optimizer, parameters),
            _begun(self._optimizer, parameters),
        ):
            found: dict[str, Any] = _copied(get_optimizer_state_dict(self._model, self._optimizer))
        names = {_without_wrappers(name): p for name, p in self._model.named_parameters()}
        own = {id(p) for p in parameters}
        # What is frozen and no adapter's isn't in the checkpoint: nor is its state of before.
        found["state"] = {
            name: values
            for name, values in found["state"].items()
            if name not in names or id(names[name]) in own
        }
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts a state into the model and the optimizer; where it doesn't fit, both are as they were.

        ``dcp.load`` itself refuses a tensor of another shape, and a checkpoint that lacks one which the
        model has, before it reads any.

        Raises:
            ValueError: the state has a tensor that the model hasn't, or lacks one; a layer has another
                scaling, another adapter active or began otherwise (PiSSA); a merged layer can't be
                merged anew; or there is an optimizer, and no state of one, or of one that had other
                parameters.
        """
        tensors = self._tensors()
        _check_settings(_settings(self._model), json.loads(state["layers"]))
        names = json.loads(state["names"])
        if isinstance(names, list):  # of a checkpoint that doesn't say what its optimizer had
            names = {"tensors": names}
        _check_names(set(tensors), set(names["tensors"]) | set(state["tensors"]))
        _check_names(set(tensors), set(state["tensors"]))
        for name, target in tensors.items():
            if state["tensors"][name].shape != target.shape:
                raise ValueError(
                    f"{name} has shape {list(state['tensors'][name].shape)} in the checkpoint and "
                    f"{list(target.shape)} in the model"
                )
        if self._optimizer is not None and "optimizer" not in state:
            raise ValueError(
                "the state has no optimizer's, and AdapterState was given an optimizer"
            )
        held, optimizer_state = {}, None
        if self._optimizer is not None:
            held = self._held(tensors)
            _check_held(set(held), set(names.get("optimizer", held)))
            optimizer_state = self._checked(held, state["optimizer"], names)
        merged = [m for m in self._model.modules() if isinstance(m, AdapterLayer) and m.merged]
        with all_or_nothing(self._model) as undo:
            undo.keep(tensors.values(), merged)
            for name, target in tensors.items():
                copy_into(target, state["tensors"][name])
            for layer in merged:
                layer.merge()
            if self._optimizer is not None and optimizer_state is not None:
                from torch.distributed.checkpoint.state_dict import (
                    StateDictOptions,
                    set_optimizer_state_dict,
                )

                with _trained_without_gradients(self._optimizer, held.values()):
                    set_optimizer_state_dict(
                        self._model, self._optimizer, optimizer_state,
                        options=StateDictOptions(strict=False),
                    )  # fmt: skip

    def _checked(
        self, held: dict[str, Tensor], given: Mapping[str, Any], names: dict[str, list[str]]
    ) -> dict[str, Any]:
        """An optimizer's state without what stands for none; raises if it is of another kind."""
        for name, values in self._optimizer_state(held)["state"].items():
            lacking = values.keys() - given["state"].get(name, {}).keys()
            if lacking:
                raise ValueError(
                    f"the state has no {min(lacking)} of {name}, which this optimizer keeps: it is that "
                    "of another kind of optimizer, or of other parameters"
                )
        fresh = set(names.get("fresh", ()))
        kept = {name: values for name, values in given["state"].items() if name not in fresh}
        return {**given, "state": kept}

    def _tensors(self) -> dict[str, Tensor]:
        """The model's own, by name."""
        if has_flat_parameters(self._model):
            raise ValueError(
                "the model is in FullyShardedDataParallel, whose parameters are flat, expected one that "
                "fully_shard has sharded"
            )
        with bitsandbytes_keys(False):
            state = state_of(self._model)  # FSDP2 shards what it has left gathered
        whole = {_without_wrappers(name): tensor for name, tensor in state.items()}
        of_adapters = {id(tensor) for tensor in adapter_parameters(self._model)}
        adapted = set()
        for place, module in self._model.named_modules(remove_duplicate=False):
            if isinstance(module, AdapterModule):
                adapted.add(_without_wrappers(place))
            if isinstance(module, AdapterLayer):
                for held in inactive.waiting(module).values():
                    of_adapters |= {id(parameter) for parameter in held.parameters()}
        names = [n for n, t in whole.items() if id(t) in of_adapters or t.requires_grad]
        trained = {_owner(name) for name in names} - adapted
        names += [
            name
            for name, tensor in whole.items()
            if not isinstance(tensor, nn.Parameter) and _owner(name) in trained
        ]
        if not names:
            raise ValueError("the model has no adapter, and no parameter of it is trained")
        for name in names:
            if whole[name].is_meta:
                raise ValueError(f"{name} is on the device meta, which holds no values")
        return {name: whole[name] for name in names}


@contextlib.contextmanager
def _trained_without_gradients(
    optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]
) -> Iterator[None]:
    """Where PyTorch sees a gradient, it leaves a state that is still empty so, and loads none; and it
    loads none of a parameter that is frozen, as those of an adapter that waits are."""
    every = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in every]
    frozen = [p for p in parameters if not p.requires_grad]
    for p in every:
        p.grad = None
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
        for p, grad in zip(every, gradients, strict=True):
            p.grad = grad


@contextlib.contextmanager
def _begun(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> Iterator[None]:
    """Within the block each has a state: ``dcp.load`` reads what is asked for. Where there is none the
    optimizer makes one that stands for it, in a step of gradients that are zero, at a rate of zero."""
    fresh = [p for p in parameters if not optimizer.state.get(p)]
    if not fresh:
        yield
        return
    before = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            if "lr" in group:
                group["lr"] = group["lr"] * 0
        for p in fresh:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for group, values in zip(optimizer.param_groups, before, strict=True):
            group.update(values)
        for p in fresh:
            p.grad = None
        yield
    finally:
        for group, values in zip(optimizer.param_groups, before, strict=True):
            group.update(values)
        for p in fresh:
            p.grad = None
            optimizer.state.pop(p, None)


def _settings(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What each adapter computes with beside its tensors."""
    adapters = adapters_in(model).items()
    return {_without_wrappers(name): _settings_of(adapter) for name, adapter in adapters}


def _settings_of(adapter: AdapterModule) -> dict[str, Any]:
    if not isinstance(adapter, AdapterLayer):
        return {"scaling": float(adapter.scaling)}
    found = {
        "the active adapter": adapter._adapter_name,
        "scaling": float(adapter.scaling),
        "init_lora_weights": adapter.init_lora_weights,
    }
    for name, held in inactive.waiting(adapter).items():
        found[f"scaling of {name}"] = float(held.settings["_scaling"])
    return found


def _check_names(own: set[str], given: set[str]) -> None:
    more, lacking = sorted(given - own), sorted(own - given)
    if more:
        raise ValueError(
            f"the checkpoint has {_few(more)}, which the model hasn't or doesn't train: adapt it as the "
            "one that was saved"
        )
    if lacking:
        raise ValueError(f"the checkpoint lacks {_few(lacking)}, which the model has or trains")


def _check_held(own: set[str], given: set[str]) -> None:
    more, lacking = sorted(given - own), sorted(own - given)
    advice = "give it the parameters that it had when it was saved, those of adapters that wait too"
    if more:
        raise ValueError(
            f"the checkpoint has an optimizer's state of {_few(more)}, which this optimizer hasn't: "
            f"{advice}"
        )
    if lacking:
        raise ValueError(
            f"the checkpoint has no optimizer's state of {_few(lacking)}, which this optimizer has: "
            f"{advice}"
        )


def _check_settings(own: dict[str, dict[str, Any]], given: dict[str, dict[str, Any]]) -> None:
    for layer in sorted(own.keys() & given.keys()):
        for what, here in own[layer].items():
            there = given[layer].get(what, here)
            if there != here:
                raise ValueError(
                    f"{what} of {layer or 'the model'} is {there!r} in the checkpoint and {here!r} in "
                    "the model: adapt it as the one that was saved, before it is sharded"
                )


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _copied(value: Any) -> Any:
    """``value`` with copies of its tensors, within dictionaries and lists."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(one) for key, one in value.items()}
    return [_copied(one) for one in value] if isinstance(value, list) else value
