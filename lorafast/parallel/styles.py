"""The styles of a plan: how a layer with its adapter is cut over the ranks of a mesh.

Both cuts of a LoRA layer leave the collectives of its forward as they are. By columns of y (``Colwise``)
W and B are cut along N and A is replicated: each rank makes its columns from all of x, its summand of dx
has both terms before they are summed, and its summand of dA is summed in the backward, ``[r, K]``. By
columns of x (``Rowwise``) W and A are cut along K and B is replicated: each rank's summand of y has both
terms, dx is its own, and dB is summed in the backward, ``[N, r]``. DoRA's norms are those of whole rows:
by columns of x they are a sum over ranks, ``[N]``, in each forward.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from lorafast import operands
from lorafast.nn import AdapterLayer, LoRAEmbedding, LoRALinear, inactive
from lorafast.nn.adapter_module import AdapterModule
from lorafast.nn.stored_weight import StoredWeight
from lorafast.operands import Operand
from lorafast.parallel.local import Local

_LINEAR = {"weight": "NK", "bias": "N", "lora_A": "rK", "lora_B": "Nr", "lora_magnitude": "N"}
"""The axes of a linear layer's parameters."""
_EMBEDDING = {
    "weight": "KN", "lora_embedding_A": "rK", "lora_embedding_B": "Nr", "lora_magnitude": "N",
}  # fmt: skip
"""Those of an embedding's, whose tokens are K."""
_AXES = "NK"


class Style(ParallelStyle):
    """A style that says beforehand what it can't do."""

    @abstractmethod
    def why_not(self, module: nn.Module, mesh: DeviceMesh) -> str | None:
        """The reason for which ``module`` can't have this style, as the end of a sentence that begins
        with its name; None if it can."""

    @abstractmethod
    def placements(self, module: nn.Module) -> dict[str, tuple[Tensor, Placement]]:
        """The parameters that it would make DTensors of, and as what; but for an operand's."""

    @abstractmethod
    def put_on(
        self, module: nn.Module, mesh: DeviceMesh, sharded: dict[int, nn.Parameter], path: str = ""
    ) -> None:
        """Cuts ``module``, which the model has at ``path``; ``sharded`` has what became of parameters,
        by their ids."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        reason = why_not_mesh(device_mesh) or self.why_not(module, device_mesh)
        if reason is not None:
            raise ValueError(f"the {type(module).__name__} {reason}")
        self.put_on(module, device_mesh, {})
        return module

    def _moved(
        self,
        tensor: Tensor,
        mesh: DeviceMesh,
        placement: Placement,
        sharded: dict[int, Any],
        is_frozen: bool = False,
    ) -> Any:
        """A tensor of all ranks, from the first's; a frozen one from this rank's, if that is to be."""
        found = sharded.get(id(tensor))
        if found is not None:
            return found
        # What is trained, now or once its adapter is active, must begin alike.
        source = None if is_frozen and self.src_data_rank is None else 0
        made: Any = distribute_tensor(tensor.detach(), mesh, [placement], src_data_rank=source)
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(made, requires_grad=tensor.requires_grad)
        sharded[id(tensor)] = made
        return made


class _Cut(Style):
    """A layer cut along one axis of W."""

    axis: str

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        _check_layouts(input_layouts=input_layouts, output_layouts=output_layouts)
        self.input_layouts, self.output_layouts = input_layouts, output_layouts
        self.use_local_output = use_local_output

    def __repr__(self) -> str:
        given = ("input_layouts", "output_layouts", "use_local_output")
        return f"{type(self).__name__}({', '.join(f'{n}={getattr(self, n)}' for n in given)})"

    def why_not(self, module: nn.Module, mesh: DeviceMesh) -> str | None:
        """Sizes that the ranks can't share out, and what can't be cut."""
        if axes_of(module) is None:
            return (
                f"is a {class_of(module)}, expected an nn.Linear, an nn.Embedding, or a layer over one "
                "with LoRA or DoRA"
            )
        if isinstance(module, AdapterModule) and module.merged:
            return "is merged: unmerge it first"
        reason = why_not_plain(module, mesh) or _why_not_whole(module)
        if reason is not None:
            return reason
        ranks = mesh.size()
        weight = operand_of(module)
        if weight is not None:
            try:
                weight.split(_AXES.index(self.axis), ranks)
            except ValueError as error:
                return str(error)
        for name, (tensor, placement) in self.placements(module).items():
            dim = placement.dim if isinstance(placement, Shard) else None
            if dim is not None and tensor.shape[dim] % ranks:
                return (
                    f"has {name} {list(tensor.shape)}, and {tensor.shape[dim]} can't be cut into "
                    f"{ranks} parts"
                )
        return None

    def _dim(self, name: str, axes: Mapping[str, str]) -> int | None:
        """The dimension along which a parameter is cut; None if every rank has all of it."""
        dim = axes.get(name.rpartition(".")[2], "").find(self.axis)
        return None if dim < 0 else dim

    def placements(self, module: nn.Module) -> dict[str, tuple[Tensor, Placement]]:
        """All parameters."""
        axes = axes_of(module)
        assert axes is not None
        dims = {name: self._dim(name, axes) for name in _own(module)}
        return {name: (tensor, _placement(dims[name])) for name, tensor in _own(module).items()}

    def put_on(
        self, module: nn.Module, mesh: DeviceMesh, sharded: dict[int, nn.Parameter], path: str = ""
    ) -> None:
        """Cuts the parameters, and gives the layer the hooks."""
        weight, description = operand_of(module), None
        summed = set()
        if weight is not None:
            description = self._cut_operand(module, weight, mesh)
        for name, (tensor, placement) in self.placements(module).items():
            is_frozen = name in ("weight", "bias") and not tensor.requires_grad
            _put(module, name, self._moved(tensor, mesh, placement, sharded, is_frozen))
            # Of the bias by columns of x every rank has all of the gradient.
            if placement == Replicate() and not (self.axis == "K" and name == "bias"):
                summed.add(name.rpartition(".")[2])  # of an inactive adapter as of the active one
        tokens = None
        of_tokens = isinstance(module, nn.Embedding | LoRAEmbedding)
        if of_tokens and self.axis == "K":
            count = module.num_embeddings // mesh.size()  # type: ignore[operator]
            tokens = range(mesh.get_local_rank() * count, (mesh.get_local_rank() + 1) * count)
        inside: tuple[Placement, Placement] = (
            Shard(-1) if self.axis == "K" and not of_tokens else Replicate(),
            Partial() if self.axis == "K" else Shard(-1),
        )
        outside = Replicate() if self.axis == "K" else Shard(-1)
        local = Local(
            mesh,
            frozenset(summed),
            takes=(self.input_layouts or inside[0],),
            gives=(self.output_layouts or outside,),
            computes=inside,
            use_local_output=self.use_local_output,
            shares_K=self.axis == "K",
            description=description,
            tokens=tokens,
        )
        attach(module, local)

    def _cut_operand(self, module: Any, weight: Operand, mesh: DeviceMesh) -> str:
        """Cuts the tensors that a weight is stored in; what describes a part."""
        split = weight.split(_AXES.index(self.axis), mesh.size())
        whole, part = operands.describe_split(weight, split)
        codes = module._stored_names[0]
        for name in module._stored_names:
            module._parameters.pop(name, None)
            module._buffers.pop(name, None)
        for name, tensor in split.tensors.items():
            dim = split.dims[name]
            if isinstance(tensor, nn.Parameter) or name == codes:
                tensor = nn.Parameter(tensor.detach(), requires_grad=False)
            made = self._moved(tensor, mesh, _placement(dim), {}, is_frozen=True)
            if isinstance(made, nn.Parameter):
                module.register_parameter(name, made)
            else:
                module.register_buffer(name, made)
        module._description, module._stored_names = whole, tuple(split.tensors)
        return part


class Colwise(_Cut):
    """W ``[N, K]`` is cut along N, and with it the output: PyTorch's ``ColwiseParallel``, with adapters.

    ``y[:, part] = x·W[part]ᵀ + scaling · (drop(x)·Aᵀ)·B[part]ᵀ + bias[part]``. Of LoRA and DoRA A is
    replicated, B and the magnitude are cut. Of an embedding the row is cut, and A is replicated. A
    forward has no collective but that of its layouts; a backward has that of dx, and the sum of dA,
    ``[r, K]``. With dropout all ranks draw one mask, of their generators, which ``parallelize`` has set
    alike.

    It can stand in a plan of PyTorch's ``parallelize_module`` too: equal generators are then up to the
    caller.

    Args:
        input_layouts: of x where it is a plain tensor; ``Replicate()`` by default. ``Shard(1)`` is that
            of sequence parallelism: x is gathered, and dx scattered.
        output_layouts: of y; ``Shard(-1)`` by default.
        use_local_output: whether y is a plain tensor, this rank's part of it, or a DTensor.

    Raises (when a layer gets it):
        TypeError: a layout is no placement (of all styles, when they are made).
        ValueError: the mesh has several dimensions, or the layer can't be cut; the layer is unchanged.
    """

    axis = "N"


class Rowwise(_Cut):
    """W ``[N, K]`` is cut along K, and with it the input: PyTorch's ``RowwiseParallel``, with adapters.

    ``y = Σ_part x[:, part]·W[:, part]ᵀ + scaling · (drop(x[:, part])·A[:, part]ᵀ)·Bᵀ + bias``, summed
    over the ranks once, both terms together. Of LoRA and DoRA A is cut, B and the magnitude are
    replicated. Of an embedding the tokens are shared out, and one beyond the table gives a row of zeros,
    as under PyTorch's style. A forward has no collective but that of its
    layouts, DoRA one more, of its norms, ``[N]``; a backward has the sum of dB, ``[N, r]``. With dropout
    each rank's mask is one of its own, from a seed that all draw alike: the masks are independent, and
    together not the one that a single rank would draw.

    Args:
        input_layouts: of x where it is a plain tensor; ``Shard(-1)`` by default, ``Replicate()`` of an
            embedding.
        output_layouts: of y; ``Replicate()`` by default. ``Shard(1)`` is that of sequence parallelism:
            y is scattered as it is summed.
        use_local_output, and what is raised: as for ``Colwise``.
    """

    axis = "K"


class Replicated(Style):
    """Every rank has all of a module: bottlenecks, norms that are trained, heads, layers left whole.

    Its parameters begin alike on all ranks. Where every rank has all of the input, each has all of the
    gradients, and nothing is sent. Where the input is cut, by tokens (``Shard(1)``, sequence
    parallelism) or by heads, each rank has a summand of the gradients: the backward sums them. Which it
    is was said in the plan: the first backward compares the gradients of all ranks where they are to be
    the same, and raises a ``ValueError`` where they aren't (not in compiled models).

    Args:
        input_layouts: of the input; ``Replicate()`` by default.

    Raises (when a module gets it):
        ValueError: a parameter is sharded already.
    """

    def __init__(self, *, input_layouts: Placement | None = None) -> None:
        super().__init__()
        _check_layouts(input_layouts=input_layouts)
        self.input_layouts = input_layouts or Replicate()

    def __repr__(self) -> str:
        return f"Replicated(input_layouts={self.input_layouts})"

    def is_like(self, other: object) -> bool:
        """Whether ``other`` does the same."""
        return isinstance(other, Replicated) and other.input_layouts == self.input_layouts

    def why_not(self, module: nn.Module, mesh: DeviceMesh) -> str | None:
        """Parameters that are sharded already."""
        for one in module.modules():
            reason = why_not_plain(one, mesh)
            if reason is not None:
                return reason
        return None

    def placements(self, module: nn.Module) -> dict[str, tuple[Tensor, Placement]]:
        """What is trained, or may be."""
        found: dict[str, tuple[Tensor, Placement]] = {}
        for path, one in module.named_modules():
            for name, tensor in _trained(one).items():
                found[f"{path}.{name}" if path else name] = tensor, Replicate()
        return found

    def put_on(
        self, module: nn.Module, mesh: DeviceMesh, sharded: dict[int, nn.Parameter], path: str = ""
    ) -> None:
        """Makes the parameters that are trained, or may be, replicated DTensors."""
        for name, one in [*module.named_modules(prefix=path)]:
            if is_trained(one):
                self.put_on_one(one, mesh, sharded, name)

    def put_on_one(
        self, module: nn.Module, mesh: DeviceMesh, sharded: dict[int, nn.Parameter], path: str
    ) -> None:
        """The same of the module's own parameters alone."""
        own = _trained(module)
        for name, tensor in own.items():
            _put(module, name, self._moved(tensor, mesh, Replicate(), sharded))
        names = {n.rpartition(".")[2]: f"{path}.{n}" if path else n for n in own}
        if self.input_layouts == Replicate():
            local = Local(mesh, frozenset(), alike=names)
        else:
            local = Local(mesh, frozenset(names))
        attach(module, local)


def _check_layouts(**given: object) -> None:
    for name, layout in given.items():
        if not isinstance(layout, Placement | None):
            raise TypeError(f"{name} is {layout!r}, expected a placement, as Shard(1), or None")


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of its own that are trained, and those of its adapters, inactive ones too."""
    if isinstance(module, inactive.InactiveAdapter):
        return {}  # its layer's
    own = _own(module)
    adapter = module.adapter_shapes().keys() if isinstance(module, AdapterLayer) else ()
    return {n: t for n, t in own.items() if t.requires_grad or n in adapter or "." in n}


def is_trained(module: nn.Module) -> bool:
    """Whether it has such parameters."""
    return bool(_trained(module))


def _placement(dim: int | None) -> Placement:
    return Replicate() if dim is None else Shard(dim)


def axes_of(module: nn.Module) -> Mapping[str, str] | None:
    """The axes of the parameters of a layer that can be cut; None of another."""
    if isinstance(module, nn.Embedding | LoRAEmbedding):
        return _EMBEDDING
    if not isinstance(module, nn.Linear | LoRALinear | StoredWeight):
        return None
    if isinstance(module, LoRALinear) and module._as_kept.__func__ is not LoRALinear._as_kept:  # type: ignore[attr-defined]
        return _LINEAR | {"weight": "KN"}  # a Conv1D
    return _LINEAR


def _why_not_whole(module: Any) -> str | None:
    """What an embedding computes of all its rows, and a weight that is not one dense tensor."""
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if isinstance(module, nn.Embedding) and getattr(module, option) not in (None, False):
            return f"is an embedding with {option}, which can't be cut"
    if isinstance(module, nn.Linear):
        shape = [module.out_features, module.in_features]
        others = sorted((module._parameters | module._buffers).keys() - _LINEAR.keys())
        if others or list(module.weight.shape) != shape:
            what = f"a {others[0]}" if others else f"a weight {list(module.weight.shape)}"
            return (
                f"is a {type(module).__name__} with {what}, which no rule cuts: adapt it, or leave it "
                "out of the plan"
            )
    return None


def operand_of(module: nn.Module) -> Operand | None:
    """The weight of a layer that stores it otherwise than in one dense tensor."""
    weight = module.operand() if isinstance(module, StoredWeight) else None
    return weight if isinstance(weight, Operand) else None


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    """The layer's own parameters and those of its inactive adapters; no tensors of an operand."""
    stored = module._stored_names if isinstance(module, StoredWeight) else ()
    own = {n: p for n, p in module._parameters.items() if p is not None and n not in stored}
    for adapter, held in inactive.waiting(module).items():
        own |= {f"{inactive.INACTIVE}.{adapter}.{n}": p for n, p in held._parameters.items()}
    return own


def _put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, last = name.rpartition(".")
    module.get_submodule(owner)._parameters[last] = parameter


def attach(module: nn.Module, local: Local) -> None:
    """Gives a module the hooks."""
    local.attach(module)
    if isinstance(module, AdapterModule):
        module._local = local


def class_of(module: nn.Module) -> str:
    """The name of its class, with its package if that isn't PyTorch: others have a Linear too."""
    kind = type(module)
    is_pytorchs = kind.__module__.startswith("torch.nn.")
    return kind.__name__ if is_pytorchs else f"{kind.__module__}.{kind.__qualname__}"


def why_not_plain(module: nn.Module, mesh: DeviceMesh) -> str | None:
    """Parameters that are sharded already, or computed."""
    for name, tensor in (module._parameters | module._buffers).items():
        if isinstance(tensor, DTensor):
            where = (
                "this mesh" if tensor.device_mesh == mesh else f"another mesh, {tensor.device_mesh}"
            )
            return f"has a {name} that is sharded over {where}: parallelize it once, before FSDP"
    if "parametrizations" in module._modules:
        return "has a parametrization: remove it first"
    return None


def why_not_mesh(mesh: Any) -> str | None:
    """The reason for which nothing can be cut over ``mesh``, or None."""
    if not isinstance(mesh, DeviceMesh):
        return f"is to be cut over a {type(mesh).__name__}, expected a DeviceMesh"
    if mesh.ndim != 1:
        names = ", ".join(mesh.mesh_dim_names or ())
        return f"is to be cut over a mesh of {mesh.ndim} dimensions ({names}), expected one of them"
    if mesh.get_coordinate() is None:
        return f"is to be cut over {mesh}, of which this rank is no part"
    return None
