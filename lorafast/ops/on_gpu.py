"""Which backend is the fastest on a GPU: from this machine's records, else from the model.

A choice is made once for the sizes and dtypes of a call and kept.
"""

import functools
from dataclasses import replace

import torch
from torch import Tensor

from lorafast.kernels import tables
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.common.plan import backward_helpers, forward_helpers, may_help
from lorafast.kernels.tables import tuned
from lorafast.ops import roofline
from lorafast.reference import wide

_ATEN, _TRITON = "aten", "triton"
Choice = tuple[str, str]


def choice(operation: str, *tensors: Tensor | None) -> Choice:
    """The backend for one operation on its tensors, and why."""
    given = [t for t in tensors if t is not None]
    first, second = given[0], given[1]
    masked = any(t.dtype is torch.int64 for t in given)  # a seed
    transposed = False
    if operation == "linear_expand":
        lora_B, transposed = given[3], second.stride(1) != 1
        sizes = (first.shape[0], first.shape[1], *lora_B.shape)
        adapter = lora_B.dtype
    elif operation == "shrink":
        (M, K), r = first.shape, second.shape[0]
        sizes, adapter = (M, K, K, r), second.dtype
    elif operation == "expand_backward":
        (M, N), r = first.shape, second.shape[1]
        sizes, adapter = (M, N, N, r), given[2].dtype
    else:
        (M, K), r = second.shape, first.shape[1]
        sizes, adapter = (M, K, K, r), second.dtype
    dtype = second.dtype if operation == "shrink_backward" else first.dtype
    names = tuned.dtypes(dtype, adapter)
    return _choice(operation, first.device, dtype, adapter, names, *sizes, masked, transposed)


def whole(
    operation: str, x: Tensor, lora_A: Tensor, seed: Tensor | None, *others: Tensor | None
) -> tuple[str | None, str]:
    """``triton`` for a whole layer's forward or backward, or None if its operations choose alone.

    ``others`` has ``weight`` first, or ``dy`` and then ``weight``.
    """
    backward = operation == "lora_linear_backward"
    weight = others[1 if backward else 0]
    assert weight is not None
    M, (N, K), r = x.shape[0], weight.shape, lora_A.shape[0]
    masked = seed is not None
    read = (others[0], weight) if backward else (x, weight)
    bulk = all(t is not None and _reads_in_bulk(t) for t in read)
    names = tuned.dtypes(x.dtype, lora_A.dtype)
    return _whole(operation, x.device, x.dtype, lora_A.dtype, names, M, K, N, r, masked, bulk)


def _reads_in_bulk(matrix: Tensor) -> bool:
    """Whether its rows are aligned as bulk copies need them."""
    return matrix.stride(1) == 1 and matrix.stride(0) * matrix.dtype.itemsize % 16 == 0


@functools.lru_cache(maxsize=4096)
def _choice(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    names: str,
    M: int,
    K: int,
    N: int,
    r: int,
    masked: bool,
    transposed: bool,
) -> Choice:
    record = _record(operation, device, names, M, K, N, r, masked, transposed)
    if record is not None:
        return record.backend, _measured(record)
    partials = 0.0
    if operation == "expand_backward":
        partials = _partials(M, N, r, dtype, _processor(device)[0])
    sizes = (dtype.itemsize, adapter_dtype.itemsize)
    problem = roofline.Problem(M, K, N, r, *sizes, masked, partials, wide(dtype) is not dtype)
    return modelled(operation, problem, _device(device))


def _partials(M: int, N: int, r: int, dtype: torch.dtype, capability: int) -> float:
    """Bytes of the partial sums of ds, and of dy read again where the rank has several blocks."""
    config = tables.find("expand_backward", capability, dtype, M, N, N, r)
    again = (-(-r // config.block_r) - 1) * M * N * dtype.itemsize
    return 2.0 * 4 * M * r * -(-N // config.block_n) + again


def modelled(operation: str, problem: roofline.Problem, device: roofline.Device) -> Choice:
    """The backend that the model gives the least time for one operation."""
    times = {name: roofline.estimate(operation, name, problem, device) for name in (_ATEN, _TRITON)}
    # float32 products in Triton don't use the tensor cores as the vendor's do.
    if operation == "linear_expand" and problem.size != 2:
        best = _ATEN
    else:
        best = min(times, key=lambda name: times[name].seconds)
    return best, "no record: modelled " + ", ".join(f"{name} {t}" for name, t in times.items())


@functools.lru_cache(maxsize=4096)
def _whole(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    names: str,
    M: int,
    K: int,
    N: int,
    r: int,
    masked: bool,
    bulk: bool,
) -> tuple[str | None, str]:
    transposed = operation == "lora_linear_backward"
    if transposed:  # as its product has them
        record = _record(operation, device, names, M, N, K, r, masked, transposed)
    else:
        record = _record(operation, device, names, M, K, N, r, masked, transposed)
    problem = roofline.Problem(M, K, N, r, dtype.itemsize, adapter_dtype.itemsize, masked)
    capability, processors = _processor(device)
    if record is not None:
        # What was measured nearby must be what runs here.
        rode = (
            record.backend == _TRITON
            and bulk
            and helps(operation, problem, dtype, capability, processors, record.config)
        )
        return (_TRITON, _measured(record)) if rode else (None, "")
    # Programs that wait for each other, on the word of a model, only where such rules have run.
    if not tables.tuned_on(capability):
        return None, ""
    if not (bulk and helps(operation, problem, dtype, capability, processors)):
        return None, ""
    partials = _partials(M, N, r, dtype, capability)
    return modelled_whole(operation, replace(problem, partials=partials), _device(device))


def helps(
    operation: str,
    p: roofline.Problem,
    dtype: torch.dtype,
    capability: int,
    processors: int,
    own: LaunchConfig | None = None,
) -> bool:
    """Whether a whole layer's launch has helpers, on aligned tensors: by its ``own`` configuration, or
    by the rules that ship."""

    def config(name: str, K: int, N: int) -> LaunchConfig:
        return tables.find(name, capability, dtype, p.M, K, N, p.r, bulk=True)

    if not may_help(dtype):
        return False
    sizes = (p.M, p.K, p.N, p.r, p.size, p.masked, processors)
    if operation == "lora_linear":
        product, shrink = own or config(operation, p.K, p.N), config("shrink", p.K, p.K)
        return forward_helpers(product, shrink, *sizes) is not None
    product = own or config(operation, p.N, p.K)
    rows, cols = config("expand_backward", p.N, p.N), config("shrink_backward", p.K, p.K)
    return backward_helpers(product, rows, cols, *sizes) is not None


def modelled_whole(
    operation: str, problem: roofline.Problem, device: roofline.Device
) -> tuple[str | None, str]:
    """``triton`` if the model gives a whole layer with helpers less time than its operations alone."""
    if problem.size != 2:
        return None, ""
    together = roofline.estimate(operation, _TRITON, problem, device)
    alone = 0.0
    for name, part in parts(operation, problem):
        backend, _ = modelled(name, part, device)
        alone += roofline.estimate(name, backend, part, device).seconds
    if together.seconds >= alone:
        return None, ""
    return _TRITON, f"no record: modelled {together}, against {alone * 1e6:,.0f} µs one by one"


def parts(operation: str, p: roofline.Problem) -> list[tuple[str, roofline.Problem]]:
    """The operations of a whole layer's forward or backward, each with its own problem."""

    def problem(K: int, N: int, masked: bool) -> roofline.Problem:
        return replace(p, K=K, N=N, masked=masked)

    if operation == "lora_linear":
        return [
            ("shrink", problem(p.K, p.K, p.masked)),
            ("linear_expand", problem(p.K, p.N, False)),
        ]
    return [
        ("expand_backward", problem(p.N, p.N, False)),
        ("shrink_backward", problem(p.K, p.K, p.masked)),
        ("linear_expand", problem(p.N, p.K, p.masked)),
    ]


def _record(
    operation: str,
    device: torch.device,
    names: str,
    M: int,
    K: int,
    N: int,
    r: int,
    masked: bool,
    transposed: bool,
) -> tuned.Record | None:
    key = tuned.Key(operation, names, M, K, N, r, masked, transposed)
    return tuned.nearest(torch.cuda.get_device_name(device), key)


def _measured(record: tuned.Record) -> str:
    times = ", ".join(f"{name} {s * 1e6:,.0f} µs" for name, s in record.seconds.items())
    return f"measured here by lorafast tune: {times}"


def _device(device: torch.device) -> roofline.Device:
    return roofline.Device.of(*_processor(device))


@functools.lru_cache
def _processor(device: torch.device) -> tuple[int, int]:
    """Compute capability, as in ``sm_90``, and number of multiprocessors."""
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count
