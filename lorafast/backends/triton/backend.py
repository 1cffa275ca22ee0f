"""``triton``: the kernels of ``lorafast.kernels``, on a GPU or in Triton's interpreter."""

import functools
import importlib
import importlib.util
import os
import sys
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lorafast import operands
from lorafast.backends import composed, dequantized
from lorafast.backends import grouped_lora_linear as grouped
from lorafast.backends.cost import Device, gpu_of, priced
from lorafast.backends.plan import Backend, Plan, Refusal, Run
from lorafast.core.problem import (
    BOTTLENECK_OPERATIONS,
    DENSE,
    GROUPED_OPERATIONS,
    LAYER_OPERATIONS,
    SCALED_OPERATIONS,
    WEIGHT_NORM,
    Problem,
    parts,
)
from lorafast.kernels import tables
from lorafast.kernels.common import bottleneck_plan, configs
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.tables import tuned
from lorafast.operands import Weight

if TYPE_CHECKING:
    from lorafast.backends.triton import planning

_OLDEST = 80
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Triton(Backend):
    """Fused kernels: a layer's forward in one launch where helpers pay, or where rows are few; PyTorch's
    GEMM onto what ``expand`` wrote where that is faster than the fused one. A quantized weight is made
    dense first, by one launch, or for few rows read as its codes.

    ``auto`` uses helpers by the model alone where nothing was tuned: they assume no order of programs
    and no residency, so a wrong model costs time and nothing else.
    """

    name = "triton"
    operations = Backend.operations | {
        *BOTTLENECK_OPERATIONS, *SCALED_OPERATIONS, *GROUPED_OPERATIONS, WEIGHT_NORM,
    }  # fmt: skip

    def __init__(self, config: LaunchConfig | None = None) -> None:
        """``config``: what every call is launched with, instead of what was measured or ships."""
        self._config = config

    def why_unusable(self) -> str | None:
        """What the installation lacks; which GPU a call is on, its plan asks."""
        return _why_unusable(interpreting())

    def plan(self, problem: Problem) -> Plan | Refusal:
        """Its launches, or why the kernels can't serve it."""
        device = device_of(problem.device)
        reason = _why_refused(problem, device)
        if reason is not None:
            return Refusal(self.name, reason)
        assert device is not None
        if problem.device.type == "cuda" and not tuned.load(device.name):
            say_untuned(device.name, device.capability)
        from lorafast.backends.triton import cost, planning
        from lorafast.backends.triton.lines import lines

        if problem.operation in GROUPED_OPERATIONS:
            return self._grouped(problem, device)
        if _reads_codes(problem):
            return self._of_codes(problem, device) or self._of_dense(problem, device)
        launch: planning.Launch | str
        if problem.operation in LAYER_OPERATIONS:
            launch = cost.in_one_launch(problem, device, self._config)
        else:
            launch = cost.PLANNED[problem.operation](problem, device, self._config)
        if isinstance(launch, str):
            apart = composed.plan_or_refusal(problem, self.plan)
            if isinstance(apart, Refusal):
                return apart
            if not apart.measured:
                # As a whole: host and device work at the same time over all of its operations.
                apart = priced(apart, problem)
            return replace(apart, launches=(*apart.launches, f"no helpers: {launch}"))
        plan = Plan(self.name, self.run_of(launch, problem), lines(launch))
        return priced(plan, problem)

    def _of_codes(self, problem: Problem, device: Device) -> Plan | Refusal | None:
        """Launches of which one reads the weight's codes, None where that doesn't pay."""
        from lorafast.backends.triton import cost
        from lorafast.backends.triton.lines import lines

        if problem.operation == WEIGHT_NORM:
            return None
        launch: planning.CodesLaunch | planning.DecodeLaunch | None
        if problem.operation in LAYER_OPERATIONS:
            launch = cost.decoded(problem, device, self._config)
        else:
            launch = cost.reads_codes(problem, device, self._config)
        if launch is None:
            return self._with_codes(problem, device)
        plan = Plan(self.name, self.run_of(launch, problem), lines(launch))
        if gpu_of(problem.device) is None:
            return plan
        found = cost.of_codes(launch, problem, device)
        return replace(plan, seconds=found.seconds, source=f"no record: modelled {found}")

    def _with_codes(self, problem: Problem, device: Device) -> Plan | Refusal | None:
        """A layer's operations one by one, the one that reads W reads its codes, where that pays."""
        from lorafast.backends.triton import cost

        if problem.operation not in LAYER_OPERATIONS or not dequantized.reads_weight(problem):
            return None
        product = next(p for p in parts(problem) if p.operation == "linear_expand")
        if cost.reads_codes(product, device, self._config) is None:
            return None
        return composed.plan_or_refusal(problem, self.plan)

    def _of_dense(self, problem: Problem, device: Device) -> Plan | Refusal:
        """The launches of the dense weight, behind one that makes it dense."""
        from lorafast.backends.triton import cost, quantized

        product = self.plan(dequantized.dense(problem))
        if isinstance(product, Refusal):
            return product
        made = dequantized.plan(problem, self.dequantize, product, quantized.line(problem))
        if product.seconds is None:
            return made
        first = cost.dequantized(problem, device)
        return replace(
            made,
            seconds=product.seconds + first.seconds,
            source=f"W made dense, modelled {first}; its products, {product.source}",
            measured=False,
        )

    def _grouped(self, problem: Problem, device: Device) -> Plan:
        """PyTorch's own calls, behind a launch that makes a quantized weight dense."""
        if problem.operation == "grouped_lora_linear":
            run = grouped.grouped_lora_linear(problem.wants, operands.linear)
        else:
            run = grouped.grouped_lora_linear_backward(
                problem.wants, problem.adapter_dtype, operands.linear_transposed
            )
        product = Plan(self.name, run, ("the base GEMM, and a batched product over all adapters",))
        if not _reads_codes(problem):
            return product
        from lorafast.backends.triton import cost, quantized

        made = dequantized.plan(problem, self.dequantize, product, quantized.line(problem))
        if gpu_of(problem.device) is None:
            return made
        # Alone it takes longer than a launch over the codes, and all else is the same in PyTorch's.
        first = cost.dequantized(problem, device)
        source = f"W made dense, modelled {first}; its products aren't"
        return replace(made, seconds=first.seconds, source=source)

    def dequantize(self, weight: Weight, W: torch.Tensor) -> None:
        """Launches what makes W dense."""
        from lorafast.backends.triton import quantized

        quantized.dequantize(weight, W)

    def run_of(self, launch: "planning.Launch", problem: Problem) -> Run:
        """What launches it."""
        from lorafast.backends.triton import (
            launching,  # which imports Triton; a machine may lack it
        )

        return launching.run_of(launch, problem)

    def allow_checks(self, device: torch.device) -> None:
        """On a CPU in the interpreter, unless Triton is imported: it has read its variable then."""
        if device.type == "cpu" and "triton" not in sys.modules and _is_installed():
            os.environ.setdefault("TRITON_INTERPRET", "1")

    def remark(self) -> str | None:
        """That results come from the interpreter, if they do."""
        if not interpreting():
            return None
        return "run in Triton's interpreter, which checks the kernels and not the chip"

    def describe(self) -> list[tuple[str, str]]:
        """Triton's version, and whether it interprets."""
        reason = self.why_unusable()
        if reason is not None:
            return [("Triton kernels", reason)]
        version = ".".join(map(str, _version("triton")))
        return [("Triton kernels", f"Triton {version}{', interpreted' * interpreting()}")]


@functools.cache
def say_untuned(device: str, sm: int) -> None:
    """Warns, once."""
    if device not in tables.tuned_on(sm):
        warnings.warn(
            f"lorafast's kernels are not tuned for {device}: they use the rules for "
            f"sm_{sm}. `lorafast tune` measures what is fastest on it, once, in minutes.",
            stacklevel=2,
        )


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on any device (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _why_unusable(interpreted: bool) -> str | None:
    if not _is_installed():
        return "Triton is not installed (pip install triton)"
    if interpreted:
        if importlib.util.find_spec("numpy") is None:
            return "Triton's interpreter needs NumPy (pip install numpy)"
        if _version("triton") < (3, 7) and _version("numpy") >= (2, 4):
            return "Triton before 3.7 can't interpret with NumPy 2.4 or later: upgrade Triton"
        return None
    if not torch.cuda.is_available():
        return (
            "no CUDA device, and on a CPU Triton runs only in its interpreter "
            "(set TRITON_INTERPRET=1 before Python starts)"
        )
    if torch.version.hip is not None:
        return "PyTorch is built for AMD GPUs, the kernels are written for NVIDIA's"
    return None


def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _version(package: str) -> tuple[int, ...]:
    """Major and minor version of an installed package."""
    version: str = importlib.import_module(package).__version__
    return tuple(int(part) for part in version.split(".")[:2])


def device_of(device: torch.device) -> Device | None:
    """What the kernels of calls on ``device`` run on, None if they don't."""
    found = gpu_of(device)
    if found is not None:
        return found
    return interpreter() if interpreting() and device.type == "cpu" else None


def interpreter() -> Device:
    """What the interpreter pretends to be: a few SMs of an H200, so that it cuts and adds up as one."""
    return Device.known_by(
        tuned.INTERPRETER, configs.INTERPRETER_CAPABILITY, configs.INTERPRETER_SMS
    )


def _reads_codes(p: Problem) -> bool:
    return p.format != DENSE and dequantized.reads_weight(p)


def _why_refused(p: Problem, device: Device | None) -> str | None:
    if p.dtype not in _DTYPES:
        return f"the dtype is {p.dtype}, the kernels have float16, bfloat16 and float32"
    if p.adapter_dtype not in _DTYPES:
        return f"the adapter is {p.adapter_dtype}, the kernels have float16, bfloat16 and float32"
    if not p.plain:
        return "an input is a tensor subclass or on another device: the kernels read plain tensors"
    if device is None:
        return f"the inputs are on {p.device}, the kernels run on CUDA devices"
    if device.capability < _OLDEST:
        major, minor = divmod(device.capability, 10)
        return f"compute capability is {major}.{minor}, the kernels need 8.0"
    if p.operation in BOTTLENECK_OPERATIONS and p.r > bottleneck_plan.widest(p.dtype):
        most = bottleneck_plan.widest(p.dtype)
        return f"the bottleneck is {p.r} wide, the kernels take up to {most} in {p.dtype}"
    if _reads_codes(p):
        from lorafast.backends.triton import quantized

        return quantized.why_not(p)
    return None
