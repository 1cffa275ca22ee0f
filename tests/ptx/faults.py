"""Faults to plant in real kernels: what is executed, and what is done to its PTX.

Kernels are Triton's 3.9, from our launchers, and nvcc's, from ``cuda/``. Registers and places are
those of their PTX: another compiler's may need other edits.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from helped import with_helpers
from helpers import assert_contract
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.lora_linear import forward
from small_tiles import are_kernels

from . import cuda_cases
from .cases import Case, shipped
from .executed import executed
from .plant import EVERY, Change, Edit, Lines, Planted, after, before, change, delay, drop, hoist

# ---- Kernels: a call of a launcher, or of a kernel in CUDA C++


@dataclass(frozen=True)
class Subject:
    """What is executed: with an edit of its PTX or None, by a seed, with so many CTAs at once. Returns
    tensors, or raises AssertionError where they aren't what they should be."""

    name: str
    kernel: str
    run: Callable[[Planted | None, int, int], Any]
    agrees: Callable[[Any], None] = lambda _: None
    """Raises AssertionError unless a result keeps the contract."""


def triton_kernel(
    name: str, case: Case, kernel: str = "", *, helpers: bool = False, launches: int = 1
) -> Subject:
    """A launcher's kernel, named where it has several. ``launches`` in a row, on the same counters."""
    call = case.call()

    def run(edit: Planted | None, seed: int, resident: int) -> Any:
        kept = torch.zeros(4096, dtype=torch.int32)
        with pytest.MonkeyPatch.context() as patch:
            if helpers:
                with_helpers(patch, helpers=2, waves=1, programs=5)
            if launches > 1:
                patch.setattr(forward, "counters", lambda x, count: kept)
            with executed(case.arch, seed, resident, sms=case.sms, edit=edit, writable=(kept,)):
                return [
                    call(case.kernels(), lambda t, to=case.dtype: t.to(to)) for _ in range(launches)
                ]

    def agrees(found: Any) -> None:
        for one in found:

            def given(operations: Any, cast: Any, one: Any = one) -> Any:
                return one if are_kernels(operations) else call(operations, cast)

            assert_contract(given, case.kernels(), case.dtype)

    return Subject(f"{name}, sm_{case.arch}", kernel or f"{case.operation}_kernel", run, agrees)


def cuda_kernel(kernel: str, call: Callable[..., Any], *sizes: int | str) -> Subject:
    """``call`` (``cuda_cases``) returns a result and what it should be, or compares them itself."""

    def run(edit: Planted | None, seed: int, resident: int) -> Any:
        options = {} if call is cuda_cases.hand_over else {"resident": resident}
        made = call(*sizes, seed, edit=edit, **options)
        if made is not None:
            found, expected = made
            assert torch.equal(found, expected.to(found.dtype))
        return ()

    return Subject(f"{kernel} (CUDA C++)", kernel, run)


def as_shipped(operation: str, arch: int, **sizes: Any) -> Case:
    """A table's first row for bf16. Sizes are multiples of 16: then loads are wide and asynchronous."""
    case = next(c for c in shipped(arch) if (c.operation, c.kind) == (operation, "bf16"))
    return replace(case, **sizes)


POINTERS = LaunchConfig(32, 64, 32, 16, 4, 3)
TMA = LaunchConfig(64, 64, 64, 16, 4, 3, descriptors=True, flatten=True, parts=2, masked_parts=2)


def gemm(arch: int, M: int, K: int, N: int, **more: Any) -> Case:
    """The GEMM in small tiles, which has edges in every dimension."""
    return Case("linear_expand", arch, "bf16", TMA if arch >= 90 else POINTERS, M, K, N, 16, **more)


GEMM_80 = triton_kernel("linear_expand", gemm(80, 40, 208, 80))
GEMM_90 = triton_kernel("linear_expand", gemm(90, 72, 208, 80))
SHIPPED_90 = triton_kernel("linear_expand as shipped", as_shipped("linear_expand", 90, K=280, N=80))
DX_90 = triton_kernel(
    "linear_expand of dx with dropout",
    gemm(90, 72, 208, 80, transposed=True, bias=False, dropout_p=0.3),
)
SPLIT_80 = triton_kernel("linear_expand with K split", gemm(80, 40, 608, 80, sms=8))
SPLIT_90 = triton_kernel("linear_expand with K split", gemm(90, 40, 608, 80, sms=8))
LORA_80 = replace(gemm(80, 72, 144, 80), operation="lora_linear")
LORA_90 = replace(gemm(90, 200, 144, 80), operation="lora_linear")
HELPED_80 = triton_kernel("lora_linear with helpers", LORA_80, helpers=True)
HELPED_90 = triton_kernel("lora_linear with helpers", LORA_90, helpers=True)
TWICE_80 = triton_kernel("lora_linear with helpers, twice", LORA_80, helpers=True, launches=2)
SHRINK_80 = triton_kernel("shrink with K split", as_shipped("shrink", 80, M=24, K=1040))
SHRINK_90 = triton_kernel("shrink with K split", as_shipped("shrink", 90, M=24, K=1040))
SHRINK_100 = triton_kernel("shrink", as_shipped("shrink", 100, K=272))
EXPAND_80 = triton_kernel("expand with dropout", as_shipped("expand", 80, N=272, dropout_p=0.3))
BACKWARD = as_shipped("expand_backward", 80, M=520, N=144, sms=8)
EXPAND_BACKWARD_80 = triton_kernel("expand_backward", BACKWARD)
EXPAND_BACKWARD_100 = triton_kernel("expand_backward", as_shipped("expand_backward", 100, N=272))
SUM_PARTIALS_80 = triton_kernel("sum of expand_backward", BACKWARD, "sum_partials_kernel")
SHRINK_BACKWARD_80 = triton_kernel(
    "shrink_backward", as_shipped("shrink_backward", 80, M=80, K=144)
)
# K in more steps than the ring has stages, and one program more than one tile.
GEMM_100 = triton_kernel(
    "linear_expand as shipped", as_shipped("linear_expand", 100, M=400, K=392, N=80)
)


def sum_of(seed: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of a thousand integers."""
    x = torch.arange(1003) % 19 - 9.0
    return torch.tensor(cuda_cases.sum_of(x.numpy(), seed, **options)), x.sum()


def mma(seed: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A product by a ring of cp.async, ldmatrix and mma."""
    random = np.random.default_rng(9)
    A, B = (cuda_cases.integers(random, shape, torch.bfloat16) for shape in ((70, 128), (64, 128)))
    return cuda_cases.mma(A, B, False, 80, seed, **options), A.double() @ B.double().T


CUDA_SUM = cuda_kernel("sum", sum_of)
CUDA_MMA = cuda_kernel("product_mma_bf16", mma)
CUDA_WGMMA = cuda_kernel("product_wgmma", cuda_cases.wgmma, 100, 136, 330)
CUDA_TCGEN05 = cuda_kernel("product_tcgen05", cuda_cases.tcgen05, 130, 70, 330)
CUDA_BULK = cuda_kernel("scale_bulk", cuda_cases.scale_bulk, 5556)
CUDA_TRANSPOSE = cuda_kernel("transpose_tensor", cuda_cases.transpose, 100, 68)
CUDA_MULTICAST = cuda_kernel("copy_multicast", cuda_cases.multicast, 100, 68)
CUDA_FLAG = cuda_kernel("hand_over", cuda_cases.hand_over, "hand_over", 3)
CUDA_FENCED = cuda_kernel("hand_over_fenced", cuda_cases.hand_over, "hand_over_fenced", 5)

# ---- Faults


@dataclass(frozen=True)
class Fault:
    """A fault, and the edits that plant it."""

    subject: Subject
    what: str
    edits: tuple[Edit, ...]

    def __str__(self) -> str:
        return f"{self.subject.name}: {self.what}"


FAULTS: list[Fault] = []


def plant(subject: Subject, what: str, *edits: Edit) -> None:
    """One more fault."""
    FAULTS.append(Fault(subject, what, edits))


def one_too_far(parameter: int) -> Edit:
    """Every bound check against a kernel's parameter lets one more through."""

    def edit(lines: Lines) -> list[Change]:
        load = re.compile(rf"ld\.param\.b32\s+(%r\d+), \[\w+_param_{parameter}\]")
        (register,) = (m[1] for text in lines.values() if (m := load.search(text)))
        return change(rf"setp\.lt(\.s32.*, {register};)", r"setp.le\1", EVERY)(lines)

    return edit


BAR = r"^bar\.sync"
TRY_WAIT = r"mbarrier\.try_wait"

# Copies by cp.async, and the loop that they feed

WAIT, COMMIT = r"cp\.async\.wait_group\s+", r"cp\.async\.commit_group"
plant(GEMM_80, "the barrier behind the first wait for copies dropped", after(WAIT + "2", drop(BAR)))
plant(
    GEMM_80, "the barrier before a stage is filled again dropped", before(COMMIT, drop(BAR, -1), -2)
)
plant(
    GEMM_80,
    "every cp.async.wait_group 2 made 3",
    change(WAIT + "2", "cp.async.wait_group 3", EVERY),
)
plant(
    SPLIT_80, "cp.async.wait_group in the loop dropped", drop(WAIT + "2", -1), drop(WAIT + "2", -1)
)
plant(SHRINK_80, "the loop's last cp.async.commit_group dropped", drop(COMMIT, -1))
plant(SHRINK_BACKWARD_80, "cp.async.wait_group 0 dropped", drop(WAIT + "0"))
plant(GEMM_80, "a ring of one stage fewer", change(r"(setp\.gt\.s32.*), 1;", r"\1, 0;", -2))
plant(GEMM_80, "ldmatrix 16 bytes further", change(r"(ldmatrix.*\[%r\d+)\+1024\]", r"\1+1040]"))
plant(
    GEMM_80,
    "two registers of an mma's B exchanged",
    change(r"\{ (%r\d+), (%r\d+) \}", r"{ \2, \1 }"),
)
plant(
    CUDA_MMA,
    "cp.async.wait_group weakened",
    change(r"cp\.async\.wait_group 1", "cp.async.wait_group 2"),
)
plant(CUDA_MMA, "__syncthreads dropped", drop(BAR))

# What a CTA hands over to another

plant(
    HELPED_80,
    "the flag raised before all threads have stored",
    *(before(r"release\.exch", drop(BAR, -1)),) * 2,
)
plant(HELPED_80, "the flag raised before the last store", delay(r"st\.global", r"release\.exch"))
plant(
    HELPED_80, "release of the flag weakened to relaxed", change(r"release\.exch", "relaxed.exch")
)
plant(
    HELPED_80,
    "the flag's .gpu scope made .cta",
    change(r"global\.gpu\.release\.exch", "global.cta.release.exch"),
)
plant(
    HELPED_90,
    "acquire of the flag weakened to relaxed",
    change(r"ld\.acquire\.gpu", "ld.relaxed.gpu", EVERY),
)
plant(
    HELPED_90, "acquire of the flag made .cta", change(r"ld\.acquire\.gpu", "ld.acquire.cta", EVERY)
)
plant(HELPED_90, "the flag never raised", drop(r"release\.exch"))
plant(HELPED_80, "an item skipped", change(r"(relaxed\.add\.u32.*), %r\d+;", r"\1, 2;", 2))
plant(HELPED_80, "an item done twice", change(r"(relaxed\.add\.u32.*), %r\d+;", r"\1, 0;", 1))
plant(TWICE_80, "the counters not cleared", drop(r"st\.global\.b32", EVERY))
plant(SPLIT_80, "acq_rel of the count weakened to relaxed", change(r"acq_rel", "relaxed"))
plant(
    SPLIT_90,
    "the count of arrivals made .cta",
    change(r"global\.gpu\.acq_rel", "global.cta.acq_rel"),
)
plant(
    EXPAND_BACKWARD_80,
    "acq_rel of the last arriver's count weakened to relaxed",
    change("acq_rel", "relaxed"),
)
plant(CUDA_SUM, "__threadfence before the count dropped", drop(r"membar\.gl"))
plant(CUDA_SUM, "__threadfence behind the count dropped", drop(r"membar\.gl", 1))
plant(CUDA_SUM, "arrivals counted by two", change(r"(atom\.global\.add.*), 1;", r"\1, 2;"))
plant(CUDA_SUM, "a shuffle's distance 8 made 9", change(r"(mov\.u32\s+%r\d+), 8;", r"\1, 9;"))
plant(CUDA_FLAG, "st.release weakened to relaxed", change(r"st\.release", "st.relaxed"))
plant(CUDA_FLAG, "ld.acquire weakened to relaxed", change(r"ld\.acquire", "ld.relaxed"))
plant(CUDA_FLAG, "the barrier before the flag dropped", drop(BAR, -1))
plant(CUDA_FENCED, "the writer's fence dropped", drop(r"membar\.gl", -1))
plant(CUDA_FENCED, "the reader's fence dropped", drop(r"membar\.gl", 0))

# Arithmetic, bounds and addresses

plant(
    EXPAND_80,
    "a Philox multiplier with a bit flipped",
    change(r", -845247145;", ", -845247144;", 2),
)
plant(
    EXPAND_80,
    "a Philox round without its key",
    after("-845247145", change(r"xor\.b32(\s+%r\d+), %r\d+, (%r\d+);", r"mov.b32\1, \2;"), 3),
)
plant(
    EXPAND_80,
    "a half-word of a dropout mask a bit short",
    after("-845247145", change(r"(and\.b32.*), 65535;", r"\1, 32767;"), -1),
)
plant(EXPAND_80, "the bound on M one too far", change(r"setp\.lt\.s64", "setp.le.s64", EVERY))
plant(
    SUM_PARTIALS_80,
    "a shuffle of lane ^ 1 made lane ^ 2",
    change(r"(shfl\.sync\.bfly.*), 1, 31", r"\1, 2, 31"),
)
plant(EXPAND_BACKWARD_80, "a store of dB dropped", after("acq_rel", drop(r"st\.global\.v4")))
plant(SHRINK_80, "the bound on M one too far", one_too_far(5))
plant(GEMM_80, "the bound on K one too far", one_too_far(8))
plant(
    GEMM_80,
    "y's address taken for x's",
    change(r"linear_expand_kernel_param_2\]", "linear_expand_kernel_param_0]"),
)
plant(
    SHRINK_BACKWARD_80,
    "a store of four at an odd place",
    change(r"(st\.global\.v4.*)\+ 0 \]", r"\1+ 4 ]"),
)
plant(
    GEMM_90,
    "two registers of a stmatrix exchanged",
    after(TRY_WAIT, change(r"(stmatrix.*\{)(%r\d+), (%r\d+)", r"\1\3, \2")),
)

# Copies by TMA, products by wgmma

plant(GEMM_90, "expect_tx of half the bytes", change(r"(expect_tx.*), 16384;", r"\1, 8192;", -1))
plant(GEMM_90, "expect_tx of twice the bytes", change(r"(expect_tx.*), 16384;", r"\1, 32768;", 0))
plant(
    SPLIT_90,
    "an expect_tx made a plain arrival",
    change(r"(mbarrier\.arrive)\.expect_tx(.*), 16384;", r"\1\2;", 1),
)
plant(
    GEMM_90, "the phase bit flipped", change(r"complete, (\[.*\]), (%r\d+);", r"complete, \1, 1;")
)
plant(GEMM_90, "the mbarrier not waited for", change(r"@!complete bra\.uni waitLoop;", ""))
plant(
    GEMM_90,
    "fence.proxy.async before the low-rank wgmma dropped",
    after(TRY_WAIT, drop(r"fence\.proxy\.async")),
)
plant(
    GEMM_90,
    "fence.proxy.async before a TMA store dropped",
    after(TRY_WAIT, drop(r"fence\.proxy\.async", 1)),
)
plant(
    SHIPPED_90,
    "both barriers before a TMA into a used stage dropped",
    after(TRY_WAIT, drop(BAR, 1)),
    after(TRY_WAIT, drop(BAR, 1)),
)
plant(GEMM_90, "wgmma.fence dropped", after(TRY_WAIT, drop(r"wgmma\.fence")))
plant(GEMM_90, "wgmma.commit_group dropped", after(TRY_WAIT, drop(r"wgmma\.commit")))
plant(
    GEMM_90,
    "wgmma.wait_group 1 made 2",
    after(TRY_WAIT, change(r"(wgmma\.wait_group.*)1;", r"\g<1>2;")),
)
plant(SPLIT_90, "wgmma.wait_group 0 dropped", after(TRY_WAIT, drop(r"wgmma\.wait_group.*0;")))
plant(
    GEMM_90,
    "bulk wait_group.read before the buffer's reuse dropped",
    after(TRY_WAIT, drop(r"wait_group\.read")),
)
plant(GEMM_90, "the xor of a swizzle with 16 for 32", change(r"(xor\.b32.*), 32;", r"\1, 16;", -1))
plant(
    GEMM_90,
    "TMA into the stage before",
    change(
        r"(cp\.async\.bulk\.tensor\S+ \[%r\d+)\], \[(%rd\d+, \{%r\d+, %r\d+\}\], \[%r)",
        r"\1+-8192], [\2",
        2,
    ),
)
plant(SHRINK_90, "fence.proxy.async before wgmma dropped", drop(r"fence\.proxy\.async"))
plant(SHRINK_90, "wgmma.wait_group 0 dropped", drop(r"wgmma\.wait_group"))
plant(
    CUDA_WGMMA,
    "the empty mbarrier's phase bit flipped",
    change(r"not\.b32(.*), (%r\d+);", r"mov.b32\1, \2;", EVERY),
)
plant(
    CUDA_WGMMA, "wgmma.wait_group 1 made 2", change(r"(wgmma\.wait_group.*)1;", r"\g<1>2;", EVERY)
)
plant(
    CUDA_WGMMA,
    "one wgmma.fence before all tiles",
    hoist(r"^wgmma\.fence", r"^setmaxnreg\.inc"),
    *(drop(r"^wgmma\.fence", 1),) * 2,
)
plant(CUDA_WGMMA, "wgmma.fence dropped", drop(r"wgmma\.fence", EVERY))
plant(CUDA_WGMMA, "fence.proxy.async before the TMA store dropped", drop(r"fence\.proxy\.async"))
plant(CUDA_WGMMA, "stmatrix into another chunk of the swizzle", change(r"xor\.b32", "or.b32"))
plant(CUDA_BULK, "bulk wait_group.read 1 made 2", change(r"(wait_group\.read) 1", r"\1 2", EVERY))
plant(CUDA_BULK, "fence.proxy.async dropped", drop(r"fence\.proxy\.async", EVERY))
plant(CUDA_BULK, "the last wait for bulk stores dropped", drop(r"bulk\.wait_group 0"))
plant(DX_90, "the wait for the low-rank term dropped", drop(r"wgmma\.wait_group"))
plant(
    CUDA_TRANSPOSE,
    "__syncwarp before a lane arrives for all dropped",
    drop(r"bar\.warp\.sync", EVERY),
)
plant(
    CUDA_MULTICAST,
    "the last meeting of the cluster dropped",
    drop(r"barrier\.cluster\.arrive", -1),
    drop(r"barrier\.cluster\.wait", -1),
)
plant(
    CUDA_MULTICAST,
    "the arrival at the other CTA released for .cta only",
    change(r"arrive\.release\.cluster", "arrive.release.cta"),
)

# Products in tensor memory

plant(CUDA_TCGEN05, "tcgen05.commit of a stage dropped", drop(r"tcgen05\.commit", 0))
plant(CUDA_TCGEN05, "tcgen05.wait::ld dropped", drop(r"tcgen05\.wait::ld"))
plant(CUDA_TCGEN05, "tcgen05.dealloc dropped", drop(r"tcgen05\.dealloc"))
plant(SHRINK_100, "tcgen05.wait::ld dropped", drop(r"tcgen05\.wait::ld"))
plant(SHRINK_100, "tcgen05.wait::st dropped", drop(r"tcgen05\.wait::st"))
plant(SHRINK_100, "fence.proxy.async before tcgen05.mma dropped", drop(r"fence\.proxy\.async", 0))
plant(SHRINK_100, "tcgen05.commit dropped", drop(r"tcgen05\.commit", 0))
plant(
    EXPAND_BACKWARD_100,
    "the tcgen05 mbarrier not waited for",
    change(r"@!complete bra\.uni waitLoop;", ""),
)

# The GEMM's waits, in the text's order: for the low-rank product, the first stage, products before TMA
# fills their stage again, the next stage, the last products.
STILL = r"bra\.uni waitLoop"
plant(GEMM_100, "the first stage not waited for", drop(STILL, 1))
plant(GEMM_100, "a full stage not waited for", drop(STILL, 3))
plant(GEMM_100, "a stage filled again while products read it", drop(STILL, 2))
plant(GEMM_100, "the main loop's products not waited for", drop(STILL, 4))
plant(GEMM_100, "the low-rank product not waited for", drop(STILL, 0))
plant(
    GEMM_100,
    "the phase bit of empty stages kept",
    change(r"(selp\.b32\s+%r\d+), 1, 0", r"\1, 0, 0", 0),
)
plant(
    GEMM_100,
    "the phase bit of full stages kept",
    change(r"(selp\.b32\s+%r\d+), 1, 0", r"\1, 0, 0", 1),
)
plant(GEMM_100, "an mbarrier of two arrivals", change(r"(mbarrier\.init.*), 1;", r"\1, 2;", 2))
plant(GEMM_100, "mbarrier.inval dropped", drop(r"mbarrier\.inval", 0))
plant(GEMM_100, "expect_tx of half the bytes", change(r"(expect_tx.*), 49152;", r"\1, 24576;", -1))
plant(GEMM_100, "expect_tx of a stage dropped", drop("expect_tx", 1))
plant(GEMM_100, "TMA into the stage before", change(r"(add\.s32.*), 131072;", r"\1, 114688;", 1))
plant(
    GEMM_100,
    "x and W exchanged in a TMA",
    change(r"(cp\.async\.bulk\.tensor\S+ \[%r\d+\], \[)%rd21", r"\1%rd22", 2),
)
plant(GEMM_100, "tcgen05.commit of the first stage dropped", drop(r"tcgen05\.commit", 0))
plant(GEMM_100, "tcgen05.commit of a stage dropped", drop(r"tcgen05\.commit", 1))
plant(
    GEMM_100,
    "tcgen05.commit before the stage's last product",
    hoist(r"tcgen05\.commit", r"tcgen05\.mma", 7),
)
plant(
    GEMM_100,
    "a product issued by every lane",
    change(r"@%p\d+ (tcgen05\.mma)", r"\1", -2),
)
plant(
    GEMM_100, "a product that forgets the sum", change(r"(tcgen05\.mma.*), %p\d+;", r"\1, 0;", -2)
)
plant(GEMM_100, "a descriptor 16 of K too far", change(r"(add\.s32.*), 2;", r"\1, 4;", -1))
plant(
    GEMM_100,
    "products of half the columns",
    change(r"(mov\.b32.*), 138413200;", r"\1, 136316048;", 1),
)
plant(GEMM_100, "tcgen05.wait::st of the zeros dropped", drop(r"tcgen05\.wait::st", -1))
plant(GEMM_100, "tcgen05.wait::st before the low-rank product dropped", drop(r"tcgen05\.wait::st"))
plant(
    GEMM_100,
    "the barrier before the low-rank product dropped",
    after(r"tcgen05\.wait::st", drop(BAR)),
)
plant(
    GEMM_100, "fence.proxy.async before the low-rank product dropped", drop(r"fence\.proxy\.async")
)
plant(GEMM_100, "tcgen05.wait::ld dropped", drop(r"tcgen05\.wait::ld"))
plant(GEMM_100, "a tcgen05.ld below its wait", delay(r"tcgen05\.ld", r"tcgen05\.wait::ld", -1))
plant(GEMM_100, "fence.proxy.async before a TMA store dropped", drop(r"fence\.proxy\.async", 1))
plant(GEMM_100, "bulk wait_group.read dropped", drop(r"wait_group\.read", 1))
plant(
    GEMM_100,
    "the barrier behind bulk wait_group.read dropped",
    after(r"wait_group\.read", drop(BAR), 1),
)
plant(
    GEMM_100, "the barrier before a TMA store dropped", after(r"wait_group\.read", drop(BAR, 1), 1)
)
plant(GEMM_100, "the last wait for TMA stores dropped", drop(r"bulk\.wait_group\s"))
plant(GEMM_100, "tensor memory of half the columns", change(r"(alloc\.cta.*), 256;", r"\1, 128;"))
plant(GEMM_100, "tcgen05.dealloc dropped", drop(r"tcgen05\.dealloc"))
