"""A layer whose parameters are DTensors computes with this rank's parts of them, as plain tensors.

Hooks around its forward put the parts in the places of the parameters and take them away again. So the
layer's own code and the kernels below it see a smaller layer, and what asks for parameters between two
forwards (optimizers, checkpoints, ``save_adapter``, ``merge``) sees DTensors.
"""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.utils._pytree import tree_map_only

from lorafast import operands
from lorafast.core import columns
from lorafast.core.columns import Columns
from lorafast.parallel import replicas

REPLICATE = (Replicate(),)
PARTIAL = (Partial(),)


class _Part(torch.autograd.Function):
    """This rank's part of a DTensor; with ``summed`` its gradient is the sum of all ranks', else
    ``check`` gets it first."""

    @staticmethod
    def forward(
        ctx: Any, whole: Any, summed: bool, check: Callable[[Tensor], None] | None
    ) -> Tensor:
        ctx.spec, ctx.summed, ctx.check = whole._spec, summed, check
        part: Tensor = whole._local_tensor
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        spec = ctx.spec
        if ctx.check is not None:
            ctx.check(gradient)
        made = DTensor.from_local(
            gradient,
            spec.mesh,
            PARTIAL if ctx.summed else spec.placements,
            run_check=False,
            shape=spec.shape,
            stride=spec.stride,
        )
        return made.redistribute(placements=spec.placements) if ctx.summed else made, None, None


class _Waited(torch.autograd.Function):
    """A tensor, and its gradient, that no collective is still writing: a kernel reads its memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = _wait(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Collectives of DTensors would lose it in silence.
            raise NotImplementedError(
                "a layer that lorafast.parallel has cut has no second derivative (create_graph=True)"
            )
        return _wait(gradient)


class _Made:
    """What was made of an input, for as long as that lives."""

    def __init__(self, given: Tensor, how: object, made: Any) -> None:
        self.how, self.made = how, made
        self.given = weakref.ref(given, self._forget)

    def _forget(self, _: object) -> None:
        self.made = None

    def of(self, given: Tensor, how: object) -> Any:
        """It, if this is the input and all else is as it was; else None."""
        return self.made if self.given() is given and self.how == how else None


class _Last(threading.local):
    made: _Made | None = None
    """Of the input that a layer got last in this thread."""


_last = _Last()


_NOTHING: tuple[object, dict[str, Tensor | None], object] = (None, {}, None)


def _wait(x: Any) -> Any:
    return x.wait() if isinstance(x, AsyncCollectiveTensor) else x


def _local_of(x: Any) -> Any:
    return _Waited.apply(x.to_local()) if isinstance(x, DTensor) else _wait(x)


def _address(tensor: Tensor) -> int:
    """Of its memory; of a fake tensor, which has none, its own."""
    return id(tensor) if isinstance(tensor, FakeTensor) else tensor.data_ptr()


def _check_dims(name: str, placements: Sequence[Placement] | None, tensor: Tensor) -> None:
    """A placement is only known to fit where the tensor comes."""
    for one in placements or ():
        if isinstance(one, Shard) and not -tensor.dim() <= one.dim < tensor.dim():
            raise ValueError(
                f"{name} is {one}, expected a dimension of a tensor of {list(tensor.shape)}"
            )


class Local:
    """The hooks of one layer, and what it takes to show its parts.

    Args:
        mesh: one dimension of ranks.
        summed: the names of replicated parameters of whose gradients each rank has a summand.
        alike: those of which each rank has all of the gradient, with their names in the model. The first
            gradient is compared.
        takes, gives: the layouts of the input and the output outside the layer; None leaves them as
            they are.
        computes: the layouts of both inside it.
        use_local_output: whether the output is a plain tensor.
        shares_K: whether the ranks have parts of the columns of W: the bias is then the first rank's.
        description: of the operand that a part of the stored tensors is.
        tokens: of an embedding whose tokens are shared out: this rank's.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        summed: frozenset[str],
        *,
        alike: Mapping[str, str] | None = None,
        takes: Sequence[Placement] | None = None,
        gives: Sequence[Placement] | None = None,
        computes: tuple[Placement, Placement] | None = None,
        use_local_output: bool = True,
        shares_K: bool = False,
        description: str | None = None,
        tokens: range | None = None,
    ) -> None:
        self.mesh, self.summed = mesh, summed
        self._uncompared = dict(alike or {})
        self.takes, self.gives = takes, gives
        self.computes, self.use_local_output = computes, use_local_output
        self.shares_K, self.description, self.tokens = shares_K, description, tokens
        self._kept: list[Any] = []
        self._columns = Columns(mesh.get_local_rank(), self._total) if shares_K else None
        self._absent: Tensor | None = None
        self._ahead: tuple[object, dict[str, Tensor | None], object] = _NOTHING
        self._given: Any = None

    def __deepcopy__(self, memo: Any) -> "Local":
        """The same one, for the copy of its layer: a mesh isn't copied."""
        return self

    def attach(self, module: nn.Module) -> None:
        """From now on the forward of ``module`` computes with parts."""
        # The innermost of those that are there: these see the input and the output as outside.
        module.register_forward_pre_hook(self.before)
        # Also after an error, which must not leave the parts in place.
        module.register_forward_hook(self.after, prepend=True, always_call=True)

    def before(self, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        """A hook before the forward."""
        if self.computes is None:
            self._given = next((x.placements for x in inputs if isinstance(x, DTensor)), None)
            inputs = tree_map_only(Tensor, _local_of, inputs)
            self.show(module)
            return inputs
        if not inputs:
            raise TypeError(
                f"a {type(module).__name__} of lorafast.parallel takes its input by position"
            )
        x = self._shared_into(inputs[0])
        self.show(module)
        return (x, *inputs[1:])

    def after(self, module: nn.Module, inputs: tuple[Any, ...], y: Any) -> Any:
        """A hook after the forward; after an error too, when ``y`` is None."""
        if self._kept:
            self.hide(module)
        if y is None:
            return None
        if self.computes is None:
            return tree_map_only(Tensor, self._whole_again, y)
        return self._out_of(y)

    def show(self, module: nn.Module) -> None:
        """Puts the parts in place; ``hide`` undoes it."""
        attributes = vars(module)
        before = columns.enter(self._columns)
        self._kept.append(
            (
                dict(module._parameters),
                dict(module._buffers),
                {n: attributes[n] for n in ("_description", "padding_idx") if n in attributes},
                before,
            )
        )
        parts = self.parts(module)
        self._ahead = _NOTHING
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for place in places:
            place.update({name: parts[name] for name in place if name in parts})
        if self.description is not None:
            attributes["_description"] = self.description
        padding = attributes.get("padding_idx")
        if self.tokens is not None and padding is not None:
            there = padding in self.tokens
            attributes["padding_idx"] = padding - self.tokens.start if there else None

    def parts(self, module: nn.Module) -> dict[str, Tensor | None]:
        """This rank's parts of the module's tensors by name: those that its next forward puts in place,
        for siblings make something of them before it."""
        held: dict[str, Any] = {**module._parameters, **module._buffers}
        wholes = {name: tensor for name, tensor in held.items() if isinstance(tensor, DTensor)}
        if torch.compiler.is_compiling():
            return {name: self._part(name, whole) for name, whole in wholes.items()}
        locals_ = [t._local_tensor for t in wholes.values()]
        what = torch.is_grad_enabled(), *[
            (id(whole), whole.requires_grad, local.dtype, _address(local))
            for whole, local in zip(wholes.values(), locals_, strict=True)
        ]  # fmt: skip
        if self._ahead[0] != what:
            found = {name: self._part(name, whole) for name, whole in wholes.items()}
            self._ahead = what, found, wholes  # which keep their ids so
        return self._ahead[1]

    def parts_of(self, held: nn.Module) -> dict[str, Tensor | None]:
        """The same of an inactive adapter of the module."""
        return {
            name: self._part(name, whole) if isinstance(whole, DTensor) else whole
            for name, whole in held._parameters.items()
        }

    def hide(self, module: nn.Module) -> None:
        """Takes the parts away."""
        parameters, buffers, attributes, before = self._kept.pop()
        columns.enter(before)
        module._parameters.update(parameters)
        module._buffers.update(buffers)
        vars(module).update(attributes)

    @contextlib.contextmanager
    def shown(self, module: nn.Module) -> Iterator[None]:
        """Within the block the parts are in place."""
        self.show(module)
        try:
            yield
        finally:
            self.hide(module)

    def width(self, features: int) -> int:
        """The last dimension of a plain input, of which a whole one has ``features``."""
        last = (Shard(-1),)
        return features // self.mesh.size() if self.takes == last else features

    def dense_of(self, layer: Any) -> Tensor:
        """W ``[N, K]`` of a layer that stores it as an operand, made dense; as a DTensor."""
        stored = [self._whole_here(one) for one in layer._stored()]
        codes: Any = layer._stored()[0]
        with self.shown(layer):
            dense = operands.as_dense(operands.build(stored, layer._description))
        own = Replicate() if self.description is None else Shard(1 if self.shares_K else 0)
        mesh = codes.device_mesh if isinstance(codes, DTensor) else self.mesh
        return DTensor.from_local(dense, mesh, self._only_here(mesh, own), run_check=False)

    def _only_here(self, mesh: DeviceMesh, own: Placement) -> list[Placement]:
        """Placements on ``mesh``, which has this layer's: ``own`` there, whole over all others."""
        if mesh == self.mesh:
            return [own]
        here = self.mesh.mesh_dim_names or ()
        return [own if name in here else Replicate() for name in mesh.mesh_dim_names or ()]

    def _whole_here(self, tensor: Any) -> Tensor:
        """This rank's part of a tensor that FSDP may have sharded over other dimensions too, of which
        it is gathered."""
        if not isinstance(tensor, DTensor):
            whole: Tensor = tensor
            return whole
        own = tensor.placements[-1]  # FSDP's dimensions come before
        gathered = tensor.redistribute(placements=self._only_here(tensor.device_mesh, own))
        local: Tensor = _wait(gathered._local_tensor)
        return local

    def _part(self, name: str, tensor: Any) -> Tensor | None:
        if tensor.device_mesh != self.mesh:
            # The hooks of FSDP gather parameters, and no merged weight. Of a parameter that they didn't
            # gather the layer says so, as where nothing is cut.
            return tensor if isinstance(tensor, nn.Parameter) else self._whole_here(tensor)
        if self.shares_K and name == "bias" and self.mesh.get_local_rank() != 0:
            # The sum over ranks has it once.
            if not tensor.requires_grad:
                return None
            bias = _Part.apply(tensor, False, None)
            return bias - bias.detach()
        if tensor.requires_grad and torch.is_grad_enabled():
            is_compared = name in self._uncompared and not torch.compiler.is_compiling()
            check = functools.partial(self._compare, name) if is_compared else None
            part: Tensor = _Part.apply(tensor, name in self.summed, check)
            return part
        local: Tensor = tensor._local_tensor
        return local

    def _compare(self, name: str, gradient: Tensor) -> None:
        """Once, of a gradient that isn't 0: the other ranks' must be the same."""
        if name not in self._uncompared:
            return
        is_another = replicas.differs(_wait(gradient), self.mesh)
        if is_another:
            raise ValueError(
                f"{self._uncompared[name]} is replicated, and each rank has another gradient: what it "
                "computes with is a part, of columns, heads or tokens; give its module "
                "Replicated(input_layouts=Shard(-1)) in the plan, which sums the gradients"
            )
        if is_another is not None:
            del self._uncompared[name]

    def _total(self, part: Tensor) -> Tensor:
        total: Tensor = _wait(all_reduce(part.detach(), "sum", (self.mesh, 0)))
        return total

    def _shared_into(self, x: Any) -> Any:
        """``_into``, once for all layers that are called with the same x one after the other: what they
        share of it they share here too, and their gradients of it are summed before they are sent."""
        alone = torch.compiler.is_compiling() or self.tokens is not None
        if alone or not isinstance(x, Tensor) or x.is_inference():
            return self._into(x)
        assert self.computes is not None
        if x.is_leaf and self.takes != (self.computes[0],):
            return self._into(x)  # a copy, and a buffer's values may change unseen
        how = (
            self.takes, self.computes, self.mesh, x._version, torch.is_grad_enabled(),
            x.requires_grad,
        )  # fmt: skip
        made = None if _last.made is None else _last.made.of(x, how)
        if made is None:
            made = self._into(x)
            _last.made = _Made(x, how, made)
        return made

    def _into(self, x: Any) -> Any:
        """The input as this rank computes with it."""
        assert self.computes is not None
        inside = (self.computes[0],)
        if not isinstance(x, DTensor):
            _check_dims("input_layouts", self.takes, x)
            x = DTensor.from_local(x, self.mesh, self.takes, run_check=False)
        if x.placements != inside:
            x = x.redistribute(placements=inside)
        # Each rank's gradient of an input that all have is a summand.
        x = x.to_local(grad_placements=PARTIAL if inside == REPLICATE else None)
        if self.tokens is not None:
            self._absent = (x < self.tokens.start) | (x >= self.tokens.stop)
            x = (x - self.tokens.start).masked_fill(self._absent, 0)
        return _Waited.apply(x) if x.is_floating_point() else _wait(x)

    def _whole_again(self, y: Tensor) -> Tensor:
        """An output of a module that takes what it gets: a DTensor if the input was one."""
        y = _wait(y)
        if y.requires_grad and not torch.compiler.is_compiling():
            y.register_hook(_wait)  # no view: what comes next may change y in place
        if self._given is None:
            return y
        return DTensor.from_local(y, self.mesh, self._given, run_check=False)

    def _out_of(self, y: Any) -> Any:
        """The output in the layout that is asked for."""
        assert self.computes is not None
        y = _Waited.apply(y)
        if self._absent is not None:
            y, self._absent = y.masked_fill(self._absent.unsqueeze(-1), 0.0), None
        made = DTensor.from_local(y, self.mesh, (self.computes[1],), run_check=False)
        if self.gives is not None and made.placements != tuple(self.gives):
            _check_dims("output_layouts", self.gives, y)
            made = made.redistribute(placements=self.gives)
        return made.to_local() if self.use_local_output else made
