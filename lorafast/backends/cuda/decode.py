"""``csrc/cuda/decode.cu``, ``decode_codes.cu``: a layer of at most 16 rows in one launch, as generation
with adapters has it.

The kernel reads W once, and a CTA has 16 rows of it for up to 8 rows of x, else 32. ``s`` is made by
helpers, the CTAs that start first, while the others read W. Where s of helpers would come later than
all of A can be loaded, each CTA makes its own. Of a quantized weight it reads the codes, and makes
numbers of them in registers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafast.backends.cost import Device
from lorafast.backends.cuda import dequantize
from lorafast.backends.cuda.launch import NONE, Choices, Launch
from lorafast.backends.cuda.tables import DECODE, DecodeRow, row_of
from lorafast.backends.plan import Run
from lorafast.core.assignment import Assignment
from lorafast.core.dtypes import wide
from lorafast.core.problem import DENSE, Problem
from lorafast.core.transfer import on_device
from lorafast.kernels.common.counters import counters
from lorafast.operands import FP8, Weight

MOST_ROWS = 16
_MOST_RANKS = 1 << 20
_OLDEST = 75
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_STEP = 256
"""Elements along K that the warps of a CTA take at a time."""
_MOST_OWN = 16 * 1024
"""Bytes of shared memory for the s that a CTA makes for itself."""
_SHARES = 4
"""Of K, that helpers take: s is there in a quarter of the time that a CTA takes for its rows of W."""
_SHARE = 2
"""Steps that a helper has at least."""
_HANDED_OVER = 4
"""Beside 1024 x 1024 of W, which an H100 has read after 1.3 µs, s of 16 ranks would be there after 3.1,
and every CTA has A's 32 KB from L2 in 1.2: so it makes its own; beside 2048 x 2048 nobody waits for
helpers. By this model: no GPU was asked.

Ways through L2 before s of a helper can be used: its ticket, s, its count, the count and s read. How
many adapters a batch has is known to the device alone: helpers that find nothing to do start and end
before the CTAs behind them start."""
_ADDED_UP = 3
"""More of them where helpers share K: a part, its count, all parts read."""
_OLDEST_OF_CODES = 80
_ALIGNED = 16
_COUNTERS = 3
"""Beside one for each helper."""
_INSTRUCTIONS = 7
"""Of sm_90 for an element of a quantized W: 6 in 4 bits, 7 in 8 bits, with all of a step around them."""
_SOFTWARE_E4M3, _CONVERTS_E4M3 = 14, 89
"""The same of e4m3 on chips that don't convert it, and the architecture from which they do."""
_LANES = 128
"""That an SM issues for in a clock."""
_L2_A_CLOCK = 32
"""Bytes, by which ``DecodeRow.l2`` says the clock."""


@dataclass(frozen=True)
class _Shares:
    """How a launch is shared out: ``rows`` of W a CTA, ``helpers`` CTAs beside them, scratch memory."""

    rows: int
    ctas: int
    helpers: int
    partials: int
    counters: int


def plan_lora_linear(problem: Problem, device: Device, fixed: Choices = NONE) -> Launch | str:
    """The launch of ``lora_linear``, or why there is none: a sentence."""
    reason = why_refused(problem, device)
    if reason is not None:
        return reason
    shares = _shares(problem, device, fixed.get("helpers"))
    return _launch("lora_linear_decode", _lora_linear(problem, shares), problem, shares)


def plan_grouped_lora_linear(
    problem: Problem, device: Device, fixed: Choices = NONE
) -> Launch | str:
    """The launch of ``grouped_lora_linear``, or why there is none: a sentence."""
    reason = why_refused(problem, device)
    if reason is not None:
        return reason
    shares = _shares(problem, device, fixed.get("helpers"))
    return _launch(
        "grouped_lora_linear_decode", _grouped_lora_linear(problem, shares), problem, shares
    )


def why_refused(p: Problem, device: Device) -> str | None:
    """A sentence if the kernel can't serve a layer's forward, else None."""
    if p.M > MOST_ROWS:
        return f"x has {p.M} rows, the kernel for decoding takes at most {MOST_ROWS}"
    if p.dropout:
        return "there is dropout, the kernel for decoding has none"
    if p.format != DENSE:
        reason = _why_not_codes(p, device)
        if reason is not None:
            return reason
    if p.dtype not in _DTYPES:
        return f"x is {p.dtype}, the kernel for decoding takes bfloat16, float16 and float32"
    if p.adapter_dtype not in (p.dtype, torch.float32):
        return f"the adapters are {p.adapter_dtype}, expected {p.dtype} or float32"
    if not 1 <= p.r < _MOST_RANKS:
        return f"the rank is {p.r}, the kernel for decoding takes 1 to {_MOST_RANKS - 1}"
    if not p.plain:
        return "an input is a tensor subclass or on another device: the kernels read plain tensors"
    if device.capability < _OLDEST:
        return f"{device.name} is sm_{device.capability}, the kernels need sm_{_OLDEST} or later"
    if p.K == 0 or p.N == 0:
        return f"the weight is {p.N} x {p.K}, the kernel for decoding needs elements"
    if p.layouts.weight.rows == 0:
        return "the weight's rows aren't contiguous, the kernel for decoding reads it along them"
    return None


def _why_not_codes(p: Problem, device: Device) -> str | None:
    """A sentence if the kernel can't read the codes of a quantized weight, else None."""
    reason = dequantize.why_refused(p)
    if reason is not None:
        return reason
    if p.dtype.itemsize != 2:
        return f"x is {p.dtype}, over codes the kernel for decoding takes bfloat16 and float16"
    if device.capability < _OLDEST_OF_CODES:
        return (
            f"{device.name} is sm_{device.capability}, over codes the kernels need sm_80 or later"
        )
    if p.layouts.x.rows < _ALIGNED:
        return "the rows of x aren't aligned to 16 bytes, over codes the kernel for decoding needs that"
    at_once = dequantize.codes_at_once(p)
    block = dequantize.block_of(p)
    if p.K % at_once or block % at_once:
        return (
            f"rows have {p.K} elements and blocks {block or 'none'}, over codes of {p.format} the "
            f"kernel for decoding takes multiples of {at_once}"
        )
    return None


def _shares(p: Problem, device: Device, given: int | None = None) -> _Shares:
    """With as many helpers as are ``given``, if that can be; else as the model has it."""
    tokens = 8 if p.M <= 8 else 16
    rows = 2 * tokens
    blocks = -(-p.r // rows)
    items = blocks * max(1, min(p.M, p.adapters) if p.adapters else 1)
    low = tokens * blocks * rows
    ctas = -(-p.N // rows)
    row = row_of(DECODE, device.capability)
    room = _resident(p, row) * device.sms
    shares = max(1, min(-(-p.K // _STEP) // _SHARE, _SHARES))
    free = room - ctas
    if items <= free < items * shares:
        shares = free // items  # so that no CTA has to wait for others to end
    helpers, fits = min(items * shares, row.helpers), 4 * low <= _MOST_OWN
    if fits and given is None:
        late = late_seconds(p, device, ctas, items, shares, helpers)
        given = 0 if own_seconds(p, device, ctas, items) <= late else helpers
    if given is not None:
        helpers = max(int(not fits), min(given, items * _SHARES, row.helpers))
    if helpers == 0:
        return _Shares(rows, ctas, 0, 0, 0)
    return _Shares(rows, ctas, helpers, low + helpers * rows * tokens, _COUNTERS + helpers)


def own_seconds(p: Problem, device: Device, ctas: int, items: int) -> float:
    """By how much a launch takes longer where each CTA makes its own ``s``: it waits for loads of A, an
    item after the other, before it loads W. A comes from L2 but for the first time."""
    row = row_of(DECODE, device.capability)
    waves = -(-ctas // (_resident(p, row) * device.sms))
    return waves * (items * row.load + _at_once(p, device, ctas) * _bytes_of_A(p) / row.l2)


def late_seconds(
    p: Problem, device: Device, ctas: int, items: int, shares: int, helpers: int
) -> float:
    """By how much it takes longer with helpers: ``s`` is made and handed over while others read W,
    who wait for what is left of that.
    """
    row = row_of(DECODE, device.capability)
    room = _resident(p, row) * device.sms
    # Memory is shared by those who read; what an SM gets has a bound.
    speed = min(row.l2, device.bandwidth / min(ctas, device.sms))
    trips = _HANDED_OVER + (_ADDED_UP if shares > 1 else 0)
    each = -(-items * shares // helpers) * _bytes_of_A(p) / (items * shares)
    ready = row.load + each / speed + trips * row.trip
    if -(-(ctas + helpers) // room) > -(-ctas // room):  # some start when helpers have ended
        return ready
    W = _bytes_of_element(p) * p.K * -(-p.N // ctas)
    return max(0.0, ready - (row.load + _at_once(p, device, ctas) * W / speed))


def seconds_of_numbers(p: Problem, device: Device) -> float:
    """In which schedulers issue what a quantized W takes, if they issue all the time."""
    clock = row_of(DECODE, device.capability).l2 / _L2_A_CLOCK
    by_software = p.format == FP8.format and device.capability < _CONVERTS_E4M3
    instructions = _SOFTWARE_E4M3 if by_software else _INSTRUCTIONS
    return p.N * p.K * instructions / (_LANES * clock * device.sms)


def _resident(p: Problem, row: DecodeRow) -> int:
    if p.dtype.itemsize > 2:
        return 1
    return row.resident if p.M <= 8 else row.resident_16


def _at_once(p: Problem, device: Device, ctas: int) -> int:
    """CTAs of an SM, which share what it loads."""
    return min(_resident(p, row_of(DECODE, device.capability)), -(-ctas // device.sms))


def _bytes_of_element(p: Problem) -> float:
    """Of W."""
    return p.dtype.itemsize if p.format == DENSE else dequantize.bytes_of_codes(p)


def _bytes_of_A(p: Problem) -> int:
    adapters = max(1, min(p.M, p.adapters)) if p.adapters else 1
    return adapters * p.r * p.K * p.adapter_dtype.itemsize


def _lora_linear(p: Problem, shares: _Shares) -> Run:
    M, N, r, dtype, low = p.M, p.N, p.r, p.dtype, wide(p.dtype)
    helpers, want_s = shares.helpers, "s" in p.wants
    partials, flags, quantized = shares.partials, shares.counters, p.format != DENSE

    def run(
        x: Tensor,
        weight: Weight,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        bias: Tensor | None,
        dropout_p: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        place = x.device
        y = torch.empty((M, N), dtype=dtype, device=place)
        s = torch.empty((M, r), dtype=low, device=place) if want_s else None
        scratch = zeros = None
        if helpers:
            scratch = torch.empty(partials, dtype=torch.float32, device=place)
            zeros = counters(x, flags)
        if quantized:
            _over_codes(
                x, weight, lora_A, lora_B, float(scaling), None, None, bias, helpers, scratch, zeros,
                y, s,
            )  # fmt: skip
            return y, s
        torch.ops.lorafast_cuda.lora_linear_decode.default(
            x, weight, lora_A, lora_B, scaling, bias, helpers, scratch, zeros, y, s
        )
        return y, s

    return run


def _grouped_lora_linear(p: Problem, shares: _Shares) -> Run:
    M, N, r, dtype, low = p.M, p.N, p.r, p.dtype, wide(p.dtype)
    helpers, want_s = shares.helpers, "s" in p.wants
    partials, flags, quantized = shares.partials, shares.counters, p.format != DENSE

    def run(
        x: Tensor,
        weight: Weight,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: Tensor,
        assignment: Assignment,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        place = x.device
        y = torch.empty((M, N), dtype=dtype, device=place)
        s = torch.empty((M, r), dtype=low, device=place) if want_s else None
        if M == 0:
            return y, s
        scratch = zeros = None
        if helpers:
            scratch = torch.empty(partials, dtype=torch.float32, device=place)
            zeros = counters(x, flags)
        if scaling.dtype is not torch.float32:
            scaling = scaling.float()
        adapter_of = assignment.made(_indices, place)
        if quantized:
            _over_codes(
                x, weight, lora_A, lora_B, 0.0, scaling, adapter_of, bias, helpers, scratch, zeros, y, s
            )  # fmt: skip
            return y, s
        torch.ops.lorafast_cuda.grouped_lora_linear_decode.default(
            x, weight, lora_A, lora_B, scaling, adapter_of, bias, helpers, scratch, zeros, y, s
        )
        return y, s

    return run


def _over_codes(x: Tensor, weight: Weight, *rest: object) -> None:
    """The launch over what a quantized weight is stored in. Codes that aren't aligned to 16 bytes, a
    part of a larger buffer, are copied first."""
    operations, arguments = torch.ops.lorafast_cuda, dequantize.of_four_bit(weight)
    name = operations.lora_linear_decode_four_bit.default
    if arguments is None:
        arguments = dequantize.of_eight_bit(weight)
        name = operations.lora_linear_decode_eight_bit.default
    codes = arguments[0]
    assert isinstance(codes, Tensor)
    if codes.data_ptr() % _ALIGNED:
        arguments = (codes.clone(), *arguments[1:])
    name(x, weight.shape[0], *arguments, *rest)


def _indices(assignment: Assignment, device: torch.device) -> Tensor:
    """``[E]`` int64 on the device."""
    known = assignment.adapter_of
    return known if isinstance(known, Tensor) else on_device(known, torch.int64, device)


def _launch(name: str, run: Run, p: Problem, shares: _Shares) -> Launch:
    size = p.dtype.itemsize
    # Of several adapters each row may have its own. What CTAs load again of A and x comes from L2.
    A = _bytes_of_A(p)
    moved = (
        _bytes_of_element(p) * p.N * p.K
        + size * (p.M * (p.K + p.N) + p.N * p.bias)
        + A
        + A // p.K * p.N
        + wide(p.dtype).itemsize * p.M * p.r * ("s" in p.wants)
        + 8 * shares.partials
    )
    of_s = f"{shares.helpers} CTAs more make s" if shares.helpers else "each makes its own s"
    aligned = min(p.layouts.weight.rows, p.layouts.x.rows) == 16
    by = "" if aligned else ", element by element: rows aren't aligned to 16 bytes"
    of = "" if p.format == DENSE else f" in {p.format}"
    return Launch(
        run,
        f"{name} {p.M} x {p.K} -> {p.N}: {shares.ctas} CTAs of {shares.rows} rows of W{of}, {of_s}{by}",
        2.0 * p.M * (p.N * p.K + p.r * (p.K + p.N)),
        float(moved),
        choices={"helpers": shares.helpers},
    )
