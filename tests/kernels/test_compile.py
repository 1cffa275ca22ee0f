"""Every configuration that ships, compiled for every architecture it ships for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from lorafast.kernels.common.configs import OPERATIONS, SHARED_MEMORY, TABLE

COMPILE = Path(__file__).parent / "compile_configs.py"
# fp16 and bf16 share their configurations and differ in one instruction's operand type: both are
# compiled where the instruction is asked for by name, bf16 stands for both elsewhere.
DTYPES = {90: {2: ("bf16", "fp16"), 4: ("fp32",)}}
ELSEWHERE = {2: ("bf16",), 4: ("fp32",)}
# Half precision needs the tensor cores: their instruction on each architecture.
TENSOR_CORE = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY, ids=lambda c: f"sm_{c}")
def test_every_configuration_compiles(capability):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    dtypes = DTYPES.get(capability, ELSEWHERE)
    process = subprocess.run(
        [sys.executable, str(COMPILE), str(capability), *dtypes[2], *dtypes[4]],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    rows = [json.loads(line) for line in process.stdout.splitlines()]
    assert {(row["operation"], row["dtype"], row["rank"]) for row in rows} == {
        (op, dtype, rank)
        for op in OPERATIONS
        for size, rank, _ in TABLE[op]
        for dtype in dtypes[size]
    }
    limit = SHARED_MEMORY[capability]
    too_large = [f"{row['name']}: {row['shared']}" for row in rows if row["shared"] > limit]
    spilling = [row["name"] for row in rows if row["spills"] or row["local"]]
    without_tensor_cores = [
        row["name"]
        for row in rows
        if row["operation"] == "linear_expand"
        and row["dtype"] != "fp32"
        and TENSOR_CORE[capability] not in row["tensor_core"]
    ]
    assert too_large == []
    assert spilling == []
    assert without_tensor_cores == []
