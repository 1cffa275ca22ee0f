"""DoRA's norm, drawn and held to the contract."""

import torch

from lorafast import reference
from lorafast.reference import contract


def drawn(N, K, r, dtypes, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((N, K), (r, K), (N, r))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]


def assert_right(found, weight, lora_A, lora_B, scaling):
    """The contract in float32, in which the norm is whatever W, A and B are stored in."""
    given = (weight, lora_A, lora_B)
    eager, ref64 = (
        {"norm": reference.weight_norm(*(t.to(dtype) for t in given), scaling)}
        for dtype in (torch.float32, torch.float64)
    )
    reason = contract.why_any_broken({"norm": found}, contract.bounds(eager, ref64))
    assert reason is None, reason
