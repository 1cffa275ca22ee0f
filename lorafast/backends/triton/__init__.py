"""Temporary stand-in."""

import importlib
from functools import partial

import torch

from lorafast.backends import composed
from lorafast.backends.plan import Backend, Plan, Refusal
from lorafast.backends.triton import old
from lorafast.core.problem import LAYER_OPERATIONS


class Triton(Backend):
    name = "triton"

    def why_unusable(self):
        return old._triton_unusable()

    def plan(self, p):
        if p.dtype not in old._TRITON_DTYPES:
            return Refusal(
                self.name, f"the dtype is {p.dtype}, the kernels have float16, bfloat16 and float32"
            )
        if not p.plain:
            return Refusal(
                self.name,
                "an input is a tensor subclass or on another device: the kernels read plain tensors",
            )
        if p.device.type != "cuda" and not (old.interpreting() and p.device.type == "cpu"):
            return Refusal(
                self.name, f"the inputs are on {p.device}, the kernels run on CUDA devices"
            )
        if p.format != "dense":
            return Refusal(
                self.name, f"the kernels read dense weights, this one is stored as {p.format}"
            )

        def k(n):
            return getattr(importlib.import_module(f"lorafast.kernels.{n}"), n)

        if p.operation in LAYER_OPERATIONS:
            return composed.plan_or_refusal(p, self.plan)
        if p.operation == "shrink":
            return Plan(self.name, k("shrink"), ("shrink",))
        if p.operation == "shrink_backward":
            return Plan(
                self.name,
                lambda ds, x, d, s: k("shrink_backward")(ds, x, d, s, p.adapter_dtype),
                ("sb",),
            )
        if p.operation == "linear_expand":
            f = k("linear_expand")
            if p.transposed:
                return Plan(self.name, lambda x, w, *a: f(x, w.t(), *a), ("dx",))
            return Plan(self.name, f, ("le",))

        def eb(dy, s, B, scaling):
            ds = dB = None
            if "ds" in p.wants and "dB" in p.wants:
                ds, dB = k("expand_backward")(dy, s, B, scaling)
            elif "ds" in p.wants:
                ds = scaling * k("shrink")(dy, B.t())
            elif "dB" in p.wants:
                dB = (k("shrink_backward")(s, dy, 0.0, None, torch.float32).t() * scaling).to(
                    p.adapter_dtype
                )
            return ds, dB, dy.sum(0) if "dbias" in p.wants else None

        return Plan(self.name, eb, ("eb",))

    def remark(self):
        return (
            "run in Triton's interpreter, which checks the kernels and not the chip"
            if old.interpreting()
            else None
        )
