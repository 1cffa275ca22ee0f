"""``linear_expand`` as a kernel of ours and PyTorch's GEMM, accumulated onto what that wrote."""

from torch import Tensor

from lorafast import operands
from lorafast.backends.plan import Run


def hybrid(expand: Run, transposed: bool) -> Run:
    """``y = x·Wᵀ + drop(scaling · s·Bᵀ) + bias``, or transposed, ``dx``.

    All but the GEMM is by ``expand``, whose ``run`` takes the bias as a sixth argument.
    """
    accumulate = operands.add_linear_transposed_ if transposed else operands.add_linear_

    def run(
        x: Tensor,
        weight: Tensor,
        s: Tensor,
        lora_B: Tensor,
        scaling: float,
        bias: Tensor | None = None,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> Tensor:
        return accumulate(expand(s, lora_B, scaling, dropout_p, seed, bias), x, weight)

    return run
