"""The kernels with other launch configurations than those that ship."""

import functools
from types import SimpleNamespace

from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.expand import expand
from lorafast.kernels.expand_backward import expand_backward
from lorafast.kernels.linear_expand import linear_expand
from lorafast.kernels.lora_linear import lora_linear
from lorafast.kernels.shrink import shrink
from lorafast.kernels.shrink_backward import shrink_backward

# The smallest tiles put many boundaries inside a small problem; None is what ships.
SMALL_TILES = {
    "16x16 tiles": LaunchConfig(16, 16, 16, 16, num_warps=1, num_stages=1),
    "32x16x64 tiles": LaunchConfig(32, 16, 64, 32, num_warps=1, num_stages=1),
    "16x64 tiles in parts": LaunchConfig(16, 64, 16, 16, 1, 1, parts=2, masked_parts=4),
    "16x32 tiles, TMA": LaunchConfig(
        16, 32, 16, 16, 1, 1, descriptors=True, flatten=True, parts=2, ctas_per_sm=2
    ),
    "shipped tiles": None,
}


def are_kernels(run: object) -> bool:
    """Whether ``run`` is what ``on_kernels`` makes, not a reference."""
    return isinstance(run, SimpleNamespace)


def on_kernels(**configs: LaunchConfig | None) -> SimpleNamespace:
    """The launchers, those named with the configuration given."""
    launchers = {
        f.__name__: f
        for f in (shrink, expand, linear_expand, expand_backward, shrink_backward, lora_linear)
    }
    for name, config in configs.items():
        launchers[name] = functools.partial(launchers[name], config=config)
    return SimpleNamespace(**launchers)
