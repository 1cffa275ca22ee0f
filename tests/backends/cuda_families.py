"""Stand-ins for the families of CUDA C++ kernels: the reference's numbers, launches as theirs."""

import torch

from lorafast import reference
from lorafast.backends.cuda import mask as module_of_mask
from lorafast.backends.cuda import planning
from lorafast.backends.cuda.launch import Launch
from lorafast.core.dtypes import wide

DECODED = 16
SMALL = 1 << 26


def launch(p, run, moved, launches=1):
    flops = 2.0 * p.M * p.r * (p.K + p.N)
    if p.K and p.N:
        flops += 2.0 * p.M * p.K * p.N
    return Launch(run, f"{p.operation}: grid 132", flops, float(moved), launches)


def plan_shrink(p, device, fixed=None):
    return launch(p, reference.shrink, p.M * p.K * p.dtype.itemsize)


def plan_expand(p, device, fixed=None):
    def run(s, lora_B, scaling, dropout_p, seed, bias=None, onto=None):
        y = reference.expand(
            s.double(), lora_B.double(), scaling, dropout_p, seed, dtype=torch.double
        )
        y = y if bias is None else y + bias
        return y.to(p.dtype) if onto is None else onto.copy_(onto + y)

    return launch(p, run, p.M * p.N * p.dtype.itemsize)


def plan_expand_backward(p, device, fixed=None):
    def run(dy, s, lora_B, scaling):
        ds = (
            scaling * (dy.to(wide(p.dtype)) @ lora_B.to(wide(p.dtype))) if "ds" in p.wants else None
        )
        dB = (scaling * (dy.to(s.dtype).t() @ s)).to(p.adapter_dtype) if "dB" in p.wants else None
        return ds, dB, dy.sum(0) if "dbias" in p.wants else None

    return launch(p, run, p.M * p.N * p.dtype.itemsize)


def plan_shrink_backward(p, device, fixed=None):
    def run(ds, x, dropout_p, seed):
        return reference.shrink_backward(ds, x, dropout_p, seed, p.adapter_dtype)

    return launch(p, run, p.M * p.K * p.dtype.itemsize)


def whole(p):
    def run(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed):
        s = reference.shrink(x, lora_A, dropout_p, seed)
        return reference.linear_expand(x, weight, s, lora_B, scaling, bias), s

    return launch(p, run, (p.K * p.N + p.M * (p.K + p.N)) * p.dtype.itemsize)


def plan_decoded(p, device, fixed=None):
    if p.M > DECODED:
        return f"M is {p.M}, the decode kernel serves up to {DECODED}"
    if p.dropout:
        return "there is dropout, the decode kernel has none"
    return whole(p)


def plan_small(p, device, fixed=None):
    if p.M * p.K * p.N > SMALL:
        return f"M·K·N is {p.M * p.K * p.N}, the kernel of small layers serves up to {SMALL}"
    return whole(p)


def mask(seed, threshold, M, K):
    groups = -(-K // 8)
    keep = reference.keep_mask(M, 8 * groups, threshold / 65536, seed)
    keep[:, K:] = False
    shifts = torch.arange(8, dtype=torch.uint8)
    return (keep.view(M, groups, 8).to(torch.uint8) << shifts).sum(-1, dtype=torch.uint8)


FAMILIES = {
    "shrink": (plan_shrink,),
    "expand_backward": (plan_expand_backward,),
    "shrink_backward": (plan_shrink_backward,),
    "expand": (plan_expand,),
    "lora_linear": (plan_decoded, plan_small),
    "grouped_lora_linear": (plan_decoded,),
}


def put_in_place(monkeypatch):
    """Within a test, the backend's families are these."""
    monkeypatch.setattr(planning, "FAMILIES", dict(FAMILIES))
    monkeypatch.setattr(module_of_mask, "mask", mask)
