"""Host time of a Triton launch, from Python to the driver, on a machine without a GPU.

    python -m lorafast.bench.call_overhead.launches

The kernels are compiled for sm_90 and launched by Triton's own launcher, but on a driver that does
nothing. So what is timed is what the host does, but for the driver's own share and for what only CUDA
tensors need (their allocator, counters and the device guard). Beside each stands ``F.linear`` on tensors
as small; it must be run without ``TRITON_INTERPRET``.
"""

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from lorafast.bench.common.clock import Summary
from lorafast.bench.common.progress import say
from lorafast.bench.common.table import table
from lorafast.bench.traffic.launches import h200
from lorafast.kernels.common import start

from lorafast.backends.triton import cost as model
from lorafast.backends.triton import launching
from lorafast.core.problem import Problem

_CALLS, _ROUNDS = 400, 15
_HEADER = ("", "µs a call", "middle half", "× F.linear")
M, K, N, r = 16, 64, 64, 16


@contextmanager
def nothing_launched() -> Iterator[list[str]]:
    """Within the block Triton compiles for sm_90 and launches nothing; the names of what it would."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    launched: list[str] = []
    utils = SimpleNamespace(
        load_binary=lambda name, *_: (name, name, 0, 0, 1024),
        get_device_properties=lambda device: {
            "max_shared_mem": 232_448, "multiprocessor_count": 132, "max_num_regs": 65_536,
        },
        build_signature_metadata=lambda signature: signature,
        fill_tma_descriptor_tiled=lambda *_: None,
        fill_tma_descriptor=lambda *_: None,
        launch=lambda *arguments: launched.append(arguments[4]),
        unload_module=lambda module: None,
    )  # fmt: skip

    class Nothing(DriverBase):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = utils, nvidia.CudaLauncher

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_benchmarker(self) -> Any:
            return None

    # What the extension that talks to the driver would have filled in.
    for name, value in {
        "PyKernelArg": dict,
        "ARG_CONSTEXPR": 0,
        "ARG_KERNEL": 1,
        "ARG_TUPLE": 2,
    }.items():
        setattr(nvidia, name, value)
    before = driver._active
    driver.set_active(Nothing())
    try:
        yield launched
    finally:
        driver._active = before


def calls() -> dict[str, Callable[[], object]]:
    """Every operation of a layer on tensors so small that nothing else takes time, as plans run it."""
    device = h200()
    dtype = torch.bfloat16

    def empty(*size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype)

    x, dy, weight, s = empty(M, K), empty(M, N), empty(N, K), empty(M, r)
    lora_A, lora_B = empty(r, K), empty(N, r)

    def planned(operation: str, *tensors: Any, **described: Any) -> Callable[[], object]:
        p = Problem(operation, M, K, N, r, dtype, dtype, x.device, **described)
        launch = model.PLANNED[operation](p, device, None)
        return functools.partial(launching.run_of(launch, p), *tensors)

    return {
        "shrink": planned("shrink", x, lora_A, 0.0, None),
        "expand": planned("expand", s, lora_B, 2.0, 0.0, None),
        "linear_expand": planned("linear_expand", x, weight, s, lora_B, 2.0, None, 0.0, None),
        "expand_backward": planned("expand_backward", dy, s, lora_B, 2.0, wants=("ds", "dB")),
        "shrink_backward": planned("shrink_backward", s, x, 0.0, None),
        "dx": planned(
            "linear_expand", dy, weight, s, lora_A.t(), 1.0, None, 0.0, None, transposed=True
        ),
    }


def measure(rounds: int = _ROUNDS, calls_a_round: int = _CALLS) -> dict[str, list[float]]:
    """Seconds a call, a number a round: of ``F.linear`` and of every operation."""
    small = torch.zeros(2, 2)
    with torch.no_grad(), nothing_launched(), mock.patch.object(start, "_FIRST_DEVICE", -1):
        turns: dict[str, Callable[[], object]] = {
            "F.linear": functools.partial(F.linear, small, small), **calls(),
        }  # fmt: skip
        for call in turns.values():
            call()
        samples: dict[str, list[float]] = {name: [] for name in turns}
        for _ in range(rounds):
            for name, call in turns.items():
                begun = time.perf_counter()
                for _ in range(calls_a_round):
                    call()
                samples[name].append((time.perf_counter() - begun) / calls_a_round)
    return samples


def main() -> int:
    """Prints a line for each operation; 2 where Triton interprets or is missing."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        print("TRITON_INTERPRET is set: nothing is compiled then, and nothing launched")
        return 2
    torch.set_num_threads(1)
    samples = measure()
    lines = []
    for name, times in samples.items():
        at, ratio = Summary.of(times), Summary.of_ratio(times, samples["F.linear"])
        middle = f"{at.low * 1e6:.1f} – {at.high * 1e6:.1f}"
        lines.append((f"  {name}", f"{at.median * 1e6:.1f}", middle, f"{ratio.median:.1f}"))
    say(table(_HEADER, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
