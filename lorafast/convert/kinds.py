"""The kinds of adapters that a model can have: a row each, which is all that this room knows of them.

To add one: its module, a subclass of ``AdapterLayer``, and a row in ``KINDS``. What stands beside a
layer and takes no layer's place is a subclass of ``AdapterModule`` alone, as ``Bottleneck`` is.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lorafast.nn import AdapterLayer, LoRAConv, LoRAEmbedding, LoRALinear, LoRAMultiheadAttention
from lorafast.nn.adaptable import is_convolution
from lorafast.nn.adapter_module import adapters_in
from lorafast.nn.plain import features, frozen_tensor, is_conv1d, is_linear


@dataclass(frozen=True)
class Kind:
    """One kind: the plain layers that it is for, and the module that takes their place."""

    layer: type[AdapterLayer]
    plain: str
    """What the plain layers are called in messages."""
    wraps: Callable[[nn.Module], bool]
    """Whether a plain layer is one of them."""
    features: Callable[[Any], tuple[int, int]]
    """``in_features`` and ``out_features`` of a plain layer."""
    frozen_tensor: Callable[[Any], Tensor]
    """Its weight, or the first tensor that the weight is stored in."""
    in_all_linear: bool
    """Whether PEFT's ``"all-linear"`` names its layers."""
    is_one_product: Callable[[Any], bool] = lambda plain: False
    """Whether ``scaling · B·A`` is the change of a plain layer's ``weight``, which is made of floats."""
    is_transposed: Callable[[Any], bool] = lambda plain: False
    """Whether that weight is ``[in_features, out_features]``."""

    @property
    def factors(self) -> tuple[str, str]:
        """The endings of A's and B's names in PEFT's files."""
        A, B, *_ = self.layer.peft_names.values()
        return A, B


KINDS = (
    Kind(
        layer=LoRALinear,
        plain="nn.Linear",
        wraps=is_linear,
        features=features,
        frozen_tensor=frozen_tensor,
        in_all_linear=True,
        is_one_product=lambda plain: isinstance(plain._parameters.get("weight"), nn.Parameter),
        is_transposed=is_conv1d,
    ),
    Kind(
        layer=LoRAEmbedding,
        plain="nn.Embedding",
        wraps=lambda module: isinstance(module, nn.Embedding),
        features=lambda plain: tuple(plain.weight.shape),
        frozen_tensor=lambda plain: plain.weight,
        in_all_linear=False,
        is_one_product=lambda plain: True,
        is_transposed=lambda plain: True,
    ),
    Kind(
        layer=LoRAConv,
        plain="convolution",
        wraps=is_convolution,
        features=lambda plain: (plain.in_channels, plain.out_channels),
        frozen_tensor=lambda plain: plain.weight,
        in_all_linear=False,
        is_one_product=lambda plain: plain.groups == 1,
    ),
    Kind(
        layer=LoRAMultiheadAttention,
        plain="nn.MultiheadAttention",
        wraps=lambda module: isinstance(module, nn.MultiheadAttention),
        features=lambda plain: (plain.embed_dim, 3 * plain.embed_dim),
        frozen_tensor=lambda plain: plain.in_proj_weight,
        in_all_linear=False,
    ),
)
PLAIN = " or ".join(kind.plain for kind in KINDS)
PEFT_NAMES = {ending: name for kind in KINDS for name, ending in kind.layer.peft_names.items()} | {
    # PEFT writes this and reads both; Transformers, loading by itself, reads what is written here.
    "lora_magnitude_vector": "lora_magnitude"
}
"""The endings of adapters' tensors in PEFT's files, and the parameters that they are."""
FACTORS = dict(kind.factors for kind in KINDS)
"""The endings of A in PEFT's files, and those of the B that belongs to it."""
LINEAR, EMBEDDING = (kind.factors for kind in KINDS[:2])
"""Those of linear layers, which convolutions have too, and those of embeddings."""


def kind_of(module: nn.Module) -> Kind | None:
    """The kind that ``module`` is, adapted or plain, or None."""
    adapted = isinstance(module, AdapterLayer)
    for kind in KINDS:
        if isinstance(module, kind.layer) if adapted else kind.wraps(module):
            return kind
    return None


def kind_of_layer(layer: nn.Module) -> Kind:
    """The kind of ``layer``, which is of one."""
    kind = kind_of(layer)
    assert kind is not None
    return kind


def adapted_layers(model: nn.Module, remove_duplicate: bool = True) -> dict[str, AdapterLayer]:
    """The adapted layers of ``model`` by name; without ``remove_duplicate`` by each of their names."""
    modules = model.named_modules(remove_duplicate=remove_duplicate)
    return {name: module for name, module in modules if isinstance(module, AdapterLayer)}


def has_peft_adapter(module: nn.Module) -> bool:
    """Whether ``module`` is a layer of PEFT's, with an adapter of any kind; never imports PEFT."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


def is_peft_wrapper(module: nn.Module) -> bool:
    """Whether it is PEFT's wrapper of a module that is stored whole; never imports PEFT."""
    others = sys.modules.get("peft.utils.other")
    return others is not None and isinstance(module, others.AuxiliaryTrainingWrapper)


def has_adapters(model: nn.Module) -> bool:
    """Whether an adapter is in ``model``: lorafast's, of any kind, or PEFT's."""
    return bool(adapters_in(model)) or any(map(has_peft_adapter, model.modules()))


def adapter_parameters(model: nn.Module) -> list[Tensor]:
    """The parameters of all adapters in ``model``."""
    adapters = adapters_in(model).values()
    return [tensor for one in adapters for tensor in one.adapter_parameters().values()]
