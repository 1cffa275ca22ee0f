"""Checks of a LoRA layer's arguments and of its values before they are merged."""

import math
from numbers import Real
from typing import Any

from torch import Tensor

from lorafast.core.dtypes import FLOAT_NAMES, FLOATS
from lorafast.ops.unstrided import is_sharded

_MOST = 2**31 - 1


def check_rank(name: str, value: object) -> int:
    """``value``, an integer of at least 1 that a tensor's side can be; else ``ValueError``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected an integer of at least 1")
    if value > _MOST:
        raise ValueError(f"{name} is {value:.3g}, expected at most {_MOST}")
    return value


def check_alpha(name: str, value: object) -> float:
    """``value`` as a float, a finite number; else ``ValueError``."""
    number = _float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} is {value!r}, expected a finite number")
    return number


def check_probability(name: str, value: object) -> float:
    """``value`` as a float, a number from 0 to 1; else ``ValueError``."""
    number = _float(value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} is {value!r}, expected a probability from 0 to 1")
    return number


def _float(value: object) -> float:
    """A number as a float, infinite if it is beyond; NaN for what is no number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_bool(name: str, value: object) -> bool:
    """``value``, True or False; else ``TypeError``."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, expected True or False")
    return value


def check_dtype(name: str, value: object) -> None:
    """``value`` must be a dtype that layers have, or None; else ``TypeError``."""
    if value is not None and value not in FLOATS:
        raise TypeError(f"{name} is {value!r}, expected {FLOAT_NAMES}")


def check_mergeable(name: str, tensor: Tensor) -> None:
    """``tensor``, a layer's ``name``, must have values, finite ones in an adapter."""
    if tensor.is_meta:
        raise ValueError(
            f"its {name} is on the device meta, which holds no values: load the model first"
        )
    bad = 0 if name == "weight" else count(~tensor.isfinite())
    if bad:
        raise ValueError(f"its {name} is NaN or infinite in {bad} of {tensor.numel()} elements")


def count(mask: Tensor) -> int:
    """How many elements of ``mask``, which may be sharded, are true."""
    total: Any = mask.sum()
    return int(total.full_tensor() if is_sharded(total) else total)
