"""``cuda``: kernels in CUDA C++."""

from dataclasses import replace

from lorafast.backends import composed, dequantized
from lorafast.backends.cost import Device, Estimate, base_gemm, gpu_of, priced
from lorafast.backends.cuda import cost, dequantize, native, planning
from lorafast.backends.cuda.launch import NONE, Choices, Launch
from lorafast.backends.cuda.planning import Hybrid
from lorafast.backends.plan import Backend, Plan, Refusal
from lorafast.core.problem import DENSE, LAYER_OPERATIONS, Problem


class Cuda(Backend):
    """Decoding and small layers in one launch, skinny operations and masks, GEMMs with the low-rank term
    in their accumulator, or PyTorch's onto what ``expand`` wrote.

    The kernels were tested on an H200, and executed on a machine for PTX: until ``lorafast tune`` has
    measured them, ``auto`` takes them where the model says so.

    ``fixed``: the choices of every launch, in place of what is tuned and modelled.
    """

    name = "cuda"
    operations = Backend.operations | frozenset(planning.WHOLE)

    def __init__(self, fixed: Choices = NONE) -> None:
        self._fixed = fixed

    def why_unusable(self) -> str | None:
        """What the installation lacks; which GPU a call is on, its plan asks."""
        return native.why_unusable()

    def plan(self, problem: Problem) -> Plan | Refusal:
        """Its launches, or why the kernels can't serve it."""
        p, device = problem, gpu_of(problem.device)
        reason = planning.why_refused(p, device)
        if reason is None and p.device.type == "cuda":  # and not one to be reckoned with
            reason = native.why_not_here(p.device)
        if reason is None and device is not None:
            reason = planning.why_too_old(p, device)
        if reason is not None:
            return Refusal(self.name, reason)
        assert device is not None
        if p.format != DENSE and dequantized.reads_weight(p):
            return self._over_codes(p, device)
        if p.operation == "linear_expand" and not p.r and p.format == DENSE:
            found = base_gemm(p, device, accumulated=False)
            run = planning.gemm_alone(p.transposed)
            return Plan(self.name, run, ("PyTorch's GEMM",), found.seconds, f"modelled {found}")
        if p.operation in planning.WHOLE or p.operation in LAYER_OPERATIONS:
            return self._layer(p, device)
        launch = cost.launch_of(p, device, self._fixed)
        if isinstance(launch, str):
            return Refusal(self.name, launch)
        lines = launch.lines if isinstance(launch, Hybrid) else (launch.line,)
        return priced(Plan(self.name, launch.run, lines), p, device)

    def _over_codes(self, p: Problem, device: Device) -> Plan | Refusal:
        """By a launch that reads codes if a family has one and that is faster, else by the plan of a
        dense weight behind a launch that makes W dense."""
        whole = None
        launch = cost.fastest(p, device, self._fixed) if p.operation in planning.WHOLE else None
        if launch is not None:
            whole = Plan(self.name, launch.run, (launch.line,))
            whole = _modelled(whole, cost.of(launch, p, device))
        dense = self.plan(dequantized.dense(p))
        if isinstance(dense, Refusal):
            return whole or dense
        apart = dequantized.plan(p, dequantize.dequantize, dense, dequantize.line(p))
        seconds = (dense.seconds or 0.0) + dequantize.seconds(p, device)
        if whole is not None and (whole.seconds or 0.0) <= seconds:
            return whole
        source = (
            f"no record: modelled {dequantize.seconds(p, device) * 1e6:,.0f} µs to make W dense"
        )
        source += f", then {dense.source}"
        return replace(apart, seconds=seconds, source=source, measured=False)

    def _layer(self, p: Problem, device: Device) -> Plan | Refusal:
        """In one launch if a family can and that is faster, else its operations one by one."""
        answers = planning.launches_of(p, device, self._fixed)
        reasons = [answer for answer in answers if isinstance(answer, str)]
        launch = cost.fastest(p, device, self._fixed)
        whole = None
        if launch is not None:
            whole = priced(Plan(self.name, launch.run, (launch.line,)), p, device)
            if not whole.measured:
                whole = _modelled(whole, cost.of(launch, p, device))
        if p.operation not in LAYER_OPERATIONS or self._fixed:
            return whole or Refusal(self.name, "; ".join(reasons))
        if whole is not None and whole.measured:
            return whole
        apart = composed.plan_or_refusal(p, self.plan)
        if isinstance(apart, Refusal):
            said = "; ".join((*reasons, "one by one, " * bool(reasons) + apart.reason))
            return whole or Refusal(self.name, said)
        if not apart.measured:
            # As a whole: host and device work at the same time over all of its operations. A record of
            # the layer may be of its one launch.
            apart = _modelled(apart, cost.one_by_one(p, device))
        if whole is not None and (whole.seconds or 0.0) <= (apart.seconds or 0.0):
            return whole
        why = tuple(f"not in one launch: {reason}" for reason in reasons)
        return replace(apart, launches=(*apart.launches, *why))

    def alternatives(self, problem: Problem) -> dict[str, Backend]:
        """Its other launches: which of them is the fastest is modelled, not measured."""
        device = gpu_of(problem.device)
        if device is None or planning.why_refused(problem, device) is not None:
            return {}
        taken = cost.fastest(problem, device, self._fixed)
        choices = [
            launch.choices
            for launch in planning.launches_of(problem, device, self._fixed)
            if isinstance(launch, Launch) and launch.choices
            if taken is None or launch.choices != taken.choices
        ]
        return {
            " ".join(f"{name}={value}" for name, value in of.items()): Cuda(of) for of in choices
        }

    def describe(self) -> list[tuple[str, str]]:
        """Whether the kernels are built, for which GPUs, and why they don't run here."""
        return [("CUDA kernels", reason) for reason in native.described()]


def _modelled(plan: Plan, takes: Estimate | None) -> Plan:
    assert takes is not None, "it is planned"
    return replace(plan, seconds=takes.seconds, source=f"no record: modelled {takes}")
