"""VeRA (Kopiczko et al., 2023): A and B are shared by all layers and frozen, two vectors are not.

``y = base + λ_b ⊙ ((drop(x)·Aᵀ) ⊙ λ_d)·Bᵀ``: the vectors are folded into the layer's part of B,
or multiply the products of a small call.
"""

from typing import Any

from lorafast.integrations.peft import low_rank
from lorafast.integrations.peft.low_rank import Kind, Part, Term


def parts(layer: Any) -> list[Part]:
    """The active adapters."""
    of_b = low_rank.entries(layer, "vera_lambda_b")
    of_d = low_rank.entries(layer, "vera_lambda_d")
    every_A, every_B = layer.vera_A, layer.vera_B
    dropouts = layer._modules["vera_dropout"]._modules
    return [
        Part(
            name,
            {
                "vera_lambda_b": of_b[name],
                "vera_lambda_d": of_d[name],
                "vera_A": every_A[name],
                "vera_B": every_B[name],
            },
            dropouts[name],
        )
        for name in low_rank.active(layer)
        if name in of_d
    ]


def why_not(layer: Any, part: Part, N: int, K: int) -> str | None:
    """Why an adapter doesn't fit a layer of W [N, K]. A and B are as large as the largest layer's."""
    A, B = part.tensors["vera_A"], part.tensors["vera_B"]
    r = A.shape[0]
    if A.shape[1] < K or B.shape[0] < N or B.shape[1] != r:
        return f"shares matrices of the shapes {list(A.shape)} and {list(B.shape)}"
    return low_rank.why_not_shapes(part, vera_lambda_b=(N,), vera_lambda_d=(r,))


def term(layer: Any, part: Part, N: int, K: int, small: bool) -> Term:
    """A and B of the layer, and its vectors."""
    found = part.tensors
    A, B = found["vera_A"], found["vera_B"]
    if A.shape[1] != K:
        A = A[:, :K]
    if B.shape[0] != N:
        B = B[:N]
    return Term(A, B, 1.0, part.dropout, found["vera_lambda_d"], found["vera_lambda_b"])


VERA = Kind(parts, why_not, term, as_input=True)
