"""``cpu``: the native kernels, and the rules by which they are measured to be ahead."""

import torch

from lorafast.backends import composed, kernel_formats
from lorafast.backends.cpu import native
from lorafast.backends.plan import Backend, Plan, Refusal
from lorafast.core.problem import (
    BOTTLENECK_OPERATIONS,
    DENSE,
    LAYER_OPERATIONS,
    Problem,
    parts,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SKINNY = 32
"""The rank up to which, in bfloat16, the native reductions beat oneDNN's: measured at 4 to 128."""
SKINNY_LAYER, SKINNY_OURS = 64, 128
"""The same of a layer, whose skinny products are one call, and of one whose base GEMM is ours too:
measured at 16 to 256."""
OUR_ROWS = 64
"""The rows from which it is (csrc/cpu/panel_gemm.h)."""
MANY = 128
"""The rows from which, in float32, the native kernels do: measured at 1 to 1024."""
BOTTLENECK_ROWS = (64, 512)
"""The rows from which a bottleneck adapter's kernels are ahead: of its forward, and of its backward in
float32."""
NARROW, WIDE = 48, 64
"""The widest bottleneck of which the backward is, in bfloat16 and in float32."""
_SMALL = {torch.bfloat16: 1 << 16, torch.float32: 1 << 22}
"""Multiply-adds of the base GEMM below which, without a mask, three of PyTorch's calls cost less than
one of ours in a ``Function``: measured between 2**15 and 2**18, and at 128 x 512 x 512."""


class Cpu(Backend):
    """C++ with AVX2 or AVX-512 for the skinny products, whatever format the weight has.

    The rules were measured on a processor with AVX-512 and its bfloat16 product.
    """

    name = "cpu"
    operations = Backend.operations | frozenset(BOTTLENECK_OPERATIONS)

    def why_unusable(self) -> str | None:
        """Whether the extension is built, and runs."""
        return native.why_not_loaded()

    def plan(self, problem: Problem) -> Plan | Refusal:
        """One call for all skinny products of a layer's forward or backward, or one an operation."""
        reason = _why_refused(problem)
        if reason is not None:
            return Refusal(self.name, reason)
        if problem.operation in BOTTLENECK_OPERATIONS:
            return self._bottleneck(problem)
        from lorafast.backends.cpu import operations as run  # which needs the extension

        p = problem
        ahead = _why_ahead(p)
        if p.operation == "lora_linear":
            short = None if p.format == DENSE else run.of_stored(p)
            whole, rows = run.FORWARD[p.format == DENSE]
            return Plan(self.name, whole, _FORWARD, ahead=ahead, of_stored=short, on_rows=rows)
        if p.operation == "lora_linear_backward":
            if p.wants != ("dx", "dA", "dB"):
                return composed.plan_or_refusal(problem, self.plan)
            whole, rows = run.BACKWARD[p.format == DENSE]
            return Plan(self.name, whole, _BACKWARD, ahead=ahead, on_rows=rows)
        if p.operation == "shrink":
            return Plan(self.name, run.shrink, ("shrink",), ahead=ahead)
        if p.operation == "expand":
            return Plan(self.name, run.expand(p.dtype), ("expand",), ahead=ahead)
        if p.operation == "expand_backward":
            made = run.expand_backward(p.wants, p.adapter_dtype)
            return Plan(self.name, made, ("expand_backward",), ahead=ahead)
        if p.operation == "shrink_backward":
            made = run.shrink_backward(p.adapter_dtype)
            return Plan(self.name, made, ("shrink_backward",), ahead=ahead)
        if p.format == DENSE:
            product = (
                run.dense_linear_expand_transposed if p.transposed else run.dense_linear_expand
            )
        else:
            product = run.linear_expand_transposed if p.transposed else run.linear_expand
        return Plan(
            self.name, product, ("the base GEMM and expand, one onto the other",), ahead=ahead
        )

    def _bottleneck(self, p: Problem) -> Plan | Refusal:
        from lorafast.backends.cpu import bottleneck as run

        ahead = _why_bottleneck_ahead(p)
        if p.operation == "bottleneck":
            return Plan(self.name, run.bottleneck(p), ("bottleneck",), ahead=ahead)
        if not {*run.TOGETHER} <= {*p.wants}:
            return Refusal(
                self.name,
                f"{', '.join(p.wants)} are wanted, the kernel makes dD and dU in any case",
            )
        backward = run.bottleneck_backward(p)
        return Plan(self.name, backward, ("bottleneck_backward",), ahead=ahead)

    def describe(self) -> list[tuple[str, str]]:
        """The instruction set, and when ``auto`` takes these kernels."""
        reason = native.why_not_loaded()
        if reason is not None:
            return [("native CPU kernels", reason)]
        rules = ["with dropout"]
        if native.multiplies_bfloat16():
            rules.append(
                f"in bfloat16 up to rank {SKINNY}, a layer up to {SKINNY_LAYER}, "
                f"from {OUR_ROWS} rows up to {SKINNY_OURS}"
            )
        if native.has_avx512():
            rules.append(f"in float32 from {MANY} rows")
        return [("native CPU kernels", f"{native.capability()}, ahead {', '.join(rules)}")]


_FORWARD = ("the base GEMM, then both skinny products in one call",)
_BACKWARD = ("the base GEMM, then all skinny products in one call",)


def _why_refused(p: Problem) -> str | None:
    if p.device.type != "cpu":
        return f"an input is on {p.device}, the native kernels run on the CPU"
    if not p.plain:
        return "an input is a tensor subclass or on another device: the kernels read plain tensors"
    for dtype in (p.dtype, p.adapter_dtype):
        if dtype not in _DTYPES:
            return f"the dtype is {dtype}, the kernels have float32, bfloat16 and float16"
    return None


def _why_ahead(p: Problem) -> str | None:
    """The measurement by which these kernels are the fastest for a problem, or None.

    A layer is like its ``shrink``, or its backward's reductions: its base GEMM has left Python and the
    dispatcher cold, and each call more costs more than what another backend would gain.
    """
    reads_weight = p.operation in ("lora_linear", "linear_expand") or "dx" in p.wants
    if reads_weight and kernel_formats.why_not(p.format) is None:
        return f"it has kernels for {p.format}"
    if p.operation in LAYER_OPERATIONS:
        if p.operation == "lora_linear" and _is_small(p):
            return None
        first = next((q for q in parts(p) if q.operation != "linear_expand"), None)
        if first is None:
            return None
        most = SKINNY_OURS if p.M >= OUR_ROWS else SKINNY_LAYER
        return _why_skinny_ahead(first._replace(dropout=p.dropout), most)
    return _why_skinny_ahead(p, SKINNY)


def _why_skinny_ahead(p: Problem, most: int) -> str | None:
    """The same for a skinny product, of a layer or not, in bfloat16 up to rank ``most``."""
    if p.dropout:
        return "on a CPU with dropout, measured"
    if p.operation == "expand":  # which PyTorch writes in one pass, and these onto zeros
        return None
    if p.dtype is torch.bfloat16 and native.multiplies_bfloat16():
        if p.operation == "linear_expand":
            return "on a CPU in bfloat16, measured"
        if p.r <= most:
            return f"on a CPU in bfloat16 up to rank {most}, measured"
    elif p.dtype is torch.float32 and p.M >= MANY and native.has_avx512():
        return f"on a CPU in float32 from {MANY} rows, measured"
    return None


def _why_bottleneck_ahead(p: Problem) -> str | None:
    """The same for a bottleneck adapter: measured at b of 16 to 256, on one thread and on two."""
    forward = p.operation == "bottleneck"
    if p.dtype is torch.bfloat16 and native.multiplies_bfloat16():
        fewest, widest = BOTTLENECK_ROWS[0], None if forward else NARROW
    elif p.dtype is torch.float32 and native.has_avx512():
        fewest, widest = BOTTLENECK_ROWS[0 if forward else 1], None if forward else WIDE
    else:
        return None
    if fewest > p.M or (widest is not None and p.r > widest):
        return None
    most = "" if widest is None else f" up to b = {widest}"
    return f"on a CPU in {p.dtype} from {fewest} rows{most}, measured"


def _is_small(p: Problem) -> bool:
    alone = "s" not in p.wants and not p.dropout and p.adapter_dtype is p.dtype
    return alone and _SMALL.get(p.dtype, 0) > p.M * p.K * p.N
