"""``AdapterModule``: what every module with an adapter has, and the one list of those in a model."""

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from lorafast.core.problem import Problem
from lorafast.nn.switch import Switch


class AdapterModule(Switch, nn.Module):
    """The base class of modules that have an adapter, or are one, of every kind.

    ``adapters_in`` finds them, and so ``disabled``, ``explain``, ``warm_up``, ``summary``, the freezing
    of what is no adapter and the warning at the first backward do: a new kind is a subclass.
    """

    operation: ClassVar[str] = ""
    """What its forward is called in every room."""
    served_by: ClassVar[str] = "PyTorch's own calls, on every backend"
    """What computes it where ``problems`` names none: a reason for ``explain``."""
    parts: ClassVar[tuple[str, ...]] = ("",)
    """What ``problems`` are of, two for each, where that is more than one frozen weight."""
    watched_parameter: ClassVar[str] = ""
    """The adapter's parameter that starts at zero, and gets a gradient whenever it is trained."""
    has_rows: ClassVar[bool] = True
    """Whether the elements of a batch can have the adapter or not (``mixed``)."""
    has_several: ClassVar[bool] = False
    """Whether they can have adapters of several names too, if none of these is DoRA."""
    own_child: ClassVar[str] = ""
    """Its name as a child of the module that it adapts; empty if it takes that one's place."""
    in_features: int
    out_features: int
    scaling: float
    """The factor before what the adapter adds."""
    dropout: float = 0.0
    """Probability of dropping an element of the input on its way into the adapter in training."""
    _local: Any = None
    """What shows the parts of its tensors that this rank has, where ``lorafast.parallel`` has cut it."""
    merged = False
    """Whether it computes without its adapter, which is a part of the frozen weight."""

    @property
    @abstractmethod
    def r(self) -> int:
        """The rank, or the width of a bottleneck."""

    @abstractmethod
    def adapter_parameters(self) -> dict[str, Tensor]:
        """The parameters of the adapter by name."""

    @abstractmethod
    def example_input(self, rows: int) -> Tensor:
        """An input of so many rows, such as a forward gets."""

    def example_arguments(self, x: Tensor) -> tuple[Tensor, ...]:
        """What a forward is called with for the input ``x``."""
        return (x,)

    def problems(self, x: Tensor | None) -> tuple[Problem, ...]:
        """The forward and the backward that backends are asked for; none where PyTorch computes it.

        Rows are like those of ``x``, or many of the weight's.
        """
        return ()

    def summary_remark(self) -> str:
        """What ``summary`` says of it beside its numbers, if anything."""
        return ""


def adapters_in(model: nn.Module, remove_duplicate: bool = True) -> dict[str, AdapterModule]:
    """All adapters of ``model`` by the names of the modules that they adapt, which a child of such a
    module goes by too; without ``remove_duplicate`` by each of their names."""
    modules = model.named_modules(remove_duplicate=remove_duplicate)
    return {_place(name, one): one for name, one in modules if isinstance(one, AdapterModule)}


def _place(name: str, one: AdapterModule) -> str:
    return name.removesuffix(one.own_child).removesuffix(".") if one.own_child else name
