"""Calls of the launchers that put every edge of a configuration into a small problem."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import test_expand
import test_expand_backward
import test_linear_expand
import test_lora_linear
import test_shrink
import test_shrink_backward
import torch
from helpers import Problem
from lorafast.kernels.common.configs import OPERATIONS, LaunchConfig
from lorafast.kernels.tables import table_of
from small_tiles import on_kernels

from lorafast.reference import wide

KINDS = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16+fp32": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16+fp32": (torch.float16, torch.float32),
    "fp32": (torch.float32, torch.float32),
}


@dataclass(frozen=True)
class Case:
    """One call of a launcher, in a configuration, on sizes of its own."""

    operation: str
    arch: int
    kind: str
    config: LaunchConfig
    M: int
    K: int
    N: int
    r: int
    dropout_p: float = 0.0
    transposed: bool = False
    bias: bool = True
    layout: str = "contiguous"
    asked: tuple[str, ...] = ("ds", "dB", "dbias")
    sms: int = 3
    """Few, so that programs go through several tiles, and K is cut where tiles are few."""

    def __str__(self) -> str:
        c = self.config
        words = [
            self.operation, f"sm_{self.arch}", self.kind, f"{self.M}x{self.K}x{self.N}", f"r{self.r}",
            f"{c.block_m}x{c.block_n}x{c.block_k}",
        ]  # fmt: skip
        words += ["TMA"] * c.descriptors + ["flat"] * c.flatten
        words += ["dropout"] * bool(self.dropout_p) + ["transposed"] * self.transposed
        words += [] if self.bias else ["no bias"]
        if self.operation == "expand_backward":
            words.append("+".join(self.asked))
        return " ".join(words + ([] if self.layout == "contiguous" else [self.layout]))

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return KINDS[self.kind][0]

    def problem(self) -> Problem:
        """As the tests of the kernels take it."""
        dtype, adapter_dtype = KINDS[self.kind]
        return Problem(
            self.M, self.K, self.N, self.r, dtype, adapter_dtype, self.dropout_p, self.layout, 5
        )

    def kernels(self) -> Any:
        """The launchers, in this configuration."""
        return on_kernels(**{self.operation: self.config})

    def call(self) -> Any:
        """What the contract calls."""
        p = self.problem()
        t = p.tensors(torch.device("cpu"))
        if not self.bias:
            t.bias = None
        if self.operation == "linear_expand":
            return test_linear_expand.call(p, t, self.transposed)
        if self.operation == "expand_backward":
            return test_expand_backward.call(p, t, self.asked)
        tests = {
            "shrink": test_shrink,
            "expand": test_expand,
            "shrink_backward": test_shrink_backward,
            "lora_linear": test_lora_linear,
        }
        return tests[self.operation].call(p, t)


def _sizes(config: LaunchConfig, operation: str, bits: int) -> dict[str, int]:
    """More than a tile in every dimension that the operation cuts, and a tail in each. Rows have 16
    bytes: without that TMA has no part."""
    even = 128 // bits
    sizes = {
        "M": config.block_m + 24,
        "K": 2 * config.block_k + 3 * even,
        "N": config.block_n + even,
    }
    if operation in ("shrink", "shrink_backward"):
        sizes["N"] = even
    if operation in ("expand", "expand_backward"):
        sizes["K"] = even
        sizes["N"] += config.block_n
    if operation in ("expand_backward", "shrink_backward"):
        sizes["M"] += config.block_m  # what is summed over
    return sizes


def shipped(arch: int) -> Iterator[Case]:
    """Every row of an architecture's table, in every variant that a layer launches of it."""
    for operation in OPERATIONS:
        for bits, _, _, _, most, config in table_of(arch)[operation]:
            for kind, (dtype, _) in KINDS.items():
                of = dtype if operation == "linear_expand" else wide(dtype)
                if 8 * of.itemsize != bits or config.hybrid:
                    continue
                rank = min(most, 16) if operation == "linear_expand" else most
                case = Case(
                    operation,
                    arch,
                    kind,
                    config,
                    r=rank,
                    **_sizes(config, operation, 8 * dtype.itemsize),
                )
                yield from _variants(case)


def _variants(case: Case) -> Iterator[Case]:
    if case.operation == "linear_expand":
        yield case
        yield replace(case, transposed=True, bias=False)
        yield replace(case, transposed=True, bias=False, dropout_p=0.3)
        if case.kind == "bf16":
            yield replace(case, r=80)  # in blocks that are looped over
        if case.config.helpers and case.kind.startswith("bf16"):
            yield replace(case, operation="lora_linear")
    elif case.operation == "expand_backward":
        yield case
        yield replace(case, asked=("ds", "dB"))
        yield replace(case, asked=("dB",), r=max(1, case.r - 7))
    else:
        yield case
        yield replace(case, dropout_p=0.3, r=max(1, case.r - 7))
