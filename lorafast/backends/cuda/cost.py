"""What the CUDA C++ kernels take on a GPU: a model of their launches.

``moved``, ``flops`` and ``launches`` are the families' own, ``clocks`` those of the kernels that were
counted on a machine for PTX (``tests/ptx``), ``Launch.seconds`` of small layers and fused GEMMs. What
skinny passes reach of that, and decoding over codes, was measured on an H200 (K = N = 4096, bf16; passes
at M = 8192, r = 16 and 64), and is assumed of other GPUs; the rest is assumed of all.
"""

from lorafast.backends.cost import LAUNCH_SECONDS, MARGIN, Device, Estimate, base_gemm
from lorafast.backends.cuda import clocks, decode, planning
from lorafast.backends.cuda.launch import CALL_HOST, NONE, Choices, Launch
from lorafast.backends.cuda.planning import Hybrid
from lorafast.core.dtypes import wide
from lorafast.core.problem import DENSE, LAYER_OPERATIONS, Problem, parts

_LAUNCH_HOST = 3e-6
"""Of each launch more within one operation: the driver's share."""
_WHOLE = 0.9
"""Of the bandwidth, for a layer in one launch, which reads W and writes next to nothing. The models of
the GEMMs that it is compared with have all of it."""
_SKINNY = 0.7
"""Of the bandwidth, and of the rate of SMs at what is counted in ``clocks``: assumed."""
_MEASURED = {"shrink": 0.42, "expand": 0.7, "shrink_backward": 0.52, "expand_backward": 0.26}
"""The same from compute capability 8.0, where other kernels run than before. Measured as above: 41 µs
for ``shrink`` at r = 16 and 88 at 64, 78 and 253 for ``expand_backward``, 34 and 43 for
``shrink_backward``. The counts don't tell why the first two are so slow."""
_UNALIGNED = 0.25
"""Of that, where the large matrix is read or written element by element: assumed as Triton's."""
_RATE = {"shrink": 0.06, "shrink_backward": 0.135, "expand_backward": 0.043, "expand": 0.18}
"""Of the rate of 16-bit GEMMs. Measured as above, at r = 64."""
_TWO_TF32, _THREE_TF32 = 0.25, 0.15
"""Of the rate of 16-bit GEMMs, and times that where one factor is float32 or both are: no more than
Triton's kernels were measured to reach, so that what was measured gives way to nothing that was not."""
_TRITONS = 80
"""The oldest architecture of those kernels."""
_RANKS = 16
"""A tile has a multiple of so many."""
_DECODING = 0.5
"""Of the rate of products: its tiles are thin, and half as many rows of x may fill them."""
_ISSUED = 0.25
"""Of the instructions that schedulers could issue, where numbers are made of codes: 18 µs for one row
and 23 for 16, measured on an H200 (K = N = 4096, NF4, int8 and fp8 alike)."""
_LARGE = {
    "shrink": ("x",),
    "shrink_backward": ("x",),
    "expand_backward": ("dy",),
    "lora_linear": ("x", "weight"),
    "lora_linear_backward": ("dy", "x", "weight"),
    "grouped_lora_linear": ("x", "weight"),
}
"""The matrices whose rows the kernels read in 16 bytes at a time where they are aligned."""


def estimate(problem: Problem, device: Device) -> Estimate | None:
    """What the problem takes on ``device``, None if the kernels refuse it."""
    p = problem
    if p.operation in planning.WHOLE:
        whole = fastest(p, device)
        apart = one_by_one(p, device) if p.operation in LAYER_OPERATIONS else None
        together = None if whole is None else of(whole, p, device)
        found = [takes for takes in (together, apart) if takes is not None]
        return min(found, key=lambda takes: takes.seconds, default=None)
    if p.operation in LAYER_OPERATIONS:
        return one_by_one(p, device)
    launch = launch_of(p, device)
    return None if isinstance(launch, str) else of(launch, p, device)


def launch_of(p: Problem, device: Device, fixed: Choices = NONE) -> Launch | str:
    """What serves an operation, with these choices, or why nothing does."""
    answers = planning.launches_of(p, device, fixed)
    found = [answer for answer in answers if isinstance(answer, Launch)]
    return min(found, key=lambda launch: of(launch, p, device).seconds, default=answers[-1])


def fastest(p: Problem, device: Device, fixed: Choices = NONE) -> Launch | None:
    """Of the launches that serve a whole layer the one with the fewest seconds: the first family's,
    unless another's has clearly fewer. A few bytes of scratch memory are no reason."""
    found = [a for a in planning.launches_of(p, device, fixed) if isinstance(a, Launch)]
    if not found:
        return None

    def key(launch: Launch) -> tuple[float, float]:
        takes = of(launch, p, device)
        behind = 1.0 if launch is found[0] else MARGIN
        return behind * takes.seconds, behind * takes.device

    return min(found, key=key)


def of(launch: Launch, p: Problem, device: Device) -> Estimate:
    """What a launch takes."""
    if not isinstance(launch, Hybrid):
        return _of_kernels(launch, p, device)
    found = _of_kernels(launch.expand, planning.as_expand(p), device)
    return found + base_gemm(p, device, accumulated=not launch.onto)


def _of_kernels(launch: Launch, p: Problem, device: Device) -> Estimate:
    host = CALL_HOST + (launch.launches - 1) * _LAUNCH_HOST
    if launch.seconds is not None:
        remark = "by what tests/ptx counts; rates and latencies are assumed, not measured"
        return Estimate(launch.seconds, host, launch.flops, launch.moved, launch.launches, remark)
    narrow = [name for name in _LARGE.get(p.operation, ()) if _is_narrow(p, name)]
    share = _UNALIGNED if narrow else 1.0
    if p.operation in planning.WHOLE:  # decoding
        remark = "rates and shares are assumed"
        busy = launch.flops / device.rate(p.dtype, tf32=False) / _DECODING
        if p.format != DENSE:
            remark = "instructions counted, what is issued of them measured on an H200"
            busy = max(busy, decode.seconds_of_numbers(p, device) / _ISSUED)
        moved = launch.moved / device.bandwidth / _WHOLE
    else:
        remark = "clocks counted, shares assumed, not measured"
        reached, busy = _SKINNY, clocks.seconds(p, device)
        if device.capability >= _TRITONS:
            remark = "clocks counted, shares measured on an H200"
            reached = _MEASURED[p.operation]
            busy = max(busy, reached * _products(launch, p, device))
        busy, moved = busy / reached, launch.moved / device.bandwidth / reached
    if narrow:
        remark += f"; the rows of {' and '.join(narrow)} aren't aligned to 16 bytes"
    seconds = max(busy, moved) / share + launch.launches * LAUNCH_SECONDS
    return Estimate(seconds, host, launch.flops, launch.moved, launch.launches, remark)


def _products(launch: Launch, p: Problem, device: Device) -> float:
    rate = device.flops * _RATE[p.operation]
    if p.dtype.itemsize == 4:
        rate *= _THREE_TF32
    elif wide(p.dtype) is not p.dtype:
        rate *= _TWO_TF32
    return launch.flops * -(-p.r // _RANKS) * _RANKS / max(p.r, 1) / rate


def _is_narrow(p: Problem, name: str) -> bool:
    layout = getattr(p.layouts, name)
    return max(layout.rows, layout.columns) < 16


def one_by_one(p: Problem, device: Device) -> Estimate | None:
    """A layer as its operations, None if the kernels refuse one of them."""
    found = Estimate()
    for part in parts(p):
        launch = launch_of(part, device)
        if isinstance(launch, str):
            return None
        found += of(launch, part, device)
    if "dweight" in p.wants:  # PyTorch's own
        found += base_gemm(p._replace(transposed=True), device, accumulated=False)
    return found
