"""The time of a call on a GPU: as ``lorafast tune`` measured it there, else by a model.

    seconds = max(device, host)
    device  = max(arithmetic / rate, bytes / bandwidth) + launches · LAUNCH_SECONDS
    host    = the time of Python and the driver for the launches

A device's rate and bandwidth are what large GEMMs and copies reach. The share of them that a backend
reaches, and its host time, are the backend's own: ``lorafast.backends.<name>.cost`` has ``estimate``.
Shares are assumptions until a GPU has measured them. Host time is that of an eager call: a captured
graph replays without any, but a problem doesn't say whether it will be captured.
"""

import contextlib
import functools
import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from lorafast.backends import registry
from lorafast.backends.plan import Plan
from lorafast.core.problem import DENSE, Layout, Problem
from lorafast.core.sms import planned_for
from lorafast.kernels.tables import tuned
from lorafast.kernels.tables.find import GEMMS

LAUNCH_SECONDS = 3e-6
"""From the end of one short kernel to the start of the next."""
CALL_SECONDS = 5e-6
"""Host time of one of PyTorch's own calls on CUDA tensors."""
LAYER_SECONDS = 8e-6
"""Host time of a layer's ``autograd.Function`` around its operations: 64 x 64, 4 rows, on one thread, by
``lorafast bench --call-overhead``."""
REACHED_BANDWIDTH = 0.87
"""Of memory clock times bus width: what copies reach, measured on an H200."""
REACHED_FLOPS = 0.8
"""Of the data sheet: what large GEMMs reach, measured on an H200 (790 of 989 TFLOP/s)."""
MARGIN = 1.01
"""A backend that isn't the record's fastest is priced at least so much above it: noise is no lead."""

FLOAT32 = 0.8
"""Of the float32 rate: what PyTorch's GEMMs reach."""
_UNALIGNED = {16: 1.0, 8: 0.9, 4: 0.7, 2: 0.5}
"""Of rate and bandwidth, by the bytes at which every row begins: a narrower load each."""

_ACCUMULATED = 1.015
"""Times a GEMM that reads what it accumulates onto: 347 µs for 342, measured on an H100 (M = 8192,
K = N = 4096, bf16)."""

_PEAK_FLOPS = (
    (r"H100 PCIe", 756e12), (r"H100 NVL|H200 NVL", 835e12), (r"H100|H200|GH200", 989e12),
    (r"GB200|GB300", 2450e12), (r"B200|B300", 2250e12),
    (r"A100", 312e12), (r"A30", 165e12),
    (r"A10G", 70e12), (r"A10", 125e12), (r"A40", 150e12), (r"A6000", 155e12),
    (r"RTX 3090", 71e12), (r"RTX 4090", 165e12), (r"RTX 5090", 210e12),
    (r"L4", 121e12), (r"L40S", 362e12), (r"L40", 181e12), (r"GB10", 125e12),
    (r"T4", 65e12), (r"TITAN RTX", 130e12),
)  # fmt: skip
"""Dense 16-bit products that accumulate in float32, by NVIDIA's data sheets of the cards (half of what
they print with sparsity): H100 (2024), H200, GH200, Blackwell (DGX B200 and GB200 NVL72, by GPU), A100,
A30, A10, A40, L4, L40, L40S, T4; the white papers of TU102, GA102, AD102 and GB202 for GeForce, which
multiplies at half rate when it accumulates in float32, and for TITAN RTX, which doesn't; DGX Spark's
1 PFLOP/s of sparse FP4 is an eighth of that."""
_FLOPS_PER_CLOCK = {75: 1024, 80: 2048, 86: 1024, 89: 1024, 90: 4096, 100: 8192, 120: 1024}
"""FLOPs of one SM in a clock, of the same products, from the architectures' white papers."""
_FLOAT32_PER_CLOCK = {75: 128, 80: 128, 86: 256, 89: 256, 90: 256, 100: 256, 120: 256}
"""The same in float32 without tensor cores."""
_NOWHERE = "a device that isn't here"
_HALF_RATE = r"GeForce|TITAN|RTX [345]0[5-9]0"
_BFLOAT16 = 80
"""The architecture from which tensor cores take bfloat16 and TF32."""
_CLOCK = 1.7e9
_LEAST_BANDWIDTH = {
    75: 8.0e9, 80: 1.4e10, 86: 8.3e9, 89: 5.2e9, 90: 1.7e10, 100: 5.4e10, 120: 5.7e9,
}  # fmt: skip
"""Bytes a second and SM on the card of the architecture that has the least, by the data sheets of T4,
A100 (40 GB), A10, L4, H100 PCIe, B200 and GB10: for a device that doesn't tell its memory's clock."""


@dataclass(frozen=True)
class Device:
    """A GPU: its compute capability as in ``sm_90``, and what it reaches.

    ``sms``: those that launches are planned for; ``flops``: FLOP/s of large 16-bit GEMMs;
    ``float32_flops``: without tensor cores; ``bandwidth``: bytes a second of a copy, read and written.
    """

    name: str
    capability: int
    sms: int
    flops: float
    float32_flops: float
    bandwidth: float

    @classmethod
    def known_by(
        cls,
        name: str,
        capability: int,
        sms: int,
        clock: float = 0.0,
        memory_clock: float = 0.0,
        bus_bits: int = 0,
    ) -> "Device":
        """From what the driver says: clocks in Hz; 0 is what it doesn't know."""
        architecture = max((a for a in _FLOPS_PER_CLOCK if a <= capability), default=75)
        clock = clock or _CLOCK
        per_clock = float(_FLOPS_PER_CLOCK[architecture])
        if re.search(_HALF_RATE, name) and architecture in (75, 86, 89, 120):
            per_clock /= 2
        peak = next(
            (flops for pattern, flops in _PEAK_FLOPS if re.search(rf"\b(?:{pattern})\b", name)),
            sms * per_clock * clock,
        )
        bandwidth = 2 * memory_clock * bus_bits / 8  # two transfers a clock
        if not bandwidth:
            bandwidth = sms * _LEAST_BANDWIDTH[architecture]
        return cls(
            name,
            capability,
            sms,
            peak * REACHED_FLOPS,
            sms * _FLOAT32_PER_CLOCK[architecture] * clock * REACHED_FLOPS,
            bandwidth * REACHED_BANDWIDTH,
        )

    def rate(self, dtype: torch.dtype, tf32: bool) -> float:
        """FLOP/s of products in ``dtype``."""
        if self.capability < _BFLOAT16 and dtype is not torch.float16:
            tf32, dtype = False, torch.promote_types(dtype, torch.float32)
        if dtype.itemsize == 2:
            return self.flops
        if dtype is torch.float32:
            return self.flops / 2 if tf32 else self.float32_flops
        return self.float32_flops / 2  # of the data-centre cards; elsewhere less still


@functools.cache
def device_of(device: torch.device) -> Device:
    """A CUDA device, as its driver describes it."""
    found = torch.cuda.get_device_properties(device)
    return Device.known_by(
        found.name,
        10 * found.major + found.minor,
        found.multi_processor_count,
        1e3 * getattr(found, "clock_rate", 0),  # in kHz
        1e3 * getattr(found, "memory_clock_rate", 0),
        getattr(found, "memory_bus_width", 0),
    )


_pretended: Device | None = None


@contextlib.contextmanager
def pretending(device: Device) -> Iterator[None]:
    """Within the block every call is planned and priced as on ``device``, on which nothing was tuned."""
    global _pretended
    before, _pretended = _pretended, replace(device, name=_NOWHERE)
    registry.forget_plans()
    try:
        yield
    finally:
        _pretended = before
        registry.forget_plans()


def gpu_of(device: torch.device) -> Device | None:
    """What is known of ``device``, None if it is no GPU.

    PyTorch's SM carve-out takes of its SMs alone: rates are the whole device's, PyTorch's GEMMs and ours
    lose the same of them.
    """
    if _pretended is not None:
        return _pretended
    if device.type != "cuda" or not torch.cuda.is_available():  # a fake tensor may be there
        return None
    found = device_of(device)
    sms = planned_for(found.sms)
    return found if sms == found.sms else replace(found, sms=sms)


@dataclass(frozen=True)
class Estimate:
    """Seconds of the device and of the host, and what they are made of."""

    device: float = 0.0
    host: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    launches: int = 0
    remark: str = ""

    @property
    def seconds(self) -> float:
        """Both work at the same time."""
        return max(self.device, self.host)

    def __add__(self, other: "Estimate") -> "Estimate":
        return Estimate(
            self.device + other.device,
            self.host + other.host,
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.launches + other.launches,
            "; ".join(dict.fromkeys(filter(None, (self.remark, other.remark)))),
        )

    def __str__(self) -> str:
        launches = "1 launch" if self.launches == 1 else f"{self.launches} launches"
        made_of = f"{self.flops / 1e9:,.3g} GFLOP, {self.bytes / 1e6:,.3g} MB, {launches}"
        said = f"{self.seconds * 1e6:,.0f} µs = {made_of}"
        if self.host > self.device:
            said += f", {self.device * 1e6:,.0f} µs of the device: the host takes longer"
        return f"{said}; {self.remark}" if self.remark else said


def work(
    device: Device,
    *,
    flops: float = 0.0,
    rate: float = 1.0,
    moved: float = 0.0,
    share: float = 1.0,
    launches: int = 1,
    host: float = CALL_SECONDS,
    remark: str = "",
) -> Estimate:
    """``launches`` that together compute ``flops`` and move ``moved`` bytes, at ``share`` of the
    bandwidth; each takes ``host`` seconds to launch."""
    seconds = max(flops / rate, moved / (device.bandwidth * share)) + launches * LAUNCH_SECONDS
    return Estimate(seconds, launches * host, flops, moved, launches, remark)


def base_gemm(p: Problem, device: Device, accumulated: bool = True) -> Estimate:
    """PyTorch's GEMM of x and W, or transposed of dy and W, by default accumulated onto what is there:
    cuBLAS is the yardstick."""
    read, share = p.layouts.dy if p.transposed else p.layouts.x, 1.0
    if p.dtype.itemsize == 2:  # the narrower loads of the two set the pace
        share = min(alignment(read), alignment(p.layouts.weight))
    return work(
        device,
        flops=2.0 * p.M * p.K * p.N,
        rate=gemm_rate(p, device) * share / (_ACCUMULATED if accumulated else 1.0),
        moved=float((p.M * p.K + p.K * p.N + p.M * p.N) * p.dtype.itemsize),
        share=share,
    )


def gemm_rate(p: Problem, device: Device) -> float:
    """FLOP/s of PyTorch's large GEMMs."""
    tensor_cores = p.dtype.itemsize == 2 or p.tf32
    return device.rate(p.dtype, p.tf32) * (1.0 if tensor_cores else FLOAT32)


def alignment(layout: Layout) -> float:
    """The share of rate and bandwidth that rows of this alignment leave to PyTorch."""
    return _UNALIGNED.get(max(layout.rows, layout.columns), min(_UNALIGNED.values()))


@dataclass(frozen=True)
class Price:
    """The seconds of a backend for a problem, where they come from, and whether they were measured."""

    seconds: float
    source: str
    measured: bool


def price(backend: str, problem: Problem, device: Device | None = None) -> Price | None:
    """The price of ``backend``: from this machine's records, else from its model, or None.

    ``device`` is that of the problem unless another one is to be reckoned with.
    """
    device = device or gpu_of(problem.device)
    if device is None:
        return None
    return _measured(backend, problem, device) or _modelled(backend, problem, device)


def priced(plan: Plan, problem: Problem, device: Device | None = None) -> Plan:
    """``plan`` with its price."""
    known = price(plan.backend, problem, device)
    if known is None:
        return plan
    return replace(plan, seconds=known.seconds, source=known.source, measured=known.measured)


def host_bound(backend: str, problem: Problem, device: Device | None = None) -> bool:
    """Whether the host takes longer for a layer's forward, through its ``Function``, than the GPU."""
    device = device or gpu_of(problem.device)
    estimate = None if device is None else estimate_of(backend, problem, device)
    return estimate is not None and estimate.device < estimate.host + LAYER_SECONDS


def estimate_of(backend: str, problem: Problem, device: Device) -> Estimate | None:
    """By the backend's own model; None if it has none."""
    model = _model(backend)
    return None if model is None or problem.format != DENSE else model(problem, device)


@functools.cache
def _model(backend: str) -> Callable[[Problem, Device], Estimate | None] | None:
    module = f"lorafast.backends.{backend}.cost"
    try:
        found: Callable[[Problem, Device], Estimate | None]
        found = importlib.import_module(module).estimate
    except ModuleNotFoundError as error:
        if error.name not in (module, module.rpartition(".")[0]):
            raise
        return None
    return found


def _modelled(backend: str, problem: Problem, device: Device) -> Price | None:
    estimate = estimate_of(backend, problem, device)
    if estimate is None:
        return None
    return Price(estimate.seconds, f"no record: modelled {estimate}", False)


def _measured(backend: str, problem: Problem, device: Device) -> Price | None:
    record = record_of(problem, device.name)
    if record is None or backend not in record.seconds or not _all_wanted(problem):
        return None
    seconds = record.seconds[backend]
    if backend != record.backend:
        seconds = max(seconds, record.seconds[record.backend] * MARGIN)
    times = ", ".join(f"{name} {s * 1e6:,.0f} µs" for name, s in record.seconds.items())
    key, at = key_of(problem), record.key
    scale = _size(key) / _size(at)
    near = "" if scale == 1.0 else f", at M={at.M} K={at.K} N={at.N}"
    return Price(seconds * scale, f"measured here by lorafast tune: {times}{near}", True)


def _size(key: tuned.Key) -> int:
    """What the time of a call is in proportion to: of a pass over one matrix, its elements."""
    return key.M * key.K * (key.N if key.operation in GEMMS else 1)


_MEASURED = {"expand_backward": ("ds", "dB")}
"""The results that are wanted of an operation when it is tuned."""


def _all_wanted(problem: Problem) -> bool:
    """Whether the same results are wanted as when the operation was tuned."""
    return problem.wants == _MEASURED.get(problem.operation, problem.wants)


def record_of(problem: Problem, device: str) -> tuned.Record | None:
    """The record of the device of this name for the call, or for one near it."""
    if problem.operation not in tuned.OPERATIONS:
        return None
    if problem.format != DENSE or min(problem.M, problem.r) < 1:
        return None
    return tuned.nearest(device, key_of(problem))


def key_of(p: Problem) -> tuned.Key:
    """The key of the call's record. Sizes are those of its GEMM, or of the matrix that it reads."""
    K, N = (p.N, p.K) if p.transposed else (p.K or p.N, p.N or p.K)
    return tuned.Key(
        p.operation,
        tuned.dtypes(p.dtype, p.adapter_dtype, p.tf32),
        p.M, K, N, p.r, p.dropout, p.transposed, aligned(p),
    )  # fmt: skip


def aligned(p: Problem) -> bool:
    """Whether every row of the large matrices that the call reads or writes begins at 16 bytes."""
    at, written = p.layouts, Layout.fresh(p.M, p.K if p.transposed else p.N, p.dtype)
    large = {
        "shrink": (at.x,),
        "expand": (written,),
        "shrink_backward": (at.x,),
        "expand_backward": (at.dy,),
        "linear_expand": (at.dy if p.transposed else at.x, at.weight, written),
        "lora_linear": (at.x, at.weight, written),
    }[p.operation]
    return all(max(matrix.rows, matrix.columns) == 16 for matrix in large)
