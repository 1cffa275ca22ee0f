"""``freeze`` and ``thaw``: which parts of a model are trained, and whose statistics are held."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from lorafast import operands
from lorafast.convert.kinds import adapter_parameters, has_adapters, has_peft_adapter
from lorafast.convert.targets import (
    Pattern,
    check_pattern,
    each,
    matches,
    no_such,
    reaches,
    some,
    unwrapped,
)
from lorafast.nn import AdapterLayer, Bottleneck
from lorafast.nn.inactive import InactiveAdapters

_LISTS = (nn.Sequential, nn.ModuleList)


def freeze(
    model: nn.Module,
    targets: Pattern | None = None,
    *,
    until: str | None = None,
    except_: Pattern | None = None,
) -> nn.Module:
    """Freezes parts of ``model``: their parameters get no gradient, their norms keep their statistics.

    Autograd then keeps nothing of layers before the first trained one, and computes no ``dx`` there.
    What is frozen already stays so, and what isn't named stays as it is.

    A norm with running statistics (batch norm; instance norm that tracks them) of which nothing is
    trained any more is held: it computes as in evaluation and its statistics stay, whatever
    ``model.train()`` says. That lasts through ``copy.deepcopy``, ``pickle`` and ``torch.save``; the
    ``state_dict`` is the same. ``thaw`` ends it, and the norm takes the mode that was last asked for.

    Adapters are parameters as others: name them in ``except_``, or freeze what lies before them.
    ``set_adapter`` trains the adapters that it makes active, in every layer: freeze again after it.
    Freeze before ``DistributedDataParallel``, which waits for what was trained when it was made, and
    after ``SyncBatchNorm.convert_sync_batchnorm``, which makes norms anew.

    Args:
        model: any module; changed in place.
        targets: modules, with all that is in them, or single parameters: a list of names (full ones or
            endings), or a string, a regex that must match the full name, as for ``adapt``. None, without
            ``until``: the whole model.
        until: the name of one module, or an ending that no other name has. It and all before it are
            frozen, in the order in which modules are registered (that of ``model.named_modules()``); a
            parameter that a module holds itself comes before its submodules.
        except_: what stays as it is, given like ``targets``. A parameter that has two names is left out
            by either.

    Returns:
        ``model``.

    Raises:
        ValueError: a name or regex matches nothing (the message has the nearest names), ``until`` is the
            name of several modules, both it and ``targets`` are given, or there is nothing to freeze.
            The model is unchanged.
    """
    inner = unwrapped(model)
    if targets is not None and until is not None:
        raise ValueError("targets and until are both given, expected one of them")
    if until is not None:
        chosen = _until(inner, until)
    elif targets is None:
        chosen = _Parts(inner, [""])
    else:
        chosen = _named(inner, "targets", targets)
    if except_ is not None:
        chosen.leave_out(_named(inner, "except_", except_))
    if not chosen.parameters and not any(map(_has_statistics, chosen.modules)):
        raise ValueError(
            "there is nothing to freeze: except_ leaves out all of it, or it has no parameter"
        )
    for parameter in chosen.parameters:
        parameter.requires_grad = False  # a lazy parameter refuses requires_grad_()
    for module in chosen.modules:
        if _has_statistics(module) and not _is_trained(module):
            _hold(module)
    return model


def thaw(model: nn.Module, targets: Pattern | None = None, *, last: int | None = None) -> nn.Module:
    """Trains parts of ``model`` again, at once or step by step; the norms in them follow
    ``model.train()`` again.

    Of a module with adapters inside only the adapters are trained (those that are active, bottlenecks
    too), of any other every parameter of a float dtype. What a layer with an adapter holds frozen stays
    so, named or not, and so do the tensors in which a quantized weight is stored. A norm in a module
    with adapters is let go if something of it is trained then.

    ``thaw(model, last=1)``, called again and again, thaws block by block from the output down (gradual
    unfreezing: Howard & Ruder, 2018). A block is an entry of an ``nn.ModuleList`` or ``nn.Sequential``,
    but of such a list of lists the entries of the inner ones, unless they are single layers; elsewhere
    it is a module in which there is no list. Blocks in which nothing is frozen don't count; in a model
    with adapters, blocks without one don't.

    Args:
        model: any module; changed in place.
        targets: what to thaw, given as for ``freeze``. None, without ``last``: the whole model.
        last: how many blocks, or all there are if they are fewer.

    Returns:
        ``model``.

    Raises:
        ValueError: a name or regex matches nothing, or only what stays frozen; ``last`` is no positive
            integer, both are given, a parameter was made in inference mode, or the model is in
            ``DistributedDataParallel``. The model is unchanged.
    """
    check_not_distributed(model, "thaw it")
    inner = unwrapped(model)
    if targets is not None and last is not None:
        raise ValueError("targets and last are both given, expected one of them")
    if last is not None:
        chosen = _last_blocks(inner, last)
    elif targets is None:
        chosen = _Parts(inner, [""])
    else:
        chosen = _named(inner, "targets", targets)
    parameters = chosen.trainable(_stay_frozen(inner))
    if targets is not None and chosen.parameters and not parameters:
        raise ValueError(
            "targets names only what stays frozen: tensors that an adapter is over, adapters that "
            "aren't active, or a quantized weight"
        )
    for parameter in parameters:
        if parameter.is_inference():
            raise ValueError(
                "a parameter was made in inference mode, and can't be trained: load the model outside"
            )
    for parameter in parameters:
        parameter.requires_grad = True
    for module in chosen.released():
        _let_go(module)
    return model


def check_not_distributed(model: nn.Module, do: str) -> None:
    """Raises ``ValueError`` if the model, or a part of it, is in ``DistributedDataParallel``."""
    if any(isinstance(one, nn.parallel.DistributedDataParallel) for one in model.modules()):
        raise ValueError(
            "the model is in DistributedDataParallel, which sums the gradients of what was trained when "
            f"it was made: {do} before"
        )


class _Parts:
    """Modules and parameters of ``model``: all inside those of the names, and single parameters."""

    def __init__(self, model: nn.Module, names: Iterable[str], own: bool = False) -> None:
        """``own``: of each module what it holds itself, without its submodules."""
        self.roots: list[tuple[nn.Module, nn.Module | nn.Parameter]] = []
        """What was named, and the module that holds it, or it itself."""
        found: dict[int, nn.Parameter] = {}
        modules: dict[nn.Module, None] = {}
        for name in names:
            holder, parameter = _at(model, name)
            self.roots.append((holder, holder if parameter is None else parameter))
            inside = [holder] if own or parameter is not None else list(holder.modules())
            modules |= dict.fromkeys(inside)
            given = [parameter] if parameter is not None else holder.parameters(recurse=not own)
            found |= {id(one): one for one in given}
        self.modules, self._parameters = list(modules), found

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Each once."""
        return list(self._parameters.values())

    def leave_out(self, others: "_Parts") -> None:
        """Takes away what ``others`` has; a norm of which a parameter is left out is not left out."""
        whole = {
            module
            for _, root in others.roots
            if isinstance(root, nn.Module)
            for module in root.modules()
        }
        self.modules = [module for module in self.modules if module not in whole]
        for key in others._parameters:
            self._parameters.pop(key, None)

    def released(self) -> list[nn.Module]:
        """The modules whose norms ``thaw`` lets go, once it has said what is trained."""
        found: dict[nn.Module, None] = {}
        for holder, root in self.roots:
            if isinstance(root, nn.Module) and not has_adapters(root):
                found |= dict.fromkeys(root.modules())
            else:
                inside = root.modules() if isinstance(root, nn.Module) else [holder]
                found |= dict.fromkeys(filter(_is_trained, inside))
        return list(found)

    def trainable(self, but: set[nn.Parameter]) -> list[nn.Parameter]:
        """What ``thaw`` trains of them."""
        found: dict[int, nn.Parameter] = {}
        for _, root in self.roots:
            inside = _to_train(root) if isinstance(root, nn.Module) else [root]
            found |= {id(one): one for one in inside}
        floats = [one for one in found.values() if one.is_floating_point() or one.is_complex()]
        return [one for one in floats if one not in but]


def _at(model: nn.Module, name: str) -> tuple[nn.Module, nn.Parameter | None]:
    """The module of this name; or the holder of the parameter of this name, and that."""
    parent, _, last = name.rpartition(".")
    holder = model.get_submodule(parent)
    parameter = holder._parameters.get(last) if last else None
    return (model.get_submodule(name), None) if parameter is None else (holder, parameter)


def _names(model: nn.Module) -> list[str]:
    """Of modules and parameters, all of them."""
    modules = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    return modules + [name for name, _ in model.named_parameters(remove_duplicate=False)]


def _named(model: nn.Module, argument: str, pattern: Pattern) -> _Parts:
    """What ``pattern`` matches; ``ValueError`` where a part of it matches nothing."""
    pattern = check_pattern(argument, pattern)
    if not pattern:
        raise ValueError(f"{argument} is {pattern!r}, expected at least one name")
    names = _names(model)
    for one in each(pattern):
        if not reaches(one, names):
            raise ValueError(no_such(argument, one, names, "module or parameter"))
    return _Parts(model, [name for name in names if matches(pattern, name)])


def _until(model: nn.Module, until: object) -> _Parts:
    modules = dict(model.named_modules(remove_duplicate=False))
    if not isinstance(until, str) or not until:
        raise ValueError(f"until is {until!r}, expected the name of a module")
    ending = [name for name in modules if matches((until,), name)]
    found = [until] if until in modules else ending
    if not found:
        raise ValueError(no_such("until", (until,), _names(model), "module or parameter"))
    if len({modules[name] for name in found}) > 1:
        raise ValueError(f"until is {until!r}, the ending of {some(found)}: expected one of them")
    order = list(modules)
    inside = [name for name in order if name == found[0] or name.startswith(f"{found[0]}.")]
    end = order.index(inside[-1]) + 1
    return _Parts(model, order[:end], own=True)


def _to_train(module: nn.Module) -> list[nn.Parameter]:
    """The parameters in ``module`` that ``thaw`` trains: of its adapters, if it has any."""
    if not has_adapters(module):
        return list(module.parameters())
    found = [one for one in adapter_parameters(module) if isinstance(one, nn.Parameter)]
    for layer in module.modules():
        if has_peft_adapter(layer):
            found += _active(layer)
    return found


def _stay_frozen(model: nn.Module) -> set[nn.Parameter]:
    """What ``thaw`` never trains: what lies under adapters, inactive ones, and quantized weights."""
    found: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, AdapterLayer) or has_peft_adapter(module):
            found |= set(module.parameters()) - set(_to_train(module))
        elif operands.of_layer(module) is not None:
            own = module.named_parameters(recurse=False)
            found |= {parameter for name, parameter in own if name != "bias"}
    return found


def _active(layer: Any) -> list[nn.Parameter]:
    """The parameters of the active adapters of PEFT's layer."""
    active = set(layer.active_adapters)
    return [
        parameter
        for adapter in layer.adapter_layer_names
        for name, parameter in getattr(layer, adapter).named_parameters()
        if name.partition(".")[0] in active
    ]


def _blocks(model: nn.Module) -> list[str]:
    """The names of the blocks, in the order of registration, and of what lies between them."""
    found: list[str] = []

    def walk(module: nn.Module, name: str, entry: bool) -> None:
        is_list = isinstance(module, _LISTS)
        single = not any(_children(child) for child in _children(module).values())
        inside = any(isinstance(one, _LISTS) for one in module.modules())
        if (entry and (single or not is_list)) or not inside:
            found.append(name)
            return
        # What it holds itself, an embedding of positions as a rule, comes first.
        found.extend(f"{name}.{one}" if name else one for one in module._parameters)
        for child_name, child in _children(module).items():
            walk(child, f"{name}.{child_name}" if name else child_name, is_list)

    walk(model, "", False)
    return found


def _children(module: nn.Module) -> dict[str, nn.Module]:
    """Those of the model's own: no bottleneck, and no adapters that wait."""
    own = dict(module.named_children())
    return {n: one for n, one in own.items() if not isinstance(one, Bottleneck | InactiveAdapters)}


def _last_blocks(model: nn.Module, last: object) -> _Parts:
    if not isinstance(last, int) or isinstance(last, bool) or last < 1:
        raise ValueError(f"last is {last!r}, expected a positive integer")
    adapted, but = has_adapters(model), _stay_frozen(model)
    frozen = []
    for name in _blocks(model):
        part = _Parts(model, [name])
        roots = [root for _, root in part.roots if isinstance(root, nn.Module)]
        if adapted and not any(map(has_adapters, roots)):
            continue
        if any(not one.requires_grad for one in part.trainable(but)):
            frozen.append(name)
    return _Parts(model, frozen[-last:])


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _has_statistics(module: nn.Module) -> bool:
    return module._buffers.get("running_mean") is not None


class _Held:
    """The ``train`` of a module that stays in evaluation: it remembers the mode that it is asked for.

    It is the instance's own attribute, so that copies and pickles of the module have it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.mode = module, module.training

    def __call__(self, mode: bool = True) -> nn.Module:
        if not isinstance(mode, bool):
            raise ValueError("training mode is expected to be boolean")
        self.mode = mode
        return self.module


def _hold(module: nn.Module) -> None:
    if not isinstance(vars(module).get("train"), _Held):
        vars(module)["train"] = _Held(module)
        module.training = False


def _let_go(module: nn.Module) -> None:
    held = vars(module).get("train")
    if isinstance(held, _Held):
        del vars(module)["train"]
        module.train(held.mode)
