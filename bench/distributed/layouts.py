"""How a decoder of Llama's shape is laid out over ranks."""

from dataclasses import dataclass
from typing import Any

import torch
from lorafast.bench.common.contenders import UnavailableError
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ParallelStyle

from lorafast.parallel import Colwise, Rowwise

_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_ROWS = ("o_proj", "down_proj")
SHARDS, CUT = "fsdp", "tp"
_DIMENSIONS = ("pp", "dp_replicate", SHARDS, CUT)
"""Of the mesh, as Transformers names them."""


@dataclass(frozen=True)
class Layout:
    """Tensor parallelism over each ``cut`` ranks, and over ``ranks // cut`` of these groups FSDP2 if
    ``sharded``, else DDP."""

    shown: str
    ranks: int
    cut: int = 1
    sharded: bool = False

    @property
    def replicas(self) -> int:
        """Parts of a batch."""
        return self.ranks // self.cut

    def mesh(self, device: torch.device) -> DeviceMesh:
        """Of all ranks."""
        shape = (1, 1, self.replicas, self.cut)
        return init_device_mesh(device.type, shape, mesh_dim_names=_DIMENSIONS)


LAYOUTS = {
    "ddp": Layout("DistributedDataParallel", 2),
    "fsdp2": Layout("FSDP2 by block", 2, sharded=True),
    "tp": Layout("tensor parallelism", 2, cut=2),
    "tp-fsdp2": Layout("tensor parallelism with FSDP2 by block", 4, cut=2, sharded=True),
}


def llama(
    *,
    hidden: int,
    intermediate: int,
    blocks: int,
    heads: int,
    vocabulary: int,
    kv_heads: int | None = None,
    head_size: int | None = None,
) -> nn.Module:
    """A decoder of these sizes; where they aren't given, as many heads of k and v as of q, which
    together are as wide as it is."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise UnavailableError("transformers is not installed") from None
    of_model: dict[str, Any] = {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": blocks,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads or heads,
        "head_dim": head_size or hidden // heads, "vocab_size": vocabulary, "use_cache": False,
        "attn_implementation": "sdpa",
    }  # fmt: skip
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**of_model))
    return model


def plan_of(blocks: nn.ModuleList) -> dict[str, ParallelStyle]:
    """Tensor parallelism of the linear layers in the blocks, which are the model's ``layers``: two
    all-reduces a block each way."""
    plan: dict[str, ParallelStyle] = {}
    for name, _ in blocks.named_modules():
        last = name.rpartition(".")[2]
        if last in _COLUMNS:
            plan[f"layers.{name}"] = Colwise()
        elif last in _ROWS:
            plan[f"layers.{name}"] = Rowwise()
    return plan


def cut_by_transformers(model: Any, mesh: DeviceMesh) -> None:
    """Cuts the layers of ``plan_of`` by Transformers' own plan, which is the one that PEFT follows when
    it adapts the model."""
    try:
        from transformers.distributed import DistributedConfig
        from transformers.distributed.utils import TransformersDeviceMesh
    except ImportError as error:
        raise UnavailableError(f"Transformers cuts no layers into DTensors: {error}") from None
    of_blocks = {name: style for name, style in model.tp_plan.items() if ".layers." in name}
    model.tp_plan = of_blocks  # lm_head and the embedding stay whole
    config = DistributedConfig(tp_size=mesh[CUT].size())
    model.maybe_distribute_model(model, config, TransformersDeviceMesh(mesh, mesh))


def give_whole_sizes(model: nn.Module) -> None:
    """Mends what PEFT 0.21 has put into a model that Transformers has cut.

    It gives A over a layer that is cut along K the ``in_features`` of a rank's part. Transformers 5.24
    takes these for all of K, and the forward fails: "shape … is invalid for input of size …".
    """
    for name, module in model.named_modules():
        if ".lora_" in name and isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape


def shard_by_block(model: Any, mesh: DeviceMesh | None, **options: Any) -> None:
    """FSDP2 of each block, and of all else; over all ranks without a mesh."""
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
