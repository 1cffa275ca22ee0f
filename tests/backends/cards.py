"""Devices and problems to reckon with, none of which is here."""

import torch

from lorafast.backends.cost import Device
from lorafast.core.problem import Layout, Layouts, Problem

CUDA = torch.device("cuda", 0)
H200 = Device.known_by("NVIDIA H200", 90, 132, 1.98e9, 3.2e9, 6144)
A100 = Device.known_by("NVIDIA A100-SXM4-80GB", 80, 108, 1.41e9, 1.593e9, 5120)
L4 = Device.known_by("NVIDIA L4", 89, 58, 2.04e9, 6.25e9, 192)
T4 = Device.known_by("Tesla T4", 75, 40, 1.59e9, 5.001e9, 256)
B200 = Device.known_by("NVIDIA B200", 100, 148, 1.97e9, 3.996e9, 8192)
FROZEN = ("dx", "dA", "dB")


def problem(operation="lora_linear", M=8192, K=4096, N=4096, r=16, dtype=torch.bfloat16, **others):
    """A call on contiguous tensors, laid out as its sizes say."""
    if operation in ("shrink", "shrink_backward"):
        N = 0
    if operation in ("expand", "expand_backward"):
        K = 0
    if operation == "expand_backward":
        others.setdefault("wants", ("ds", "dB"))
    if operation == "lora_linear_backward":
        others.setdefault("wants", FROZEN)
    layouts = Layouts(
        x=Layout.fresh(M, K, dtype), dy=Layout.fresh(M, N, dtype), weight=Layout.fresh(N, K, dtype)
    )
    given = {"adapter_dtype": dtype, "device": CUDA, "layouts": layouts} | others
    return Problem(operation, M, K, N, r, dtype, **given)
