"""Compiles every launch configuration for one architecture and prints what the machine code needs.

    python tests/kernels/compile_configs.py 90 [bf16 fp16 fp32]

One JSON object a line. Needs no GPU; must not run with ``TRITON_INTERPRET`` set.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import triton
import triton.backends.nvidia
from lorafast.kernels.common.configs import OPERATIONS, TABLE, LaunchConfig
from lorafast.kernels.linear_expand.kernel import _GROUP_M
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
ELEMENT_SIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
PARTIAL_SUMS = {("expand_backward", "ds_ptr"), ("expand_backward", "db_ptr")}  # float32

# operation → (variant, dropout, bias, which strides are 1). The backward calls linear_expand on Wᵀ
# and Aᵀ, whose contiguous dimension is the other one.
FORWARD = {"stride_xk", "stride_wk", "stride_sr", "stride_br", "stride_bias"}
TRANSPOSED = {"stride_xk", "stride_wn", "stride_sr", "stride_bn", "stride_bias"}
VARIANTS = {
    "shrink": [
        ("plain", False, False, {"stride_xk", "stride_ak"}),
        ("dropout", True, False, {"stride_xk", "stride_ak"}),
    ],
    "linear_expand": [
        ("forward", False, True, FORWARD),
        ("dx", False, False, TRANSPOSED),
        ("dx-dropout", True, False, TRANSPOSED),
    ],
    "expand_backward": [("plain", False, False, {"stride_dyn", "stride_sr", "stride_br"})],
    "shrink_backward": [
        ("plain", False, False, {"stride_dsr", "stride_xk"}),
        ("dropout", True, False, {"stride_dsr", "stride_xk"}),
    ],
}


def kernel_source(
    operation: str, config: LaunchConfig, dtype: str, dropout: bool, bias: bool, unit: set[str]
) -> ASTSource:
    """The kernel specialised as the launcher does for contiguous inputs and sizes divisible by 16."""
    kernel = getattr(import_module(f"lorafast.kernels.{operation}.kernel"), f"{operation}_kernel")
    constants = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK_R": config.block_r,
        "GROUP_M": _GROUP_M,
        "HAS_DROPOUT": dropout,
        "HAS_BIAS": bias,
        "PRECISION": "ieee",
        "INTERPRETED": False,
        **dict.fromkeys(unit, 1),
    }
    signature, constexprs, attributes = {}, {}, {}
    for parameter in kernel.params:
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            constexprs[(parameter.num,)] = constants[name]
        elif name.endswith("_ptr"):
            element = "i64" if name == "seed_ptr" else dtype
            signature[name] = "*fp32" if (operation, name) in PARTIAL_SUMS else f"*{element}"
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        elif name in ("scaling", "survivor_scale"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if not parameter.do_not_specialize:
                attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs, attributes)


def machine_code(cubin: bytes) -> tuple[str, str]:
    """Resource usage and instructions, as cuobjdump prints them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(flag: str) -> str:
            command = [str(CUOBJDUMP), flag, file.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        return dump("-res-usage"), dump("-sass")


def compile_all(capability: int, dtypes: list[str]) -> Iterator[dict[str, object]]:
    """One row per operation, configuration, dtype and variant."""
    for operation in OPERATIONS:
        for dtype in dtypes:
            for size, rank, config in TABLE[operation]:
                if size != ELEMENT_SIZE[dtype]:
                    continue
                for variant, dropout, bias, unit in VARIANTS[operation]:
                    compiled = triton.compile(
                        kernel_source(operation, config, dtype, dropout, bias, unit),
                        target=GPUTarget("cuda", capability, 32),
                        options=config.options,
                    )
                    usage, sass = machine_code(compiled.asm["cubin"])
                    resources = {
                        k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)
                    }
                    yield {
                        "name": f"{operation}-{dtype}-r{rank}-{variant}",
                        "operation": operation,
                        "dtype": dtype,
                        "rank": rank,
                        "variant": variant,
                        "shared": compiled.metadata.shared,
                        "registers": resources["REG"],
                        "stack": resources["STACK"],
                        "local": resources["LOCAL"],
                        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
                        "tensor_core": sorted(
                            set(re.findall(r"\b(HGMMA|HMMA|UTCHMMA|UTCQMMA)\b", sass))
                        ),
                    }


if __name__ == "__main__":
    for row in compile_all(int(sys.argv[1]), sys.argv[2:] or list(ELEMENT_SIZE)):
        print(json.dumps(row), flush=True)
