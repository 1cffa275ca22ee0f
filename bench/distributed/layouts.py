"""How a decoder of Llama's shape is cut over ranks."""

from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from lorafast.parallel import Colwise, Rowwise

_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_ROWS = ("o_proj", "down_proj")


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
