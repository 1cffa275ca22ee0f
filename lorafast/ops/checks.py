"""Refusals of bad input: one sentence that names the argument, what it is, and what was expected."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from lorafast.core.dtypes import FLOAT_NAMES, FLOATS, wide
from lorafast.operands import Operand, Weight

_STRIDED = torch.strided
_PLAIN = (Tensor, nn.Parameter)


def _shape(tensor: Weight) -> str:
    return f"[{', '.join(str(size) for size in tensor.shape)}]"


def check_matrix(name: str, tensor: Weight, rows: object, columns: object) -> None:
    """``tensor`` must be ``[rows, columns]``; a string stands for any size and is its name."""
    check_shape(name, tensor, rows, columns)


def check_shape(name: str, tensor: Weight, *sizes: object) -> None:
    """``tensor`` must have these sizes; a string stands for any size and is its name."""
    fits = tensor.dim() == len(sizes) and all(
        isinstance(size, str) or size == actual
        for size, actual in zip(sizes, tensor.shape, strict=True)
    )
    if not fits:
        expected = ", ".join(map(str, sizes))
        raise ValueError(f"{name} has shape {_shape(tensor)}, expected [{expected}]")


def check_float(name: str, tensor: object, kinds: Any = Tensor) -> None:
    """``tensor`` must be a tensor, or of ``kinds``, in one of the dtypes that layers may have."""
    if not isinstance(tensor, kinds):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a tensor")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} is {tensor.dtype}, expected {FLOAT_NAMES}")


def check_device(name: str, tensor: Weight, device: torch.device, other: str) -> None:
    """``tensor`` must be on ``device``, where ``other`` is."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}, where {other} is")


def check_same_dtype(name: str, tensor: Weight, other: str, dtype: torch.dtype) -> None:
    """``tensor`` must have the dtype of ``other``."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}, expected {dtype}, the dtype of {other}")


def check_low_rank(name: str, tensor: Tensor, other: str, dtype: torch.dtype) -> None:
    """``tensor``, s or ds, must have the dtype of the low-rank term of ``other``."""
    if tensor.dtype != wide(dtype):
        raise TypeError(f"{name} is {tensor.dtype}, expected {wide(dtype)}: {other} is {dtype}")


def check_frozen(weight: Weight) -> None:
    """No tensor of an operand may require a gradient."""
    if isinstance(weight, Tensor) or not weight.requires_grad:
        return
    name = next(name for name, tensor in weight.tensors().items() if tensor.requires_grad)
    raise ValueError(
        f"{name} of weight requires a gradient, and none flows into a weight stored as "
        f"{weight.format}: freeze it (requires_grad_(False))"
    )


def check_probability(dropout_p: float) -> None:
    """``dropout_p`` must be a probability."""
    try:
        fits = 0.0 <= dropout_p <= 1.0
    except TypeError as error:
        raise TypeError(f"dropout_p is a {type(dropout_p).__name__}, expected a number") from error
    if not fits:
        raise ValueError(f"dropout_p is {dropout_p}, expected a probability from 0 to 1")


def check_dropout(dropout_p: float, seed: Tensor | None) -> None:
    """A probability, and a seed if there is anything to drop."""
    check_probability(dropout_p)
    if dropout_p > 0.0 and seed is None:
        raise ValueError(
            "seed is None, expected an int64 tensor of one element: dropout_p is not 0"
        )
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(
            f"seed is {seed.dtype} of {seed.numel()} elements, expected one int64 element"
        )


def check_no_dtensors(operation: str, **arguments: object) -> None:
    """None may be a DTensor: ``operation`` has no rule for them."""
    tensors: Any = sys.modules.get("torch.distributed.tensor")
    if tensors is None:
        return
    for name, one in arguments.items():
        parts = one.tensors().values() if isinstance(one, Operand) else (one,)
        if any(isinstance(part, tensors.DTensor) for part in parts):
            raise ValueError(
                f"{name} is sharded (a DTensor), and {operation} has no rule for those, expected plain "
                "tensors (to_local(), full_tensor())"
            )


def _check_sharded_too(x: Any, dtensor: Any, parameters: dict[str, object]) -> None:
    """Where ``x`` is a DTensor all else must be, on its mesh."""
    for name, given in parameters.items():
        tensors: Any = given.tensors().values() if isinstance(given, Operand) else (given,)
        for tensor in tensors:
            if isinstance(tensor, Tensor) and not isinstance(tensor, dtensor):
                raise ValueError(
                    f"x is sharded (a DTensor) and {name} is not, expected both on one mesh "
                    "(distribute_tensor), or both plain"
                )
            if isinstance(tensor, dtensor) and tensor.device_mesh != x.device_mesh:
                raise ValueError(
                    f"{name} is sharded over another mesh than x, {tensor.device_mesh}, expected "
                    f"{x.device_mesh}"
                )


def check_not_sharded_alone(x: object, **parameters: object) -> None:
    """No parameter may be a DTensor where ``x`` is a plain tensor, nor one plain where that is one."""
    if type(x) in _PLAIN and all(type(tensor) in _PLAIN for tensor in parameters.values()):
        return
    tensors: Any = sys.modules.get("torch.distributed.tensor")
    if tensors is None:
        return
    if getattr(tensors.DTensor._op_dispatcher, "_allow_implicit_replication", False):
        return
    if isinstance(x, tensors.DTensor):
        _check_sharded_too(x, tensors.DTensor, parameters)
        return
    for name, tensor in parameters.items():
        if isinstance(tensor, tensors.DTensor):
            raise ValueError(
                f"{name} is sharded (a DTensor) and x is not, expected a whole tensor: shard layers or "
                "blocks, not the parameters of one by themselves, and call what fully_shard was given, "
                "not its forward: its hooks gather them"
            )


def check_lora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
) -> bool:
    """Whether ``x`` is a strided tensor, as kernels and operations take it.

    Raises ``TypeError`` or ``ValueError`` if the arguments don't make a LoRA linear layer.
    """
    if type(lora_A) not in _PLAIN or type(lora_B) not in _PLAIN or type(x) not in _PLAIN:
        check_not_sharded_alone(x, weight=weight, lora_A=lora_A, lora_B=lora_B)
    try:
        N, K = weight.shape
        r, K_A = lora_A.shape
        dtype, adapter_dtype, device = x.dtype, lora_A.dtype, x.get_device()
        fits = (
            x.shape[-1] == K == K_A
            and lora_B.shape == (N, r)
            and r > 0
            and dtype is weight.dtype
            and dtype in FLOATS
            and adapter_dtype is lora_B.dtype
            and (adapter_dtype is dtype or adapter_dtype in FLOATS)
            and device == weight.get_device() == lora_A.get_device() == lora_B.get_device()
            # get_device() is -1 on the CPU and on meta alike.
            and (device >= 0 or x.is_meta == weight.is_meta == lora_A.is_meta == lora_B.is_meta)
            and (
                bias is None
                or (bias.shape == (N,) and bias.dtype is dtype and bias.get_device() == device)
            )
            and 0.0 <= dropout_p <= 1.0
            and type(scaling) in (float, int)
            and x.layout is _STRIDED
            and (isinstance(weight, Tensor) or not weight.requires_grad)
        )
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        fits = False  # a nested tensor raises RuntimeError when asked for its shape
    if not fits:
        _explain_lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p)
        return has_rows(x)
    return True


def check_dora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
) -> None:
    """Raises ``TypeError`` or ``ValueError`` if the arguments don't make a DoRA linear layer."""
    if not check_lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p):
        raise ValueError(
            f"x is {describe_layout(x)}, expected a strided tensor: DoRA scales what W makes of it"
        )
    check_float("magnitude", magnitude)
    check_shape("magnitude", magnitude, weight.shape[0])
    check_device("magnitude", magnitude, x.device, "x")


def check_scaled_lora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    *,
    d_in: Tensor | None,
    m: Tensor | None,
    d_out: Tensor | None,
) -> None:
    """Raises ``TypeError`` or ``ValueError`` if the arguments don't make a LoRA layer with vectors."""
    check_lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p)
    for name, tensor in (("lora_A", lora_A), ("lora_B", lora_B)):
        _check_elements(name, tensor)
    (N, K), r = weight.shape, lora_A.shape[0]
    for name, vector, size in (("d_in", d_in, K), ("m", m, r), ("d_out", d_out, N)):
        if vector is None:
            continue
        check_float(name, vector)
        _check_elements(name, vector)
        check_device(name, vector, x.device, "x")
        if name == "m" and vector.dim() == 2:
            check_matrix(name, vector, r, r)
        else:
            check_shape(name, vector, size)


def check_lokr_linear(
    x: Tensor,
    weight: Weight,
    w1: Tensor,
    w2: Any,
    scaling: float,
    bias: Tensor | None,
) -> None:
    """Raises ``TypeError`` or ``ValueError`` if the arguments don't make a LoKr linear layer."""
    N, K = _check_linear(x, weight, bias)
    if isinstance(w2, tuple) and len(w2) == 2:
        factors = {"w2[0]": w2[0], "w2[1]": w2[1]}
    elif isinstance(w2, Tensor):
        factors = {"w2": w2}
    else:
        kind = f"tuple of {len(w2)}" if isinstance(w2, tuple) else type(w2).__name__
        raise TypeError(f"w2 is a {kind}, expected a tensor or a tuple of two")
    for name, tensor in {"w1": w1, **factors}.items():
        check_float(name, tensor)
        _check_elements(name, tensor)
        check_device(name, tensor, x.device, "x")
        check_matrix(name, tensor, "rows", "columns")
        check_same_dtype(name, tensor, "w1", w1.dtype)
    first, *others = factors.values()
    if others:
        check_matrix("w2[1]", others[0], first.shape[1], "columns")
    (a, b), (c, d) = w1.shape, (first.shape[0], (others or [first])[0].shape[1])
    if (a * c, b * d) != (N, K):
        raise ValueError(
            f"w1 ⊗ w2 has shape [{a * c}, {b * d}], expected {_shape(weight)}, as weight"
        )
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling is a {type(scaling).__name__}, expected a number")


def check_scaled_linear(
    x: Tensor, weight: Weight, scale: Tensor, bias: Tensor | None, scales_input: bool
) -> None:
    """Raises ``TypeError`` or ``ValueError`` if the arguments don't make a layer with a vector."""
    N, K = _check_linear(x, weight, bias)
    check_float("scale", scale)
    check_shape("scale", scale, K if scales_input else N)
    check_device("scale", scale, x.device, "x")


def check_oft_linear(x: Tensor, weight: Weight, blocks: Tensor, bias: Tensor | None) -> None:
    """Raises ``TypeError`` or ``ValueError`` if the arguments don't make an OFT linear layer."""
    _, K = _check_linear(x, weight, bias)
    check_float("blocks", blocks)
    _check_elements("blocks", blocks)
    check_device("blocks", blocks, x.device, "x")
    check_shape("blocks", blocks, "count", "k", "k")
    count, rows, columns = blocks.shape
    if rows != columns or count * rows != K:
        raise ValueError(
            f"blocks has shape {_shape(blocks)}, expected [count, k, k] with count * k = {K}"
        )


def _check_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> tuple[int, int]:
    """N and K of a frozen linear layer that fits ``x``."""
    check_float("x", x)
    check_float("weight", weight, (Tensor, Operand))
    if isinstance(weight, Tensor):
        _check_elements("weight", weight)
    check_matrix("weight", weight, "out_features", "in_features")
    N, K = weight.shape
    if not has_rows(x):
        raise ValueError(f"x is {describe_layout(x)}, expected a strided tensor")
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(
            f"x has shape {_shape(x)}, expected [..., {K}]: weight has {K} input features"
        )
    check_same_dtype("weight", weight, "x", x.dtype)
    check_device("weight", weight, x.device, "x")
    if bias is not None:
        check_float("bias", bias)
        check_shape("bias", bias, N)
        check_same_dtype("bias", bias, "x", x.dtype)
        check_device("bias", bias, x.device, "x")
    check_frozen(weight)
    return N, K


def _check_elements(name: str, tensor: Tensor) -> None:
    """``tensor`` must be strided, and not empty."""
    if not has_rows(tensor):
        raise ValueError(f"{name} is {describe_layout(tensor)}, expected a strided tensor")
    if tensor.numel() == 0:
        raise ValueError(f"{name} has shape {_shape(tensor)}, expected no size of 0")


def has_rows(x: Tensor) -> bool:
    """Whether ``x`` is a strided tensor and not a nested one."""
    return x.layout is _STRIDED and not x.is_nested


def describe_layout(x: Tensor) -> str:
    """As a sentence names it."""
    return "nested" if x.is_nested else str(x.layout)


def _width(x: Tensor) -> int | None:
    """Size of the last dimension; None if there is none, or of a nested tensor in which it varies."""
    try:
        return x.size(-1)
    except (IndexError, RuntimeError):
        return None


def _explain_lora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
) -> None:
    """Finds what is wrong and says it; the order is that in which a user would look."""
    tensors: dict[str, Weight] = {"x": x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B}
    if bias is not None:
        tensors["bias"] = bias
    for name, tensor in tensors.items():
        check_float(name, tensor, (Tensor, Operand) if name == "weight" else Tensor)
    check_matrix("weight", weight, "out_features", "in_features")
    N, K = weight.shape
    check_matrix("lora_A", lora_A, "r", K)
    r = lora_A.shape[0]
    if r == 0:
        raise ValueError(f"lora_A has shape {_shape(lora_A)}: the rank r is 0, expected at least 1")
    check_matrix("lora_B", lora_B, N, r)
    if x.dim() == 0 or _width(x) != K:
        width = _width(x) or "of several sizes"
        shape = _shape(x) if has_rows(x) else f"[..., {width}] ({describe_layout(x)})"
        raise ValueError(f"x has shape {shape}, expected [..., {K}]: weight has {K} input features")
    if bias is not None:
        check_shape("bias", bias, N)
    check_same_dtype("weight", weight, "x", x.dtype)
    check_same_dtype("lora_B", lora_B, "lora_A", lora_A.dtype)
    if bias is not None:
        check_same_dtype("bias", bias, "x", x.dtype)
    for name, tensor in tensors.items():
        check_device(name, tensor, x.device, "x")
    check_frozen(weight)
    check_probability(dropout_p)
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling is a {type(scaling).__name__}, expected a number")
